"""The commands as a person runs them: a whole small training run, and one clear line for everything that is
wrong.
"""

import json
import os
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from commands import ROOT, call, refused, run
from PIL import Image

import checkpoint
from common import BadInput
from models import build_student, build_teacher

FAST = ["--drawings", "96", "--epochs", "1", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with one short run in it: a student distilled from the shipped teacher."""
    folder = tmp_path_factory.mktemp("a place with spaces")
    done = run("train.py", "--student", "reg", "--filter", "gs", *FAST, "--out", "runs/short", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_says_what_it_does_and_leaves_a_run_behind(workplace):
    folder, said = workplace
    assert "synthetic people to train on" in said and "PCKh@0.5" in said and "mean pose" in said
    written = {path.name for path in (folder / "runs/short").iterdir()}
    assert written == {"best.pt", "config.json", "last.pt", "log.jsonl", "predictions.png", "result.json"}
    line = json.loads((folder / "runs/short/log.jsonl").read_text())
    assert {"task", "keypoint_tokens", "visual_tokens", "heatmap", "confidence", "loss", "pckh@0.5",
            "images_per_second"} <= set(line)


def test_evaluation_gives_the_figure_of_training(workplace):
    folder, _ = workplace
    done = call("evaluate.py", "--checkpoint", "runs/short/best.pt", "--json", "figures.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    trained = json.loads((folder / "runs/short/log.jsonl").read_text())["pckh@0.5"]
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["pckh@0.5"]["mean"] == pytest.approx(trained, abs=1e-9)


def test_resume_goes_on(workplace):
    folder, _ = workplace
    again = ["--student", "reg", "--filter", "gs", *FAST, "--out", "runs/short", "--resume", "--epochs", "2"]
    done = call("train.py", *again, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "runs/short/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    refused(call("train.py", *again, "--student", "cc", cwd=folder), "last.pt is reg gs none tiny",
            "cc gs none tiny")


@pytest.mark.parametrize("command,line", [
    ("train.py --epochs 0", "--epochs 0 must be a finite number above 0"),
    ("evaluate.py --checkpoint none.pt", "there is no checkpoint none.pt"),
    ("predict.py me.jpg --box 1 2 3", "--box: expected 4 arguments")])
def test_a_process_that_refuses(command, line, tmp_path):
    refused(run(*command.split(), cwd=tmp_path, held_out=None), line)


SCRIPTS = [path for pattern in ("*.py", "studies/*.py", "demo/*.py") for path in sorted(ROOT.glob(pattern))
           if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", [str(path.relative_to(ROOT)) for path in SCRIPTS])
def test_help(script, monkeypatch, capsys):
    """Every error of arguments sends people there."""
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = capsys.readouterr()
    assert not ended.value.code and said.out.startswith("usage: ") and not said.err


def test_impossible_commands(tmp_path):
    (tmp_path / "some.mat").touch()
    fast = " ".join(FAST)
    for command, *parts in (
        ("train.py --train-teacher --student cc", "--train-teacher takes no --student"),
        ("train.py --no-distill --teacher x.pt", "contradict"),
        ("train.py --preset paper", "--train-teacher", "--no-distill"),
        ("train.py --data nowhere --no-distill", "nowhere is not a folder"),
        ("train.py --data nowhere", "--data nowhere is not a folder"),
        (f"train.py --teacher none.pt {fast}", "there is no checkpoint none.pt"),
        (f"train.py --no-distill --init none.pt {fast}", "there is no checkpoint none.pt"),
        ("train.py --epochs 0", "--epochs 0 must be a finite number above 0"),
        ("train.py --lr inf", "--lr inf must be a finite number above 0"),
        ("train.py --stop-after 0", "--stop-after 0.0 must be a finite number above 0"),
        ("train.py --drawings 0", "--drawings 0 must be a finite number above 0"),
        ("train.py --accumulate 0", "--accumulate 0 must be a finite number above 0"),
        (f"train.py --no-distill {fast} --batch-size 100", "100 is more than the 96 samples there are"),
        (f"train.py --resume --no-distill {fast}", "there is no", "last.pt to resume from"),
        ("train.py --drawings 9 --data x --no-distill", "leave it out"),
        ("train.py --seed -1", "--seed -1"),
        ("train.py --filter fft", "choose from", "attention", "train.py --help"),
        ("train.py --resume runs/x", "unrecognized arguments: runs/x"),
        ("evaluate.py --checkpoint none.pt", "there is no checkpoint"),
        ("evaluate.py --predictions none.mat --data nowhere", "there is no file none.mat"),
        ("evaluate.py --predictions none.mat --data .", "there is no file none.mat"),
        ("evaluate.py --predictions some.mat --data nowhere", "gt_valid.mat, which is not there"),
        ("evaluate.py --costs --json no/where.json", "there is no folder no"),
        ("evaluate.py --data x", "name what to score"),
        ("evaluate.py --costs --flip-test", "--flip-test is for a network: name it with --checkpoint"),
        ("evaluate.py --device tpu", "choose cpu"),
        ("evaluate.py --device cuda:99", "GPUs that PyTorch can use"),
        ("predict.py me.jpg --box 1 2 3", "--box: expected 4 arguments")):
        refused(call(*command.split(), cwd=tmp_path), *parts)
    assert not (tmp_path / "runs").exists()                       # refused before anything was written


PERSON = dict(joints=[[10.0 + 3 * k, 20.0 + 4 * k] for k in range(16)], joints_vis=[1] * 16,
              center=[32.0, 50.0], scale=0.4)


def photos(folder, count=6):
    """A folder of pictures of noise with `count` people to train on, and two to score on."""
    generator = np.random.default_rng(0)
    for part in ("annot", "images"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, many in (("train", count), ("valid", 2)):
        for n in range(many):
            noise = generator.integers(0, 255, (90, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"images/{split}{n}.png")
        entries = [dict(PERSON, image=f"{split}{n}.png") for n in range(many)]
        (folder / f"annot/{split}.json").write_text(json.dumps(entries))
    return folder


def test_a_set_is_known_by_its_resolved_name_and_its_content(tmp_path):
    """Trained in its own folder, resumed by another spelling; not after labels or images have changed."""
    data = photos(tmp_path / "people")
    few = ["--student", "cc", "--filter", "gs", "--no-distill", "--batch-size", "2", "--device", "cpu"]

    def train(*words, cwd=tmp_path, resume=("--resume",)):
        return call("train.py", *few, *words, *resume, "--cache", tmp_path / "crops", "--out",
                    tmp_path / "run", cwd=cwd)

    done = train("--data", ".", "--epochs", "1", cwd=data, resume=())
    assert done.returncode == 0 and "people/train: 6 samples" in done.stdout, done
    done = train("--data", "people/../people", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    scored = "--checkpoint", "run/best.pt", "--data", data, "--cache", "crops"
    done = call("evaluate.py", *scored, cwd=tmp_path)
    assert "samples of people/valid" in done.stdout and "another name" not in done.stdout
    for name, of, message in (
        ("annot/train.json", "training labels 6 of people/train",
         "the training labels have changed: bring the old ones back"),
        ("annot/valid.json", "validation (people) labels 2 of people/valid",
         "the validation (people) labels have changed"),
        ("images/train3.png", "training images 6 of people/train", "the training images have changed"),
        ("images/valid1.png", "validation (people) images 2 of people/valid",
         "the validation (people) images have changed"),
    ):
        before = (data / name).read_bytes()
        if name.startswith("annot"):
            (data / name).write_text((data / name).read_text().replace("10.0", "10.5"))
        else:
            Image.new("RGB", (64, 90), "red").save(data / name)
        refused(train("--data", "people", "--epochs", "3"), f"was trained with {of}, ", message)
        (data / name).write_bytes(before)
    entries = json.loads((data / "annot/train.json").read_text())
    (data / "annot/train.json").write_text(json.dumps(entries[1:]))
    refused(train("--data", "people", "--epochs", "3"), "now it is 5 of people/train", "give the flags")


@pytest.mark.skipif(sys.platform != "linux", reason="this system has no such names")
def test_a_set_whose_name_is_not_utf_8(tmp_path):
    """Trained and scored in a terminal that is strict about it, as a process."""
    odd = os.fsdecode(b"d\xe9")
    photos(tmp_path / odd, 40)
    done = run("train.py", "--student", "cc", "--filter", "gs", "--no-distill", "--batch-size", "8",
               "--epochs", "1", "--device", "cpu", "--data", odd, "--out", f"run{odd}",
               cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0 and "d\\udce9/train: 40 samples" in done.stdout, done.stderr


def test_predictions_that_are_not_finite_say_whose(tmp_path):
    from scipy.io import savemat
    (tmp_path / "annot").mkdir()
    truth = dict(pos_gt_src=np.full((16, 2, 5), 5.0), jnt_missing=np.zeros((16, 5)),
                 headboxes_src=np.array([[[1.0] * 5] * 2, [[9.0] * 5] * 2]))
    savemat(tmp_path / "annot/gt_valid.mat", truth)
    preds = np.zeros((5, 16, 2))
    preds[3, 13, 1] = preds[4, 2, 0] = np.nan
    savemat(tmp_path / "preds.mat", dict(preds=preds))
    refused(call("evaluate.py", "--predictions", "preds.mat", "--data", ".", cwd=tmp_path),
            "l-shoulder of person 3 (of 0 to 4) is not; 2 people have such joints")


def test_a_teacher_no_better_than_chance_is_refused(tmp_path):
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "untrained.pt", build_teacher("tiny"), {})
    refused(call("train.py", "--teacher", "untrained.pt", *FAST, cwd=tmp_path), "no better than a mean pose")
    checkpoint.save(tmp_path / "student.pt", build_student("cc", "gs", "none", "tiny"), {})
    refused(call("train.py", "--teacher", "student.pt", *FAST, cwd=tmp_path), "is a student")


def test_a_run_goes_on_only_as_it_began(workplace):
    folder, _ = workplace
    again = ["--student", "reg", "--filter", "gs", *FAST, "--out", "runs/short", "--resume"]
    done = call("train.py", *again, "--seed", "1", cwd=folder)
    refused(done, "trained with seed 0, now it is 1")
    assert "a mean pose" not in done.stdout                                    # before the teacher is scored
    shutil.copytree(folder / "runs/short", folder / "runs/longer")
    lost = call("train.py", *again, "--init", "lost.pt", "--epochs", "3", "--out", "runs/longer", cwd=folder)
    assert lost.returncode == 0 and "resuming from" in lost.stdout, lost        # last.pt has the weights
    refused(call("train.py", *[word for word in again if word != "--resume"], cwd=folder),
            "runs/short holds a run: --resume")
    results_only = folder / "runs/results"
    results_only.mkdir()
    (results_only / "best.pt").touch()
    refused(call("train.py", *again[:-3], "--out", "runs/results", cwd=folder),
            "runs/results holds a run: --out names another folder")
    weights_only = folder / "runs/copied"
    weights_only.mkdir()
    (weights_only / "last.pt").write_bytes((folder / "runs/short/best.pt").read_bytes())
    refused(call("train.py", *again, "--out", "runs/copied", cwd=folder), "no state of training")
    content = torch.load(folder / "runs/short/last.pt", weights_only=True)     # of a version without a log
    del content["training"]["log"], content["checksum"]
    content["checksum"] = checkpoint.checksum(content)
    torch.save(content, weights_only / "last.pt")
    refused(call("train.py", *again, "--out", "runs/copied", cwd=folder), "no state of training")


def published(lists, name):
    """A checkpoint with the names and shapes of a published one."""
    shapes = next(keys for title, keys in lists.items() if title.startswith(name))
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def test_published_backbones(real_data, tmp_path):
    """--init knows HRNet's files, whole and in the right width: a pose network's, and ImageNet's of the pose
    repository, whose classifier is called head; that of w48 lacks the counters of batch norms.
    """
    weights = published(json.loads((real_data / "official_keys.json").read_text()), "pose_hrnet_w32")
    weights["conv1.weight"] += 7
    wrapped = {"state_dict": {"module." + name: tensor for name, tensor in weights.items()}}
    less = {name: tensor for name, tensor in weights.items() if name != "layer1.0.conv1.weight"}
    head = {"head.0.0.0.conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}
    mmpose = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    uncounted = {name: tensor for name, tensor in weights.items() if "num_batches_tracked" not in name}
    for name, content in (("pose", weights), ("wrapped", wrapped), ("less", less),
                          ("imagenet", weights | head), ("early", uncounted | head),
                          ("mmpose", mmpose | {"keypoint_head.x": torch.zeros(1)}),
                          ("more", {**weights, "stage3.4.surprise": torch.zeros(1)})):
        torch.save(content, tmp_path / f"{name}.pth")
    for name, left_over in (("pose", 824), ("wrapped", 824), ("imagenet", 826), ("early", 689),
                            ("mmpose", 825)):
        model = build_student("cc", "gs", "w32", "tiny")
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        assert f"all 930 weights used, {left_over} left over (" in checkpoint.start_from(
            model, tmp_path / f"{name}.pth")
        assert (model.backbone.conv1.weight == 7).all()
        for name, weight in model.state_dict().items():
            assert name.startswith("backbone.") or torch.equal(weight, before[name]), name
    torch.save(build_student("cc", "gs", "w32", "tiny").state_dict(), tmp_path / "ours.pth")    # no config
    torch.save({name: weights[name] for name in weights if "stage" not in name}, tmp_path / "resnet.pth")
    for name in ("ours", "resnet"):
        with pytest.raises(BadInput, match="is not a checkpoint of this project"):
            checkpoint.start_from(build_student("cc", "gs", "w32", "tiny"), tmp_path / f"{name}.pth")
    with pytest.raises(BadInput, match="another shape of .* weights"):
        checkpoint.start_from(build_student("cc", "gs", "w48", "tiny"), tmp_path / "pose.pth")
    with pytest.raises(BadInput, match="holds unknown 1 weights, stage3.4.surprise"):
        checkpoint.start_from(build_student("cc", "gs", "w32", "tiny"), tmp_path / "more.pth")
    words = "train.py", "--no-distill", *FAST, "--init"
    refused(call(*words, "less.pth", "--backbone", "w32", cwd=tmp_path),
            "lacks 1 weights, layer1.0.conv1.weight")
    refused(call(*words, "pose.pth", cwd=tmp_path), "pose.pth holds an HRNet, and cc gd none tiny has no "
                                                    "backbone: add --backbone w32 or w48")


def test_a_checkpoint_that_would_run_something_is_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"format": 1, "metadata": {}, "model": Bomb()}, tmp_path / "bomb.pt")
    refused(call("evaluate.py", "--checkpoint", "bomb.pt", cwd=tmp_path), "bomb.pt cannot be read safely",
            "open")
    assert not (tmp_path / "executed").exists()


def test_foreign_and_broken_checkpoints(tmp_path):
    torch.manual_seed(0)
    model = build_student("cc", "gs", "none", "tiny")
    checkpoint.save(tmp_path / "good.pt", model, {"note": "fine"})
    loaded, metadata = checkpoint.load(tmp_path / "good.pt")
    assert metadata == {"note": "fine"} and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))

    content = checkpoint.read(tmp_path / "good.pt")
    content["config"]["filter"] = "attention"                     # says it is something else than it is
    torch.save(content | {"checksum": checkpoint.checksum(content)}, tmp_path / "other.pt")
    refused(call("evaluate.py", "--checkpoint", "other.pt", cwd=tmp_path), "does not fit the network",
            "attention")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:5000])
    refused(call("evaluate.py", "--checkpoint", "cut.pt", cwd=tmp_path), "cut.pt is not a checkpoint")
    (tmp_path / "empty.pt").touch()
    refused(call("evaluate.py", "--checkpoint", "empty.pt", cwd=tmp_path), "empty.pt is not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    refused(call("evaluate.py", "--checkpoint", "foreign.pt", cwd=tmp_path),
            "not a checkpoint of this project")


def test_an_unreadable_image_stops_training_before_it_starts(tmp_path):
    (tmp_path / "data/annot").mkdir(parents=True)
    (tmp_path / "data/images").mkdir()
    entry = dict(image="a.jpg", joints=[[10.0, 20.0]] * 16, joints_vis=[1] * 16, center=[15.0, 20.0],
                 scale=0.2)
    for split in ("train", "valid"):
        (tmp_path / "data/annot" / f"{split}.json").write_text(json.dumps([entry]))
    (tmp_path / "data/images/a.jpg").write_bytes(b"no picture")
    words = "--data data --filter gs --no-distill --epochs 1 --batch-size 1".split()
    refused(call("train.py", *words, cwd=tmp_path), "data/train, entry 0: ", "a.jpg cannot be read")
    assert not list(tmp_path.glob("runs/**/*.pt"))
