"""Many pictures, many processes, and machines that lack something.

    LONG_TESTS=1 python -m pytest tests/test_load.py      # 100,000 pictures instead of 600
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import synthetic
from synthetic import draw_people

ROOT = Path(__file__).resolve().parents[1]
PICTURES = 100_000 if os.environ.get("LONG_TESTS") else 600
WEIGHTS = ROOT / "weights/student-cc-gd-drawn.pt"


def predict(*arguments, sources=ROOT, **more):
    command = [sys.executable, sources / "predict.py", *map(str, arguments), "--checkpoint", WEIGHTS,
               "--device", "cpu"]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def memory(process):
    """Resident megabytes, without files that are mapped (the crops), which the system takes back at will."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    for n, picture in enumerate(draw_people(20, 9, workers=1).image):
        Image.fromarray(picture).save(folder / f"{n}.jpg")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_flat(drawings, tmp_path):
    many = tmp_path / "many"
    for n in range(PICTURES):
        (many / f"{n // 1000}").mkdir(parents=True, exist_ok=True)
        (many / f"{n // 1000}" / f"{n}.jpg").symlink_to(drawings / f"{n % 20}.jpg")
    process = predict(many, "--json", "all.json", cwd=tmp_path)
    seen = []
    while process.poll() is None:
        done = sum(len(files) for *_, files in os.walk(tmp_path / "predictions"))
        try:
            seen.append((done, memory(process)))
        except (OSError, StopIteration):
            break
        time.sleep(0.2 if PICTURES < 10_000 else 5)
    said, errors = process.communicate()
    assert process.returncode == 0 and f"{PICTURES} of {PICTURES} images" in said, errors
    assert len(json.loads((tmp_path / "all.json").read_text())["images"]) == PICTURES
    early = max(size for done, size in seen if done <= 0.4 * PICTURES)
    late = max(size for done, size in seen if done > 0.4 * PICTURES)
    print(f"{PICTURES} pictures: {early:.0f} MB in the first two fifths, {late:.0f} MB after")
    assert late < early + 60


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_while_scoring(drawings, tmp_path):
    """From the first crop that is cut to the last that is scored; labels, which are read before, take 5 kB a
    person.
    """
    for folder in ("annot", "images"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for n in range(20):
        shutil.copy(drawings / f"{n}.jpg", tmp_path / "data/images")
    entries = [dict(image=f"{n % 20}.jpg", joints=[[10.0 + k + n % 7, 20.0 + k] for k in range(16)],
                    joints_vis=[1] * 16, center=[48.0, 48.0], scale=0.3 + n / 10**6) for n in range(PICTURES)]
    (tmp_path / "data/annot/valid.json").write_text(json.dumps(entries))
    cache = tmp_path / "cache"
    command = [sys.executable, ROOT / "evaluate.py", "--checkpoint", WEIGHTS, "--data", tmp_path / "data",
               "--cache", cache, "--device", "cpu"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = []
    while process.poll() is None:
        if cache.exists():
            try:
                seen.append(memory(process))
            except (OSError, StopIteration):
                break
        time.sleep(0.05 if PICTURES < 10_000 else 1)
    said, errors = process.communicate()
    assert process.returncode == 0 and f"PCKh on {PICTURES:,} samples of data/valid" in said, errors
    early, late = max(seen[:2 * len(seen) // 5]), max(seen[2 * len(seen) // 5:])
    print(f"{PICTURES} people scored: {early:.0f} MB in the first two fifths, {late:.0f} MB after")
    # the network's first batch of 64 is in the late part where cutting takes longest
    assert late < early + 120


CUT = """
import os, sys
import numpy as np
sys.path.insert(0, {root!r})
from crops import store
from data_mpii import load_samples
children = []
for n in range(10):
    if not (child := os.fork()):
        np.save(f"sum-{{n}}.npy", np.array(store(load_samples("data", "train"), 64, "cache")).sum())
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system knows no fork")
def test_ten_processes_share_a_cache(tmp_path):
    """Children of one process, which has imported PyTorch for all of them, so that they begin at once."""
    (tmp_path / "data/annot").mkdir(parents=True), (tmp_path / "data/images").mkdir()
    entries = []
    for n, picture in enumerate(draw_people(40, 8, workers=1).image):
        Image.fromarray(picture).save(tmp_path / f"data/images/{n}.jpg")
        entries.append(dict(image=f"{n}.jpg", joints=[[10.0 + k, 20.0] for k in range(16)],
                            joints_vis=[1] * 16, center=[48.0, 48.0], scale=0.3))
    (tmp_path / "data/annot/train.json").write_text(json.dumps(entries))
    done = subprocess.run([sys.executable, "-c", CUT.format(root=str(ROOT))], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len({int(np.load(tmp_path / f"sum-{n}.npy")) for n in range(10)}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1                # one file, nothing half-written


def test_a_clone_that_is_only_read(drawings, tmp_path):
    """Names with spaces and letters beyond ASCII, no home, one core; nothing is written beside the sources.
    """
    place, clone = tmp_path / "Ein Ordner für Bilder", tmp_path / "clone"
    place.mkdir()
    clone.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, clone)
    for path in clone.iterdir():
        path.chmod(0o444)
    clone.chmod(0o555)
    before = {path: path.stat().st_mtime_ns for path in clone.rglob("*")}
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    one_core = None
    if hasattr(os, "sched_setaffinity"):
        one_core = lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    process = predict(drawings, "--out", "Skizzen – neu", "--json", "é.json", cwd=place, env=environment,
                      preexec_fn=one_core, sources=clone)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(list((place / "Skizzen – neu").iterdir())) == 20 and (place / "é.json").exists()
    assert {path: path.stat().st_mtime_ns for path in clone.rglob("*")} == before


def test_without_shared_memory_one_process_draws(monkeypatch):
    expected = draw_people(30, 7, workers=1)

    class NoSharedMemory:
        def Pool(self, workers):
            raise OSError("[Errno 38] Function not implemented")

    monkeypatch.setattr(synthetic, "get_context", lambda method: NoSharedMemory())
    monkeypatch.setattr(synthetic, "POOL_FROM", 1)
    for one, other in zip(expected, draw_people(30, 7, workers=4)):
        np.testing.assert_array_equal(one, other)
