"""Videos: whatever OpenCV reads, at the pace of their timestamps, and why one cannot be written."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from commands import call, refused, run
from PIL import Image

import predict
import videos as module
from people import Found

cv2 = pytest.importorskip("cv2")
WEIGHTS = Path(__file__).resolve().parents[1] / "weights/student-cc-gd-drawn.pt"


@pytest.fixture
def film(tmp_path):
    """A function that writes 24 frames, or others, into a file of any kind that OpenCV writes."""
    def make(name, rate=30, frames=24, codec="mp4v", size=(96, 80)):
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*codec), rate, size)
        for n in range(frames):
            writer.write(np.full((*size[::-1], 3), 9 * n % 256, np.uint8))
        writer.release()
        return tmp_path / name

    return make


def seconds(path):
    stream = cv2.VideoCapture(str(path))
    return stream.get(cv2.CAP_PROP_FRAME_COUNT) / stream.get(cv2.CAP_PROP_FPS)


def predict_film(*arguments, cwd):
    return call("predict.py", *arguments, "--checkpoint", WEIGHTS, "--device", "cpu", cwd=cwd)


def test_whatever_opencv_reads_is_a_video(film, tmp_path):
    """By any name where it is named, by its ending in folders, which may hold images, too."""
    (tmp_path / "some").mkdir()
    image = Image.new("RGB", (90, 60), (200, 120, 40))
    for name, codec in (("some/a.m4v", "mp4v"), ("some/b.mpg", "PIM1"), ("some/c.3gp", "mp4v"),
                        ("some/d.ts", "mp4v"), ("some/e.wmv", "WMV2"), ("x.avi", "MJPG")):
        film(name, frames=24 if name == "some/d.ts" else 3, codec=codec)
    (tmp_path / "x.avi").rename(tmp_path / "clip.unknown")
    image.save(tmp_path / "image.unknown", "PNG")
    done = predict_film("some", "clip.unknown", "image.unknown", cwd=tmp_path)
    assert done.returncode == 0 and "1 of 1 images" in done.stdout, done
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {
        *(f"{name}-pose.mp4" for name in ("a", "b", "c", "d", "e", "clip")), "image-pose.jpg"}
    image.save(tmp_path / "some/f.jpg")
    (tmp_path / "boxes.json").write_text('{"f.jpg": [[1, 2, 30, 40]]}')
    done = predict_film("some", "--boxes", "boxes.json", cwd=tmp_path)
    assert done.returncode == 0 and "as --boxes is for images: some/a.m4v, " in done.stdout
    refused(predict_film("some/a.m4v", "--boxes", "boxes.json", cwd=tmp_path), "--boxes is for images")
    refused(predict_film("some/a.m4v", "--box", "9000", "9000", "10", "10", cwd=tmp_path),
            "a.m4v has nothing in the box")
    (tmp_path / "text.unknown").write_text("hello")
    refused(predict_film("text.unknown", cwd=tmp_path), "text.unknown cannot be read as an image")


@pytest.mark.parametrize("rate", [211.222, 59.94006, 1 / 3])
def test_a_video_keeps_its_pace(film, tmp_path, rate):
    film("clip.avi", rate, frames=4, codec="MJPG")
    done = predict_film("clip.avi", "--smooth", cwd=tmp_path)
    assert done.returncode == 0 and "4 frames" in done.stdout, done
    assert seconds(tmp_path / "predictions/clip-pose.mp4") == pytest.approx(4 / rate, rel=0.01)


class Stream:
    """Stands for cv2.VideoCapture: frames with timestamps, in seconds, and what a header states."""

    def __init__(self, times, rate, count=0):
        self.times, self.at = times, -1
        self.stated = {cv2.CAP_PROP_FPS: rate, cv2.CAP_PROP_FRAME_COUNT: count}

    def isOpened(self):
        return True

    def grab(self):
        self.at += 1
        return self.at < len(self.times)

    def read(self):
        return self.grab(), np.zeros((80, 96, 3), np.uint8)

    def get(self, what):
        return self.stated[what] if what in self.stated else 1000 * self.times[self.at]

    def release(self):
        pass


def test_the_rate_is_that_of_the_timestamps(film, tmp_path, monkeypatch):
    """A recording of a browser, whose header states a thousand frames a second; one without timestamps; one
    whose last frame has none.
    """
    film("clip.webm.avi", codec="MJPG").rename(tmp_path / "clip.webm")
    uneven, steps, opened = [0, 0.04, 0.073, 0.1, 0.14, 0.174], [], module.open_video
    monkeypatch.setattr(module.OneEuro, "__call__", lambda self, x, dt, side: steps.append(dt) or x)
    for times, stated, rate in ((uneven, 1000, 5 / 0.174), ([0] * 6, 12, 12), ([0] * 6, 1000, 25),
                                ([0, 0.04, 0.08, 0.12, 0.16, 0], 1000, 25), (uneven, np.nan, 5 / 0.174)):
        def stream(path, times=times, stated=stated):
            return opened(path) if "pose" in path.name else Stream(times, stated)

        steps.clear()
        monkeypatch.setattr(module, "open_video", stream)
        done = predict_film("clip.webm", "--smooth", "--whole", cwd=tmp_path)
        assert done.returncode == 0, done
        assert seconds(tmp_path / "predictions/clip-pose.mp4") == pytest.approx(6 / rate, rel=0.01), stated
        if times is uneven:
            assert steps[1:] == pytest.approx(np.diff(times)) and steps[0] == pytest.approx(1 / rate, 0.01)


@pytest.mark.parametrize("smooth", [False, True])
def test_the_people_of_a_video(film, tmp_path, monkeypatch, smooth):
    """One who stands at (20, 30) and leaves, one who comes and stands at (70, 50), and one who moves.

    Each is smoothed by itself: who stands is drawn there, whoever else is seen; who moves is drawn behind.
    """
    one = lambda x, y: Found([x - 5, y - 5, 10, 10], np.full((16, 2), [x, y], float), np.ones(16))
    frames = [{0: one(20, 30), 2: one(10, 10)}, {0: one(20, 30), 1: one(70, 50), 2: one(14, 10)},
              {1: one(70, 50), 2: one(18, 10)}, {}]
    followed, drawn, draw = iter(frames), [], predict.draw_poses
    monkeypatch.setattr(predict, "Tracker", lambda *how: lambda image: dict(next(followed)))
    monkeypatch.setattr(predict, "draw_poses",
                        lambda image, people, *how: drawn.append(list(people)) or draw(image, people, *how))
    film("clip.avi", frames=4, codec="MJPG")
    done = predict_film("clip.avi", *["--smooth"] * smooth, cwd=tmp_path)
    assert done.returncode == 0, done
    assert "clip-pose.mp4: 4 frames, 30 a second, at most 3 people in a frame" in done.stdout
    for people, frame in zip(drawn, frames):
        assert len(people) == len(frame)
        for found, (number, expected) in zip(people, frame.items()):
            behind = (expected.joints - found.joints)[:, 0]
            still = number < 2 or not smooth or frame is frames[0]
            assert np.allclose(behind, 0) if still else (behind > 0.5).all()
            assert np.allclose(found.joints[:, 1], expected.joints[:, 1]) and found.box == expected.box


def test_the_joints_of_a_video(film, tmp_path, monkeypatch):
    """--json: an entry a frame, with its number, its second and each person's id; images stand behind."""
    one = Found([5, 6, 30, 40], np.full((16, 2), [20, 30], float), np.full(16, 0.5))
    followed = iter([{}, {3: one}, {3: one, 4: one}])
    monkeypatch.setattr(predict, "Tracker", lambda *how: lambda image: next(followed))
    film("clip.avi", rate=10, frames=3, codec="MJPG")
    Image.new("RGB", (90, 60)).save(tmp_path / "a.jpg")
    done = predict_film("clip.avi", "a.jpg", "--whole", "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 0, done
    fixed = json.loads((tmp_path / "all.json").read_text())["images"]
    assert [[person["id"] for person in frame["people"]] for frame in fixed[:3]] == [[0]] * 3
    assert fixed[3]["file"] == "a.jpg" and "id" not in fixed[3]["people"][0] and "frame" not in fixed[3]
    done = predict_film("clip.avi", "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("at most 2 people in a frame, all.json\n"), done
    frames = json.loads((tmp_path / "all.json").read_text())["images"]
    assert [(frame["file"], frame["frame"], frame["seconds"]) for frame in frames] == [
        ("clip.avi", 0, 0), ("clip.avi", 1, 0.1), ("clip.avi", 2, 0.2)]
    assert [[person["id"] for person in frame["people"]] for frame in frames] == [[], [3], [3, 4]]
    assert frames[1]["people"][0]["joints"]["r-ankle"] == [20, 30, 0.5]
    assert frames[1]["people"][0]["box"] == [5, 6, 30, 40] and frames[1]["people"][0]["score"] == 0.5
    # into standard output: 40 frames are more than one block of it
    film("clip.avi", rate=10, frames=40, codec="MJPG")
    done = run("predict.py", "clip.avi", "--whole", "--json", "/dev/stdout", "--checkpoint", WEIGHTS,
               "--device", "cpu", cwd=tmp_path)
    assert len(json.loads(done.stdout)["images"]) == 40
    assert done.stderr.splitlines()[-1].startswith("predictions/clip-pose.mp4: 40 frames")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_json_file_that_cannot_be_written_ends_the_work(film, tmp_path):
    for name in ("a.avi", "b.avi"):
        film(name, frames=40, codec="MJPG")
    done = predict_film("a.avi", "b.avi", "--whole", "--json", "/dev/full", cwd=tmp_path)
    ends, error = done.stderr.splitlines()
    assert done.returncode == 2 and ends.startswith("predictions/partial-a-pose.mp4 ends after ")
    assert error == "error: --json /dev/full cannot be written: No space left on device"


def test_seconds_without_timestamps(film, tmp_path, monkeypatch):
    """A frame that has none is as long as others."""
    film("clip.webm.avi", codec="MJPG").rename(tmp_path / "clip.webm")
    opened, notes = module.open_video, []
    for times, expected in (([0] * 4, [0, 0.1, 0.2, 0.3]), ([0, 0.1, 0.25, 0], [0, 0.1, 0.25, 0.37])):
        def stream(path, times=times):
            return opened(path) if "pose" in path.name else Stream(times, 10)

        monkeypatch.setattr(module, "open_video", stream)
        notes.clear()
        module.draw_video(tmp_path / "clip.webm", tmp_path / "pose.mp4", lambda image: {},
                          lambda image, people: None, lambda people, frame, seconds: notes.append(seconds))
        assert notes == pytest.approx(expected, abs=0.01)


def test_ctrl_c_in_a_film_says_where_it_ends(film, tmp_path, monkeypatch):
    film("clip.avi", rate=10, frames=9, codec="MJPG")
    followed = iter([{}, {}])
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/clip-pose.mp4").write_text("older")

    def follow(image):
        for people in followed:
            return people
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "Tracker", lambda *how: follow)
    done = predict_film("clip.avi", "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-3:] == ["predictions/partial-clip-pose.mp4 ends after 2 frames",
                                             f"what was found until then is in {tmp_path}/all.json.partial",
                                             "interrupted"]
    assert len(json.loads((tmp_path / "all.json.partial").read_text())["images"]) == 2
    assert not (tmp_path / "all.json").exists()
    assert (tmp_path / "predictions/clip-pose.mp4").read_text() == "older"
    assert seconds(tmp_path / "predictions/partial-clip-pose.mp4") == pytest.approx(0.2)


def test_names_that_are_those_of_others(film, tmp_path):
    """A colon, before which FFmpeg looks for a protocol, and a video called as another's drawing would be."""
    film("b.mp4", frames=5).rename(tmp_path / "clip12:30.mp4")
    film("a.mp4", frames=3)
    own = {name: film(name, frames=7).read_bytes() for name in ("a-pose.mp4", "partial-a-2-pose.mp4")}
    done = predict_film("clip12:30.mp4", "a.mp4", *own, "--whole", "--out", ".", cwd=tmp_path)
    assert done.returncode == 0, done
    assert "clip12:30-pose.mp4: 5 frames" in done.stdout and "a-3-pose.mp4: 3 frames" in done.stdout
    for name, content in own.items():
        assert (tmp_path / name).read_bytes() == content
        assert f"{name[:-4]}-pose.mp4: 7 frames" in done.stdout
    assert len(list(tmp_path.glob("partial-*"))) == 2


def test_what_is_written_of_a_video_that_fails(film, tmp_path):
    """Of several videos one whose name is too long, and one that cannot be written: the others go on, and
    --json holds these alone.
    """
    (tmp_path / "some").mkdir()
    for name in ("b.avi", "c.avi"):
        film(f"some/{name}", frames=2, codec="MJPG")
    (tmp_path / "some/a.mp4").symlink_to("x" * 300)
    (tmp_path / "predictions/b-pose.mp4").mkdir(parents=True)
    done = predict_film("some", "--json", "x.json", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2
    assert "there is no video some/a.mp4" in done.stderr
    assert "b-pose.mp4 is a folder: remove it, or name another place with --out" in done.stderr
    assert [entry["file"] for entry in json.loads((tmp_path / "x.json").read_text())["images"]] == (
        ["some/c.avi"] * 2)


def test_one_box_for_all_frames(film, tmp_path, monkeypatch):
    """With --box or --whole nobody is looked for, nor followed."""
    monkeypatch.setattr(predict, "find_people", None)
    monkeypatch.setattr(predict.Tracker, "__call__", None)
    film("clip.avi", frames=3, codec="MJPG")
    for words, count in ((["--whole"], "1 person"),
                         (["--box", 5, 6, 30, 40, "--box", 50, 6, 30, 40], "2 people")):
        done = predict_film("clip.avi", *words, cwd=tmp_path)
        assert done.returncode == 0, done
        assert done.stdout.endswith(f"3 frames, 30 a second, at most {count} in a frame\n")
    monkeypatch.setattr(predict, "Tracker", lambda *how: lambda image: {})
    assert predict_film("clip.avi", cwd=tmp_path).stdout.endswith("3 frames, 30 a second, nobody found\n")


def test_a_camera_keeps_its_pace_however_slow_the_network_is(tmp_path, monkeypatch):
    """Four frames, which take half a second each, at ten a second."""
    opened, clock = module.open_video, iter(np.arange(0, 99, 0.5))
    monkeypatch.setattr(
        module, "open_video", lambda source: Stream([0] * 4, 10) if source == 0 else opened(source))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    done = predict_film("--camera", "0", "--json", "all.json", cwd=tmp_path)
    assert done.returncode == 0 and ": 20 frames, 10 a second" in done.stdout, done
    drawn, = (tmp_path / "predictions").glob("camera-0-20*-pose.mp4")                # the time is in its name
    assert seconds(drawn) == pytest.approx(2)
    frames = json.loads((tmp_path / "all.json").read_text())["images"]
    assert [(frame["frame"], frame["seconds"]) for frame in frames] == [(0, 0.5), (5, 1), (10, 1.5), (15, 2)]


def test_errors_name_a_camera(tmp_path, monkeypatch):
    opened = module.open_video
    for frames, box, message in (([0] * 4, (9000, 0, 5, 5), "camera 0 has nothing in the box"),
                                 ([], (0, 0, 5, 5), "camera 0 gave no frame")):
        monkeypatch.setattr(
            module, "open_video", lambda source: Stream(frames, 10) if source == 0 else opened(source))
        refused(predict_film("--camera", "0", "--box", *box, cwd=tmp_path), message)


def test_videos_that_are_cut_short_are_said(film, tmp_path):
    for name, codec in (("cut.avi", "MJPG"), ("cut.mkv", "mp4v")):
        whole = film(name, codec=codec).read_bytes()
        (tmp_path / name).write_bytes(whole[:len(whole) // 2])
        done = predict_film(name, cwd=tmp_path)
        refused(done, f"{name} seems to be cut short: 0.", "of 0.8 seconds could be read")
        assert seconds(tmp_path / "predictions/cut-pose.mp4") > 0.03


def test_why_a_video_cannot_be_written(film, tmp_path):
    """A full disk, a folder in its place, a name that is too long, a size that the codec does not take."""
    clip = film("clip.avi", codec="MJPG")
    out = tmp_path / "predictions"
    out.mkdir()
    if Path("/dev/full").exists():
        (out / "partial-clip-pose.mp4").symlink_to("/dev/full")
        refused(predict_film(clip, cwd=tmp_path), "clip-pose.mp4 cannot be written: No space left on device")
    (out / "clip-pose.mp4").mkdir()
    refused(predict_film(clip, cwd=tmp_path), "clip-pose.mp4 is a folder: remove it")
    clip = clip.rename(tmp_path / f"{'m' * 250}.avi")
    refused(predict_film(clip, cwd=tmp_path), "cannot be written: File name too long")
    film("dot.avi", codec="MJPG", size=(1, 1))
    done = predict_film("dot.avi", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on files")
def test_a_disk_that_fills_while_a_video_is_written(film, tmp_path):
    """Files may have 66 kB, and no more."""
    import resource
    clip, generator = tmp_path / "clip.avi", np.random.default_rng(0)
    noise = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 30, (640, 480))
    for _ in range(12):
        noise.write(generator.integers(0, 255, (480, 640, 3), dtype=np.uint8))
    noise.release()
    done = run("predict.py", clip, "--whole", "--checkpoint", WEIGHTS, "--device", "cpu", cwd=tmp_path,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (66_000, 66_000)))
    refused(done, "clip-pose.mp4 cannot be written: File too large")
    assert not list((tmp_path / "predictions").iterdir())
