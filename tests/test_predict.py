"""predict.py: whose boxes are whose, what is written, and one clear line for everything that is wrong."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import call, refused, run
from PIL import Image
from test_data import ENTRY, folder
from test_images import touch

import checkpoint
import predict as module
from common import BadInput
from crops import store
from data_mpii import load_samples
from evaluate import write_json
from images import list_files, read_image
from models import build_student
from people import Found
from predict import json_file, match_boxes, people_in, read_boxes, record

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights/student-cc-gd-drawn.pt"
IMAGE = Image.linear_gradient("L").resize((90, 60)).convert("RGB")


def predict(*arguments, cwd):
    return call("predict.py", *arguments, "--checkpoint", WEIGHTS, "--device", "cpu", cwd=cwd)


# ------------------------------------------------------------------------------- boxes

@pytest.mark.parametrize("text,message", [
    ("[", "Expecting"), ("[1]", "must be json such as"), ('{"a.jpg": [[1, 2, 3]]}', "must be json such as"),
    ('{"a.jpg": ["1234"]}', "must be json such as"), ('{"a.jpg": {"1234": 1}}', "must be json such as"),
    ('{"a.jpg": [["1", 2, 3, 4]]}', "must be json such as"), (20000 * "[", "must be json such as"),
    ('{"a.jpg": [], "a.jpg": []}', "a.jpg is named twice"),
    ('{"a.jpg": [[1, 2, 3, 1%s]]}' % (400 * "0"), "must be json such as"),
    ('{"a.jpg": [[1, 2, 0, 4]]}', "size above 0"), ('{"a.jpg": [[1, 2, NaN, 4]]}', "size above 0")])
def test_bad_box_files(text, message, tmp_path):
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_boxes(tmp_path / "boxes.json")


def test_boxes_belong_to_one_image(tmp_path, monkeypatch):
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


# ------------------------------------------------------------------------------- what is written

def test_a_json_file_is_whole_or_not_there(tmp_path, capsys):
    """What was found before an interruption is beside it; a file without a record replaces none."""
    def files_of(name):
        return [found["file"] for found in json.loads((tmp_path / name).read_text())["images"]]

    made = False
    for count in (0, 1, 3, 0):
        with json_file(tmp_path / "a.json") as add:
            for n in range(count):
                add({"file": f"{n}.jpg"})
        made |= count > 0
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"] * made
    assert files_of("a.json") == ["0.jpg", "1.jpg", "2.jpg"]
    for count, reason in ((0, KeyboardInterrupt), (2, KeyboardInterrupt), (1, SystemExit)):
        with pytest.raises(reason), json_file(tmp_path / "a.json") as add:
            for n in range(count):
                add({"file": f"new {n}.jpg"})
            raise reason
        said = capsys.readouterr().err
        assert (f"what was found until then is in {tmp_path}/a.json.partial" in said) == bool(count)
        assert not count or files_of("a.json.partial") == [f"new {n}.jpg" for n in range(count)]
        assert files_of("a.json") == ["0.jpg", "1.jpg", "2.jpg"]


def test_joints_in_an_image_that_was_decoded_smaller():
    """The centre of the first of four pixels is at 1.5 in the file, its edge at the file's edge."""
    people = [Found([2, 3, 5, 5], np.tile([[0.0, 10.0]], (16, 1)), np.ones(16))]
    found, = record("x.jpg", people, 0.25)["people"]
    assert found["box"] == [8, 12, 20, 20] and found["joints"]["r-knee"] == [1.5, 41.5, 1]
    assert found["score"] == 1


def test_large_jpegs_and_pngs_give_the_same_joints(tmp_path):
    """Blobs on odd sides, decoded at a half and at a quarter; one box, and the whole image as the box."""
    torch.manual_seed(0)
    model = build_student("cc", "gs", "none", "tiny").eval()
    how = SimpleNamespace(device="cpu", flip_test=False)
    for width, height, reduced in ((9003, 301, 1 / 2), (16_387, 101, 1 / 4)):
        y, x = np.mgrid[:height, :width]
        grey = (127 + 60 * np.sin(x / 400) + 60 * np.cos(y / 300)).astype(np.uint8)
        Image.fromarray(grey).convert("RGB").save(tmp_path / "a.jpg", quality=98, subsampling=0)
        Image.fromarray(grey).save(tmp_path / "a.png", compress_level=1)
        (jpg, scale), (png, one) = (read_image(tmp_path / name) for name in ("a.jpg", "a.png"))
        assert (scale, one) == (reduced, 1)
        for how.whole, box in ((True, [0, 0, width, height]), (False, [width / 4, 2, width / 2, 300])):
            entries = []
            for image, part in ((jpg, scale), (png, 1)):
                people = people_in(how, model, image, [[part * number for number in box]])
                entries += record("a", people, part)["people"]
            assert entries[0]["box"] == entries[1]["box"] == box
            ours, theirs = (np.array(list(entry["joints"].values()))[:, :2] for entry in entries)
            assert np.median(np.abs(ours - theirs)) < 0.1


def test_who_is_looked_for_and_where(monkeypatch):
    """Everybody by themselves, somebody in each of some boxes, nobody in none, one in the whole image."""
    monkeypatch.setattr(module, "find_people", lambda *how: ["found", *how])
    how = SimpleNamespace(whole=False, device="cpu", flip_test=True)
    assert people_in(how, "model", IMAGE, None) == ["found", "model", IMAGE, "cpu"]
    monkeypatch.setattr(module, "poses_in_boxes", lambda *how, **more: [how[2], more])
    assert people_in(how, "model", IMAGE, [[1, 2, 3, 4]]) == [[[1, 2, 3, 4]], {}]
    assert people_in(how, "model", IMAGE, []) == [[], {}]
    how.whole = True
    assert people_in(how, "model", IMAGE, None) == [[[0, 0, 90, 60]], {"tight": False}]


# ------------------------------------------------------------------------------- the command

def test_a_process(tmp_path):
    """A folder, an image in it that cannot be read, a name that is not ASCII; whoever may be in it."""
    (tmp_path / "my photos").mkdir()
    IMAGE.save(tmp_path / "my photos/é.jpg")
    (tmp_path / "my photos/text.jpg").write_text("hello")
    done = run("predict.py", "my photos", "--json", "joints.json", "--checkpoint", WEIGHTS, "--device", "cpu",
               cwd=tmp_path)
    assert done.returncode == 2 and re.search(r"^\d+ (person|people) in 1 of 2 images\b", done.stdout, re.M)
    line, = done.stderr.strip().splitlines()
    assert line.startswith("error: my photos/text.jpg cannot be read as an image")
    assert Image.open(tmp_path / "predictions/é-pose.jpg").size == (90, 60)
    image, = json.loads((tmp_path / "joints.json").read_text())["images"]
    assert all(len(person["joints"]) == 16 for person in image["people"])


@pytest.fixture
def crowd(monkeypatch):
    """predict.py finds as many people as the name of the file says, one right of the other."""
    counts = []

    def find(model, image, *how):
        return [Found([20.0 * n, 0, 9, 9], np.full((16, 2), 20.0 * n), np.full(16, 0.9))
                for n in range(counts.pop(0))]

    def make(tmp_path, *numbers):
        for n, count in enumerate(numbers):
            IMAGE.save(tmp_path / f"{n}-has-{count}.jpg")
        counts[:] = numbers
        return [f"{n}-has-{count}.jpg" for n, count in enumerate(numbers)]

    monkeypatch.setattr(module, "find_people", find)
    return make


@pytest.mark.parametrize("numbers,words", [
    ([1], "1 person in 1 of 1 images: "), ([2, 0, 1], "3 people in 3 of 3 images, nobody found in 1: "),
    ([0], "0 people in 1 of 1 images, nobody found in 1: "), ([5], "5 people in 1 of 1 images: ")])
def test_how_many_are_found_is_said(crowd, numbers, words, tmp_path):
    """And drawn, and written; that nobody is found is no error."""
    done = predict(*crowd(tmp_path, *numbers), "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.splitlines()[-1] == f"{words}predictions/*-pose.jpg, all.json"
    images = json.loads((tmp_path / "all.json").read_text())["images"]
    assert [len(image["people"]) for image in images] == numbers
    for n, (image, count) in enumerate(zip(images, numbers)):
        assert image["file"] == f"{n}-has-{count}.jpg"
        for k, person in enumerate(image["people"]):
            assert person["box"] == [20 * k, 0, 9, 9] and person["joints"]["pelvis"] == [20 * k, 20 * k, 0.9]
        pixels = np.asarray(Image.open(tmp_path / f"predictions/{n}-has-{count}-pose.jpg"))
        drawn = [pixels[20 * k + 1, 20 * k + 1].min() > 200 for k in range(1, min(count, 3))]
        assert all(drawn), (n, count)
        if not count:
            assert np.abs(pixels.astype(int) - IMAGE).max() < 9


def test_a_photo_that_is_called_as_another_ones_drawing_is_kept(crowd, tmp_path):
    """And --json may stand in --out before there is such a folder."""
    crowd(tmp_path, 1, 2)
    (tmp_path / "0-has-1.jpg").rename(tmp_path / "tree.jpg")
    (tmp_path / "1-has-2.jpg").rename(tmp_path / "tree-pose.jpg")
    own = (tmp_path / "tree-pose.jpg").read_bytes()
    done = predict("tree.jpg", "tree-pose.jpg", "--out", ".", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "tree-pose.jpg").read_bytes() == own, done
    assert {path.name for path in tmp_path.iterdir()} == {
        "tree.jpg", "tree-pose.jpg", "tree-2-pose.jpg", "tree-pose-pose.jpg"}
    crowd(tmp_path, 1)
    done = predict("0-has-1.jpg", "--out", "new/out", "--json", "new/out/all.json", cwd=tmp_path)
    assert done.returncode == 0, done
    assert {path.name for path in (tmp_path / "new/out").iterdir()} == {"0-has-1-pose.jpg", "all.json"}
    (tmp_path / "new/out/folder").mkdir()
    refused(predict("0-has-1.jpg", "--out", "new/out", "--json", "new/out/folder", cwd=tmp_path), "a folder")
    refused(predict("no.jpg", "--out", "other", "--json", "other/all.json", cwd=tmp_path), "no file no.jpg")
    assert not (tmp_path / "other").exists()


def test_ctrl_c_keeps_what_was_found(crowd, monkeypatch, tmp_path):
    names, find = crowd(tmp_path, 2, 1, 1), module.find_people

    def stop_at_the_third(*how):
        if (tmp_path / "predictions/1-has-1-pose.jpg").exists():
            raise KeyboardInterrupt
        return find(*how)

    monkeypatch.setattr(module, "find_people", stop_at_the_third)
    (tmp_path / "all.json").write_text("older")
    done = predict(*names, "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 130 and (tmp_path / "all.json").read_text() == "older"
    assert done.stderr.endswith("all.json.partial\ninterrupted\n"), done
    images = json.loads((tmp_path / "all.json.partial").read_text())["images"]
    assert [len(image["people"]) for image in images] == [2, 1]


def test_images_that_cannot_be_read_leave_an_older_json(tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "all.json").write_text("older")
    refused(predict("text.jpg", "--json", "all.json", cwd=tmp_path), "text.jpg cannot be read as an image")
    assert (tmp_path / "all.json").read_text() == "older"


def test_boxes_and_the_whole_image(tmp_path):
    """--box for each image alike, --boxes for those that it names; in the others people are found."""
    for name in ("a.jpg", "b.jpg"):
        IMAGE.save(tmp_path / name)
    (tmp_path / "boxes.json").write_text('{"a.jpg": [[1, 2, 30, 40], [9, 9, 30, 30]], "b.jpg": []}')
    for words, boxes in ((["--whole"], [[[0, 0, 90, 60]]] * 2),
                         (["--box", 1, 2, 30, 40, "--box", 5, 6, 7, 8], [[[1, 2, 30, 40], [5, 6, 7, 8]]] * 2),
                         (["--boxes", "boxes.json"], [[[1, 2, 30, 40], [9, 9, 30, 30]], []])):
        done = predict("a.jpg", "b.jpg", *words, "--json", "all.json", cwd=tmp_path)
        assert done.returncode == 0 and not done.stderr, done
        images = json.loads((tmp_path / "all.json").read_text())["images"]
        assert [[person["box"] for person in image["people"]] for image in images] == boxes
        assert f"{sum(map(len, boxes))} people in 2 of 2 images" in done.stdout
    for words in (["--whole", "--boxes", "boxes.json"], ["--whole", "--box", 1, 2, 3, 4],
                  ["--box", 1, 2, 3, 4, "--boxes", "boxes.json"]):
        refused(predict("a.jpg", *words, cwd=tmp_path),
                "--box, --boxes and --whole each say where people are: leave all but one out")


def test_a_student_without_confidence_needs_boxes(tmp_path):
    """A regression student that learns from labels alone is always sure: it would see people everywhere."""
    model = build_student("reg", "gs", "none", "tiny")
    model.head.scored = False
    checkpoint.save(tmp_path / "reg.pt", model, {"data": "mine/train"})
    for name in ("a.jpg", "b.jpg"):
        IMAGE.save(tmp_path / name)
    boxes = {"a.jpg": [[1, 2, 30, 40]]}
    for named, words in ((boxes, ["--boxes", "boxes.json"]), (boxes, [])):
        (tmp_path / "boxes.json").write_text(json.dumps(named))
        refused(call("predict.py", "a.jpg", "b.jpg", *words, "--checkpoint", "reg.pt", cwd=tmp_path),
                "reg.pt was trained without confidence, by which people are found: name them with --box, ")
    (tmp_path / "boxes.json").write_text(json.dumps({**boxes, "b.jpg": []}))
    for words, count in ((["--boxes", "boxes.json"], "1 person"), (["--whole"], "2 people")):
        done = call("predict.py", "a.jpg", "b.jpg", *words, "--checkpoint", "reg.pt", cwd=tmp_path)
        assert done.returncode == 0 and f"{count} in 2 of 2 images" in done.stdout, done


def test_images_without_a_box_of_their_own_are_searched(crowd, tmp_path):
    """Of two images --boxes names one."""
    names = crowd(tmp_path, 2, 2)
    (tmp_path / "boxes.json").write_text(json.dumps({names[0]: [[1, 2, 30, 40]]}))
    done = predict(*names, "--boxes", "boxes.json", cwd=tmp_path)
    assert done.returncode == 0 and "3 people in 2 of 2 images" in done.stdout


def test_impossible_commands(tmp_path):
    IMAGE.save(tmp_path / "é.jpg")
    (tmp_path / "some.json").write_text("[]")
    for arguments, message in (
        ([], "name images"),
        (["é.jpg", "--boxes", "some.json"], "--boxes some.json"),
        (["é.jpg", "--box", "1", "2", "0", "3"], "size above 0"),
        (["é.jpg", "--box", "900", "2", "9", "9"], "é.jpg has nothing in the box"),
        (["é.jpg", "--smooth"], "--smooth is for videos"),
        (["--camera", "-1"], "there is no camera -1"), (["--camera", str(2 ** 31)], "there is no camera"),
        (["x.jpg", "--threshold", "2"], "between 0 and 1"),
        (["nowhere.mp4"], "there is no video nowhere.mp4"),
        (["nowhere.jpg"], "there is no file nowhere.jpg"),
    ):
        refused(predict(*arguments, cwd=tmp_path), message)


def test_what_a_folder_holds_is_read_or_named(tmp_path, monkeypatch):
    """Images in formats that are not read, a lost link, and a folder that is closed, each in a line."""
    holiday = tmp_path / "holiday"
    touch(holiday, "phone.HEIC", "raw.dng", "new.jxl", "notes.txt", "._phone.heic", "closed/x.jpg")
    IMAGE.save(holiday / "a.jfif", "JPEG")
    IMAGE.save(holiday / "b.pgm")
    (holiday / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    scan = os.scandir

    def closed(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    done = predict(holiday, cwd=tmp_path)
    assert done.returncode == 2 and "2 of 6 images" in done.stdout and "predictions/*-pose.jpg" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
    for name in ("closed", "phone.HEIC", "raw.dng", "new.jxl", "lost.jpg"):
        assert sum(name in line for line in lines) == 1, name


def test_one_image_that_cannot_be_written_does_not_end_the_others(tmp_path):
    """Too wide for a JPEG, a name that is too long with its ending, a folder that stands in the way."""
    folder = tmp_path / "some"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.jpg", f"{'m' * 251}.jpg", "taken.jpg", "deep/z.jpg"):
        IMAGE.save(folder / name)
    Image.new("L", (65_501, 2)).save(folder / "pano.png")
    (tmp_path / "out/taken-pose.jpg").mkdir(parents=True)
    done = predict(folder, "--whole", "--out", "out", "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 2 and "2 of 5 images: out/**/*-pose.jpg" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3 and all("cannot be written" in line and "all.json" in line for line in lines)
    assert "a JPEG has at most 65,500 pixels a side" in next(line for line in lines if "pano.png" in line)
    entries = json.loads((tmp_path / "all.json").read_text())["images"]
    assert len(entries) == 5 and all(len(entry["people"]) == 1 for entry in entries)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "a-pose.jpg", "deep", "taken-pose.jpg"}
    assert (tmp_path / "out/deep/z-pose.jpg").exists()


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    IMAGE.save(tmp_path / "a.jpg")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        (["--out", "a.jpg"], "a.jpg cannot be written into (Not a directory): name another place with --out"),
        (["--json", "folder"], "--json folder is a folder: name a file"),
        (["--json", "./a.jpg"], "--json a.jpg would be written over a.jpg, which is read: name another file"),
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
def test_names_that_are_not_utf_8(tmp_path):
    """In a terminal that is strict about it, as a process."""
    odd = os.fsdecode(b"d\xe9")
    (tmp_path / odd).mkdir()
    IMAGE.save(tmp_path / odd / "a.jpg")
    touch(tmp_path / odd, "text.jpg", "clip.mp4")
    done = run("predict.py", odd, "--checkpoint", WEIGHTS, "--out", f"{odd}/out", cwd=tmp_path,
               env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 2, done.stderr
    assert re.search(r" in 1 of 2 images.*: d\\udce9/out/", done.stdout)
    video = "d\\udce9/clip.mp4" if importlib.util.find_spec("cv2") else "cv2 is not installed"
    assert "error: d\\udce9/text.jpg cannot be read" in done.stderr and video in done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / odd / "out/a-pose.jpg").exists()


def test_a_json_file_leaves_links_and_pipes_what_they_are(tmp_path):
    (tmp_path / "real.json").write_text("before")
    (tmp_path / "link.json").symlink_to("real.json")
    (tmp_path / "new.json").symlink_to("later.json")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link.json", "new.json", "pipe"):
        with json_file(tmp_path / name) as add:
            add({"file": "a.jpg"})
    made = [(tmp_path / "real.json").read_text(), (tmp_path / "later.json").read_text(),
            os.read(reader, 9999).decode()]
    assert [json.loads(text)["images"] for text in made] == 3 * [[{"file": "a.jpg"}]]
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="this system has no /dev/stdout")
@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1"])
@pytest.mark.parametrize("script,words,said", [
    ("predict.py", ["a.jpg", "--whole"], "1 person in 1 of 1 images"),
    ("evaluate.py", ["--data", "."], "PCKh")])
def test_json_has_standard_output_for_itself(script, words, said, name, tmp_path):
    """What is printed goes to standard error; a file that it is sent to keeps what it holds."""
    IMAGE.save(tmp_path / "a.jpg")
    folder(tmp_path, ENTRY, split="valid")
    (tmp_path / "log.txt").write_text("first\n")
    with open(tmp_path / "log.txt", "a") as log:
        command = [sys.executable, ROOT / script, *words, "--checkpoint", WEIGHTS, "--json", name]
        done = subprocess.run(command, cwd=tmp_path, stdout=log, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and said in done.stderr
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("first\n") and json.loads(text.removeprefix("first\n"))
    assert not (tmp_path / "-").exists()


def test_figures_are_written_over_nothing_that_is_read(tmp_path):
    """Nor over what was there, where they cannot be written."""
    data, checkpoint_file = folder(tmp_path / "set", ENTRY, split="valid"), tmp_path / "my.pt"
    checkpoint_file.write_bytes(WEIGHTS.read_bytes())
    for target in (checkpoint_file, data / "annot/valid.json"):
        before = target.read_bytes()
        refused(call("evaluate.py", "--checkpoint", checkpoint_file, "--data", data, "--json", target,
                     cwd=tmp_path), "would be written over")
        assert target.read_bytes() == before
    (tmp_path / "boxes.json.partial").write_text("{}")
    IMAGE.save(tmp_path / "a.jpg")
    refused(predict("a.jpg", "--boxes", "boxes.json.partial", "--json", "boxes.json", cwd=tmp_path),
            "--json boxes.json would be written over boxes.json.partial, which is read: name another file")
    (tmp_path / "old.json").write_text("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(BadInput, match="old.json cannot be written: No space left"):
            write_json(tmp_path / "old.json", {"figure": 7})
    assert (tmp_path / "old.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == ["boxes.json.partial"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="this system has no /dev/shm")
def test_an_older_file_in_shared_memory_is_replaced():
    """A folder in /dev holds ordinary files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for n in range(2):
            with json_file(Path(folder) / "a.json") as add:
                add({"file": f"{n}.jpg"})
            write_json(Path(folder) / "b.json", {"figure": n})
        assert json.loads(Path(folder, "a.json").read_text())["images"] == [{"file": "1.jpg"}]
        assert json.loads(Path(folder, "b.json").read_text()) == {"figure": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="a file's size is limited by the system's signal")
def test_a_json_file_that_does_not_fit_is_kept_under_another_name(tmp_path):
    """Both while the work goes on and when it is interrupted; in a process, as the limit stays."""
    for rest in ("for n in range(99): add({'file': 8999 * 'a'})", "raise KeyboardInterrupt"):
        code = ("import resource, signal\nfrom pathlib import Path\n"
                "from predict import JsonError, json_file\n"
                "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\ntry:\n"
                f"    with json_file(Path({str(tmp_path / 'a.json')!r})) as add:\n"
                f"        add({{'file': 8900 * 'a'}})\n        {rest}\n"
                "except JsonError as error: print(error)")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert "a.json cannot be written: File too large" in done.stdout, done
        assert done.stderr == (f"what was found until then is in {tmp_path}/a.json.partial, whose end may be "
                               "missing\n")
        assert (tmp_path / "a.json.partial").read_text().startswith('{"joints": ["r-ankle"')
        assert len(list(tmp_path.iterdir())) == 1


def test_a_json_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(BadInput, match="--json .*joints.json cannot be written: No space left on device"):
        with json_file(tmp_path / "joints.json") as add:
            add({"file": "a.jpg"})
    assert json.loads((tmp_path / "joints.json.partial").read_text())["images"] == [{"file": "a.jpg"}]
