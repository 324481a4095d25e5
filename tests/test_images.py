"""Files of images and videos: which ones, read in one way by every command; skeletons drawn on them."""

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import ENTRY, folder

from common import BadInput
from crops import store
from data_mpii import load_samples
from images import (LEFT, MIDDLE, RIGHT, contact_sheet, draw_poses, draw_skeleton, image_endings, is_video,
                    list_files, name_outputs, open_image, open_safely, open_video, read_image, rgb, to_bytes,
                    upright_size, write_image)
from people import Found

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def gradient():
    """Smooth, so that JPEG and palettes change little; red grows to the right, green downwards."""
    y, x = np.mgrid[:60, :90]
    return Image.fromarray(np.stack([2 * x, 4 * y, np.full_like(x, 128)], -1).astype(np.uint8))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# ------------------------------------------------------------------------------- which files

def listed(paths, out=Path("elsewhere")):
    """Images, videos and what failed, as text."""
    failed = []
    images, videos = list_files(paths, out, failed)
    return [[str(name) for _, name in part] for part in (images, videos)] + [list(map(str, failed))]


def test_no_two_images_share_an_output(tmp_path):
    touch(tmp_path, "a/x.jpg", "b/x.jpg", "a/x.png", "a/deep/y.jpg", "a/notes.txt", "a/._x.jpg")
    images, *others = listed([tmp_path / "a", tmp_path / "b", tmp_path / "a/x.jpg"])
    assert images == ["deep/y.jpg", "x.jpg", "x.png", "x.jpg", "x.jpg"] and others == [[], []]
    assert [str(output) for output in name_outputs(map(Path, images), "-pose.jpg")] == [
        "deep/y-pose.jpg", "x-pose.jpg", "x-2-pose.jpg", "x-3-pose.jpg", "x-4-pose.jpg"]
    assert name_outputs([Path("x.jpg")], "-pose.jpg", lambda output: output.stem != "x-pose") == [
        Path("x-2-pose.jpg")]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_upright_size_is_that_of_the_decoded_image(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (60, 40)).save(tmp_path / f"a.{ending}", exif=exif)
    size = open_safely(tmp_path / f"a.{ending}", upright_size)
    assert size == open_image(tmp_path / f"a.{ending}").size == ((40, 60) if orientation > 4 else (60, 40))


def test_linked_folders_are_listed_once(tmp_path):
    """What links lead to elsewhere, but not what is listed without them, nor for ever."""
    touch(tmp_path, "a/x.jpg", "a/deep/y.jpg", "b/z.jpg", "b/more/w.jpg")
    for link, to in (("a/there", "b"), ("a/again", "b"), ("a/back", "a"), ("a/up", ""), ("a/twin", "a/deep"),
                     ("b/loop", "b")):
        (tmp_path / link).symlink_to(tmp_path / to, target_is_directory=True)
    images, *_ = listed([tmp_path / "a"])
    assert sorted(Path(name).name for name in images) == ["w.jpg", "x.jpg", "y.jpg", "z.jpg"]
    assert "x.jpg" in images and "deep/y.jpg" in images


def test_images_and_videos_by_their_names(tmp_path):
    """In folders by their endings; what Pillow lacks and a link to nothing are not passed over."""
    touch(tmp_path, "a/b.JPG", "a/clip.MOV", "a/deep/c.webm", "a/d.heic", "a/notes.txt", "a/._e.jpg",
          "a/f.jpg/inside.txt")
    (tmp_path / "a/lost.png").symlink_to(tmp_path / "nowhere.png")
    assert listed([tmp_path / "a"]) == [["b.JPG", "d.heic", "lost.png"], ["clip.MOV", "deep/c.webm"], []]
    assert listed([tmp_path / "a/clip.MOV", tmp_path / "a/notes.txt"]) == [["notes.txt"], ["clip.MOV"], []]


def test_a_named_file_may_be_a_video_of_any_name(gradient, tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 30, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    (tmp_path / "clip.avi").rename(tmp_path / "clip.unknown")
    gradient.save(tmp_path / "image.unknown", "PNG")
    (tmp_path / "text.unknown").write_text("hello")
    kinds = {"clip.unknown": True, "image.unknown": False, "text.unknown": False, "none.unknown": False,
             "none.mp4": True, "none.jpg": False}
    assert {name: is_video(tmp_path / name) for name in kinds} == kinds
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert not is_video(tmp_path / "clip.unknown")           # then an error names it as an unreadable image
    with pytest.raises(BadInput, match="cv2 is not installed"):
        open_video(tmp_path / "none.mp4")


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no such names")
def test_names_that_opencv_does_not_take():
    pytest.importorskip("cv2")
    with pytest.raises(BadInput, match="OpenCV takes no names that are not UTF-8: rename it"):
        open_video(Path(os.fsdecode(b"d\xe9.mp4")))


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


def test_four_thousand_images_of_one_name():
    began = time.perf_counter()
    outputs = name_outputs([Path("x.jpg")] * 4000 + [Path("x-2.jpg")], "-pose.jpg")
    assert time.perf_counter() - began < 2
    assert len(set(outputs)) == 4001 and list(map(str, outputs[-2:])) == ["x-4000-pose.jpg", "x-2-2-pose.jpg"]


# ------------------------------------------------------------------------------- pixels

STRETCHED = pytest.mark.filterwarnings("ignore:an image's values do not fill")


@STRETCHED
def test_every_kind_of_image_becomes_rgb(gradient, tmp_path):
    """The same for training and predicting: there is one reader."""
    grey = gradient.convert("L")
    values = np.asarray(grey).astype(np.int32)                                 # 0 to 238
    float_of = lambda values: Image.fromarray(np.asarray(values, np.float32))
    holes, least, most = np.ones(values.shape), values.min(), values.max()
    holes[:9, :9] = np.nan
    to_white = grey.point(lambda v: v * 255 / most)
    stretched = grey.point(lambda v: (v - least) * 255 / (most - least))
    kinds = {
        "grey.png": (grey, grey),
        "palette.png": (gradient.quantize(256), gradient),
        "cmyk.jpg": (gradient.convert("CMYK"), gradient),
        "plain.jpg": (gradient, gradient),
        "plain.jfif": (gradient, gradient),
        "alpha.png": (gradient.convert("RGBA"), gradient),
        "la.png": (grey.convert("LA"), grey),
        "16 of 16 bits.png": (Image.fromarray((values * 257).astype(np.uint16)), grey),
        "12 of 16 bits.png": (Image.fromarray((values * 16).astype(np.uint16)), grey),
        "10 of 16 bits.tif": (Image.fromarray((values * 4).astype(np.uint16)), grey),
        "8 of 16 bits.png": (Image.fromarray(values.astype(np.uint16)), grey),
        "black of 16 bits.png": (Image.new("I;16", gradient.size), Image.new("L", gradient.size)),
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
    gradient.quantize(8).save(tmp_path / "moving.gif", save_all=True,
                              append_images=[Image.new("P", (90, 60))] * 2)
    assert read_image(tmp_path / "moving.gif")[0].size == (90, 60)
    float_of(np.full((5, 5), np.nan)).save(tmp_path / "nothing.tif")
    with pytest.raises(BadInput, match="nothing.tif cannot be read .*none of its values is finite"):
        read_image(tmp_path / "nothing.tif")


@STRETCHED
def test_twelve_bits_a_colour(gradient, tmp_path):
    """Pillow keeps the upper 8 of 16 bits, here 4 of the 12."""
    cv2 = pytest.importorskip("cv2")
    for bits, factor in ((12, 16), (16, 257)):
        cv2.imwrite(str(tmp_path / "deep.png"), np.asarray(gradient)[..., ::-1].astype(np.uint16) * factor)
        apart = np.abs(np.asarray(read_image(tmp_path / "deep.png")[0], float) - np.asarray(gradient, float))
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
def test_exif_orientation_is_honoured(gradient, tmp_path, ending, orientation):
    file = tmp_path / f"turned.{ending}"
    if f".{ending}" not in image_endings():
        pytest.skip("this Pillow does not read AVIF")
    exif = Image.Exif()
    exif[274] = orientation
    gradient.save(file, exif=exif, quality=95)
    how = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}
    upright = gradient.transpose(Image.Transpose[how[orientation]]) if orientation > 1 else gradient
    for found in (read_image(file)[0], open_image(file)):
        assert found.size == upright.size
        assert np.abs(np.asarray(found, float) - np.asarray(upright, float)).mean() < 4


def test_labels_are_those_of_the_upright_image(gradient, tmp_path):
    """Stored turned, the same crops are cut, and crops that an older reader cut are not taken up."""
    root, exif = folder(tmp_path, ENTRY), Image.Exif()
    exif[274] = 6
    crops = []
    for stored, how in ((gradient, {}), (gradient.transpose(Image.Transpose.ROTATE_90), {"exif": exif})):
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
import images
assert Image.MAX_IMAGE_PIXELS == limit
assert images.open_safely(sys.argv[1], lambda image: image.size) == (19000, 10000)
assert Image.MAX_IMAGE_PIXELS == limit
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "large.png"], check=True, cwd=ROOT)


def test_huge_jpegs_are_decoded_small(tmp_path):
    Image.new("RGB", (9000, 6000), (90, 120, 60)).save(tmp_path / "huge.jpg")
    found, scale = read_image(tmp_path / "huge.jpg")
    assert found.size == (4500, 3000) and scale == 0.5
    assert open_image(tmp_path / "huge.jpg").size == (9000, 6000)              # labels are in its own pixels
    exif = Image.Exif()
    exif[274] = 6                                            # it lies on its side
    Image.new("RGB", (9001, 301)).save(tmp_path / "odd.jpg", exif=exif)
    found, scale = read_image(tmp_path / "odd.jpg")
    assert found.size == (151, 4501) and found.info["decoded size"] == [150.5, 4500.5] and scale == 0.5
    for side, expected in ((8190, 1), (8192, 0.5), (16384, 0.25)):                   # 4,096 or more are left
        Image.new("L", (side, 9)).save(tmp_path / "side.jpg")
        assert read_image(tmp_path / "side.jpg")[1] == expected, side
    Image.new("L", (9000, 9)).save(tmp_path / "side.png")
    assert read_image(tmp_path / "side.png")[0].size == (9000, 9)
    Image.new("RGB", (9, 65000)).save(tmp_path / "thin.jpg")
    assert read_image(tmp_path / "thin.jpg")[1] == 1 / 8
    Image.new("1", (20001, 10000)).save(tmp_path / "bomb.png")
    with pytest.raises(BadInput, match="20001 x 10000 pixels, more than 200 million"):
        read_image(tmp_path / "bomb.png")


def test_unreadable_files_are_named(gradient, tmp_path):
    gradient.save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    for name, content in (("cut.jpg", whole[:len(whole) // 2]), ("text.jpg", b"hello"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    for name, why in (("none.jpg", "No such file or directory"), ("", "Is a directory")):
        with pytest.raises(BadInput, match=f"{name} cannot be read: {why}$"):
            read_image(tmp_path / name)


def test_modes_without_a_file(gradient):
    """What a library's user may have: RGB is not copied."""
    grey = gradient.convert("L")
    expected = np.asarray(grey.convert("RGB"))
    for image in (*map(grey.convert, ("L", "RGBA", "LA", "P", "I")), grey.convert("RGB").convert("CMYK")):
        found = rgb(image)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), expected), image.mode
    assert rgb(gradient) is gradient


@pytest.mark.parametrize("values,expected", [
    (np.uint8([0, 7, 255]), [0, 7, 255]), (np.uint16([0, 4095, 819]), [0, 255, 51]),
    (np.uint16([0, 300, 511]), [0, 150, 255]), (np.int32([-10, 245]), [0, 255]),
    (np.float32([0, 0.2, 1]), [0, 51, 255]), (np.float32([0.2, 0.2]), [51, 51]),
    (np.float32([0, 1, 5]), [0, 51, 255]), (np.float32([-1, -0.6, 1]), [0, 51, 255]),
    (np.float32([np.nan, 0.2, np.inf, -np.inf]), [0, 51, 255, 0]), (np.uint16([9, 9]), [9, 9])])
@STRETCHED
def test_bytes_by_hand(values, expected):
    assert to_bytes(values).tolist() == expected


def test_what_jpeg_cannot_hold(gradient, tmp_path):
    write_image(gradient, tmp_path / "new/deep/a.jpg")
    assert Image.open(tmp_path / "new/deep/a.jpg").size == (90, 60)
    with pytest.raises(OSError, match="a JPEG has at most 65,500 pixels a side"):
        write_image(Image.new("L", (65_501, 2)), tmp_path / "b.jpg")


# ------------------------------------------------------------------------------- drawing

def test_sides_have_colours():
    """One limb of each side; the left wrist is not seen, and so is no limb that ends there."""
    joints, seen = np.full((16, 2), -50.0), np.zeros(16, bool)
    for row, (a, b) in enumerate(((0, 1), (3, 4), (8, 9), (14, 15))):
        joints[[a, b]], seen[[a, b]] = [(5, 10 + 10 * row), (35, 10 + 10 * row)], True
    seen[15] = False
    pixels = np.asarray(draw_skeleton(Image.new("RGB", (40, 50)), joints, seen))
    assert [tuple(pixels[y, 20]) for y in (10, 20, 30, 40)] == [RIGHT, LEFT, MIDDLE, (0, 0, 0)]
    assert pixels[40, 5].min() == 255 and pixels[40, 35].max() == 0
    pixels = np.asarray(draw_skeleton(Image.new("RGB", (40, 50)), joints, seen, (1, 2, 3)))
    assert tuple(pixels[10, 20]) == tuple(pixels[20, 5]) == (1, 2, 3)


def test_a_sheet_has_rows_and_columns():
    """Three times as large: the centre of pixel 3 comes to (3 + 0.5) * 3 - 0.5 = 10."""
    crops = np.zeros((5, 16, 16, 3), np.uint8)
    crops[4] = 90
    joints = np.full((5, 16, 2), 3.0)
    sheet = contact_sheet(crops, (joints, np.ones((5, 16), bool), (255, 0, 0)), columns=2, side=48)
    pixels = np.asarray(sheet)
    assert pixels.shape == (3 * 48, 2 * 48, 3) and tuple(pixels[2 * 48 + 40, 40]) == (90, 90, 90)
    assert pixels[2 * 48:, 48:].max() == 0                                     # no sixth
    rows, columns = np.nonzero(pixels[:48, :48, 0])
    assert rows.mean() == columns.mean() == 10


def test_unsure_joints_are_faint():
    joints, seen = np.tile([[10.0, 10.0]], (16, 1)), np.ones(16, bool)
    sure, unsure = (np.asarray(draw_skeleton(Image.new("RGB", (20, 20)), joints, seen,
                                             confidence=np.full(16, value)), float) for value in (1.0, 0.0))
    assert 0 < unsure.max() < sure.max() and sure[10, 10].min() == 255


def test_the_threshold_decides_which_joints_are_faint():
    joints, seen, confidence = np.tile([[10.0, 10.0]], (16, 1)), np.ones(16, bool), np.full(16, 0.4)
    faint, strong = (np.asarray(draw_skeleton(Image.new("RGB", (20, 20)), joints, seen, confidence=confidence,
                                              threshold=threshold)).max() for threshold in (0.41, 0.4))
    assert faint < strong == 255


def test_unsure_joints_of_each_person_are_faint():
    """The right ankle of two people, of whom one is below the threshold; all else is outside the image."""
    far = np.full((15, 2), -99.0)
    people = [Found([0] * 4, np.r_[[[60.0, y]], far], np.full(16, sure))
              for y, sure in ((20, 0.6), (60, 0.4))]
    for order in (people, people[::-1]):
        pixels = np.asarray(draw_poses(Image.new("RGB", (90, 90)), order, threshold=0.5))
        assert pixels[20, 60].min() == 255 and 0 < pixels[60, 60].max() < 150
    assert np.asarray(draw_poses(Image.new("RGB", (90, 90)), people, threshold=0.4))[60, 60].min() == 255
    assert not np.asarray(draw_poses(Image.new("RGB", (90, 90)), [])).any()
    # ids: each in its box's corner, or in the image's
    at = lambda number, x: np.asarray(draw_poses(Image.new("RGB", (90, 90)), [people[0]._replace(
        box=[x, 60, 9, 9], joints=np.zeros((16, 2)))], ids=[number]))[60:, :].astype(int)
    seven, outside = at(7, 40), at(7, -5)
    assert seven[:, 40:60].any() and not seven[:, :39].any() and (seven != at(8, 40)).any()
    assert np.array_equal(seven[:, 40:60], outside[:, :20])
