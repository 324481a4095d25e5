"""Tables are what the results say, blank where nothing was run; runs that are done are not run again."""

import json
import re
import threading
import time
from pathlib import Path

import pytest

import experiments
import tables
import train
from common import BadInput
from evaluate import PAPER


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)

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
    assert cells(tables.drawn_table(), "cc", "gd")[:6] == ["40.0", "52.0 ± 2.0", "+12.0", "3.0", "5.0 ± 0.0", "+2.0"]


def test_blank_where_nothing_was_run(results):
    assert cells(tables.drawn_table(), "reg", "gs")[:6] == [""] * 6
    assert set(cells(tables.photo_table(), "teacher")) == {""}
    assert cells(tables.terms_table(), "labels and all four") == ["", ""]
    row = cells(tables.paper_table(), "cc", "gd", "w32")
    assert row[0] == "87.67 → 89.25" and row[1] == row[2] == "" and row[4] == ""


def test_hours_are_counted_and_measured_ones_stand_beside(results):
    """Teacher, by hand: 3 x 2 x 13.65 billion multiply-adds a picture, 300 x 22,246 pictures, 100 TFLOP/s."""
    results("mpii-cc-gs-w32-alone", 80, 20, log=[{"images_per_second": rate} for rate in (100, 1000, 1200)])
    table = tables.hours_table()
    assert cells(table, "teacher") == ["82", "1.5", ""]
    pictures, hours, measured = cells(table, "cc gs w32")
    assert pictures == "43 / 70" and hours == "0.8 / 1.3" and measured == "1000 (1.9)"


def test_flags_behind_two_dashes_go_to_every_run(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(experiments, "run_all", lambda runs, jobs, until: given.update(runs))
    monkeypatch.setattr(experiments.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["experiments.py", "paper", "--data", str(tmp_path), "--", "--epochs", "2", "--batch-size", "4"])
    experiments.main()
    assert len(given) == 33 and all(flags[-4:] == ["--epochs", "2", "--batch-size", "4"] for flags in given.values())


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
        text = (experiments.ROOT / page).read_text()
        assert all(tables.TABLES[name]() in text for name in names), "run: python studies/tables.py"


def test_done_is_not_run_again_and_failure_is_told(results, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    results("drawn-x", 1, 1)
    experiments.run("drawn-x", ["--no-such-flag"], 1)
    with pytest.raises(BadInput, match="drawn-y ended with status 2: .*said.txt says why"):
        experiments.run("drawn-y", ["--no-such-flag"], 1)
    assert "no-such-flag" in (tmp_path / "runs/drawn-y/said.txt").read_text()


def test_a_result_of_other_flags_is_not_taken_for_done(results, tmp_path):
    results("mpii-x", 1, 1, arguments=dict(epochs=300, batch_size=64))
    experiments.run("mpii-x", ["--epochs", 16, "--epochs", 300], 1)            # the last one counts
    with pytest.raises(BadInput, match="mpii-x.json was made with --epochs 300, now it is 100: move that file"):
        experiments.run("mpii-x", ["--data", "MPII", "--epochs", "100"], 1)


def test_both_sides_of_a_pair_differ_by_the_teacher_alone():
    runs = experiments.drawn_runs((0, 1))
    assert len(runs) == 2 * (2 * 3 * 2 + 5)
    for name, flags in runs.items():
        if "-distilled-" in name:
            assert runs[name.replace("-distilled-", "-alone-")] == [*flags, "--no-distill"]


def test_the_papers_rows_in_order_of_value():
    runs = experiments.paper_runs(Path("somewhere/MPII"), (Path("w32.pth"), Path("w48.pth")))
    names = list(runs)
    assert len(names) == 33 and names[0] == "mpii-teacher" and "w48.pth" in map(str, runs["mpii-teacher"])
    assert all("-none-" in name for name in names[1:13])
    assert names[13:15] == ["mpii-cc-gs-w32-distilled", "mpii-cc-gs-w32-alone"]
    for name, flags in runs.items():
        flags = list(map(str, flags))
        for backbone in ("w32", "w48"):
            assert (f"{backbone}.pth" in flags) == (f"-{backbone}-" in name or (name, backbone) == ("mpii-teacher", "w48"))
        assert ("--teacher" in flags) == name.endswith("-distilled") and ("--no-distill" in flags) == name.endswith("-alone")
    assert not any("--backbone-weights" in flags for flags in experiments.paper_runs(Path("MPII"), ()).values())


def test_the_docs_have_a_command_for_every_row_of_the_paper(monkeypatch, tmp_path):
    """Each is what train.py understands, and says what experiments.py runs."""
    (tmp_path / "MPII").mkdir()
    monkeypatch.chdir(tmp_path)
    variables, rows = {}, []
    for line in (experiments.ROOT / "docs/mpii.md").read_text().splitlines():
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
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "called.txt").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if "--quick" in sys.argv:
    (out / "result.json").write_text(json.dumps({"arguments": {"data": "/home/me/lspet"}, "scores": {"pckh@0.5": {"mean": 1}}}))
elif "--stop-after" not in sys.argv:
    (out / "last.pt").touch()
    time.sleep(60)
"""


@pytest.fixture
def fake(results, tmp_path, monkeypatch):
    """experiments with a train.py that says how it was called."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(experiments, "stopping", threading.Event())
    return tmp_path


def test_results_name_no_folders_of_anybody(fake):
    experiments.run("x", ["--quick"], 1)
    assert experiments.result("x")["arguments"] == {"data": "lspet"}


def test_a_signal_ends_the_runs_and_the_same_command_goes_on(fake):
    thread = threading.Thread(target=experiments.run, args=("x", ["--slow"], 1))
    thread.start()
    while not (fake / "runs/x/last.pt").exists():
        time.sleep(0.05)
    experiments.stop(15, None)
    thread.join(timeout=20)
    assert not thread.is_alive() and not experiments.children and experiments.result("x") is None
    experiments.run("y", ["--quick"], 1)                     # none is begun after that
    assert not (fake / "runs/y").exists()
    experiments.stopping.clear()
    experiments.run("x", ["--quick"], 1)
    first, second = (fake / "runs/x/called.txt").read_text().splitlines()
    assert "--resume" not in first and "--resume" in second and experiments.result("x")


def test_time_is_up(fake, capsys):
    experiments.run("x", [], 1, until=time.monotonic() - 1)
    assert not (fake / "runs/x").exists()
    experiments.run("x", [], 1, until=time.monotonic() + 60)
    assert "--stop-after 0.99" in (fake / "runs/x/called.txt").read_text() and "to be continued" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        experiments.run_all({"x": [], "y": []}, 1, time.monotonic() + 60)
    assert ended.value.code == 0 and "2 of 2 are still to be run, x the first" in capsys.readouterr().out
