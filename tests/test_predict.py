"""Any picture a person may have, boxes, outputs, and one clear line for what cannot be read."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import call, refused, run
from PIL import Image

from common import BadInput
from crops import FLIP
from models import build_student
from predict import (
    BETA,
    CUTOFF,
    OneEuro,
    box_matrix,
    draw_skeleton,
    find,
    in_batches,
    json_file,
    list_images,
    name_outputs,
    read_boxes,
    read_image,
)

ROOT = Path(__file__).resolve().parents[1]
random = np.random.default_rng(0)


@pytest.fixture
def picture():
    """Smooth, so that JPEG and palettes change little; red grows to the right, green downwards."""
    y, x = np.mgrid[:60, :90]
    return Image.fromarray(np.stack([2 * x, 4 * y, np.full_like(x, 128)], -1).astype(np.uint8))


def test_every_kind_of_picture_becomes_rgb(picture, tmp_path):
    grey16 = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    kinds = {
        "grey.png": picture.convert("L"),
        "palette.png": picture.quantize(256),
        "cmyk.jpg": picture.convert("CMYK"),
        "sixteen.png": Image.fromarray(grey16),
        "plain.jpg": picture,
        "alpha.png": picture.convert("RGBA"),
        "la.png": picture.convert("LA"),
        "float.tif": Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
        found, scale = read_image(tmp_path / name)
        assert found.mode == "RGB" and found.size == (90, 60) and scale == 1, name
        expected = (
            picture if name[:3] in ("pla", "pal", "cmy", "alp") else picture.convert("L").convert("RGB")
        )
        ratio = (
            255 / np.asarray(expected).max() if name == "float.tif" else 1
        )  # floats are stretched to white
        assert np.abs(np.asarray(found, float) - ratio * np.asarray(expected, float)).mean() < 6, name
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")[0]).max() == 0
    picture.quantize(8).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("P", (90, 60))] * 2
    )
    assert read_image(tmp_path / "moving.gif")[0].size == (90, 60)


def test_exif_orientation_is_honoured(picture, tmp_path):
    exif = picture.getexif()
    exif[274] = 6                                    # turned by 90 degrees: a camera held upright
    picture.save(tmp_path / "up.jpg", exif=exif, quality=95)
    found, _ = read_image(tmp_path / "up.jpg")
    assert found.size == (60, 90)
    turned = np.asarray(picture.transpose(Image.Transpose.ROTATE_270), float)
    assert np.abs(np.asarray(found, float) - turned).mean() < 3


def test_huge_jpegs_are_decoded_small_and_joints_come_back_large(tmp_path):
    Image.new("RGB", (9000, 6000), (90, 120, 60)).save(tmp_path / "huge.jpg")
    found, scale = read_image(tmp_path / "huge.jpg")
    assert found.size == (4500, 3000) and scale == 0.5
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


def test_no_two_pictures_share_an_output(tmp_path):
    for name in ("a/x.jpg", "b/x.jpg", "a/x.png", "a/deep/y.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed = list_images([tmp_path / "a", tmp_path / "b", tmp_path / "a/x.jpg"])
    assert [str(output) for _, output in listed] == [
        "deep/y-pose.jpg",
        "x-pose.jpg",
        "x-2-pose.jpg",
        "x-3-pose.jpg",
        "x-4-pose.jpg",
    ]


    (tmp_path / "a/x-pose.jpg").touch()              # what we drew is not looked at again, wherever --out is
    (tmp_path / "a/out").mkdir()
    (tmp_path / "a/out/other.jpg").touch()
    for out, count in ((tmp_path, 4), (tmp_path / "a", 4), (tmp_path / "a/out", 3), (None, 4)):
        assert len(list_images([tmp_path / "a"], out)) == count, out
    clips = [Path("clip.mp4"), Path("elsewhere/clip.avi")]
    assert list(map(str, name_outputs([Path(clip.name) for clip in clips], "-pose.mp4"))) == [
        "clip-pose.mp4",
        "clip-2-pose.mp4",
    ]


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


def test_few_large_images_are_in_memory_at_once():
    small, large = ((None, None, SimpleNamespace(size=size)) for size in ((640, 480), (6000, 5000)))
    found = [len(batch) for batch in in_batches(iter(9 * [small] + 3 * [large]))]
    assert found == [8, 3, 1]                            # 8 small ones, one and two large ones, the last
