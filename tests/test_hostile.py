"""Hundreds of damaged and hostile files: each refused in one line, none executed, none trained on.

Counts: 540 checkpoints, 320 annotation files, 60 images.
"""

import copy
import json
import pickle
import random
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import ENTRY, folder

import checkpoint
from common import BadInput
from crops import store
from data_mpii import load_samples
from images import read_image
from models import build_student


def one_line(caught):
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ------------------------------------------------------------------------------- checkpoints

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("good") / "good.pt"
    checkpoint.save(file, build_student("reg", "gs", preset="tiny"), {"note": "fine"}, half=True)
    return file


def test_truncated_and_flipped_checkpoints(good, tmp_path):
    """270 cut at a random place, 270 with 1 to 20 bits turned: refused, or read as exactly what was written.
    """
    whole, choice = good.read_bytes(), random.Random(0)
    expected, bad = checkpoint.checksum(checkpoint.read(good)), tmp_path / "bad.pt"
    unharmed = 0
    for trial in range(540):
        content = bytearray(whole)
        if trial % 2:
            content = content[:choice.randrange(len(whole))]
        else:
            for _ in range(choice.randrange(1, 21)):
                content[choice.randrange(len(whole))] ^= 1 << choice.randrange(8)
        bad.write_bytes(content)
        try:
            assert checkpoint.checksum(checkpoint.read(bad)) == expected       # padding was hit
            unharmed += 1
        except BadInput as error:
            assert "\n" not in str(error) and "bad.pt" in str(error)
    assert unharmed < 100


def test_hostile_checkpoints(good, tmp_path):
    class Runs:
        def __init__(self, function, *arguments):
            self.call = function, arguments

        def __reduce__(self):
            return self.call

    mark, file = tmp_path / "executed", tmp_path / "hostile.pt"
    content = checkpoint.read_safely(good)
    for trap in (Runs(open, str(mark), "w"), Runs(eval, f"open({str(mark)!r}, 'w')"),
                 Runs(exec, f"open({str(mark)!r}, 'w')")):
        for where in ("format", "config", "metadata", "model", "training", "checksum"):
            torch.save(content | {where: trap}, file)
            with pytest.raises(BadInput, match="cannot be read safely") as caught:
                checkpoint.load(file)
            one_line(caught)
        file.write_bytes(pickle.dumps(trap))
        with pytest.raises(BadInput):
            checkpoint.load(file)
    assert not mark.exists()

    with zipfile.ZipFile(good) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            data = bytes(10 ** 9) if name.endswith("data/0") else source.read(name)
            target.writestr(name, data)
    assert file.stat().st_size < 5_000_000
    tracemalloc.start()
    with pytest.raises(BadInput, match="compressed archive"):
        checkpoint.load(file)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()

    for wrong in ({**content, "config": {"student": "teacher", "preset": "huge"}}, {**content, "config": []},
                  {**content, "model": {}}, {**content, "model": [1, 2]}, {**content, "metadata": None},
                  [content], "text", 7,
                  {**content, "model": {name: tensor[..., :1] for name, tensor in content["model"].items()}}):
        if isinstance(wrong, dict):
            wrong["checksum"] = checkpoint.checksum({name: value for name, value in wrong.items()
                                                     if name != "checksum"})
        torch.save(wrong, file)
        with pytest.raises(BadInput) as caught:
            checkpoint.load(file)
        one_line(caught)


    without = {name: value for name, value in content.items() if name != "checksum"}
    endless = []
    endless.append(endless)
    for wrong in (without, {**content, "training": torch.zeros(1).expand(10**13)},
                  {**content, "training": endless}, {**content, "training": torch.eye(3).to_sparse()}):
        torch.save(wrong, file)
        with pytest.raises(BadInput, match="hostile.pt is (damaged|not a checkpoint)") as caught:
            checkpoint.load(file)
        one_line(caught)


# ------------------------------------------------------------------------------- data

BAD_NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e300, -1e30, "12", "left", None, [], {}, True,
               [[1, 2]], 10**400)


def mutations(choice):
    """320 entries that differ from ENTRY in one to three places."""
    for _ in range(320):
        entry = copy.deepcopy(ENTRY)
        for _ in range(choice.randrange(1, 4)):
            kind = choice.randrange(8)
            if kind == 0:
                entry.pop(choice.choice(list(entry)), None) if len(entry) > 1 else None
            elif kind == 1 and "joints" in entry:
                entry["joints"] = entry["joints"][:choice.randrange(16)]
            elif kind == 2 and "joints" in entry and entry["joints"]:
                entry["joints"][choice.randrange(len(entry["joints"]))] = [choice.choice(BAD_NUMBERS), 3.0]
            elif kind == 3:
                entry["center"] = choice.choice([[choice.choice(BAD_NUMBERS), 2.0], [1.0], [1.0, 2.0, 3.0],
                                                 "here"])
            elif kind == 4:
                entry["scale"] = choice.choice((*BAD_NUMBERS, -1, 0, -0.0))
            elif kind == 5:
                entry["joints_vis"] = choice.choice(([0] * 16, [2] * 16, [1] * 15, ["yes"] * 16, 1,
                                                     [float("nan")] * 16))
            elif kind == 6:
                entry["image"] = choice.choice(("../../etc/passwd", "/etc/passwd", "b.jpg", "", ".", 7, None,
                                                "a.jpg/../../x", "a\0.jpg", "x" * 5000, "link.jpg"))
            elif kind == 7:
                entry = choice.choice((entry, [entry], "person", None, 3))
                break
        yield entry


def test_mutated_annotations(tmp_path):
    """Strict: each stops the run with file, index and reason, unless what it says is still a person."""
    root, refused = folder(tmp_path, ENTRY), 0
    (tmp_path / "outside.jpg").write_bytes((root / "images/a.jpg").read_bytes())
    (root / "images/link.jpg").symlink_to(tmp_path / "outside.jpg")
    for entry in mutations(random.Random(0)):
        (root / "annot/train.json").write_text(json.dumps([ENTRY, entry]))
        try:
            people = load_samples(root, "train")
            assert np.isfinite(people.joints).all() and people.visible.any() and people.side.min() > 0
        except BadInput as error:
            assert "train.json, entry 1: " in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 280


@pytest.mark.parametrize("change", [
    dict(scale=1e-50), dict(scale="0.5"), dict(scale=True), dict(scale=[0.5]), dict(center=["12", 3.0]),
    dict(image="a\nb.jpg"), dict(joints=[["12", 3.0]] * 16), dict(joints=[[float("nan"), 3.0]] * 16),
    dict(joints_vis=["1"] * 16), dict(image="sub/s.jpg")])
def test_what_must_be_refused(change, tmp_path):
    root = folder(tmp_path, ENTRY, dict(ENTRY, **change))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/s.jpg").write_bytes((root / "images/a.jpg").read_bytes())
    (root / "images/sub").symlink_to(tmp_path / "elsewhere")  # a linked folder leads out, too
    with pytest.raises(BadInput, match="train.json, entry 1: ") as caught:
        load_samples(root, "train")
    one_line(caught)


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """Pillow hands Encapsulated PostScript to Ghostscript, whatever the file is called."""
    from PIL import EpsImagePlugin
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    root = folder(tmp_path, ENTRY)
    Image.new("RGB", (40, 40)).save(root / "images/a.jpg", "EPS")
    with pytest.raises(BadInput, match="a.jpg cannot be read as an image"):
        load_samples(root, "train").image(0)
    with pytest.raises(BadInput, match="a.jpg cannot be read as an image"):
        read_image(root / "images/a.jpg")
    assert not started


def test_links_and_doubles(tmp_path):
    root = folder(tmp_path, ENTRY, ENTRY)
    with pytest.raises(BadInput, match="entry 1: is the same as one before"):
        load_samples(root, "train")
    (tmp_path / "outside.jpg").write_bytes((root / "images/a.jpg").read_bytes())
    (root / "images/link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "annot/train.json").write_text(json.dumps([dict(ENTRY, image="link.jpg")]))
    with pytest.raises(BadInput, match="is a link to something outside"):
        load_samples(root, "train")


def test_damaged_images_stop_the_cutting_by_name(tmp_path):
    """60 of them after 1,200 good ones: each is refused in one line, and the first ends the cutting."""
    root, choice = folder(tmp_path, ENTRY), random.Random(0)
    whole = (root / "images/a.jpg").read_bytes()
    Image.new("1", (20001, 10000)).save(root / "images/bad0.jpg", "PNG")       # a decompression bomb
    for n in range(1, 60):
        damaged = (b"", b"text", whole[:choice.randrange(len(whole) - 20)])[n % 3]
        (root / f"images/bad{n}.jpg").write_bytes(damaged)
    entries = [*(dict(ENTRY, scale=0.1 + n / 10000) for n in range(1200)),
               *(dict(ENTRY, image=f"bad{n}.jpg") for n in range(60))]
    (root / "annot/train.json").write_text(json.dumps(entries))
    people = load_samples(root, "train")
    for n in range(60):
        with pytest.raises(BadInput, match=f"bad{n}.jpg cannot be read as an image") as caught:
            people.image(1200 + n)
        one_line(caught)
    with pytest.raises(BadInput, match="train, entry 1200: .*bad0.jpg cannot be read as .*200 million"):
        store(people, 64)


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_many_entries(count, tmp_path):
    root = folder(tmp_path, *(dict(ENTRY, scale=0.1 + n / 10 ** 6) for n in range(count)))
    assert len(load_samples(root, "train", images=False)) == count


@pytest.mark.parametrize("text", ["[]", "{}", "", "null", "[" * 100_000, "\ufeff[]", '[{"image": '])
def test_files_that_hold_nobody(text, tmp_path):
    root = folder(tmp_path, ENTRY)
    (root / "annot/train.json").write_text(text)
    with pytest.raises(BadInput, match="train.json") as caught:
        load_samples(root, "train")
    one_line(caught)


def test_a_truncated_or_foreign_crop_cache_is_cut_anew(tmp_path):
    people = load_samples(folder(tmp_path, ENTRY, dict(ENTRY, scale=0.3)), "train")
    first = np.array(store(people, 64, tmp_path / "cache"))
    file, = (tmp_path / "cache").glob("*.bin")
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:50], b"", b"something else", whole[:200] + bytes(10)):
        file.write_bytes(content)
        np.testing.assert_array_equal(store(people, 64, tmp_path / "cache"), first)
