"""The loop's parts by hand: rates, the weight average, who optimises what, where a run starts from.
"""

import copy
import os

import pytest
import torch
from torch import nn

import checkpoint
import train
from commands import call, refused
from common import BadInput, Distributed, lock
from crops import store
from export import for_inference
from models import build_student, build_teacher
from synthetic import drawn_people
from train import EMA_FRACTION, Muon, build_optimisers, orthogonal, rate_factor, update_ema


def test_rate_rises_and_falls_by_tenths():
    factors = [rate_factor(step, 300) for step in range(300)]
    assert factors[:3] == pytest.approx([1 / 30, 2 / 30, 3 / 30]) and factors[29] == factors[199] == 1
    assert factors[200] == factors[259] == pytest.approx(0.1) and factors[260] == factors[
        299
    ] == pytest.approx(0.01)


def test_running_mean_of_weights():
    """A plain mean at first; later over a fraction of the steps; counters are left alone."""
    model = nn.BatchNorm1d(1)
    ema = copy.deepcopy(model)
    for step, value in enumerate((1.0, 2.0, 6.0)):
        nn.init.constant_(model.weight, value)
        model.num_batches_tracked += 1
        update_ema(ema, model, step, 10 ** 6)
    assert ema.weight.item() == pytest.approx(3) and ema.num_batches_tracked == 0
    nn.init.constant_(model.weight, 103.0)
    update_ema(ema, model, 10 ** 6, 10 ** 6)
    assert ema.weight.item() == pytest.approx(3 + 100 / (EMA_FRACTION * 10 ** 6))


@pytest.mark.parametrize("build",
                         [lambda: build_student("cc", "gd", preset="tiny"), lambda: build_teacher("tiny")])
def test_every_learning_weight_has_one_optimiser(build):
    model = build()
    learning = {id(p): p for p in model.parameters() if p.requires_grad}
    for name in ("adam", "muon"):
        held = [p for optimiser in build_optimisers(model, name, 1e-3) for group in optimiser.param_groups
                for p in group["params"]]
        assert len(held) == len(learning) and {id(p) for p in held} == learning.keys()
    muon, adam = build_optimisers(model, "muon", 1e-3)
    assert all(p.ndim in (2, 4) for p in muon.param_groups[0]["params"]) and muon.param_groups[0][
        "lr"
    ] == pytest.approx(0.02)
    assert any(p is model.head.parameters().__next__() for p in adam.param_groups[0]["params"])


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


def test_muon_takes_the_steps_of_torch_optim_muon():
    """Two optimisers, the same gradients, ten steps; matrices that lie, that stand, and two of one shape."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (16, 16), (8, 24), (24, 8))]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    # a convolution's kernel takes the step of its matrix
    kernel = nn.Parameter(ours[0].detach().clone().view(8, 6, 2, 2).to(memory_format=torch.channels_last))
    ours.append(kernel), theirs.append(nn.Parameter(ours[0].detach().clone()))
    optimisers = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0)
    start = [weight.detach().clone() for weight in ours]
    for _ in range(10):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.flatten(1).clone()
        for optimiser in optimisers:
            optimiser.step()
    for begin, one, other in zip(start, ours, theirs):
        moved = (one - begin).norm()
        assert (one.flatten(1) - other).norm() < 0.02 * moved                    # bfloat16, in another order


def test_orthogonal_updates():
    singular = torch.linalg.svdvals(
        orthogonal(torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0)))
    )
    assert 0.6 < singular.min() and singular.max() < 1.3                         # what five iterations reach


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


@pytest.mark.parametrize(
    "flags, processes, parts",
    [
        (["--batch-size", "10", "--accumulate", "4"], 1,
         "1 processes x 4 accumulated parts: make it a multiple of 4"),
        (["--batch-size", "32"], 3, "3 processes x 1 accumulated parts: make it a multiple of 3"),
        (["--batch-size", "12", "--accumulate", "2"], 4,
         "4 processes x 2 accumulated parts: make it a multiple of 8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, tmp_path, flags, processes, parts):
    monkeypatch.setattr("sys.argv", ["train.py", *flags, "--out", str(tmp_path / "run")])
    monkeypatch.setattr(train, "init_distributed", lambda device: Distributed(0, processes, "cpu"))
    monkeypatch.setattr(train, "train", None)                                    # not reached
    with pytest.raises(BadInput, match=f"does not divide into {parts}"):
        train.main()


@pytest.mark.parametrize("native", [False, True])
def test_amp_needs_native_bfloat16(monkeypatch, capsys, tmp_path, native):
    """Without it one line says so, and nothing that trains or teaches computes in bfloat16."""
    monkeypatch.chdir(tmp_path)                  # away from the runs of whoever runs the tests
    monkeypatch.setattr("sys.argv", ["train.py", "--amp", "--device", "cpu"])
    monkeypatch.setattr(train, "fast_bfloat16", lambda device: native)
    monkeypatch.setattr(train, "for_inference", lambda model,
                        dtype: seen.append(dtype) or for_inference(model))
    seen, chosen = [], []

    def prepare(args, distributed):
        chosen.append(args)
        samples = drawn_people("valid", 8, 64)
        data = samples, store(samples, 64)
        train.load_teacher(args, data, data, 64)

    monkeypatch.setattr(train, "train", prepare)
    train.main()
    assert chosen[0].amp and train.use_bfloat16(chosen[0], "cpu") == native      # the flag itself is kept
    assert seen == [torch.bfloat16 if native else torch.float32]
    line = "--amp: this CPU has no native bfloat16, computing in float32\n"
    assert (line in capsys.readouterr().out) != native


def test_attention_has_a_lower_rate_where_muon_trains_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MPII").mkdir()
    photos = ["--data", "MPII", "--no-distill"]
    for words, rate in ((["--filter", "gd"], 1e-3), (["--filter", "attention"], 5e-4),
                        (["--train-teacher"], 5e-4),
                        (["--backbone", "w16"], 5e-4),
                        (["--filter", "attention", "--lr", "0.01"], 0.01),
                        (["--filter", "attention", "--optimiser", "adam"], 1e-3),
                        (["--filter", "attention", "--preset", "paper", *photos], 1e-3)):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        assert train.parse_arguments().lr == rate


def test_a_student_finds_the_shipped_teacher_of_its_preset_and_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PHOTOS").mkdir()
    for words, name in (([], "teacher-tiny-drawn.pt"), (["--preset", "small", "--data", "PHOTOS"],
                                                        "teacher-small-photos.pt")):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        assert train.parse_arguments().teacher == train.SHIPPED / name
    monkeypatch.setattr("sys.argv", ["train.py", "--data", "PHOTOS"])
    with pytest.raises(BadInput, match="neither annot/train.json"):                # the folder comes first
        train.parse_arguments()
    (tmp_path / "PHOTOS" / "annot").mkdir()
    (tmp_path / "PHOTOS" / "annot" / "train.json").touch()
    for words in (["--data", "PHOTOS"], ["--preset", "small"]):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        with pytest.raises(BadInput, match="is shipped: train one with --train-teacher"):
            train.parse_arguments()
