"""What the command makes of its arguments, what a run starts from, and several folders of data."""

import copy
import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import distill
import train
from commands import call, refused
from common import BadInput, Distributed, lock
from crops import AUGMENTATIONS, store
from export import for_inference
from models import PRESETS, build_student, build_teacher
from synthetic import drawn_people
from test_data import drawn_folder


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """train.py's arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def parse_words(*words):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        return train.parse_arguments()

    return parse_words


# ------------------------------------------------------------------------------- arguments

def test_a_preset_trains_by_its_recipe(parse, tmp_path):
    """But for what flags say; drawings are always upright, and teachers see a new view in every epoch."""
    (tmp_path / "MPII").mkdir()
    assert train.RECIPES.keys() == PRESETS.keys()
    for preset, recipe in train.RECIPES.items():
        assert recipe["photos"] in AUGMENTATIONS
        photos, drawn, teacher = (parse("--preset", preset, *words) for words in (
            ["--data", "MPII", "--no-distill"], ["--no-distill"], ["--train-teacher"]))
        for args in (photos, drawn, teacher):
            assert args.epochs == recipe["epochs"] and args.batch_size == recipe["batch_size"]
            assert args.optimiser == recipe["optimiser"] and not hasattr(args, "photos")
        assert photos.augmentation == recipe["photos"] and drawn.augmentation == "upright"
        assert (photos.views, drawn.views, teacher.views) == (recipe["views"], recipe["views"], 0)
        assert photos.backbone == recipe["backbone"] and parse("--preset", preset, "--backbone", "w16",
                                                               "--no-distill").backbone == "w16"
    args = parse("--epochs", "3", "--batch-size", "10")
    assert (args.epochs, args.batch_size) == (3, 10)


def test_the_table_of_recipes_is_in_the_help(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "tiny     epochs 16  batch_size 32  optimiser muon" in capsys.readouterr().out


def test_attention_has_a_lower_rate_where_muon_trains_it(parse, tmp_path):
    (tmp_path / "MPII").mkdir()
    paper = ["--preset", "paper", "--data", "MPII"]                              # its optimiser is Adam
    for words, rate in ((["--filter", "gd"], 1e-3), (["--filter", "attention"], 5e-4),
                        (["--train-teacher"], 5e-4), (["--backbone", "w16"], 5e-4),
                        (["--filter", "attention", "--lr", "0.01"], 0.01),
                        (["--filter", "attention", "--no-distill", *paper], 1e-3),
                        (["--train-teacher", *paper], 1e-3)):
        assert parse(*words).lr == rate


def test_a_student_finds_the_shipped_teacher_of_its_preset_and_data(parse, tmp_path):
    (tmp_path / "PHOTOS").mkdir()
    assert parse().teacher == train.SHIPPED / "teacher-tiny-drawn.pt"
    assert parse("--preset", "small", "--data", "PHOTOS").teacher == train.SHIPPED / "teacher-small-photos.pt"
    with pytest.raises(BadInput, match="neither annot/train.json"):              # the folder comes first
        parse("--data", "PHOTOS")
    (tmp_path / "PHOTOS/annot").mkdir()
    (tmp_path / "PHOTOS/annot/train.json").touch()
    for words in (["--data", "PHOTOS"], ["--preset", "small"]):
        with pytest.raises(BadInput, match="is shipped: train one with --train-teacher"):
            parse(*words)


def test_the_folder_of_a_run_tells_what_it_is(parse, tmp_path):
    for name in ("MPII", "LSP"):
        (tmp_path / name).mkdir()
    for words, name in (([], "cc-gd-none-tiny-drawn"), (["--train-teacher"], "teacher-tiny-drawn"),
                        (["--student", "reg", "--filter", "gs", "--no-distill", "--preset", "small", "--data",
                          "MPII", str(tmp_path / "LSP")], "reg-gs-w24-small-MPII+LSP-no-distill")):
        assert str(parse(*words).out) == f"runs/{name}"


@pytest.mark.parametrize("flags, processes, parts", [
    (["--batch-size", "10", "--accumulate", "4"], 1,
     "1 processes x 4 accumulated parts: make it a multiple of 4"),
    (["--batch-size", "32"], 3, "3 processes x 1 accumulated parts: make it a multiple of 3"),
    (["--batch-size", "12", "--accumulate", "2"], 4,
     "4 processes x 2 accumulated parts: make it a multiple of 8")])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, tmp_path, flags, processes, parts):
    monkeypatch.setattr("sys.argv", ["train.py", *flags, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(train, "init_distributed", lambda device: Distributed(0, processes, "cpu"))
    monkeypatch.setattr(train, "train_model", None)                                    # not reached
    with pytest.raises(BadInput, match=f"does not divide into {parts}"):
        train.main()


@pytest.mark.parametrize("flags, processes, least", [
    (["--batch-size", "1"], 1, 2), (["--batch-size", "4", "--accumulate", "4"], 1, 8),
    (["--batch-size", "6", "--accumulate", "3"], 2, 12)])
def test_one_sample_at_a_time_is_too_few_for_a_dynamic_filter(monkeypatch, tmp_path, flags, processes, least):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "init_distributed", lambda device: Distributed(0, processes, "cpu"))
    monkeypatch.setattr(train, "train_model", lambda args, distributed: trained.append(args))
    trained = []
    for words in (["--filter", "gs"], ["--train-teacher"]):                      # have no such statistics
        monkeypatch.setattr("sys.argv", ["train.py", *flags, *words])
        train.main()
    assert len(trained) == 2
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    with pytest.raises(BadInput, match=f"one sample at a time, .* make it at least {least}"):
        train.main()


@pytest.mark.parametrize("native", [False, True])
def test_amp_needs_native_bfloat16(monkeypatch, capsys, tmp_path, native):
    """Without it one line says so, and the teacher computes in float32 (the student: test_loop.py)."""
    monkeypatch.chdir(tmp_path)                  # away from the runs of whoever runs the tests
    monkeypatch.setattr("sys.argv", ["train.py", "--amp", "--device", "cpu"])
    for module in (train, distill):
        monkeypatch.setattr(module, "fast_bfloat16", lambda device: native)
    monkeypatch.setattr(distill, "for_inference",
                        lambda model, kind: seen.append(kind) or for_inference(model))
    seen, chosen = [], []

    def prepare(args, distributed):
        chosen.append(args)
        samples = drawn_people("valid", 8, 64)
        data = samples, store(samples, 64)
        train.prepare_targets(args, train.load_teacher(args), data, {"drawn": data})

    monkeypatch.setattr(train, "train_model", prepare)
    train.main()
    assert chosen[0].amp                                                         # the flag itself is kept
    assert seen == [torch.bfloat16 if native else torch.float32]
    line = "--amp: cpu has no native bfloat16, computing in float32\n"
    assert (line in capsys.readouterr().out) != native


def test_two_processes_do_not_train_into_one_folder(tmp_path):
    pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir(), (tmp_path / "another").mkdir()
    held = lock(tmp_path / "run")
    with pytest.raises(BadInput, match="busy"):
        lock(tmp_path / "run", "busy")
    os.close(lock(tmp_path / "another", "busy"))
    words = "--no-distill", "--drawings", "64", "--epochs", "1", "--out"
    refused(call("train.py", *words, "run", cwd=tmp_path), "another process trains into run")
    os.close(held)
    os.close(lock(tmp_path / "run", "busy"))


# ------------------------------------------------------------------------------- what a run starts from

def test_a_run_starts_from_another(tmp_path):
    torch.manual_seed(0)
    source, model = build_teacher("tiny"), build_teacher("tiny")
    checkpoint.save(tmp_path / "source.pt", source, dict(data="drawn/teacher"))
    model.encoder.position.data += 1
    assert "drawn/teacher" in checkpoint.start_from(model, tmp_path / "source.pt")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, source.state_dict()[name] + (name == "encoder.position")), name
    for other in (build_student("cc", "gd", preset="tiny"), build_teacher("paper")):
        with pytest.raises(BadInput, match="source.pt is teacher tiny and cannot start"):
            checkpoint.start_from(other, tmp_path / "source.pt")


def test_a_student_starts_from_a_teacher_with_its_backbone(tmp_path):
    torch.manual_seed(0)
    teacher, student = build_teacher("tiny"), build_student("cc", "gd", "w16", "tiny")
    checkpoint.save(tmp_path / "teacher.pt", teacher, dict(data="drawn/teacher"))
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    checkpoint.start_from(student, tmp_path / "teacher.pt")
    for name, weight in student.state_dict().items():
        from_teacher = not (name.startswith("head.") or ".mixer." in name)
        assert torch.equal(weight, (teacher.state_dict() if from_teacher else before)[name]), name


# ------------------------------------------------------------------------------- several folders of data

@pytest.fixture
def folders(mini, tmp_path):
    """The folders one and two, with 6 and 10 drawings to learn from, and 4 and 3 to be scored on."""
    drawn_folder(tmp_path / "one", 32, train=6, valid=4)
    drawn_folder(tmp_path / "two", 32, train=10, valid=3)
    return tmp_path


FLAGS = "--preset", "mini", "--filter", "gs", "--no-distill", "--epochs", "5", "--device", "cpu"


def test_a_run_on_several_folders(folders, monkeypatch):
    """Their people are learned from as one set; each set is scored, and --select names those that count."""
    out = folders / "a run"
    done = call("train.py", *FLAGS, "--data", "one", "two", "--select", "two", "--out", out, cwd=folders)
    assert done.returncode == 0, done.stderr
    assert "one+two/train: 16 samples to train on (6 + 10 people); one/valid: 4 to score on; " in done.stdout
    assert "two/valid: 3 to score on" in done.stdout
    assert "epochs 5, steps 2, batch size 8" in done.stdout
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    scored = [line for line in log if "one@0.5" in line and line["pckh@0.5"] == line["two@0.5"]]
    assert [line["epoch"] for line in scored] == [4, 5]
    result = json.loads((out / "result.json").read_text())
    metadata = checkpoint.read(out / "best.pt")["metadata"]
    assert set(result["scores"]) == set(result["flip_test"]) == {"one", "two"}
    assert metadata["data"] == "one+two/train" and metadata["samples"] == 16
    assert result["scores"]["two"]["pckh@0.5"]["mean"] == metadata["pckh@0.5"] == metadata["two@0.5"]
    monkeypatch.chdir(folders)
    monkeypatch.setattr("sys.argv", ["train.py", *FLAGS, "--data", "one", "two"])
    assert train.parse_arguments().out == Path("runs/cc-gs-none-mini-one+two-no-distill")
    # what it says comes next can be done, and gives the same
    command = shlex.split(done.stdout.rsplit("next: python ", 1)[1])
    again = call(*command, "--json", "figures.json", cwd=folders)
    assert again.returncode == 0 and command[-1] == "two", again.stderr
    figures = json.loads((folders / "figures.json").read_text())
    assert figures["pckh@0.5"] == result["scores"]["two"]["pckh@0.5"]


def test_folders_that_are_named_wrongly(folders):
    (folders / "else").mkdir()
    for words, line in ((["one", "one"], "two data sets are called one: rename one folder"),
                        (["one", "nowhere"], "--data nowhere is not a folder"),
                        (["one", "drawn"], "--data drawn is not a folder"),
                        (["one", "else"], "else has neither annot/train.json nor"),
                        (["one", "two", "--select", "six"], "--select six is not one of the sets one, two")):
        refused(call("train.py", *FLAGS, "--data", *words, cwd=folders), line)
    assert not (folders / "runs").exists()


@pytest.mark.parametrize("select, best", [(["one"], 2), (["two"], 3), (["one", "two"], 4)])
def test_the_selected_sets_choose_the_best_epoch(mini, monkeypatch, tmp_path, select, best):
    scores = {"one": [50, 60, 40, 60], "two": [20, 10, 30, 30]}                  # means 35, 35, 35, 45
    model = build_student("cc", "gs", preset="mini")
    run, lines = train.Run(model, copy.deepcopy(model), [], {}, {}), []
    args, alone = SimpleNamespace(select=select, out=tmp_path), Distributed(0, 1, "cpu")
    for epoch in range(4):
        monkeypatch.setattr(train, "evaluate", lambda model, name, crops, device, epoch=epoch: {
            "pckh@0.5": {"mean": scores[name][epoch]}, "pckh@0.1": {"mean": scores[name][epoch] / 10}})
        sets = {name: (name, None) for name in scores}
        lines.append(train.score_average(args, alone, run, sets, epoch + 1))
    metadata = checkpoint.read(tmp_path / "best.pt")["metadata"]
    mean = sum(scores[name][best - 1] for name in select) / len(select)
    assert metadata["epoch"] == best and run.best == metadata["pckh@0.5"] == mean
    assert metadata["pckh@0.1"] == pytest.approx(mean / 10)
    assert [line["two@0.5"] for line in lines] == scores["two"]


def test_a_wrong_teacher_is_told_before_data_are_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_data", None)
    student = Path(__file__).resolve().parents[1] / "weights/student-cc-gd-drawn.pt"
    for teacher, why in (("none.pt", "there is no checkpoint none.pt"), (student, "is a student")):
        monkeypatch.setattr("sys.argv", ["train.py", "--teacher", str(teacher), "--device", "cpu"])
        with pytest.raises(BadInput, match=why):
            train.main()


def test_a_teacher_must_beat_the_mean_pose_on_every_set(mini, monkeypatch, tmp_path, capsys):
    checkpoint.save(tmp_path / "teacher.pt", build_teacher("mini"), {})
    sets = {name: drawn_people("valid", 4, 32) for name in ("one", "two")}
    for name, samples in sets.items():
        samples.name = f"{name}/valid"
    found = {"one/valid": 99.0, "two/valid": 99.0}
    score = lambda model, samples, *_: {"pckh@0.5": {"mean": found[samples.name]}}
    monkeypatch.setattr(distill, "evaluate", score)
    args = SimpleNamespace(teacher=tmp_path / "teacher.pt", device="cpu", preset="mini", views=0, amp=False)
    load = lambda: train.prepare_targets(args, train.load_teacher(args),
                                         (sets["one"], store(sets["one"], 32)),
                                         {name: (samples, None) for name, samples in sets.items()})
    load()
    assert "PCKh@0.5 99.00 on one/valid" in (said := capsys.readouterr().out) and "99.00 on two/valid" in said
    found["two/valid"] = 0.0
    with pytest.raises(BadInput, match="scores 0.00 on two/valid, no better than a mean pose"):
        load()
