"""What studies run is what train.py understands; changes change the loss; scores of studies by hand."""

import copy
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import changed
import distill
import optim
import paper
import parts
import photos
import results
import sweep
import train
from commands import run
from common import BadInput
from confidence import calibration
from crops import Batch, FLIP, TOKENPOSE, store
from costs import PAPER
from models import build_student
from peers import shared_scores
from speed_parts import CELLS, SIZE, sample_by_sample, whole_batches
from synthetic import drawn_people


def test_every_part_has_changes_that_exist_and_flags_that_train_knows(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "WEIGHTS", copy.deepcopy(distill.WEIGHTS))
    monkeypatch.setattr(optim, "ADAM_ALONE", optim.ADAM_ALONE)
    monkeypatch.setattr(train, "RECIPES", copy.deepcopy(train.RECIPES))
    for folder in ("photos", "sports"):
        (tmp_path / folder).mkdir()
    assert not any("data" in flags for flags in parts.parts_runs(seeds=(0,)).values())
    runs = parts.parts_runs(seeds=(0,), data=["photos", "sports"])
    for name, flags in runs.items():
        for word in flags["changes"]:
            if "=" in word:
                changed.assign(word)
            assert "=" in word or word in changed.CHANGES, name
        flags = {key: value for key, value in flags.items() if key != "changes"}
        monkeypatch.setattr("sys.argv", ["train.py", *sweep.command_line(flags)])
        args = train.parse_arguments()
        short = name.startswith(("parts-told", "parts-small-gd"))
        epochs = 16 if "photos" in name else 32 if "long-0" in name else 4 if short else 8
        assert args.epochs == epochs
        preset = "small-64" if name.startswith("parts-small-64") else "small" if short else "tiny"
        assert args.preset == preset
    with pytest.raises(BadInput, match="there is no group x"):
        parts.parts_runs(["x"])
    with pytest.raises(BadInput, match="terms-photos needs photos: name their folders with --data"):
        parts.parts_runs(["dynamic", "terms-photos"])
    monkeypatch.setattr(parts, "FIRST_TEACHER", tmp_path / "first.pt")
    with pytest.raises(BadInput, match="teacher-photos needs .*first.pt: --help says how"):
        parts.parts_runs(["teacher-photos"], data=["photos"])
    assert not any("first-teacher" in name for name in parts.parts_runs(data=["photos"]))
    assert f"left out: teacher-photos, which needs {tmp_path}" in capsys.readouterr().out
    (tmp_path / "first.pt").touch()
    assert list(parts.parts_runs(["teacher-photos"], (0,), ["photos"])) == ["parts-told-first-teacher-0"]


def test_results_are_of_the_cells_that_stand_there():
    """A cell that was changed would refuse its own results, or share a row with them. One in several groups
    is the same in each.
    """
    data = {"labels-photos": ["lspet_refined"], "dynamic-photos": ["lspet"]}
    flags_of, checked = {}, 0
    for group in parts.CELLS:
        if group == "teacher-photos":                            # needs a file that is not there
            continue
        folders = [Path(name) for name in data.get(group, ("lspet_refined", "everyday", "lsp"))]
        for name, flags in parts.parts_runs((group,), data=folders).items():
            assert flags_of.setdefault(name, flags) == flags, (group, name)
            if entry := results.result(name):
                sweep.check_flags(name, flags, entry)
                checked += 1
    assert checked > 100


def test_rows_of_real_people_differ_in_what_they_learn_from_alone(monkeypatch, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    runs = photos.photo_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "teacher.pt")
    assert len(runs) == 2 * 6 + 3 + 3 + 2 + 2 + 2 * 2 + 3                      # seed 0, seed 1 of three rows
    lengths = {}
    for name, flags in runs.items():
        assert flags["changes"] == ["train.RECIPES.small.views=4"]
        words = sweep.command_line({key: value for key, value in flags.items() if key != "changes"})
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        args = train.parse_arguments()
        column = name.split("-")[4]
        assert args.preset == "small" and args.amp and args.select == ["a", "b"]
        assert args.distill == (column != "alone") and (args.init is None) == (column != "weights")
        low = args.backbone == "w24" or args.filter == "attention"
        assert args.lr == (train.LOW_RATE if low else train.RATE)
        lengths.setdefault(args.backbone, set()).add((args.epochs, args.batch_size, args.augmentation))
    assert all(len(same) == 1 for same in lengths.values())


def test_a_constant_is_set_by_its_name(monkeypatch):
    monkeypatch.setattr(optim, "MUON_RATE", 20)
    monkeypatch.setitem(distill.WEIGHTS["cc"], "heatmap", 1.0)
    changed.assign("optim.MUON_RATE=7")
    changed.assign("distill.WEIGHTS.cc.heatmap=3")
    assert optim.MUON_RATE == 7 and distill.WEIGHTS["cc"]["heatmap"] == 3.0
    for word in ("train.NOTHING=1", "nowhere.X=1", "optim.MUON_RATE=", "optim.MUON_RATE=1=2", "train.X.y=1",
                 "optim.MUON_RATE=2.5", "optim.MUON_RATE=Infinity"):                 # a whole number
        with pytest.raises(BadInput, match="no such constant"):
            changed.assign(word)


@pytest.mark.parametrize("change", ["mean-squared-error", "binary-cross-entropy"])
def test_other_losses_of_the_teacher_prefer_the_label(change):
    """Heatmaps that are the label cost less than those of another place."""
    (_, name, loss), = changed.CHANGES[change]
    xy = torch.rand(2, 16, 2, generator=torch.Generator().manual_seed(0))
    visible, empty = torch.ones(2, 16, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    label, other = distill.gaussian_heatmaps(xy, 2.0, 64), distill.gaussian_heatmaps(1 - xy, 2.0, 64)
    assert name == "heatmap_task"
    assert loss(label, xy, visible, empty, 2.0) < loss(other, xy, visible, empty, 2.0)


def distillation():
    """Arguments of loss_terms for a cc student that was never trained, and the step's targets."""
    model = build_student("cc", "gs", preset="tiny")
    drawing = np.random.default_rng(0)
    images, xy, keypoint, visual, heatmaps = (
        torch.from_numpy(drawing.random(shape, dtype=np.float32))
        for shape in ((2, 3, 64, 64), (2, 16, 2), (2, 16, 96), (2, 64, 96), (2, 16, 64, 64)))
    batch = Batch(images, xy, torch.ones(2, 16, dtype=torch.bool), None, torch.zeros(2, dtype=torch.bool))
    return model.head, model(images), batch, distill.Targets(keypoint, visual, heatmaps)


def test_the_terms_end_after_two_thirds_of_the_steps():
    until, weights, values = changed.TermsUntil(2 / 3), distill.WEIGHTS["cc"], distillation()
    for step in range(6):
        assert until.rate_factor(step, 6) == optim.rate_factor(step, 6)
        terms = until.loss_terms(*values, weights)
        assert (terms["loss"] > terms["task"]) == (step < 4) and terms["keypoint_tokens"] > 0
        assert step < 4 or terms["loss"] == terms["task"]


def test_tokens_behind_a_layer_norm_forget_scale_and_shift():
    """Twice the teacher's tokens, and one more, cost nothing, and as they are they do."""
    head, output, batch, targets = distillation()
    output = output._replace(keypoint_tokens=2 * targets.keypoint_tokens + 1,
                             visual_tokens=2 * targets.visual_tokens + 1)
    told = changed.normed_targets(None, None, original=lambda *_: targets)
    normed = changed.normed_loss_terms(head, output, batch, told, distill.WEIGHTS["cc"])
    plain = distill.loss_terms(head, output, batch, targets, distill.WEIGHTS["cc"])
    for name in ("keypoint_tokens", "visual_tokens"):
        assert normed[name] < 1e-3 < plain[name], name


@pytest.mark.parametrize("change", [
    name if name == "constant" else pytest.param(name, marks=pytest.mark.long)
    for name in sorted(changed.CHANGES)])
def test_every_change_trains_and_changes_the_loss(change, tmp_path):
    """One epoch of 64 drawings, in a process of its own, as a change stays in the library."""
    teacher = change in ("mean-squared-error", "binary-cross-entropy", "adam-convolutions",
                         "no-backbone-heatmaps")
    filter = "attention" if "attention" in change or "qkv" in change or "heads" in change else "gd"
    flags = {"train-teacher": True, "preset": "small-64"} if teacher else {"filter": filter}
    flags |= {"preset": "small-64", "no-distill": True} if change == "quiet-backbone" else {}
    # of two steps, three tenths are no warm-up, and none is in the last third
    flags |= {"epochs": 1, "drawings": 320 if change in ("long-warm-up", "two-thirds") else 64}
    losses = []
    for changes in ([], [change]):
        out = tmp_path / f"run{len(losses)}"
        words = sweep.command_line({**flags, "out": out})
        done = run("studies/changed.py", *changes, "--", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        result = json.loads((out / "result.json").read_text())
        assert result["arguments"]["changes"] == changes and 0 <= result["confidence"]["auroc"] <= 1
        assert ("dynamic" in result) == (filter == "gd" and not teacher)
        losses.append(result["log"][0]["loss"])
    assert losses[0] != losses[1]


def test_a_changed_run_is_resumed_with_the_same_changes(tmp_path):
    words = sweep.command_line({"filter": "gs", "no-distill": True, "drawings": 64, "epochs": 2,
                                "out": tmp_path / "run"})
    begun = run("studies/changed.py", "labels-2", "--", *words, "--stop-after", "1e-4", cwd=tmp_path)
    assert begun.returncode == 0 and "stopped after epoch 1" in begun.stdout, begun.stderr
    assert json.loads((tmp_path / "run/config.json").read_text())["changes"] == ["labels-2"]
    wide = ["studies/changed.py", "labels-8", "--"]
    for command, now in ((["train.py"], []), (wide, ["labels-8"])):
        done = run(*command, *words, "--resume", cwd=tmp_path)
        assert done.returncode == 2 and f"with changes ['labels-2'], now it is {now}" in done.stderr
    done = run("studies/changed.py", "labels-2", "--", *words, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plain = [*words[:-1], tmp_path / "plain"]
    run("train.py", *plain, "--stop-after", "1e-4", cwd=tmp_path)
    done = run("studies/changed.py", "labels-2", "--", *plain, "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "with changes [], now it is ['labels-2']" in done.stderr


def test_two_changes_of_one_place_are_refused(tmp_path):
    done = run("studies/changed.py", "slow-M", "triple-rate", "--", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2 and "triple-rate replaces build_optimisers, as slow-M does" in done.stderr


def test_every_study_can_be_imported():
    for path in (sweep.ROOT / "studies").glob("*.py"):
        importlib.import_module(path.stem)


def test_the_papers_rows_in_order_of_value():
    runs = paper.paper_runs(Path("somewhere/MPII"), (Path("w32.pth"), Path("w48.pth")))
    names = list(runs)
    assert len(names) == 33 and names[0] == "mpii-teacher"
    assert "w48.pth" in sweep.command_line(runs["mpii-teacher"])
    assert all("-none-" in name for name in names[1:13])
    assert names[13:15] == ["mpii-cc-gs-w32-distilled", "mpii-cc-gs-w32-alone"]
    for name, flags in runs.items():
        words = sweep.command_line(flags)
        for backbone in ("w32", "w48"):
            begun = f"-{backbone}-" in name or (name, backbone) == ("mpii-teacher", "w48")
            assert (f"{backbone}.pth" in words) == begun
        assert ("--teacher" in words) == name.endswith("-distilled")
        assert ("--no-distill" in words) == name.endswith("-alone")
    assert not any("init" in flags for flags in paper.paper_runs(Path("MPII")).values())
    # the recipe is written out, so that a run of train.py with another one is not taken as done
    assert all((flags["epochs"], flags["batch-size"], flags["lr"], flags["seed"]) == (300, 64, 1e-3, 0)
               for flags in runs.values())
    # what stands before a name's first hyphen is the file of its results
    assert {name.split("-")[0] for name in paper.paper_runs(Path("MPII-mini-2"))} == {"mpii_mini_2"}


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
        if assignment := re.fullmatch(r"    ([A-Z0-9]+)=\"(.*)\"", line):
            variables[assignment[1]] = assignment[2]
        elif line.startswith("    python train.py $COMMON"):
            words = re.sub(r"\$([A-Z0-9]+)", lambda name: variables[name[1]], line).split()[2:]
            monkeypatch.setattr("sys.argv", ["train.py", *words])
            args = train.parse_arguments()
            rows.append("teacher" if args.train_teacher else (args.student, args.filter, args.backbone))
            assert args.preset == "paper" and args.amp and args.distill != args.train_teacher
            backbone = "w48" if args.train_teacher else args.backbone
            assert str(args.init) == f"hrnet_{backbone}.pth" or backbone == "none"
    assert rows[0] == "teacher" and sorted(rows[1:]) == sorted(row[:3] for row in PAPER)


def test_calibration_by_hand_and_auroc_by_all_pairs():
    random = np.random.default_rng(0)
    truth, confidence = random.uniform(0, 100, (50, 16, 2)), random.uniform(0, 1, (50, 16))
    head, visible = np.full(50, 10.0), random.uniform(size=(50, 16)) < 0.9
    right = random.uniform(size=(50, 16)) < confidence ** 2            # overconfident, ranks well
    joints = truth + np.where(right, 4.0, 6.0)[..., None] * [1, 0]
    samples = SimpleNamespace(joints=truth, visible=visible, head_size=head)
    counted = visible.copy()
    counted[:, [6, 7]] = False
    c, r = confidence[counted], right[counted]
    pairs = c[r][:, None] - c[~r][None]
    ece = sum(abs(r[b].mean() - c[b].mean()) * b.sum() for b in
              ((c >= low / 10) & (c < (low + 1) / 10) for low in range(10))) / len(c)
    out = calibration(joints, confidence, samples)
    assert out["auroc"] == pytest.approx((pairs > 0).mean()) and out["ece"] == pytest.approx(ece)
    assert sum(count for *_, count in out["curve"]) == len(c)
    assert calibration(joints, np.ones_like(confidence), samples)["auroc"] == 0.5        # no ranking


def test_shared_scores_by_hand():
    """Two people of one head size: the first exact, upright; the second on its head, sides exchanged."""
    truth = np.zeros((2, 16, 2))
    truth[:, :, 0] = 100 * np.arange(16)
    truth[:, 8] = truth[:, 9] = 0
    truth[0, 9, 1], truth[1, 9, 1] = -10, 10
    samples = SimpleNamespace(joints=truth, visible=np.ones((2, 16), bool), head_size=np.full(2, 10.0))
    joints = np.stack([truth[0], truth[1][FLIP]])
    first = {"12 joints": 50, "either side": 100, "upright": 100, "others": 0}
    # a torso is 1,100 pixels. Of the second's, head and neck are right, and what swaps with a joint 100
    # pixels away, (2, 3) and (12, 13); (1, 4) and (11, 14) are 300 pixels apart
    assert shared_scores(joints, samples) == {**first, "PCK@0.2": pytest.approx(100 * (14 + 6) / 28)}
    samples.visible[1, [8, 13]] = False                                # no torso, no upright or not
    scores = shared_scores(joints, samples)
    assert scores["PCK@0.2"] == 100 and np.isnan(scores["others"])


def test_both_input_sides_make_the_same_crops_and_heatmaps():
    """One way cuts from stored crops, HRNet's cuts anew and puts its Gaussians on whole cells."""
    samples = drawn_people("valid", 4, SIZE)
    params = TOKENPOSE.draw(samples, torch.Generator().manual_seed(0))
    ways = whole_batches(samples, store(samples, SIZE), params), sample_by_sample(samples, params)
    (images, maps), (images_anew, maps_anew) = (make(torch.arange(4)) for make in ways)
    assert images.shape == (4, 3, SIZE, SIZE) and (images - images_anew).abs().mean() < 0.1
    places = [heatmaps.flatten(2).argmax(-1) for heatmaps in (maps, maps_anew)]                   # (4, 16)
    rows, columns = ([place // CELLS for place in places], [place % CELLS for place in places])
    seen = (maps.amax((2, 3)) > 0.5) & (maps_anew.amax((2, 3)) > 0.5)
    assert seen.sum() > 48
    for one, other in (rows, columns):
        assert ((one - other).abs() <= 1)[seen].all()
