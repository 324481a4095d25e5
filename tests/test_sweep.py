"""The runner of studies: done is not run again, stopped is resumed, failures are told, each GPU has a run."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import drawn
import paper
import results
import sweep
from common import BadInput

FAKE_TRAIN = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
called = " ".join(sys.argv[1:]) + " GPU " + os.environ.get("CUDA_VISIBLE_DEVICES", "none")
(out / "called.txt").open("a").write(called + "\\n")
if "--quick" in sys.argv:
    made = {"arguments": {"quick": True, "data": ["/home/me/lspet"]}, "scores": {"pckh@0.5": {"mean": 1}},
            "log": [{"epoch": 1, "loss": 1, "images_per_second": 1, "pckh@0.5": 1}]}
    (out / "result.json").write_text(json.dumps(made))
elif "--stop-after" not in sys.argv:
    (out / "last.pt").touch()
    time.sleep(60)
"""
QUICK = {"quick": True}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty folders for runs and results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    return tmp_path


@pytest.fixture
def fake(folder, monkeypatch):
    """The same, and a train.py that writes down how it was called."""
    (folder / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(sweep, "ROOT", folder)
    monkeypatch.setattr(sweep, "POLL", 0.05)
    return folder


def called(folder, name):
    return (folder / "runs" / name / "called.txt").read_text()


def test_done_is_not_run_again_and_failure_is_told(folder, capsys):
    results.add("drawn-x", {"arguments": {"no_such_flag": True}})
    with pytest.raises(BadInput, match="1 runs failed: drawn-y"):
        sweep.sweep(dict.fromkeys(("drawn-x", "drawn-y"), {"no-such-flag": True}))
    assert "drawn-y ended with status 2: " in capsys.readouterr().err
    assert "no-such-flag" in (folder / "runs/drawn-y/output.txt").read_text()
    assert not (folder / "runs/drawn-x").exists()


def test_a_result_of_other_flags_is_not_taken_for_done(folder):
    results.add("mpii-x", {"arguments": dict(epochs=300, batch_size=64)})
    assert sweep.collect("mpii-x", {"epochs": "300", "batch-size": 64, "data": "MPII"})
    for flags, message in (({"epochs": 100}, "--epochs 300, now it is 100: remove that entry"),
                           ({"amp": True}, "--amp False, now it is True"),
                           ({"init": "w48.pth"}, "--init None, now it is w48.pth")):
        with pytest.raises(BadInput, match=f"mpii-x in .* was made with {message}"):
            sweep.collect("mpii-x", flags)
    results.add("mpii-z", {"arguments": dict(epochs=1, init="w48.pth")})
    with pytest.raises(BadInput, match="was made with --init w48.pth, now it is None"):
        sweep.collect("mpii-z", {"epochs": 1})
    results.add("mpii-changed", {"arguments": dict(epochs=1, changes=["views=4"])})
    with pytest.raises(BadInput, match="was made with --changes .*views=4.*, now it is None"):
        sweep.collect("mpii-changed", {"epochs": 1})
    (folder / "runs/mpii-begun").mkdir(parents=True)
    begun = folder / "runs/mpii-begun/config.json"
    begun.write_text('{"epochs": 1, "init": "/a/w48.pth", "amp": false, "teacher": null, "out": "runs/x"}')
    assert not sweep.collect("mpii-begun", {"epochs": 1, "init": "w48.pth"})              # to be resumed
    with pytest.raises(BadInput, match="mpii-begun in .*/mpii-begun was made with --init w48.pth, now"):
        sweep.collect("mpii-begun", {"epochs": 1})
    was = dict(epochs=1, lr=0.001, data="MPII", teacher="a.pt", changes=["x=1"])
    results.add("mpii-y", {"arguments": was, "flags": sorted(was)})
    same = {"epochs": 1, "lr": "1e-3", "data": Path("/b/MPII"), "teacher": "c/a.pt", "changes": ["x=1"]}
    assert sweep.collect("mpii-y", {**same, "device": "cuda:1"})
    without_epochs = {flag: value for flag, value in same.items() if flag != "epochs"}
    for flags, message in ((without_epochs, "made with --epochs: "),
                           ({**same, "amp": True}, "made without --amp: "),
                           ({**same, "data": "/b/COCO"}, "--data MPII, now it is COCO"),
                           ({**same, "teacher": "b.pt"}, "--teacher a.pt, now it is b.pt"),
                           ({**same, "changes": ["x=2"]}, "--changes")):
        with pytest.raises(BadInput, match=message):
            sweep.collect("mpii-y", flags)


def test_flags_are_kept_of_runs_that_the_sweep_made(fake):
    """Of one that was made otherwise it is not known; one of other flags is not kept at all."""
    sweep.sweep({"drawn-x": QUICK})
    assert results.result("drawn-x")["flags"] == ["quick"]
    (fake / "runs/drawn-y").mkdir()
    (fake / "runs/drawn-y/result.json").write_text((fake / "runs/drawn-x/result.json").read_text())
    with pytest.raises(BadInput, match="drawn-y in .* was made with --data lspet, now it is coco"):
        sweep.collect("drawn-y", {**QUICK, "data": "coco"})
    assert results.result("drawn-y") is None
    assert sweep.collect("drawn-y", {}) and "flags" not in results.result("drawn-y")


def test_a_finished_run_is_added_to_its_study_without_anybodys_folders(fake, capsys):
    sweep.sweep({"drawn-x": QUICK, "parts-x": QUICK})
    assert set(results.read("drawn")) == {"drawn-x"} and set(results.read("parts")) == {"parts-x"}
    assert results.result("drawn-x")["arguments"] == {"quick": True, "data": "lspet"}
    assert "drawn-x: PCKh@0.5 1.00" in capsys.readouterr().out


def test_a_row_trained_by_its_own_command_is_done(fake):
    (fake / "own").mkdir()
    made = {"arguments": {"slow": True}, "scores": {"pckh@0.5": {"mean": 7}},
            "log": [{"epoch": 1, "loss": 1, "images_per_second": 1, "pckh@0.5": 7}]}
    (fake / "own/result.json").write_text(json.dumps(made))
    sweep.sweep({"mpii-x": {"slow": True, "out": fake / "own"}})
    assert results.pckh(results.result("mpii-x")) == 7 and not (fake / "own/called.txt").exists()


def test_students_wait_for_their_teacher_and_each_gpu_has_a_run(fake, monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    student = {**QUICK, "teacher": fake / "runs/t/best.pt"}
    sweep.sweep({"s": student, "t": QUICK, "alone": QUICK}, jobs=2)
    assert called(fake, "t").endswith("GPU 0\n") and called(fake, "alone").endswith("GPU 1\n")
    order = [(fake / "runs" / name / "called.txt").stat().st_mtime_ns for name in "ts"]
    assert order == sorted(order) and results.result("s")


def test_an_end_ends_the_runs_and_the_same_command_resumes_them(fake, monkeypatch, capsys):
    def interrupt(seconds):
        while not (fake / "runs/x/last.pt").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    began = time.monotonic()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep, "time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
        sweep.sweep({"x": {"slow": True}, "y": QUICK})
    assert time.monotonic() - began < 50 and "2 of 2 runs are missing, x the first" in capsys.readouterr().out
    assert results.result("x") is None and not (fake / "runs/y").exists()
    sweep.sweep({"x": QUICK})
    first, second = called(fake, "x").splitlines()
    assert "--resume" not in first and "--resume" in second and results.result("x")


def test_time_is_up(fake, capsys):
    sweep.sweep({"x": {}}, stop_after=-1)
    assert not (fake / "runs/x").exists()
    sweep.sweep({"x": {}, "y": {}}, stop_after=1)
    assert "--stop-after 0.99" in called(fake, "x") and "x: stopped, to be resumed" in capsys.readouterr().out


def test_flags_behind_two_dashes_go_to_every_run(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(sweep, "sweep", lambda runs, jobs, stop_after: given.update(runs))
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    flags = ["--epochs", "2", "--select", "a", "b", "--resume"]
    monkeypatch.setattr("sys.argv", ["paper.py", "--data", str(tmp_path), "--", *flags])
    sweep.main("", lambda args: paper.paper_runs(args.data), ("--data", dict(type=Path)))
    assert len(given) == 33
    assert all((run["epochs"], run["select"], run["resume"]) == ("2", ["a", "b"], True)
               for run in given.values())


def test_both_sides_of_a_pair_differ_by_the_teacher_alone():
    runs = drawn.drawn_runs((0, 1))
    assert len(runs) == 2 * 2 * 3 * 2
    for name, flags in runs.items():
        if "-distilled-" in name:
            assert runs[name.replace("-distilled-", "-alone-")] == {**flags, "no-distill": True}
