"""The loop in this process: losses that are not finite, the same weights again, and what threads and
processes may change.
"""

import argparse
import copy
import json
import time

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import train as loop
from common import BadInput, Distributed
from crops import store
from distill import TERMS
from models import build_student, build_teacher
from synthetic import drawn_people
from train import Stopped

ONE = Distributed(0, 1, "cpu")


pytestmark = pytest.mark.usefixtures("mini")


def drawings(count, size):
    train, valid = drawn_people("train", count, size), drawn_people("valid", 16, size)
    return train, valid, store(train, size), store(valid, size)


@pytest.fixture(scope="module")
def people():
    return drawings(64, 32)


@pytest.fixture(scope="module")
def tiny_people():
    return drawings(64, 64)


def tiny():
    """A network that is large enough for several threads, and for a compiler to find something to do."""
    return build_student("cc", "gs", preset="tiny")


def teacher():
    """HRNet's place is taken by one convolution with its batch norm: checkpoints of HRNet's 930 tensors take
    a second to read.
    """
    model = build_teacher("mini")
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return model


def training(people, out, build=lambda: build_student("cc", "gs", preset="mini"), **changes):
    out.mkdir(exist_ok=True)
    args = argparse.Namespace(
        **{
            **dict(out=out, data="drawn", drawings=64, distill=False, terms=list(TERMS), views=0,
                   batch_size=16, accumulate=1, lr=1e-3, optimiser="muon", seed=0, amp=False, epochs=2,
                   preset="tiny", student="cc", stop_after=None, augmentation="upright", compile=False,
                   deterministic=False),
            **changes,
        }
    )
    train, valid, crops, valid_crops = people
    torch.manual_seed(args.seed)
    return Run(args, loop.initial_state(args, ONE, build(), train), (train, crops), (valid, valid_crops))


class Run:
    """A run in this process, as train.train puts it together."""

    def __init__(self, args, state, train, valid):
        self.args, self.state, self.data = args, state, (train, valid)
        self.model, self.ema = state.model, state.ema

    def run(self, teacher=None, stop=lambda between_steps=False: False):
        loop.fit(self.args, ONE, self.state, *self.data, teacher, stop)

    def save(self):
        loop.save(self.args, ONE, self.state)

    def resume(self):
        return loop.resume(self.args, self.state)


def weights(run):
    run.run()
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def test_same_seed_same_weights_and_another_seed_others(tiny_people, tmp_path):
    first, again, other = (weights(training(tiny_people, tmp_path / name, tiny, seed=seed, epochs=1))
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_threads_change_roundings_only(tiny_people, tmp_path):
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(weights(training(tiny_people, tmp_path / str(count), tiny, epochs=1)))
    finally:
        torch.set_num_threads(before)
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_compiled_learns_the_same(tiny_people, tmp_path):
    plain, compiled = (training(tiny_people, tmp_path / name, tiny, epochs=1, compile=name == "compiled")
                       for name in ("plain", "compiled"))
    compiled.model.compile(dynamic=False)                    # as train.py does
    try:
        found = weights(compiled)
    except RuntimeError as error:
        if "compiler" in str(error).lower():
            pytest.skip("no C++ compiler")
        raise
    expected = weights(plain)
    assert not torch.equal(found, expected)                  # sums in another order, or nothing was compiled
    assert (found - expected).norm() < 0.02 * expected.norm()                  # as far as threads may move it


def test_what_is_not_finite_is_named_and_kept(people, tmp_path):
    run = training(people, tmp_path / "run")
    with torch.no_grad():
        run.model.head.x.weight[0, 0] = float("nan")
    with pytest.raises(
        BadInput,
        match=r"not finite at epoch 1, step 1: task, loss \(.*not-finite.pt holds .*or lower --lr$"):
        run.run()
    kept = torch.load(tmp_path / "run/not-finite.pt", weights_only=True)
    assert len(kept["rows"]) == 16 and kept["epoch"] == 0 and "head.x.weight" in kept["model"]

    run = training(people, tmp_path / "other")
    run.model.head.y.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(BadInput, match="step 1: gradient"):
        run.run()
    assert all(torch.equal(before[name], value) for name,
               value in run.model.state_dict().items())  # not spoiled


def test_a_run_knows_its_people_wherever_they_are(people, tmp_path):
    """Another path to the same people is the same run; other people, as many, of the same name, are not."""
    run = training(people, tmp_path)
    run.save()
    assert training(people, tmp_path, data="elsewhere/drawn").resume() == tmp_path / "last.pt"
    train, *rest = people
    others = drawn_people("valid", 64, 32)
    others.name = train.name
    with pytest.raises(BadInput, match="was trained with samples 64 of drawn/train"):
        training((others, *rest), tmp_path).resume()


def test_a_stop_is_heard_while_the_teacher_is_asked(people, tmp_path):
    run = training(people, tmp_path)

    class Slow:
        source = "x"

        def prepare(self, view, batch_of, between):
            between()
            raise AssertionError("not heard")

    with pytest.raises(Stopped):
        run.run(Slow(), lambda between_steps=False: True)
    assert (tmp_path / "last.pt").exists()


def test_a_stop_is_heard_while_a_network_is_scored(people, tmp_path, monkeypatch):
    expected = weights(training(people, tmp_path / "whole"))
    run = training(people, tmp_path / "run")
    scoring, asked = loop.evaluate, []

    def asked_meanwhile(*how, **more):
        asked.append(15)
        return scoring(*how, **more)

    monkeypatch.setattr(loop, "evaluate", asked_meanwhile)
    with pytest.raises(Stopped):
        run.run(stop=lambda between_steps=False: bool(asked))
    progress = run.state.progress
    assert progress.epoch == 1 and progress.step == 4  # all steps of the second, which has no score yet
    monkeypatch.setattr(loop, "evaluate", scoring)
    run = training(people, tmp_path / "run")
    run.resume()
    assert torch.equal(weights(run), expected)
    one, other = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "run")
    )
    changing = {"images_per_second"}
    assert [{key: line[key] for key in line.keys() - changing} for line in one] == [
        {key: line[key] for key in line.keys() - changing} for line in other]


@pytest.mark.parametrize("how", ["signal", "time is up"])
def test_stopped_after_every_step_to_the_bit(people, tmp_path, monkeypatch, how):
    """The teacher, whose batch norms count, in bfloat16 and in parts, partly hidden people: eight stops in
    two epochs of four.
    """
    changes = dict(build=teacher, amp=True, accumulate=2, batch_size=4, augmentation="occlusion",
                   optimiser="adam")
    people = people[0].first(16), people[1], people[2][:16], people[3]
    whole = training(people, tmp_path / "whole", **changes)
    expected, stops = weights(whole), 0
    monkeypatch.setattr(loop, "BEGAN", time.monotonic() - 120)
    update = loop.update_ema
    while True:
        run = training(people, tmp_path / "run", **changes)
        if stops:
            run.resume()
        stop = loop.StopRequest(1 if how == "time is up" else None)
        if how == "signal":  # it arrives within the step
            monkeypatch.setattr(loop, "update_ema", lambda *what,
                                stop=stop: (update(*what), stop.receive(15, None)))
        try:
            run.run(stop=stop)
            break
        except Stopped:
            stops += 1
    monkeypatch.setattr(loop, "update_ema", update)
    assert stops == 8 and torch.equal(weights(run), expected)
    found = run.ema.state_dict()
    for name, value in whole.ema.state_dict().items():
        assert torch.equal(found[name], value), name


def test_best_weights_left_behind_are_scored_anew(people, tmp_path):
    """last.pt alone travels; or no epoch was one that is scored."""
    training(people, tmp_path).run()
    (tmp_path / "best.pt").unlink()
    run = training(people, tmp_path)
    run.resume()
    run.run()
    assert checkpoint.read(tmp_path / "best.pt")["metadata"]["epoch"] == 2


def test_what_is_kept_on_a_gpu_leaves_it_half(monkeypatch):
    """Crops of a read-only file, and a GPU that has twice their bytes free, or a little more."""
    crops = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    crops.flags.writeable = False
    monkeypatch.setattr(loop, "CHUNK", 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert loop.on_device(crops, "cpu") is crops
    other = torch.device("cpu")                                      # stands for a GPU: it is not the string
    for free, kept in ((2 * crops.nbytes, False), (2 * crops.nbytes + 2, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 ** 6))
        found = loop.on_device(crops, other)
        assert np.array_equal(found.numpy(), crops) if kept else found is crops


def test_a_damaged_state_does_not_replace_the_good_one(people, tmp_path):
    run = training(people, tmp_path)
    run.save(), run.save()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    run = training(people, tmp_path)
    run.resume(), run.save()
    for name in ("last.pt", "previous.pt"):
        checkpoint.read(tmp_path / name)
    assert (tmp_path / "last.damaged").read_bytes() == b"damaged"


def test_a_run_may_go_on_with_a_lower_rate(people, tmp_path):
    training(people, tmp_path).save()
    run = training(people, tmp_path, lr=1e-4)
    run.resume()
    run.run()
    with pytest.raises(BadInput,
                       match="was trained with --lr 0.0001, now it is 0.001: it may be lowered, not raised"):
        training(people, tmp_path, lr=1e-3).resume()
    rates = [json.loads(line)["lr"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rates) == 2 and max(rates) <= 1e-4


@pytest.mark.parametrize("native", [False, True])
def test_amp_without_native_bfloat16_is_float32(people, tmp_path, monkeypatch, native):
    plain = weights(training(people, tmp_path / "plain", epochs=1))
    monkeypatch.setattr(loop, "fast_bfloat16", lambda device: native)
    assert torch.equal(weights(training(people, tmp_path / "amp", epochs=1, amp=True)), plain) != native
