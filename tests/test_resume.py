"""What is promised of runs that are stopped, killed or spread over processes: the same weights in the end.

    LONG_TESTS=1 python -m pytest tests/test_resume.py      # 20 kills instead of 3
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time

import commands
import pytest
import torch
from commands import HELD_OUT, call

import checkpoint

LONG = bool(os.environ.get("LONG_TESTS"))
KILLS, EPOCHS = (20, 100) if LONG else (3, 8)
SHORT = ["--student", "cc", "--filter", "gs", "--drawings", 192 if LONG else 96, "--batch-size", 16,
         "--device", "cpu"]


def start(*arguments, held_out=None if LONG else HELD_OUT, **how):
    return commands.start("train.py", *arguments, held_out=held_out,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def call_alone(*arguments, cwd):
    """train.py in this process, on one thread as the processes of `start`, held-out drawings alike."""
    if LONG:
        return finished(start(*arguments, cwd=cwd))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = call("train.py", *arguments, cwd=cwd)
    finally:
        torch.set_num_threads(threads)
    assert done.returncode == 0, done
    return done.stdout


def finished(process):
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, (said, errors)
    return said


def outcome(folder):
    """What must not depend on interruptions: weights, their average, optimisers, log, scores; not seconds."""
    last = checkpoint.read(folder / "last.pt")
    log = [
        {name: value for name, value in json.loads(line).items() if name != "images_per_second"}
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]
    return (checkpoint.checksum([last["model"], last["training"]["ema"], last["training"]["optimisers"]]),
            log, json.loads((folder / "result.json").read_text())["scores"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    call_alone(*SHORT, "--epochs", EPOCHS, "--out", "run", cwd=folder)
    return folder / "run"


def test_killed_at_any_moment_and_continued_to_the_bit(undisturbed, tmp_path):
    """SIGKILL, SIGTERM and Ctrl-C at random moments, starting up included."""
    choice, kills, steps = random.Random(0), 0, []
    while True:
        resume = ["--resume"] * any((tmp_path / "run" / name).exists() for name in ("last.pt", "previous.pt"))
        process = start(*SHORT, "--epochs", EPOCHS, "--out", "run", *resume, cwd=tmp_path, pool=kills == 0)
        if kills == KILLS:
            finished(process)
            break
        # now while it starts up, now in its training, however fast the machine: after an epoch more, or at
        # once
        log, lines = tmp_path / "run/log.jsonl", choice.choice([0, 1, 1])
        wanted = lines and (len(log.read_text().splitlines()) if log.exists() else 0) + lines
        while (
            process.poll() is None
            and wanted
            and not (log.exists() and len(log.read_text().splitlines()) >= wanted)
        ):
            time.sleep(0.05)
        time.sleep(choice.uniform(0, 4))  # asking the teacher in a new view takes a second or two of that
        if process.poll() is not None:
            assert process.returncode == 0
            break
        how = choice.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send_signal(how)
        asked = time.monotonic()
        said, errors = process.communicate(timeout=60)
        assert time.monotonic() - asked < 10
        # workers of the killed may complain, and Python itself where Ctrl-C meets it while it imports
        assert how == signal.SIGKILL or not wanted or "Traceback" not in errors, errors
        kills += 1
        steps += [said.rsplit("stopped at ", 1)[1].split(";")[0]] if "stopped at " in said else []
    assert kills == KILLS or (kills and not LONG), f"the run was over after {kills} kills: train longer"
    assert outcome(tmp_path / "run") == outcome(undisturbed)
    if LONG:
        assert any(not at.endswith("step 0") for at in steps), steps


def test_a_damaged_last_checkpoint_falls_back(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    last = tmp_path / "run/last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 255
    last.write_bytes(content)
    said = call_alone(*SHORT, "--epochs", EPOCHS, "--out", "run", "--resume", cwd=tmp_path)
    assert "resuming from run/previous.pt" in said
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def torchrun():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port]


def test_two_processes_are_one_experiment(tmp_path):
    """torchrun with gloo, and --accumulate: the loss curve of one process with all of the batch, and PCKh to
    the digit.
    """
    common = ["--student", "cc", "--filter", "gs", "--drawings", 96, "--device", "cpu", "--epochs", 2]
    finished(
        start(*common, "--batch-size", 16, "--out", "two", cwd=tmp_path, launcher=torchrun(),
              held_out=HELD_OUT)
    )
    for name, flags in (("whole", ["--batch-size", 16]),
                        ("accumulated", ["--batch-size", 16, "--accumulate", 2])):
        done = call("train.py", *common, *flags, "--out", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    logs = {name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "accumulated", "two")}
    for name in ("accumulated", "two"):
        for one, other in zip(logs["whole"], logs[name], strict=True):
            for term in ("task", "keypoint_tokens", "visual_tokens", "heatmap", "confidence", "loss"):
                # the confidence term looks the heatmap up at the student's argmax, which rounding may move by
                # a bin: measured
                # 4e-4 to 2e-3 off, the other terms 7e-7 to 3e-4
                rel = 1e-2 if term == "confidence" else 1e-3
                assert other[term] == pytest.approx(one[term], rel=rel), (name, term)

    done = call("evaluate.py", "--checkpoint", "two/best.pt", "--json", "one.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "one.json").read_text())["pckh@0.5"]["mean"]
    assert alone == max(line.get("pckh@0.5", 0) for line in logs["two"])        # scored by two processes


def test_one_lost_process_ends_all(tmp_path):
    process = start(*SHORT, "--epochs", 500, "--out", "run", cwd=tmp_path, launcher=torchrun())
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    said, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "lost the others" in errors or "SIGKILL" in errors or "Signal 9" in errors, errors


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    from common import BadInput
    from models import build_student
    torch.manual_seed(0)
    model = build_student("cc", "gs", preset="tiny")
    checkpoint.save(tmp_path / "last.pt", model, {"epoch": 1})
    before = (tmp_path / "last.pt").read_bytes()

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="last.pt could not be written.*No space left.*untouched"):
        checkpoint.save(tmp_path / "last.pt", model, {"epoch": 2})
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.partial"))
