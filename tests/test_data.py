"""MPII's labels from both layouts, real and made up; what is wrong with a file is said in one line."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from common import BadInput, read_mat
from data_mpii import box, join, load_samples, read_annorect
from synthetic import SERIES, draw_people, drawn_people


@pytest.mark.parametrize("split,count", [("train", 22_246), ("valid", 2_958)])
def test_real_labels(real_data, split, count):
    people = load_samples(real_data / "mpii_annot", split, images=False)
    assert len(people) == count and people.joints.shape == (count, 16, 2)
    raw = json.loads((real_data / "mpii_annot" / "annot" / f"{split}.json").read_text())
    assert np.array_equal(people.visible, np.array([entry["joints_vis"] for entry in raw], bool))
    joints = np.array([entry["joints"] for entry in raw]) - 1
    apart = (np.abs(people.joints - joints).max(-1) > 0.01) & people.visible
    # Ten validation people have joints off the image: gt_valid.mat has a zero there, the json the mirrored
    # number.
    assert apart.any(1).sum() == (10 if split == "valid" else 0)
    # 0.6 x the head box's diagonal is 25 x scale for nearly everyone
    scale = people.side / 250
    assert np.mean(np.abs(people.head_size / (25 * scale) - 1) < 0.001) > 0.85


def test_box_by_hand():
    center, side = box([[100.0, 200.0]], [2.0])
    assert center.tolist() == [[100, 230]] and side.tolist() == [500]


def test_real_pictures(real_data):
    people = load_samples(real_data / "mpii_sample", "valid")
    assert len(people) == 5
    for i in range(5):
        picture = people.image(i)
        assert picture.mode == "RGB" and min(picture.size) >= 300
        seen = people.joints[i][people.visible[i]]
        assert (seen > -1).all() and (seen < picture.size).all()


def test_drawn_people_are_the_same_kind_of_record():
    people = drawn_people("valid", 20, 64)
    assert people.joints.shape == (20, 16, 2) and people.image(3).size == (96, 96)
    np.testing.assert_allclose(people.head_size, people.side / 250 * 25, rtol=1e-4)
    train = drawn_people("train", 20, 64)
    assert not np.array_equal(train.joints, people.joints)


# ------------------------------------------------------------------------------- made-up folders

ENTRY = dict(image="a.jpg", joints=[[10.0 + k, 20.0] for k in range(16)], joints_vis=[1] * 16,
             center=[15.0, 20.0], scale=0.2)


def folder(tmp_path, *entries, split="train"):
    (tmp_path / "annot").mkdir(exist_ok=True, parents=True)
    (tmp_path / "images").mkdir(exist_ok=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "annot" / f"{split}.json").write_text(json.dumps(list(entries)))
    return tmp_path


def drawn_folder(root, size, **counts):
    """Drawings in MPII's layout, counts: train=6, valid=4 -> the entries of each split."""
    (root / "images").mkdir(parents=True), (root / "annot").mkdir()
    entries = {}
    for split, count in counts.items():
        drawn = draw_people(count, SERIES[split], size)
        for n, image in enumerate(drawn.image):
            Image.fromarray(image).save(root / f"images/{split}{n}.png")
        entries[split] = [
            dict(image=f"{split}{n}.png", joints=(xy + 1).tolist(), joints_vis=visible.astype(int).tolist(),
                 center=(center + 1).tolist(), scale=float(scale))
            for n, (xy, visible, center, scale) in enumerate(zip(*drawn[1:5]))]
        (root / f"annot/{split}.json").write_text(json.dumps(entries[split]))
    return entries


def test_json_counts_pixels_from_one(tmp_path):
    people = load_samples(folder(tmp_path, ENTRY), "train")
    assert people.joints[0, 0].tolist() == [9, 19]
    assert people.center[0].tolist() == [14, 22] and people.side[0] == 50


def test_without_truth_the_head_size_is_estimated_and_said(tmp_path):
    people = load_samples(folder(tmp_path, ENTRY, split="valid"), "valid")
    assert people.head_size[0] == pytest.approx(5) and "gt_valid.mat" in people.note


FAULTS = {
    "no 'joints'": {key: value for key, value in ENTRY.items() if key != "joints"},
    "no labelled joint": dict(ENTRY, joints_vis=[0] * 16),
    r"joints \(0,\)": dict(ENTRY, joints=[]),
    r"\(15, 2\)": dict(ENTRY, joints=ENTRY["joints"][:15]),
    "must be numbers": dict(ENTRY, joints=[["left", 2.0]] * 16),
    "must be finite": dict(ENTRY, center=[float("nan"), 2.0]),
    "joints_vis must be 0": dict(ENTRY, joints_vis=[3] * 16),
    "joints_vis must be numbers": dict(ENTRY, joints_vis=["yes"] * 16),
    "joints must be numbers": dict(ENTRY, joints=[[True, False]] * 16),
    "joints must be finite": dict(ENTRY, joints=[[None, 2.0]] * 16),
    "center must be finite, within": dict(ENTRY, center=[3.0, 1e6]),
    r"has center \(3,\), must be \(2,\)": dict(ENTRY, center=[3.0, 4.0, 5.0]),
    "scale 600.0 is a person of 120,000 pixels: scale is the height in pixels / 200": dict(ENTRY, scale=600),
    "scale -1.0 is a person of -200 pixels": dict(ENTRY, scale=-1.0),
    "scale 1e[+]30 is a person of 2e[+]32 pixels": dict(ENTRY, scale=1e30),
    "within 100,000 pixels": dict(ENTRY, joints=[[1e300, 2.0]] * 16),
    "does not name a file inside": dict(ENTRY, image="../../secret.jpg"),
    "there is no image": dict(ENTRY, image="b.jpg"),
    "is not a person": 7,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_entry_is_named_with_file_and_index(tmp_path, fault):
    with pytest.raises(BadInput, match=rf"train\.json, entry 1: .*{fault}") as caught:
        load_samples(folder(tmp_path, ENTRY, FAULTS[fault]), "train")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(" (1 of 2 entries is bad)")


def test_the_first_bad_entry_is_named_and_all_are_counted(tmp_path):
    """1,200 people; one without a scale, one a second time, one without an image."""
    entries = [dict(ENTRY, scale=0.1 + n / 10000) for n in range(1200)]
    entries[700], entries[40], entries[1000] = dict(ENTRY, image="b.jpg"), dict(ENTRY, scale=0), entries[0]
    root = folder(tmp_path, *entries)
    with pytest.raises(BadInput) as caught:
        load_samples(root, "train")
    assert str(caught.value) == (
        f"{root}/annot/train.json, entry 40: scale 0.0 is a person of 0 pixels: scale is the height in "
        f"pixels / 200, and the height must be 1 to 100,000 pixels: correct or remove this entry "
        f"(3 of 1,200 entries are bad)")
    entries[40] = dict(ENTRY, scale=0.3)
    with pytest.raises(BadInput, match=r"entry 700: there is no image .*b\.jpg.* \(2 of 1,200 entries"):
        load_samples(folder(tmp_path, *entries), "train")


@pytest.mark.parametrize("seen", [2, True, 1])
def test_visibility_of_coco_and_joints_without_a_label(tmp_path, seen):
    """COCO's 2, true, and NaN or null, or anything, where there is no label."""
    for nothing in ([float("nan"), None], [None, None], [1e300, 5.0]):
        changed = dict(ENTRY, joints=[nothing, *ENTRY["joints"][1:]], joints_vis=[0] + [seen] * 15)
        people = load_samples(folder(tmp_path, changed), "train")
        assert people.visible[0].tolist() == [False] + [True] * 15
        assert people.joints[0, 0].tolist() == [-2, -2]
        assert people.joints[0, 1:].tolist() == [[10.0 + k, 19] for k in range(15)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_labels_are_unicode_in_any_locale(tmp_path, encoding, monkeypatch):
    root = folder(tmp_path, ENTRY)
    (root / "images/a.jpg").rename(root / "images/é.jpg")
    text = json.dumps([dict(ENTRY, image="é.jpg")], ensure_ascii=False)
    (root / "annot/train.json").write_text(text, encoding=encoding)
    monkeypatch.setattr("io.text_encoding", lambda *_: "ascii")         # what read_text would take
    assert load_samples(root, "train").files[0].name == "é.jpg"


def test_labels_in_other_units(tmp_path):
    """Twenty people of half the image's height: each entry alone may be right, the whole set cannot."""
    generator = np.random.default_rng(0)
    Image.new("RGB", (400, 300)).save(folder(tmp_path) / "images/b.png")
    corners = generator.uniform((5, 5), (300, 150), (20, 2))
    joints = corners[:, None] + generator.uniform(0, 1, (20, 16, 2)) * (80, 140)
    center, scale = corners + (40, 60), np.full(20, 0.7)

    def load(joints=joints, center=center, scale=scale):
        entries = [dict(image="b.png", joints=xy.tolist(), joints_vis=[1] * 16, center=middle.tolist(),
                        scale=float(size)) for xy, middle, size in zip(joints, center, scale)]
        (tmp_path / "annot/train.json").write_text(json.dumps(entries))
        return load_samples(tmp_path, "train")

    assert len(load()) == 20
    for fault, change in (
        ("no joint is beyond 2, as if they were fractions", dict(joints=joints / 400)),
        ("no joint is beyond 2", dict(joints=joints / 200 - 1)),
        ("no center is beyond 2", dict(center=center / 400)),
        ("crops are 2[0-9]{2} times as wide as what their joints span", dict(scale=200 * scale)),
        ("crops are [0-9]{2} times as wide as what their joints span", dict(scale=20 * scale)),
        ("only [0-9]% of the labels lie inside their crops", dict(scale=scale / 20)),
        ("only [0-9]+% of the labels lie inside their crops", dict(joints=2 * joints)),
        ("only [0-9]+% of the labels lie inside their crops", dict(center=center[:, ::-1])),
        ("only [0-9]+% of the labels lie inside their images",
         dict(joints=2 * joints, center=2 * center, scale=2 * scale)),
    ):
        units = "pixels of the upright image, .*scale the person's height in pixels / 200"
        with pytest.raises(BadInput, match=f"train.json: {fault}.*{units}") as caught:
            load(**change)
        assert "\n" not in str(caught.value)


def test_head_boxes_in_other_units(tmp_path):
    root = folder(tmp_path, ENTRY, split="valid")
    boxes = np.array([[[12.0], [5.0]], [[15.0], [9.0]]])
    for factor, refused in ((1, False), (1 / 64, True)):
        savemat(root / "annot/gt_valid.mat", dict(
            pos_gt_src=np.array(ENTRY["joints"])[..., None], jnt_missing=np.zeros((16, 1)),
            headboxes_src=factor * boxes))
        if refused:
            with pytest.raises(BadInput, match="head sizes are .* of the crops' sides, not about 0.1"):
                load_samples(root, "valid")
        else:
            assert load_samples(root, "valid").head_size[0] == pytest.approx(3)


def test_a_person_of_a_pixel_is_warned_of(tmp_path):
    people = [dict(ENTRY, scale=scale) for scale in (0.2, 0.25, 0.3, 0.35, 0.4, 0.005)]
    with pytest.warns(UserWarning, match="train.json: 1 people are less than 10 pixels tall.*in a.jpg"):
        load_samples(folder(tmp_path, *people), "train")


@pytest.mark.parametrize("name", ["everyday", "lspet", "lspet_refined", "lsp"])
def test_real_sets_are_in_the_right_units(real_data, name):
    if not (real_data / name).is_dir():
        pytest.skip(f"POSE_DATA has no {name}")
    for split in ("train", "valid"):
        people = load_samples(real_data / name, split)
        assert people.name == f"{name}/{split}" and len(people) > 100


def test_truth_without_a_place_where_there_is_no_label(tmp_path):
    joints = np.array(ENTRY["joints"])[..., None]
    joints[3] = np.nan
    missing = np.zeros((16, 1))
    missing[3] = 1
    root = folder(tmp_path, ENTRY, split="valid")
    savemat(root / "annot/gt_valid.mat", dict(pos_gt_src=joints, jnt_missing=missing,
                                              headboxes_src=np.array([[[12.0], [5.0]], [[15.0], [9.0]]])))
    people = load_samples(root, "valid")
    assert not people.visible[0, 3] and np.isfinite(people.joints).all()


def test_the_name_is_that_of_the_folder_however_it_is_spelled(tmp_path, monkeypatch):
    root = folder(tmp_path / "people", ENTRY)
    monkeypatch.chdir(root / "annot")
    for spelling in ("..", "../../people", "../annot/..", str(root) + "/."):
        assert load_samples(spelling, "train").name == "people/train"


VERSION_7_3 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n"


def test_matlab_files_of_version_7_3(tmp_path, monkeypatch):
    """Arrays are read where h5py is, their axes turned; structures never."""
    file = tmp_path / "some.mat"
    file.write_bytes(VERSION_7_3)
    monkeypatch.setitem(sys.modules, "h5py", None)
    root = folder(tmp_path, ENTRY, split="valid")
    file.rename(root / "annot/gt_valid.mat")
    with pytest.raises(BadInput, match="gt_valid.mat is .* of version 7.3: save it with -v7, .*h5py"):
        load_samples(root, "valid")
    release(tmp_path)
    (root / "annot/valid.json").unlink()
    (root / "mpii_human_pose_v1_u12_1.mat").write_bytes(VERSION_7_3)
    with pytest.raises(BadInput, match="u12_1.mat is a Matlab file of version 7.3: save it with -v7"):
        load_samples(root, "train")


def test_matlab_files_of_version_7_3_with_h5py(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as mat:
        mat["preds"] = np.arange(2 * 16 * 3).reshape(2, 16, 3)           # Matlab's (3, 16, 2)
    (tmp_path / "b.mat").write_bytes(VERSION_7_3.ljust(512) + (tmp_path / "a.mat").read_bytes()[512:])
    assert read_mat(tmp_path / "b.mat")["preds"].shape == (3, 16, 2)


def test_bad_files(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        load_samples(tmp_path / "nowhere", "train")
    with pytest.raises(BadInput, match="neither"):
        load_samples(tmp_path, "train")
    folder(tmp_path)
    with pytest.raises(BadInput, match="no list of people"):
        load_samples(tmp_path, "train")
    (tmp_path / "annot" / "train.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be read as json"):
        load_samples(tmp_path, "train")
    folder(tmp_path, ENTRY, split="valid")
    (tmp_path / "annot" / "gt_valid.mat").write_bytes(b"not a mat file")
    with pytest.raises(BadInput, match="gt_valid.mat is not a Matlab file that can be read"):
        load_samples(tmp_path, "valid")
    savemat(
        tmp_path / "annot" / "gt_valid.mat",
        dict(pos_gt_src=np.ones((15, 2, 1)), jnt_missing=np.zeros((15, 1)), headboxes_src=np.ones((2, 2, 1))))
    with pytest.raises(BadInput, match=r"\(15, 2, 1\)"):
        load_samples(tmp_path, "valid")
    truth = dict(pos_gt_src=np.full((16, 2, 2), 5.0), jnt_missing=np.zeros((16, 2)),
                 headboxes_src=np.zeros((2, 2, 2)))
    savemat(tmp_path / "annot" / "gt_valid.mat", truth)
    with pytest.raises(BadInput, match="person 0 .* head box or joints are empty"):
        load_samples(tmp_path, "valid")
    truth["headboxes_src"][1] = 5
    savemat(tmp_path / "annot" / "gt_valid.mat", truth)
    with pytest.raises(BadInput, match="has 2 people and .* 1"):
        load_samples(tmp_path, "valid")
    savemat(tmp_path / "annot" / "gt_valid.mat", {key: value[..., :1] for key, value in truth.items()})
    with pytest.raises(BadInput, match="different orders"):
        load_samples(tmp_path, "valid")


def test_an_unreadable_image_is_named(tmp_path):
    root = folder(tmp_path, ENTRY)
    (root / "images" / "a.jpg").write_bytes(b"text")
    people = load_samples(root, "train")
    with pytest.raises(BadInput, match=r"a\.jpg cannot be read as an image"):
        people.image(0)


# ------------------------------------------------------------------------------- several folders; everybody

def test_several_folders_are_one_set(tmp_path):
    """In the order they are named; each person keeps labels, image and file."""
    sizes = {"one": 2, "two": 3}
    for name, count in sizes.items():
        (tmp_path / name).mkdir()
        folder(tmp_path / name, *(dict(ENTRY, image=f"{n}.png", scale=0.1 * count + n / 100)
                                  for n in range(count)))
        for n in range(count):
            Image.new("RGB", (10 * count + n, 48)).save(tmp_path / name / f"images/{n}.png")
    sets = [load_samples(tmp_path / name, "train") for name in sizes]
    people = join(sets)
    assert people.name == "one+two/train" and len(people) == 5 and not people.empty.any()
    np.testing.assert_allclose(people.side, 250 * np.array([0.2, 0.21, 0.3, 0.31, 0.32]), rtol=1e-6)
    assert [path.parts[-3] for path in people.files] == ["one"] * 2 + ["two"] * 3
    assert [people.image(i).width for i in range(5)] == [20, 21, 30, 31, 32]
    assert people.first(3).joints.shape == (3, 16, 2) and len(people.first(3).files) == 3
    assert join(sets[:1]) is sets[0]
    (tmp_path / "else").mkdir()
    (tmp_path / "one").rename(tmp_path / "else/two")
    with pytest.raises(BadInput, match="two data sets are called two: rename one folder"):
        join([load_samples(tmp_path / name, "train") for name in ("two", "else/two")])


def test_everybodys_boxes_belong_to_their_images(tmp_path):
    root = folder(tmp_path, ENTRY)
    assert load_samples(root, "train").everybody == {}
    (root / "annot/boxes.json").write_text(
        '{"a.jpg": [[1, 2, 3, 4], [5, 6, 7.5, 8]], "sub/b.jpg": [[9, 9, 0, 5]]}')
    for split in ("train", "valid"):
        everybody = load_samples(folder(root, ENTRY, split=split), split).everybody
        assert list(everybody) == [root / "images/a.jpg", root / "images/sub/b.jpg"]
        assert everybody[root / "images/a.jpg"].tolist() == [[1, 2, 3, 4], [5, 6, 7.5, 8]]
        assert everybody[root / "images/sub/b.jpg"].shape == (1, 4)
    (root / "annot/boxes.json").write_text('{"images/a.jpg": [], "b.jpg": []}')
    with pytest.raises(BadInput, match="boxes.json names no image that is there, and .*images/images/a.jpg"):
        load_samples(root, "train")
    assert len(load_samples(root, "train", images=False).everybody) == 2


@pytest.mark.parametrize("text", [
    "{", "[1]", 20000 * "[", '{"a.jpg": [[1, 2, 3]]}', '{"a.jpg": "12"}', '{"a.jpg": null}',
    '{"a.jpg": [[1, 2, null, 4]]}', '{"a.jpg": [[1, 2, NaN, 4]]}', '{"a.jpg": [[1, 2, -3, 4]]}',
    '{"a.jpg": [], "a.jpg": [[1, 2, 3, 4]]}',
    '{"a.jpg": [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 3]]}'])
def test_boxes_that_are_none(tmp_path, text):
    root = folder(tmp_path, ENTRY)
    (root / "annot/boxes.json").write_text(text)
    with pytest.raises(BadInput, match=r"annot/boxes\.json must be json such as .*width, height") as caught:
        load_samples(root, "train")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- MPII's release

def release(tmp_path, pictures=40, first=None):
    """A file like mpii_human_pose_v1_u12_1.mat: two people a picture, one of them without joints, a test
    picture.

    first: what is different about the first person, or the name of the first picture.
    """
    def person(k):
        points = np.array([(j, 10.0 + j + k, 30.0, 1.0) for j in range(15)],
                          dtype=[("id", "f8"), ("x", "f8"), ("y", "f8"), ("is_visible", "f8")])
        return dict(x1=10.0, y1=5.0, x2=13.0, y2=9.0, scale=0.5, objpos=dict(x=20.0, y=30.0),
                    annopoints=dict(point=points))

    bare = dict(x1=1.0, y1=1.0, x2=2.0, y2=2.0, scale=np.array([]), objpos=np.array([]),
                annopoints=np.array([]))
    kinds = ("x1", "y1", "x2", "y2", "scale", "objpos", "annopoints")
    annolist = np.zeros(pictures, dtype=[("image", "O"), ("annorect", "O")])
    (tmp_path / "images").mkdir(exist_ok=True)
    for k in range(pictures):
        name = f"{k:05d}.jpg"
        Image.new("RGB", (64, 48)).save(tmp_path / "images" / name)
        rects = np.zeros(2 if k else 1, dtype=[(kind, "O") for kind in kinds])
        changed = {} if k else dict(first or {})
        for row, rect in zip(rects, (person(k) | changed, bare)):
            for kind in kinds:
                row[kind] = rect[kind]
        annolist[k] = (dict(name=changed.get("name", name)), rects)
    training = np.ones(pictures)
    training[-1] = 0
    savemat(tmp_path / "mpii_human_pose_v1_u12_1.mat",
            dict(RELEASE=dict(annolist=annolist, img_train=training)))
    return tmp_path


def test_mpiis_release(tmp_path):
    root = release(tmp_path)
    train, valid = load_samples(root, "train"), load_samples(root, "valid")
    assert len(train) + len(valid) == 39 and len(valid) > 0                   # the test picture is left out
    assert not set(train.files) & set(valid.files)
    assert "not the standard validation set" in valid.note
    k = int(train.files[0].stem)
    assert train.joints[0, 3].tolist() == [12 + k, 29] and train.visible[0].tolist() == [True] * 15 + [False]
    assert train.head_size[0] == pytest.approx(0.6 * 5) and train.side[0] == 125
    assert train.center[0].tolist() == [19, 36.5]
    assert load_samples(root, "valid").files == valid.files                  # the split is for good
    moved = root.rename(root.with_name("annotations"))                       # a name of COCO's layout
    assert len(load_samples(moved, "valid")) == len(valid)


@pytest.mark.parametrize("split, other", [("train", "valid"), ("valid", "train")])
def test_a_release_does_not_stand_in_for_one_of_two_json_files(tmp_path, split, other):
    """It holds people of both, divided otherwise: some would be trained on and scored."""
    root = folder(release(tmp_path), ENTRY, split=split)
    assert len(load_samples(root, split)) == 1
    with pytest.raises(BadInput, match=f"annot/{split}.json and no annot/{other}.json, .* divides"):
        load_samples(root, other)


@pytest.mark.parametrize(
    "change",
    [dict(scale=1e-50), dict(scale=1e30), dict(objpos=dict(x=1e20, y=3.0)), dict(name="../secret.jpg")])
def test_a_release_is_checked_as_a_json_file_is(tmp_path, change):
    (tmp_path / "secret.jpg").touch()
    with pytest.raises(BadInput, match="mpii_human_pose_v1_u12_1.mat, entry 0: ") as caught:
        for split in ("train", "valid"):
            load_samples(release(tmp_path, first=change), split)
    assert "\n" not in str(caught.value)


def test_people_of_the_release_whose_image_is_not_released(tmp_path):
    """Three images are listed in MPII's file and are not in its archive: the real one must load."""
    whole, counts = release(tmp_path), []
    for first in ({}, dict(name="013401523.jpg")):
        release(tmp_path, first=first)
        counts.append(sum(len(load_samples(whole, split)) for split in ("train", "valid")))
    assert counts[1] == counts[0] - 1


def test_the_release_may_lie_in_the_folder_it_comes_in(tmp_path):
    found = len(load_samples(release(tmp_path), "train"))
    (tmp_path / "mpii_human_pose_v1_u12_2").mkdir()
    file = tmp_path / "mpii_human_pose_v1_u12_1.mat"
    file.rename(tmp_path / "mpii_human_pose_v1_u12_2" / file.name)
    assert len(load_samples(tmp_path, "train")) == found


def test_a_joint_without_a_place_counts_as_missing():
    """Half a coordinate is none; NaN must not reach the losses, where it would survive multiplication by 0.
    """
    from types import SimpleNamespace as struct
    point = [struct(id=3, x=np.array([]), y=5.0), struct(id=4, x=7.0, y=8.0)]
    rect = struct(annopoints=struct(point=point), objpos=struct(x=1, y=2), scale=1, x1=0, y1=0, x2=3, y2=4)
    found = read_annorect(rect)
    assert found["joints_vis"] == [k == 4 for k in range(16)]
    assert np.isfinite(found["joints"]).all() and found["head_size"] == pytest.approx(3)
    assert read_annorect(struct(**{**vars(rect), "x2": 0, "y2": 0})) is None


def test_something_else_called_release(tmp_path):
    savemat(tmp_path / "mpii_human_pose_v1_u12_1.mat", dict(other=1))
    with pytest.raises(BadInput, match="is not MPII's release"):
        load_samples(tmp_path, "train")
