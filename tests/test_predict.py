"""Any picture a person may have, boxes, outputs, and one clear line for what cannot be read."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import call, refused, run
from PIL import Image
from test_data import ENTRY, folder

from common import BadInput
from crops import FLIP, store
from data_mpii import load_samples
from images import image_endings, open_image
from models import build_student
from images import draw_skeleton
from predict import (BETA, CUTOFF, Found, OneEuro, box_matrix, find, in_batches, json_file, list_files,
                     match_boxes, name_outputs, read_boxes, read_image, record)

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights/student-cc-gd-drawn.pt"
random = np.random.default_rng(0)


@pytest.fixture
def picture():
    """Smooth, so that JPEG and palettes change little; red grows to the right, green downwards."""
    y, x = np.mgrid[:60, :90]
    return Image.fromarray(np.stack([2 * x, 4 * y, np.full_like(x, 128)], -1).astype(np.uint8))


def test_every_kind_of_picture_becomes_rgb(picture, tmp_path):
    """The same for training and predicting: there is one reader."""
    grey = picture.convert("L")
    values = np.asarray(grey).astype(np.int32)                                 # 0 to 238
    float_of = lambda values: Image.fromarray(np.asarray(values, np.float32))
    holes, least, most = np.ones(values.shape), values.min(), values.max()
    holes[:9, :9] = np.nan
    to_white = grey.point(lambda v: v * 255 / most)
    stretched = grey.point(lambda v: (v - least) * 255 / (most - least))
    kinds = {
        "grey.png": (grey, grey),
        "palette.png": (picture.quantize(256), picture),
        "cmyk.jpg": (picture.convert("CMYK"), picture),
        "plain.jpg": (picture, picture),
        "plain.jfif": (picture, picture),
        "alpha.png": (picture.convert("RGBA"), picture),
        "la.png": (grey.convert("LA"), grey),
        "16 of 16 bits.png": (Image.fromarray((values * 257).astype(np.uint16)), grey),
        "12 of 16 bits.png": (Image.fromarray((values * 16).astype(np.uint16)), grey),
        "10 of 16 bits.tif": (Image.fromarray((values * 4).astype(np.uint16)), grey),
        "8 of 16 bits.png": (Image.fromarray(values.astype(np.uint16)), grey),
        "black of 16 bits.png": (Image.new("I;16", picture.size), Image.new("L", picture.size)),
        "16 of 32 bits.tif": (Image.fromarray(values * 257), grey),
        "below 0.tif": (Image.fromarray(values * 40 - 5000), stretched),
        "0 to 1.tif": (float_of(values / 255), grey),
        "0 to 255.tif": (float_of(values), to_white),
        "-1 to 1.tif": (float_of(values / most * 2 - 1), stretched),
        "holes.tif": (float_of(values / 255 * holes), grey),
        "infinite.tif": (float_of(np.where(holes == 1, values / 255, -np.inf)), grey),
    }
    for name, (image, expected) in kinds.items():
        image.save(tmp_path / name, **({"format": "JPEG"} if name.endswith("jfif") else {}))
        found, scale = read_image(tmp_path / name)
        assert found.mode == "RGB" and found.size == (90, 60) and scale == 1, name
        apart = np.abs(np.asarray(found, float) - np.asarray(expected.convert("RGB"), float))
        assert apart.mean() < 6 and (name[-3:] == "jpg" or np.median(apart) < 3), name
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), np.asarray(found)), name
    assert np.asarray(read_image(tmp_path / "holes.tif")[0])[:9, :9].max() == 0
    exact = np.asarray(read_image(tmp_path / "16 of 16 bits.png")[0])[..., 0]
    assert np.array_equal(exact, values)
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")[0]).max() == 0
    picture.quantize(8).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("P", (90, 60))] * 2
    )
    assert read_image(tmp_path / "moving.gif")[0].size == (90, 60)
    float_of(np.full((5, 5), np.nan)).save(tmp_path / "nothing.tif")
    with pytest.raises(BadInput, match="nothing.tif cannot be read .*none of its values is finite"):
        read_image(tmp_path / "nothing.tif")


def test_twelve_bits_a_colour(picture, tmp_path):
    """Pillow keeps the upper 8 of 16 bits, here 4 of the 12."""
    cv2 = pytest.importorskip("cv2")
    for bits, factor in ((12, 16), (16, 257)):
        cv2.imwrite(str(tmp_path / "deep.png"), np.asarray(picture)[..., ::-1].astype(np.uint16) * factor)
        apart = np.abs(np.asarray(read_image(tmp_path / "deep.png")[0], float) - np.asarray(picture, float))
        assert apart.max() < (20 if bits == 12 else 1), bits


def test_what_is_stretched_is_said_once(tmp_path):
    for n in range(3):
        Image.fromarray(np.full((9, 9), 4000 + n, np.uint16)).save(tmp_path / f"{n}.png")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for n in range(3):
            read_image(tmp_path / f"{n}.png")
    assert ["stretched to their own range" in str(one.message) for one in said] == [True]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(picture, tmp_path, ending, orientation):
    file = tmp_path / f"turned.{ending}"
    if f".{ending}" not in image_endings():
        pytest.skip("this Pillow does not read AVIF")
    exif = Image.Exif()
    exif[274] = orientation
    picture.save(file, exif=exif, quality=95)
    how = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}
    upright = picture.transpose(Image.Transpose[how[orientation]]) if orientation > 1 else picture
    for found in (read_image(file)[0], open_image(file)):
        assert found.size == upright.size
        assert np.abs(np.asarray(found, float) - np.asarray(upright, float)).mean() < 4


def test_labels_are_those_of_the_upright_picture(picture, tmp_path):
    """Stored turned, the same crops are cut, and crops that an older reader cut are not taken up."""
    root, exif = folder(tmp_path, ENTRY), Image.Exif()
    exif[274] = 6
    crops = []
    for stored, how in ((picture, {}), (picture.transpose(Image.Transpose.ROTATE_90), {"exif": exif})):
        stored.save(root / "images/a.jpg", "PNG", **how)
        crops.append(np.array(store(load_samples(root, "train"), 64, tmp_path / "cache")))
    assert np.array_equal(*crops) and crops[0].max() > 100
    before = set((tmp_path / "cache").iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crops.READER", 1)
        store(load_samples(root, "train"), 64, tmp_path / "cache")
    assert len(set((tmp_path / "cache").iterdir()) - before) == 1


def test_nothing_of_pillow_changes(tmp_path):
    """Large images are read, and Pillow's own limit is the same before and after."""
    Image.new("1", (19000, 10000)).save(tmp_path / "large.png")
    script = """
import sys, warnings
warnings.simplefilter("error")
from PIL import Image
limit = Image.MAX_IMAGE_PIXELS
import predict
assert Image.MAX_IMAGE_PIXELS == limit
assert predict.open_safely(sys.argv[1], lambda image: image.size) == (19000, 10000)
assert Image.MAX_IMAGE_PIXELS == limit
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "large.png"], check=True, cwd=ROOT)


def test_huge_jpegs_are_decoded_small_and_joints_come_back_large(tmp_path):
    Image.new("RGB", (9000, 6000), (90, 120, 60)).save(tmp_path / "huge.jpg")
    found, scale = read_image(tmp_path / "huge.jpg")
    assert found.size == (4500, 3000) and scale == 0.5
    assert open_image(tmp_path / "huge.jpg").size == (9000, 6000)              # labels are in its own pixels
    Image.new("RGB", (9, 65000)).save(tmp_path / "thin.jpg")
    assert read_image(tmp_path / "thin.jpg")[1] == 1 / 8
    Image.new("1", (20001, 10000)).save(tmp_path / "bomb.png")
    with pytest.raises(BadInput, match="20001 x 10000 pixels, more than 200 million"):
        read_image(tmp_path / "bomb.png")


def test_unreadable_files_are_named(picture, tmp_path):
    picture.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, content in (("cut.jpg", whole[:len(whole) // 2]), ("text.jpg", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    with pytest.raises(BadInput, match="none.jpg cannot be read"):
        read_image(tmp_path / "none.jpg")


def listed(paths, out=Path("elsewhere")):
    """Images, videos and what failed, as text."""
    failed = []
    images, videos = list_files(paths, out, failed)
    return [[str(name) for _, name in part] for part in (images, videos)] + [list(map(str, failed))]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_no_two_pictures_share_an_output(tmp_path):
    touch(tmp_path, "a/x.jpg", "b/x.jpg", "a/x.png", "a/deep/y.jpg", "a/notes.txt", "a/._x.jpg")
    images, *others = listed([tmp_path / "a", tmp_path / "b", tmp_path / "a/x.jpg"])
    assert images == ["deep/y.jpg", "x.jpg", "x.png", "x.jpg", "x.jpg"] and others == [[], []]
    assert [str(output) for output in name_outputs(map(Path, images), "-pose.jpg")] == [
        "deep/y-pose.jpg",
        "x-pose.jpg",
        "x-2-pose.jpg",
        "x-3-pose.jpg",
        "x-4-pose.jpg",
    ]


def test_our_own_output_is_not_looked_at_again_and_it_is_said(tmp_path, capsys):
    touch(tmp_path, "a/x.jpg", "a/x-pose.jpg", "a/clip-pose.mp4", "a/out/other.jpg", "b/y-pose.jpg")
    for out, count in ((tmp_path, 2), (tmp_path / "a", 2), (tmp_path / "a/out", 1), (tmp_path / "b", 2)):
        assert len(listed([tmp_path / "a"], out)[0]) == count, out
        assert "left out as our own output, *-pose.jpg or *-pose.mp4: 2\n" in capsys.readouterr().out
    images, _, failed = listed([tmp_path / "b"])
    assert not images and "b holds no images or videos" in failed[0]
    assert "left out as our own output" in capsys.readouterr().out
    assert listed([tmp_path / "b/y-pose.jpg"])[0] == ["y-pose.jpg"]
    assert "y-pose.jpg is named like our own output" in capsys.readouterr().out


def test_four_thousand_pictures_of_one_name():
    began = time.perf_counter()
    outputs = name_outputs([Path("x.jpg")] * 4000 + [Path("x-2.jpg")], "-pose.jpg")
    assert time.perf_counter() - began < 2
    assert len(set(outputs)) == 4001 and list(map(str, outputs[-2:])) == ["x-4000-pose.jpg", "x-2-2-pose.jpg"]


def test_what_a_folder_holds_is_read_or_named(picture, tmp_path, monkeypatch):
    """Images in formats that are not read, a lost link, and a folder that is closed, each in a line."""
    holiday = tmp_path / "holiday"
    touch(holiday, "phone.HEIC", "raw.dng", "new.jxl", "notes.txt", "._phone.heic", "closed/x.jpg")
    picture.save(holiday / "a.jfif", "JPEG")
    picture.save(holiday / "b.pgm")
    (holiday / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    scan = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    done = call("predict.py", holiday, "--checkpoint", WEIGHTS, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and "2 of 6 images" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
    for name in ("closed", "phone.HEIC", "raw.dng", "new.jxl", "lost.jpg"):
        assert sum(name in line for line in lines) == 1, name


def test_a_json_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), json_file(tmp_path / "a.json") as add:
        add({"file": "x.jpg"})
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    for count in (0, 1, 3):
        with json_file(tmp_path / "a.json") as add:
            for n in range(count):
                add({"file": f"{n}.jpg"})
        assert [found["file"] for found in json.loads((tmp_path / "a.json").read_text())["images"]] == [
            f"{n}.jpg" for n in range(count)]


def test_boxes():
    whole, tight = (box_matrix([10, 20, 101, 51], 64, is_tight) for is_tight in (False, True))
    middle = torch.tensor([60.0, 45.0, 1], dtype=torch.float64)  # of the pixels 10 .. 110 and 20 .. 70
    for matrix, side in ((whole, 101), (tight, 1.25 * 101)):
        torch.testing.assert_close(matrix @ middle, torch.full((2,), 31.5, dtype=torch.float64))
        assert matrix[0, 0].item() == pytest.approx(64 / side)


@pytest.mark.parametrize("text,message", [
    ("[", "Expecting"), ("[1]", "must be json such as"), ('{"a.jpg": [[1, 2, 3]]}', "must be json such as"),
    ('{"a.jpg": [[1, 2, 0, 4]]}', "size above 0"), ('{"a.jpg": [[1, 2, NaN, 4]]}', "size above 0")])
def test_bad_box_files(text, message, tmp_path):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_boxes(tmp_path / "boxes.json")


def test_boxes_belong_to_one_picture(tmp_path, monkeypatch):
    """By the path in the named folder, by another path, or by a bare name that only one has."""
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "set/a/x.jpg", "set/b/x.jpg", "set/b/y.jpg", "set/x.jpg", "z.jpg", "other/z.jpg")
    images, _ = list_files([Path("set"), Path("z.jpg"), Path("set/b/y.jpg")], Path("out"), [])

    def of(*keys):
        Path("boxes.json").write_text(json.dumps({key: [[n, 1, 2, 3]] for n, key in enumerate(keys)}))
        found = match_boxes("boxes.json", images)
        return {os.path.relpath(file): int(boxes[0][0]) for file, boxes in found.items()}

    assert of("a/x.jpg", "b/x.jpg", "x.jpg") == {"set/a/x.jpg": 0, "set/b/x.jpg": 1, "set/x.jpg": 2}
    assert of("y.jpg", "z.jpg") == {"set/b/y.jpg": 0, "z.jpg": 1}
    assert of("set/a/x.jpg", str(tmp_path / "set/b/x.jpg"), "./z.jpg", "set/./b//y.jpg") == {
        "set/a/x.jpg": 0, "set/b/x.jpg": 1, "z.jpg": 2, "set/b/y.jpg": 3}
    for keys, message in ((["a/y.jpg"], "names a/y.jpg, which is not among"), (["a\0"], "is not among"),
                          (["y.jpg", "b/y.jpg"], "names b/y.jpg twice"), (["other/z.jpg"], "not among")):
        with pytest.raises(BadInput, match=message):
            of(*keys)
    images = list_files([Path("set/a"), Path("set/b")], Path("out"), [])[0]
    assert of("a/x.jpg".replace("a/", "set/a/"), "y.jpg") == {"set/a/x.jpg": 0, "set/b/y.jpg": 1}
    with pytest.raises(BadInput, match="x.jpg may be any of 2 images: write its path"):
        of("x.jpg")


def test_boxes_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "boxes.json").write_text('{"é.jpg": [[1, 2, 3, 4]]}', encoding="utf-8-sig")
    assert read_boxes(tmp_path / "boxes.json") == {"é.jpg": [[1, 2, 3, 4]]}


def test_batches_do_not_mix_people_up():
    """Two pictures at once, one with two boxes: the same as one by one."""
    torch.manual_seed(0)
    model = build_student("cc", "gs", "none", "tiny").eval()
    pictures = [Image.fromarray(random.integers(0, 255, (80, 50, 3), dtype=np.uint8)) for _ in range(2)]
    boxes = [None, [[0, 0, 30, 60], [10, 20, 40, 60]]]
    together = find(model, pictures, boxes)
    assert [len(people) for people in together] == [1, 2]
    for picture, of, people in zip(pictures, boxes, together):
        for n, person in enumerate(people):
            alone = find(model, [picture], [of and [of[n]]])[0][0]
            np.testing.assert_allclose(person.joints, alone.joints, atol=1e-6)
            np.testing.assert_allclose(person.confidence, alone.confidence, rtol=1e-4)


def test_people_are_found_in_pictures_of_any_mode(picture):
    torch.manual_seed(0)
    model = build_student("cc", "gs", "none", "tiny").eval()
    grey = picture.convert("L")
    pictures = [grey, grey.convert("RGB"), grey.convert("RGBA"), grey.convert("LA"), grey.convert("P")]
    first, *others = find(model, pictures, [None] * len(pictures))
    for people in others:
        np.testing.assert_allclose(people[0].joints, first[0].joints, atol=1e-6)


def test_joints_in_a_picture_that_was_decoded_smaller():
    """The centre of the first of four pixels is at 1.5 in the file, its edge at the file's edge."""
    people = [Found([2, 3, 5, 5], np.tile([[0.0, 10.0]], (16, 1)), np.ones(16))]
    found, = record("x.jpg", people, 0.25)["people"]
    assert found["box"] == [8, 12, 20, 20] and found["joints"]["r-knee"] == [1.5, 41.5, 1]


def test_large_jpegs_and_pngs_give_the_same_joints(tmp_path):
    """Blobs on odd sides, decoded at a half and at a quarter; the whole image is the box."""
    torch.manual_seed(0)
    model = build_student("cc", "gs", "none", "tiny").eval()
    for width, height in ((4501, 3001), (9003, 901)):
        y, x = np.mgrid[:height, :width]
        grey = (127 + 60 * np.sin(x / 400) + 60 * np.cos(y / 300)).astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(tmp_path / "a.jpg", quality=98, subsampling=0)
        Image.fromarray(grey).save(tmp_path / "a.png", compress_level=1)
        entries = []
        for name in ("a.jpg", "a.png"):
            image, scale = read_image(tmp_path / name)
            people, = find(model, [image], [None])
            entries.append(record(name, people, scale)["people"][0])
        assert scale == 1 and entries[0]["box"] == entries[1]["box"] == [0, 0, width, height]
        jpg, png = (np.array(list(entry["joints"].values()))[:, :2] for entry in entries)
        assert np.median(np.abs(jpg - png)) < 0.05 * width / 64


def test_flip_test_gives_a_picture_and_its_mirror_image_mirrored_joints(picture):
    torch.manual_seed(0)
    model = build_student("cc", "gs", preset="tiny").eval()
    (one,), (other,) = find(
        model, [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)], [None, None], flip_test=True
    )
    mirrored = other.joints[FLIP]
    np.testing.assert_allclose(one.joints[:, 0], picture.width - 1 - mirrored[:, 0], atol=1e-3)
    np.testing.assert_allclose(one.joints[:, 1], mirrored[:, 1], atol=1e-3)
    np.testing.assert_allclose(one.confidence, other.confidence[FLIP], atol=1e-5)


def test_unsure_joints_are_faint():
    joints, seen = np.tile([[10.0, 10.0]], (16, 1)), np.ones(16, bool)
    sure, unsure = (
        np.asarray(
            draw_skeleton(Image.new("RGB", (20, 20)), joints, seen, confidence=np.full(16, value)), float
        )
        for value in (1.0, 0.0)
    )
    assert 0 < unsure.max() < sure.max() and sure[10, 10].min() == 255


def test_the_threshold_decides_which_joints_are_faint():
    joints, seen, confidence = np.tile([[10.0, 10.0]], (16, 1)), np.ones(16, bool), np.full(16, 0.4)
    faint, strong = (np.asarray(draw_skeleton(Image.new("RGB", (20, 20)), joints, seen, confidence=confidence,
                                              threshold=threshold)).max() for threshold in (0.41, 0.4))
    assert faint < strong == 255


def test_one_step_of_smoothing_by_hand():
    """dt = 1 / (2 pi): weight 1 / (1 + 1 / f) for a cut-off of f Hz; from 0 to 1 at rest the speed becomes
    half of 2 pi.
    """
    smooth, dt = OneEuro(), 1 / (2 * np.pi)
    assert smooth(np.zeros(1), dt) == 0
    f = CUTOFF + BETA * np.pi
    assert smooth(np.ones(1), dt) == pytest.approx(1 / (1 + 1 / f))
    speed = np.pi + 0.5 * (2 * np.pi * (1 - 1 / (1 + 1 / f)) - np.pi)  # stands still at 1: the filter goes on
    f2, x = CUTOFF + BETA * speed, 1 / (1 + 1 / f)
    assert smooth(np.ones(1), dt) == pytest.approx(x + (1 - x) / (1 + 1 / f2))


def test_a_noisy_sine_comes_out_smoother_and_nearer():
    """30 frames a second; a joint swings by 0.2 box sides every 3 seconds and is seen with a deviation of
    0.02.
    """
    t = np.arange(300) / 30
    true = 0.2 * np.sin(2 * np.pi * t / 3)
    noisy = true + 0.02 * np.random.default_rng(0).standard_normal(300)
    smooth = OneEuro()
    found = np.array([smooth(x, 1 / 30) for x in noisy])
    assert np.abs(np.diff(found)).mean() < 0.6 * np.abs(np.diff(noisy)).mean()
    assert ((found - true) ** 2).mean() < 0.7 * ((noisy - true) ** 2).mean()
    still = OneEuro()
    assert np.std([still(x, 1 / 30) for x in noisy - true][60:]) < 0.5 * 0.02


def test_the_command(picture, tmp_path):
    (tmp_path / "my photos").mkdir()
    picture.save(tmp_path / "my photos/é.jpg")
    (tmp_path / "my photos/text.jpg").write_text("hello")
    weights = ROOT / "weights/teacher-tiny-drawn.pt"
    done = run(
        "predict.py",
        "my photos",
        "--json",
        "joints.json",
        "--checkpoint",
        weights,
        "--device",
        "cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "1 of 2 images" in done.stdout
    line, = done.stderr.strip().splitlines()
    assert line.startswith("error: my photos/text.jpg cannot be read as an image")
    assert Image.open(tmp_path / "predictions/é-pose.jpg").size == (90, 60)
    found = json.loads((tmp_path / "joints.json").read_text())
    assert len(found["images"][0]["people"][0]["joints"]) == 16
    for arguments, message in (
        ([], "name images"),
        (["my photos", "--boxes", "joints.json"], "--boxes joints.json"),
        (["my photos", "--box", "1", "2", "0", "3"], "size above 0"),
        (["my photos/é.jpg", "--box", "900", "2", "9", "9"], "é.jpg has nothing in the box"),
        (["my photos/é.jpg", "--smooth"], "--smooth is for videos"),
        (["x.jpg", "--threshold", "2"], "between 0 and 1"),
        (["nowhere.mp4"], "there is no video nowhere.mp4"),
    ):
        refused(call("predict.py", *arguments, "--checkpoint", weights, cwd=tmp_path), message)


def test_one_picture_that_cannot_be_written_does_not_end_the_others(picture, tmp_path):
    """Too wide for a JPEG, a name that is too long with its ending, a folder that stands in the way."""
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("a.jpg", f"{'m' * 251}.jpg", "taken.jpg", "z.jpg"):
        picture.save(folder / name)
    Image.new("L", (65_501, 2)).save(folder / "pano.png")
    (tmp_path / "out/taken-pose.jpg").mkdir(parents=True)
    done = call("predict.py", folder, "--out", "out", "--json", "all.json", "--checkpoint", WEIGHTS,
                "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and "2 of 5 images" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and all("cannot be written" in line and "all.json" in line for line in lines)
    assert "a JPEG has at most 65,500 pixels a side" in next(line for line in lines if "pano.png" in line)
    entries = json.loads((tmp_path / "all.json").read_text())["images"]
    assert len(entries) == 5 and all(len(entry["people"]) == 1 for entry in entries)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a-pose.jpg", "z-pose.jpg", "taken-pose.jpg"}


def test_what_cannot_be_written_is_said_before_the_work(picture, tmp_path):
    picture.save(tmp_path / "a.jpg")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        (["--out", "a.jpg"], "a.jpg cannot be written into (Not a directory): name another place with --out"),
        (["--json", "folder"], "--json folder is a folder: name a file"),
        (["--json", "a.jpg/b.json"], "--json a.jpg/b.json: there is no folder a.jpg"),
    ):
        refused(call("predict.py", "a.jpg", *arguments, cwd=tmp_path), message)
    with pytest.MonkeyPatch.context() as patch:
        def read_only(dir):
            raise OSError(30, "Read-only file system")

        patch.setattr("common.tempfile.TemporaryFile", read_only)
        refused(call("predict.py", "a.jpg", "--out", "folder/deep", cwd=tmp_path),
                "folder cannot be written into (Read-only file system): name another place with --out")
        refused(call("predict.py", "a.jpg", "--json", "x.json", cwd=tmp_path), "another place with --json")
        refused(call("train.py", "--out", "folder/run", cwd=tmp_path), "name another place with --out")
        refused(call("evaluate.py", "--costs", "--json", "x.json", cwd=tmp_path), "another place with --json")
        with pytest.raises(BadInput, match="name another place with --cache"):
            store(load_samples(folder(tmp_path, ENTRY), "train"), 64, tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir()) and not (tmp_path / "predictions").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no such names")
def test_names_that_are_not_utf_8(picture, tmp_path):
    """In a terminal that is strict about it, as a process."""
    odd = os.fsdecode(b"d\xe9")
    (tmp_path / odd).mkdir()
    picture.save(tmp_path / odd / "a.jpg")
    touch(tmp_path / odd, "text.jpg", "clip.mp4")
    done = run("predict.py", odd, "--checkpoint", WEIGHTS, "--out", f"{odd}/out", cwd=tmp_path,
               env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 2 and "1 of 2 images: d\\udce9/out/" in done.stdout, done.stderr
    assert "error: d\\udce9/text.jpg cannot be read" in done.stderr and "d\\udce9/clip.mp4" in done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / odd / "out/a-pose.jpg").exists()


def test_few_large_images_are_in_memory_at_once():
    small, large = ((None, None, SimpleNamespace(size=size)) for size in ((640, 480), (6000, 5000)))
    found = [len(batch) for batch in in_batches(iter(9 * [small] + 3 * [large]))]
    assert found == [8, 3, 1]                            # 8 small ones, one and two large ones, the last
