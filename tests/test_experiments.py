"""Tables are what the results say, blank where nothing was run; runs that are done are not run again."""

import copy
import importlib
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import changed
import checkpoint
import distill
import drawn
import paper
import parts
import photos
import sweep
import tables
import train
from common import BadInput
from commands import run
from confidence import calibrate, calibration
from crops import FLIP, store
from evaluate import PAPER, predict
from peers import shared_scores
from synthetic import drawn_people


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)

    def put(name, half, tenth, **more):
        joints = ("head", "shoulder", "elbow", "wrist", "hip", "knee", "ankle", "mean")
        (tmp_path / f"{name}.json").write_text(json.dumps(
            {"scores": {"pckh@0.5": dict.fromkeys(joints, half), "pckh@0.1": {"mean": tenth}}, **more}))

    return put


def cells(text, *beginning):
    """The cells of the one row that begins so."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found, = [row for row in rows if tuple(row[:len(beginning)]) == beginning]
    return found[len(beginning):]


def test_mean_spread_and_gain(results):
    for seed, value in enumerate((50, 52, 54)):
        results(f"drawn-cc-gd-distilled-{seed}", value, 5)
    results("drawn-cc-gd-alone-0", 40, 3)
    assert cells(tables.drawn_table(), "cc", "gd")[:6] == [
        "40.0",
        "52.0 ± 2.0",
        "+12.0",
        "3.0",
        "5.0 ± 0.0",
        "+2.0",
    ]


def test_blank_where_nothing_was_run(results):
    assert cells(tables.drawn_table(), "reg", "gs")[:6] == [""] * 6
    assert set(cells(tables.photo_table(), "teacher")) == {""}
    assert tables.parts_table("terms") == "(not measured yet)"
    row = cells(tables.paper_table(), "cc", "gd", "w32")
    assert row[0] == "87.67 → 89.25" and row[1] == row[2] == "" and row[4] == ""


def test_cells_of_parts_say_what_is_asked_of_the_part(results):
    for seed, frozen in enumerate((48, 49)):
        block = dict(deviation=0.06, dead=0.1)
        results(f"parts-gd-{seed}", 50, 5, confidence=dict(ece=0.1, auroc=0.8),
                dynamic=dict(blocks=4 * [block], live=50, frozen=frozen))
    row = cells(tables.parts_table("dynamic"), "**1 + z**, z: the mean token, standardised over images")
    assert row == ["2", "50.0 ± 0.0", "5.0 ± 0.0", "0.06, 0.06, 0.06, 0.06", "0.10, 0.10, 0.10, 0.10",
                   "-1.50 ± 0.71"]
    results("parts-reg-gs-all-0", 50, 5, confidence=dict(ece=0.125, auroc=0.8))
    assert cells(tables.parts_table("terms"), "reg gs: labels and all four")[-2:] == ["0.12", "0.80"]


def test_every_part_has_changes_that_exist_and_flags_that_train_knows(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "WEIGHTS", copy.deepcopy(distill.WEIGHTS))
    monkeypatch.setattr(train, "ADAM_ALONE", train.ADAM_ALONE)
    (tmp_path / "photos").mkdir()
    assert not any("data" in flags for flags in parts.parts_runs(seeds=(0,)).values())
    runs = parts.parts_runs(seeds=(0,), data=Path("photos"))
    for name, flags in runs.items():
        for word in flags["changes"]:
            if "=" in word:
                changed.assign(word)
            assert "=" in word or word in changed.CHANGES, name
        flags = {key: value for key, value in flags.items() if key != "changes"}
        monkeypatch.setattr("sys.argv", ["train.py", *sweep.command_line(flags)])
        args = train.parse_arguments()
        epochs = 16 if "photos" in name else parts.LONG if "long-0" in name else parts.EPOCHS
        small = name.startswith("parts-small-64")
        assert args.epochs == (8 if small else epochs) and args.preset == ("small-64" if small else "tiny")
    with pytest.raises(BadInput, match="there is no group x"):
        parts.parts_runs(["x"])


def test_students_of_small_start_from_their_teacher_or_from_nothing(monkeypatch, tmp_path):
    runs = photos.small_runs(tmp_path)
    assert len(runs) == 3 + 4 * (6 + 2 * 2)              # starts x (students, and two of them again twice)
    for name, flags in runs.items():
        monkeypatch.setattr("sys.argv", ["train.py", *sweep.command_line(flags)])
        args = train.parse_arguments()
        assert args.lr == train.LOW_RATE and args.amp
        if "teacher" not in name:
            assert args.backbone == "w24" and args.distill == ("distilled" in name or "taught" in name)
            teacher = "small-teacher-64" if args.preset == "small-64" else "small-teacher"
            teacher = sweep.folder(teacher, runs[teacher]) / "best.pt"
            assert args.teacher == (teacher if args.distill else None)
            assert args.init == (None if "alone" in name or "taught" in name else teacher)


def test_a_constant_is_set_by_its_name(monkeypatch):
    monkeypatch.setattr(train, "MUON_RATE", 20)
    monkeypatch.setitem(distill.WEIGHTS["cc"], "heatmap", 1.0)
    changed.assign("train.MUON_RATE=7")
    changed.assign("distill.WEIGHTS.cc.heatmap=3")
    assert train.MUON_RATE == 7 and distill.WEIGHTS["cc"]["heatmap"] == 3.0
    for word in ("train.NOTHING=1", "nowhere.X=1", "train.MUON_RATE=", "train.MUON_RATE=1=2", "train.X.y=1"):
        with pytest.raises(BadInput, match="no such constant"):
            changed.assign(word)


@pytest.mark.parametrize("change", [
    name if name == "constant" else pytest.param(name, marks=pytest.mark.long)
    for name in sorted(changed.CHANGES)])
def test_every_change_trains_and_changes_the_loss(change, tmp_path):
    """One epoch of 64 drawings, in a process of its own, as a change stays in the library."""
    teacher = change in ("mean-squared-error", "binary-cross-entropy", "adam-convolutions",
                         "no-backbone-heatmaps")
    filter = "attention" if "attention" in change or "qkv" in change or "heads" in change else "gd"
    flags = {"train-teacher": True, "preset": "small-64"} if teacher else {"filter": filter}
    flags |= {"epochs": 1, "drawings": 64}
    logs = []
    for changes in ([], [change]):
        out = tmp_path / f"run{len(logs)}"
        words = sweep.command_line({**flags, "out": out})
        done = run("studies/changed.py", *changes, "--", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads((out / "result.json").read_text())
        assert found["arguments"]["changes"] == changes and 0 <= found["confidence"]["auroc"] <= 1
        assert ("dynamic" in found) == (filter == "gd" and not teacher)
        logs.append(found["log"][0]["loss"])
    assert logs[0] != logs[1]


def test_two_changes_of_one_place_are_refused(tmp_path):
    done = run("studies/changed.py", "slow-M", "triple-rate", "--", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2 and "triple-rate replaces build_optimisers, as slow-M does" in done.stderr


def test_every_study_can_be_imported():
    for path in (sweep.ROOT / "studies").glob("*.py"):
        importlib.import_module(path.stem)


def test_calibration_by_hand_and_auroc_by_all_pairs():
    random = np.random.default_rng(0)
    truth, confidence = random.uniform(0, 100, (50, 16, 2)), random.uniform(0, 1, (50, 16))
    head, visible = np.full(50, 10.0), random.uniform(size=(50, 16)) < 0.9
    right = random.uniform(size=(50, 16)) < confidence ** 2            # overconfident, ranks well
    found = truth + np.where(right, 4.0, 6.0)[..., None] * [1, 0]
    samples = SimpleNamespace(joints=truth, visible=visible, head_size=head)
    counted = visible.copy()
    counted[:, [6, 7]] = False
    c, r = confidence[counted], right[counted]
    pairs = c[r][:, None] - c[~r][None]
    ece = sum(abs(r[b].mean() - c[b].mean()) * b.sum() for b in
              ((c >= low / 10) & (c < (low + 1) / 10) for low in range(10))) / len(c)
    out = calibration(found, confidence, samples)
    assert out["auroc"] == pytest.approx((pairs > 0).mean()) and out["ece"] == pytest.approx(ece)
    assert sum(count for *_, count in out["curve"]) == len(c)
    assert calibration(found, np.ones_like(confidence), samples)["auroc"] == 0.5        # no ranking


def test_a_calibrated_copy_has_better_confidences_and_the_same_joints(tmp_path):
    model, metadata = checkpoint.load(sweep.ROOT / "weights" / "student-cc-gd-drawn.pt")
    people = drawn_people("valid", 96, model.size)
    crops = store(people, model.size)
    joints, before = predict(model, people, crops)
    assert calibrate(model, people, crops, flip_test=False) != 1
    checkpoint.save(tmp_path / "calibrated.pt", model, metadata, half=True)
    again, after = predict(checkpoint.load(tmp_path / "calibrated.pt")[0], people, crops)
    np.testing.assert_array_equal(joints, again)
    assert calibration(again, after, people)["ece"] < calibration(joints, before, people)["ece"] - 0.02


def test_shared_scores_by_hand():
    """Two people of one head size: the first exact, upright; the second on its head, sides exchanged."""
    truth = np.zeros((2, 16, 2))
    truth[:, :, 0] = 100 * np.arange(16)
    truth[:, 8] = truth[:, 9] = 0
    truth[0, 9, 1], truth[1, 9, 1] = -10, 10
    samples = SimpleNamespace(joints=truth, visible=np.ones((2, 16), bool), head_size=np.full(2, 10.0))
    found = np.stack([truth[0], truth[1][FLIP]])
    assert shared_scores(found, samples) == {"12 joints": 50, "either side": 100, "upright": 100, "others": 0}


def test_hours_are_counted_and_measured_ones_stand_beside(results):
    """Teacher, by hand: 3 x 2 x 13.65 billion multiply-adds a picture, 300 x 22,246 pictures, 100 TFLOP/s."""
    results("mpii-cc-gs-w32-alone", 80, 20, log=[{"images_per_second": rate} for rate in (100, 1000, 1200)])
    table = tables.hours_table()
    assert cells(table, "teacher") == ["82", "1.5", ""]
    pictures, hours, measured = cells(table, "cc gs w32")
    assert pictures == "43 / 70" and hours == "0.8 / 1.3" and measured == "1000 (1.9)"


def test_flags_behind_two_dashes_go_to_every_run(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(sweep, "sweep", lambda runs, jobs, stop_after: given.update(runs))
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        "sys.argv",
        ["paper.py", "--data", str(tmp_path), "--", "--epochs", "2", "--terms", "a", "b", "--compile"],
    )
    sweep.main("", lambda args: paper.paper_runs(args.data), ("--data", dict(type=Path)))
    assert len(given) == 33
    for flags in given.values():
        assert sweep.command_line(flags)[-6:] == ["--epochs", "2", "--terms", "a", "b", "--compile"]


def test_tables_are_written_between_their_marks(results, tmp_path):
    results("photos-teacher", 55.55, 7)
    readme = tmp_path / "README.md"
    readme.write_text("before\n" + "".join(f"<!-- table {name} -->\nold\n<!-- end -->\nafter {name}\n"
                                           for name in tables.TABLES))
    tables.write_tables(readme, tables.TABLES)
    once = readme.read_text()
    assert "old" not in once and "| teacher | 55.5" in once and once.startswith("before\n")
    assert all(f"after {name}" in once for name in tables.TABLES)
    tables.write_tables(readme, tables.TABLES)
    assert readme.read_text() == once
    readme.write_text("no marks")
    with pytest.raises(BadInput, match="has no place for the table 'headline'"):
        tables.write_tables(readme, tables.TABLES)


def test_the_pages_hold_what_the_results_say():
    assert sorted(sum(tables.PAGES.values(), ())) == sorted(tables.TABLES)
    for page, names in tables.PAGES.items():
        text = (sweep.ROOT / page).read_text()
        assert all(tables.TABLES[name]() in text for name in names), "run: python studies/tables.py"


def test_done_is_not_run_again_and_failure_is_told(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    results("drawn-x", 1, 1)
    with pytest.raises(BadInput, match="1 runs failed: drawn-y"):
        sweep.sweep(dict.fromkeys(("drawn-x", "drawn-y"), {"no-such-flag": True}))
    assert "drawn-y ended with status 2: " in capsys.readouterr().err
    assert (
        "no-such-flag" in (tmp_path / "runs/drawn-y/output.txt").read_text()
        and not (tmp_path / "runs/drawn-x").exists()
    )


def test_a_result_of_other_flags_is_not_taken_for_done(results, tmp_path):
    results("mpii-x", 1, 1, arguments=dict(epochs=300, batch_size=64))
    assert sweep.collect("mpii-x", {"epochs": "300", "batch-size": 64})
    with pytest.raises(
        BadInput, match="mpii-x.json was made with --epochs 300, now it is 100: move that file"
    ):
        sweep.collect("mpii-x", {"data": "MPII", "epochs": 100})


def test_the_footnote_names_the_scored_epochs_of_each_seed(results):
    log = [{"epoch": epoch, "pckh@0.5": 1} if epoch % 2 == 0 else {"epoch": epoch} for epoch in range(1, 5)]
    for seed, lines in enumerate((log, log[2:], log[2:])):
        results(f"drawn-cc-gd-distilled-{seed}", 50, 5, log=lines)
    assert (
        "Scored at epochs 4, of which the best counts; but 1 of 1 runs of seed 0 at 2, 4."
        in tables.drawn_table()
    )
    results("drawn-cc-gd-distilled-0", 50, 5, log=log[2:])
    assert "Scored at" not in tables.drawn_table()


def test_both_sides_of_a_pair_differ_by_the_teacher_alone():
    runs = drawn.drawn_runs((0, 1))
    assert len(runs) == 2 * 2 * 3 * 2
    for name, flags in runs.items():
        if "-distilled-" in name:
            assert runs[name.replace("-distilled-", "-alone-")] == {**flags, "no-distill": True}


def test_the_papers_rows_in_order_of_value():
    runs = paper.paper_runs(Path("somewhere/MPII"), (Path("w32.pth"), Path("w48.pth")))
    names = list(runs)
    assert (
        len(names) == 33
        and names[0] == "mpii-teacher"
        and "w48.pth" in sweep.command_line(runs["mpii-teacher"])
    )
    assert all("-none-" in name for name in names[1:13])
    assert names[13:15] == ["mpii-cc-gs-w32-distilled", "mpii-cc-gs-w32-alone"]
    for name, flags in runs.items():
        words = sweep.command_line(flags)
        for backbone in ("w32", "w48"):
            assert (f"{backbone}.pth" in words) == (
                f"-{backbone}-" in name or (name, backbone) == ("mpii-teacher", "w48")
            )
        assert ("--teacher" in words) == name.endswith("-distilled") and (
            "--no-distill" in words
        ) == name.endswith("-alone")
    assert not any("backbone-weights" in flags for flags in paper.paper_runs(Path("MPII")).values())


def test_runs_are_in_the_folders_that_train_chooses(monkeypatch, tmp_path):
    """One path for one network: the README's commands, train.py alone and the sweep share the teacher and
    each row.
    """
    (tmp_path / "MPII").mkdir()
    (tmp_path / "w48.pth").touch()
    monkeypatch.chdir(tmp_path)
    for flags in paper.paper_runs(tmp_path / "MPII").values():
        monkeypatch.setattr("sys.argv", ["train.py", *sweep.command_line({**flags, "out": ""})[:-2]])
        args = train.parse_arguments()
        assert args.out == flags["out"]
        assert not args.distill or str(args.teacher) == "runs/teacher-paper-MPII/best.pt"
    assert "--teacher runs/teacher-paper-MPII/best.pt" in (sweep.ROOT / "docs/mpii.md").read_text()


def test_the_docs_have_a_command_for_every_row_of_the_paper(monkeypatch, tmp_path):
    """Each is what train.py understands, and says what paper.py runs."""
    (tmp_path / "MPII").mkdir()
    monkeypatch.chdir(tmp_path)
    variables, rows = {}, []
    for line in (sweep.ROOT / "docs/mpii.md").read_text().splitlines():
        if found := re.fullmatch(r"    ([A-Z0-9]+)=\"(.*)\"", line):
            variables[found[1]] = found[2]
        elif line.startswith("    python train.py $COMMON"):
            words = re.sub(r"\$([A-Z0-9]+)", lambda name: variables[name[1]], line).split()[2:]
            monkeypatch.setattr("sys.argv", ["train.py", *words])
            args = train.parse_arguments()
            rows.append("teacher" if args.train_teacher else (args.student, args.filter, args.backbone))
            assert args.preset == "paper" and args.amp and args.distill != args.train_teacher
            assert str(args.backbone_weights) == f"hrnet_{args.backbone}.pth" or args.backbone == "none"
    assert rows[0] == "teacher" and sorted(rows[1:]) == sorted(row[:3] for row in PAPER)


FAKE_TRAIN = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
called = " ".join(sys.argv[1:]) + " GPU " + os.environ.get("CUDA_VISIBLE_DEVICES", "none")
(out / "called.txt").open("a").write(called + "\\n")
if "--quick" in sys.argv:
    found = {"arguments": {"data": "/home/me/lspet"}, "scores": {"pckh@0.5": {"mean": 1}}}
    (out / "result.json").write_text(json.dumps(found))
elif "--stop-after" not in sys.argv:
    (out / "last.pt").touch()
    time.sleep(60)
"""
QUICK = {"quick": True}


@pytest.fixture
def fake(results, tmp_path, monkeypatch):
    """A sweep with a train.py that writes down how it was called."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sweep, "POLL", 0.05)
    return tmp_path


def called(folder, name):
    return (folder / "runs" / name / "called.txt").read_text()


def test_results_name_no_folders_of_anybody(fake):
    sweep.sweep({"x": QUICK})
    assert sweep.result("x")["arguments"] == {"data": "lspet"}


def test_a_row_trained_by_its_own_command_is_done(fake):
    (fake / "own").mkdir()
    (fake / "own/result.json").write_text(json.dumps({"arguments": {}, "scores": {"pckh@0.5": {"mean": 7}}}))
    sweep.sweep({"x": {"slow": True, "out": fake / "own"}})
    assert sweep.result("x")["scores"]["pckh@0.5"]["mean"] == 7 and not (fake / "own/called.txt").exists()


def test_students_wait_for_their_teacher_and_each_gpu_has_a_run(fake, monkeypatch):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    student = {**QUICK, "teacher": fake / "runs/t/best.pt"}
    sweep.sweep({"s": student, "t": QUICK, "alone": QUICK}, jobs=2)
    assert called(fake, "t").endswith("GPU 0\n") and called(fake, "alone").endswith("GPU 1\n")
    order = [(fake / "runs" / name / "called.txt").stat().st_mtime_ns for name in "ts"]
    assert order == sorted(order) and sweep.result("s")


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
    assert sweep.result("x") is None and not (fake / "runs/y").exists()
    sweep.sweep({"x": QUICK})
    first, second = called(fake, "x").splitlines()
    assert "--resume" not in first and "--resume" in second and sweep.result("x")


def test_time_is_up(fake, capsys):
    sweep.sweep({"x": {}}, stop_after=-1)
    assert not (fake / "runs/x").exists()
    sweep.sweep({"x": {}, "y": {}}, stop_after=1)
    assert "--stop-after 0.99" in called(fake, "x") and "x: stopped, to be resumed" in capsys.readouterr().out
