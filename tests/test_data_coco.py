"""COCO's labels: joint by joint, worked by hand, against other labels of the same people, and what is wrong.

The people are made up. The largest check needs POSE_DATA: everyday photos, whose labels in MPII's layout were
made from COCO's by another program.
"""

import copy
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from commands import call, refused
from test_data import ENTRY
from test_data import folder as mpii_folder

from common import BadInput
from data_coco import COCO_KEYPOINTS, read_annotations, to_mpii, unit_of
from data_mpii import JOINTS, join, load_samples

# A person whose keypoint k is at (10 + 3 k, 20 + 5 k); odd ones are occluded.
KEYPOINTS_17 = [number for k in range(17) for number in (10 + 3 * k, 20 + 5 * k, 1 if k % 2 else 2)]
PERSON = dict(id=7, image_id=12, category_id=1, iscrowd=0, area=900.5, num_keypoints=17,
              bbox=[8.0, 15.5, 56.0, 100.0], keypoints=KEYPOINTS_17, segmentation=[[1.5, 2, 3, 4, 5, 6]])
UNSIZED = [dict(id=12, file_name="000012.jpg")]                # its entry without width and height


def changed(id=8, **values):
    return {**copy.deepcopy(PERSON), "id": id, **values}


def labels(*keypoints):
    """51 numbers: the named keypoints labelled as in KEYPOINTS_17, the others not."""
    return [number if COCO_KEYPOINTS[k // 3] in keypoints else 0 for k, number in enumerate(KEYPOINTS_17)]


def coco(root, *people, year="val2017", folder=None, **content):
    """A folder in COCO's layout with these annotations and one image, number 12. folder: of the images."""
    pictures = root / (folder or year)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (90, 120)).save(pictures / "000012.jpg")
    content = dict(images=[dict(id=12, file_name="000012.jpg", width=90, height=120)],
                   annotations=list(people)) | content
    (root / f"annotations/person_keypoints_{year}.json").write_text(json.dumps(content))
    return root


# ------------------------------------------------------------------------------- by hand

def test_joint_by_joint(tmp_path):
    """Keypoint k at (10 + 3 k, 20 + 5 k): 16 is the right ankle, 14 the right knee, 12 the right hip ..."""
    people = load_samples(coco(tmp_path / "C", PERSON), "valid")
    assert people.name == "C/valid" and len(people) == 1 and people.image(0).size == (90, 120)
    expected = {"r-ankle": (58, 100), "r-knee": (52, 90), "r-hip": (46, 80), "l-hip": (43, 75),
                "l-knee": (49, 85), "l-ankle": (55, 95), "pelvis": (44.5, 77.5), "thorax": (26.5, 47.5),
                "r-wrist": (40, 70), "r-elbow": (34, 60), "r-shoulder": (28, 50), "l-shoulder": (25, 45),
                "l-elbow": (31, 55), "l-wrist": (37, 65)}
    found = {name: tuple(xy) for name, xy, seen in zip(JOINTS, people.joints[0].tolist(), people.visible[0])
             if seen}
    assert found == expected                         # neither upper neck nor head top; no pixel is added


def test_box_and_unit(tmp_path):
    """Box x 8 to 64, y 15.5 to 115.5, edges of pixels: in pixel centres its middle is (35.5, 65).

    The limbs span x 25 to 58 and y 45 to 100, shoulder to ankle: 55 / 6.
    """
    people = load_samples(coco(tmp_path, PERSON), "valid")
    assert people.center.tolist() == [[35.5, 65]] and people.side.tolist() == [125]
    assert people.head_size[0] == pytest.approx(55 / 6)
    assert all(array.dtype == np.float32 for array in (people.joints, people.center, people.side,
                                                       people.head_size)) and people.visible.dtype == bool


def test_a_mean_needs_both_of_its_keypoints():
    keypoints = np.ones((2, 17, 3))
    keypoints[0, COCO_KEYPOINTS.index("left_hip"), 2] = 0
    keypoints[1, COCO_KEYPOINTS.index("right_shoulder"), 2] = 0
    joints, visible = to_mpii(keypoints)
    missing = [{JOINTS[k] for k in np.flatnonzero(~seen)} - {"upper neck", "head top"} for seen in visible]
    assert missing == [{"l-hip", "pelvis"}, {"r-shoulder", "thorax"}]
    assert (joints[~visible] == 0).all()


def test_units_by_hand():
    joints, visible = np.zeros((5, 16, 2)), np.zeros((5, 16), bool)
    for row, (k, x, y) in ((0, (0, 10, 20)), (0, (12, 70, 140)),         # spans 60 x 120: 20
                           (1, (0, 10, 20)), (1, (5, 25, 20)),           # 15 / 6 is less than 4
                           (2, (12, 30, 30)),                            # one limb joint: box of 90, so 15
                           (3, (2, 0, 0)), (3, (3, 30, 0)), (3, (6, 15, 0)), (3, (7, 15, -600)),
                           (4, (10, -90, 5)), (4, (15, 30, 5))):
        joints[row, k], visible[row, k] = (x, y), True
    joints[0, 1] = 5000                                                  # not labelled
    assert unit_of(joints, visible, np.full(5, 90.0)).tolist() == [20, 4, 15, 5, 20]


def test_who_is_left_out(tmp_path):
    """Crowds, people without keypoints or with keypoints of the face alone, boxes without size."""
    left_out = [changed(1, iscrowd=1, segmentation=dict(counts=[3, 4], size=[2, 3])),
                changed(2, keypoints=[0] * 51, num_keypoints=0),
                changed(3, keypoints=labels("nose", "left_eye", "right_ear")),
                changed(4, bbox=[3, 4, 0, 30])]
    one_joint = changed(5, keypoints=labels("nose", "right_wrist"))
    people = load_samples(coco(tmp_path, *left_out, PERSON, one_joint), "valid")
    assert people.visible.sum(1).tolist() == [14, 1] and people.visible[1, JOINTS.index("r-wrist")]
    assert "left out: 4 crowds and people" in people.note and "unit is 1/6" in people.note
    with pytest.raises(BadInput, match="has nobody with a labelled limb joint"):
        load_samples(coco(tmp_path, *left_out), "valid")


@pytest.mark.parametrize("change,message", [
    (dict(keypoints=[value / 100 if n % 3 < 2 else value for n, value in enumerate(PERSON["keypoints"])]),
     "no joint is beyond 2, as if they were fractions"),
    (dict(bbox=[64, 115, 56, 100]), "of the labels lie inside their crops")])         # where the box ends
def test_other_units_are_named(tmp_path, change, message):
    with pytest.raises(BadInput, match=f"{message}: keypoints and bbox .* must be in pixels"):
        load_samples(coco(tmp_path, changed(**change), images=UNSIZED), "valid")


@pytest.mark.parametrize("folder", ["train2017", "images/train2017", "images"])
def test_where_the_images_may_be(tmp_path, folder):
    root = coco(tmp_path, PERSON, year="train2017", folder=folder)
    (root / "images").mkdir(exist_ok=True)
    (root / "images/.DS_Store").touch()
    people = load_samples(root, "train")
    assert people.files == (tmp_path / folder / "000012.jpg",) and people.image(0).mode == "RGB"


def test_outlines_take_no_memory(tmp_path):
    crowd = changed(segmentation=dict(counts=[3, 4], size=[2, 3]))
    root = coco(tmp_path, PERSON, crowd)
    _, annotations = read_annotations(root / "annotations/person_keypoints_val2017.json")
    assert [set(PERSON) - set(entry) for entry in annotations] == [{"segmentation"}] * 2


def test_half_of_the_data(tmp_path):
    """With val2017 alone one can validate; what training lacks is named."""
    root = coco(tmp_path, PERSON)
    assert len(load_samples(root, "valid")) == 1
    with pytest.raises(BadInput, match="there is no .*person_keypoints_train2017.json .*cocodataset.org"):
        load_samples(root, "train")
    shutil.copy(root / "annotations/person_keypoints_val2017.json",
                root / "annotations/person_keypoints_train2017.json")
    with pytest.raises(BadInput, match=fr"\(are they unpacked into {root}/train2017\?\)"):
        load_samples(root, "train")
    (root / "images").mkdir()
    (root / "val2017").rename(root / "images/val2017")
    assert len(load_samples(root, "valid")) == 1
    with pytest.raises(BadInput, match=fr"\(are they unpacked into {root}/images/train2017\?\)"):
        load_samples(root, "train")
    assert len(load_samples(root, "train", images=False)) == 1


def test_joined_with_mpii(tmp_path):
    (tmp_path / "M").mkdir()
    people = join([load_samples(mpii_folder(tmp_path / "M", ENTRY), "train"),
                   load_samples(coco(tmp_path / "C", PERSON, year="train2017"), "train")])
    assert people.name == "M+C/train" and people.visible.sum(1).tolist() == [16, 14]
    assert people.image(1).size == (90, 120) and "unit is 1/6" in people.note


# ------------------------------------------------------------------------------- against other labels

@pytest.mark.parametrize("split,year", [("train", "train2017"), ("valid", "val2017")])
def test_everyday_people(real_data, tmp_path, split, year):
    """Their labels in MPII's layout, made from COCO's by another program, and back: the same people.

    Its boxes are COCO's, in another file and rounded to 0.1; their middle was taken at x + width / 2 there.
    """
    if not (real_data / "everyday").is_dir():
        pytest.skip("POSE_DATA has no folder everyday")
    expected = load_samples(real_data / "everyday", split)
    boxes = json.loads((real_data / "everyday/annot/boxes.json").read_text())
    entries = json.loads((real_data / "everyday/annot" / f"{split}.json").read_text())
    annotations, ids = [], {}
    for index, entry in enumerate(entries):
        image = boxes[entry["image"]]
        middles = np.array(image)[:, :2] + np.array(image)[:, 2:] / 2
        box = image[np.abs(middles - expected.center[index]).sum(1).argmin()]
        of = {name.replace("r-", "right_").replace("l-", "left_"): (x - 1, y - 1, 1 + index % 2)
              for name, (x, y), seen in zip(JOINTS, entry["joints"], entry["joints_vis"]) if seen}
        annotations.append(dict(
            id=10 ** 6 - index, image_id=ids.setdefault(entry["image"], len(ids)), bbox=box,
            keypoints=[number for name in COCO_KEYPOINTS for number in of.get(name, (0, 0, 0))]))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(real_data / "everyday/images")
    (tmp_path / f"annotations/person_keypoints_{year}.json").write_text(json.dumps(dict(
        images=[dict(id=id, file_name=name) for name, id in ids.items()], annotations=annotations)))
    people = load_samples(tmp_path, split)
    assert [file.name for file in people.files] == [file.name for file in expected.files]
    np.testing.assert_array_equal(people.visible, expected.visible)
    np.testing.assert_allclose(people.joints[people.visible], expected.joints[people.visible], atol=0.01)
    np.testing.assert_allclose(people.center + 0.5, expected.center, atol=0.11)
    np.testing.assert_allclose(people.side, expected.side, atol=0.07)
    if split == "valid":                             # others have no unit of their own there
        np.testing.assert_allclose(people.head_size, expected.head_size, atol=0.01)
    assert people.image(0).size == expected.image(0).size


# ------------------------------------------------------------------------------- what is wrong

FAULTS = {
    "is not an annotation": 7,
    "has no 'bbox'": {key: value for key, value in changed().items() if key != "bbox"},
    "has no 'id'": {key: value for key, value in PERSON.items() if key != "id"},
    "has the id of entry 0": changed(7),
    "image_id 13 is of no image": changed(image_id=13),
    r"image_id \[12\] is of no image": changed(image_id=[12]),
    "keypoints must be 51 numbers": changed(keypoints=KEYPOINTS_17[:50]),
    "keypoints must be 51 numbers: x": changed(keypoints=None),
    "visibility": changed(keypoints=[*KEYPOINTS_17[:50], 3]),
    "must be finite": changed(keypoints=[float("nan"), *KEYPOINTS_17[1:]]),
    "must be finite numbers": changed(keypoints=["10", *KEYPOINTS_17[1:]]),
    "must be finite numbers,": changed(keypoints=[True, *KEYPOINTS_17[1:]]),
    "must be finite numbers, within": changed(bbox=[1, 2, 10 ** 400, 4]),
    "within 100,000 pixels": changed(bbox=[1, 2, 1e30, 4]),
    "bbox must be four": changed(bbox=[1, 2, 3]),
    "bbox must be four numbers": changed(bbox="1234"),
    "has a side below 0": changed(bbox=[1, 2, 3, -4]),
    "iscrowd must be 0 or 1": changed(iscrowd="no"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_entry_is_named_with_file_and_index(tmp_path, fault):
    with pytest.raises(BadInput, match=rf"person_keypoints_val2017\.json, entry 1: .*{fault}") as caught:
        load_samples(coco(tmp_path, PERSON, FAULTS[fault]), "valid")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


OUTSIDE = "does not name a file inside"


@pytest.mark.parametrize("name,fault", [
    ("../secret.jpg", OUTSIDE), ("/etc/passwd", OUTSIDE), ("a/../../b.jpg", OUTSIDE), ("a\0.jpg", OUTSIDE),
    ("x" * 5000, "there is no image"), ("", "there is no image"), (".", "there is no image"),
    ("a\nb.jpg", "there is no image"), (None, "no image with a file_name"), (5, "no image with a file_name")])
def test_names_of_images(tmp_path, name, fault):
    """A name that leads out of the folder, or to nothing."""
    root = coco(tmp_path, PERSON, images=[dict(id=12, file_name=name)])
    (tmp_path / "secret.jpg").touch()
    with pytest.raises(BadInput, match=f"val2017.json, entry 0: .*{fault}") as caught:
        load_samples(root, "valid")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_a_link_out_of_the_folder(tmp_path):
    root = coco(tmp_path, PERSON)
    (root / "val2017/000012.jpg").rename(tmp_path / "secret.jpg")
    (root / "val2017/000012.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(BadInput, match="is a link to something outside"):
        load_samples(root, "valid")


BAD_FILES = {
    "cannot be read as json": '{"images": ',
    "cannot be read as json .*": "[" * 100_000,
    "has no lists of images and annotations": "[]",
    "has no lists of images and annotations: take": '{"images": [], "annotations": {}}',
    "has no annotations with keypoints: take person_keypoints": json.dumps(dict(images=[], annotations=[
        dict(id=1, image_id=1, bbox=[1, 2, 3, 4])])),
    "has no annotations with keypoints": '{"images": [], "annotations": []}',
    "2 of its images are no entry or have the id of another": json.dumps(dict(
        images=[dict(id=1, file_name="a"), dict(id=1, file_name="b"), 7], annotations=[PERSON])),
    "has other keypoints than COCO, or in another order": json.dumps(dict(
        images=[], annotations=[PERSON], categories=[dict(id=1, keypoints=COCO_KEYPOINTS[::-1])])),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_bad_files(tmp_path, fault):
    root = coco(tmp_path, PERSON)
    (root / "annotations/person_keypoints_val2017.json").write_text(BAD_FILES[fault])
    with pytest.raises(BadInput, match=f"person_keypoints_val2017.json,? ?:? ?{fault}") as caught:
        load_samples(root, "valid")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_other_folders(tmp_path):
    (tmp_path / "annotations").mkdir()
    with pytest.raises(BadInput, match="neither annot/valid.json .* nor COCO's"):
        load_samples(tmp_path, "valid")
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    with pytest.raises(BadInput, match="person_keypoints_val2017.json .*instances.* have no keypoints"):
        load_samples(tmp_path, "valid")
    for split in ("train", "valid"):                 # of two layouts none is preferred
        with pytest.raises(BadInput, match="MPII's layout and of COCO's"):
            load_samples(mpii_folder(coco(tmp_path, PERSON), ENTRY, split=split), "valid")


def test_the_first_bad_entry_is_named_and_all_are_counted(tmp_path):
    """4 of 24: a box, an image that is not there, the same id again, a number that is no entry."""
    people = [changed(n) for n in range(20)]
    people[3:3] = [changed(100, bbox=[0, 0, -1, 5])]
    people += [changed(101, image_id=99), changed(7), 5]
    images = [dict(id=12, file_name="000012.jpg"), dict(id=99, file_name="gone.jpg")]
    root = coco(tmp_path, *people, images=images)
    with pytest.raises(BadInput) as caught:
        load_samples(root, "valid")
    assert str(caught.value) == (
        f"{root}/annotations/person_keypoints_val2017.json, entry 3: bbox [0, 0, -1, 5] has a side below 0: "
        f"correct or remove this entry (4 of 24 entries are bad)")


def test_boxes_that_are_two_corners(tmp_path):
    """x1, y1, x2, y2 read as x, y, width, height ends outside most images (here of 90 x 120 pixels)."""
    corners = [changed(n, bbox=[40, 30 + n, 80, 100]) for n in range(2)]
    with pytest.raises(BadInput, match=r"2 of 3 boxes end outside the width .* not two corners"):
        load_samples(coco(tmp_path / "corners", PERSON, *corners), "valid")
    assert len(load_samples(coco(tmp_path / "one", PERSON, corners[1]), "valid")) == 2
    for unknown in UNSIZED, [dict(UNSIZED[0], width=0, height=0)]:
        assert len(load_samples(coco(tmp_path / "unknown", *corners, images=unknown), "valid")) == 2


def test_everybody_is_known_crowds_too(tmp_path):
    """Boxes of all that are annotated in an image, samples or not, by its path."""
    crowd = changed(1, iscrowd=1, bbox=[1, 2, 60, 70])
    face = changed(2, bbox=[3, 4, 20, 30], keypoints=labels("nose"))
    people = load_samples(coco(tmp_path, PERSON, crowd, face), "valid")
    boxes = [PERSON["bbox"], [1, 2, 60, 70], [3, 4, 20, 30]]
    assert len(people) == 1 and people.everybody == {people.files[0]: boxes}


def test_the_commands_take_it(tmp_path):
    """One epoch of eight people; the unit is named with each score; a bad entry is one line and status 2."""
    people = [changed(n, bbox=[8 + n, 15.5, 56, 100]) for n in range(8)]
    root = coco(coco(tmp_path / "C", *people), *people, year="train2017")
    done = call("train.py", "--student", "reg", "--filter", "gs", "--no-distill", "--data", "C",
                "--epochs", "1", "--batch-size", "4", "--device", "cpu", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "C/train: 8 samples to train on (8 people); C/valid: 8 to score on; no head boxes: " in done.stdout
    evaluate = "evaluate.py", "--checkpoint", "run/best.pt", "--data", "C", "--device", "cpu"
    done = call(*evaluate, cwd=tmp_path)
    assert done.returncode == 0 and "PCKh on 8 samples of C/valid; no head boxes" in done.stdout
    coco(root, *people, changed(9, bbox=[1, 2, -3, 4]))
    refused(call(*evaluate, cwd=tmp_path), "val2017.json, entry 8: bbox", "correct or remove this entry")
