"""The loop in this process: losses that are not finite, stops and resumed runs to the bit, and what threads
may change. Processes that are killed, and several at once: test_resume.py.
"""

import argparse
import copy
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import checkpoint
import optim
import train as loop
from common import BadInput, Distributed
from crops import store
from models import build_student, build_teacher
from optim import rate_factor
from synthetic import drawn_people

ONE = Distributed(0, 1, "cpu")
STEPS = 4                        # of an epoch of `people` in batches of 16
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
    """A network that is large enough for several threads."""
    return build_student("cc", "gs", preset="tiny")


def teacher():
    """HRNet's place is taken by one convolution with its batch norm: checkpoints of HRNet's 930 tensors take
    a second to read.
    """
    model = build_teacher("mini")
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    return model


class Training:
    """A run in this process, as train.train_model puts it together."""

    def __init__(self, people, out, build=lambda: build_student("cc", "gs", preset="mini"), **changes):
        out.mkdir(exist_ok=True)
        self.args = argparse.Namespace(**dict(
            out=out, data=["drawn"], select=["drawn"], student="cc", distill=False, views=0, batch_size=16,
            accumulate=1, lr=1e-3, optimiser="muon", seed=0, amp=False, epochs=2, stop_after=None,
            augmentation="upright") | changes)
        train, valid, crops, valid_crops = people
        torch.manual_seed(self.args.seed)
        self.data = (train, crops), {"drawn": (valid, valid_crops)}
        self.state = loop.start(self.args, ONE, build(), train, self.data[1])
        self.model, self.ema = self.state.model, self.state.ema

    def run(self):
        return loop.fit(self.args, ONE, self.state, *self.data)

    def save(self):
        checkpoint.save_run(self.args.out, self.state, self.args)

    def resume(self):
        return checkpoint.resume(self.args.out, self.state, self.args)


def weights(run):
    assert run.run()
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


def outcome(run):
    """What must not depend on stops: weights, their average, states of optimisers, the log but seconds."""
    log = [{name: value for name, value in line.items() if name != "images_per_second"}
           for line in run.state.log]
    return checkpoint.checksum([run.model.state_dict(), run.ema.state_dict(),
                                [optimiser.state_dict() for optimiser in run.state.optimisers]]), log


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------- the same weights again

def test_same_seed_same_weights_and_another_seed_others(tiny_people, tmp_path):
    first, again, other = (weights(Training(tiny_people, tmp_path / name, tiny, seed=seed, epochs=1))
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_threads_change_roundings_only(tiny_people, tmp_path):
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(weights(Training(tiny_people, tmp_path / str(count), tiny, epochs=1)))
    finally:
        torch.set_num_threads(before)
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


@pytest.mark.parametrize("native", [False, True])
def test_amp_without_native_bfloat16_is_float32(people, tmp_path, monkeypatch, native):
    plain = weights(Training(people, tmp_path / "plain", epochs=1))
    monkeypatch.setattr(loop, "fast_bfloat16", lambda device: native)
    assert torch.equal(weights(Training(people, tmp_path / "amp", epochs=1, amp=True)), plain) != native


def test_processes_and_parts_share_a_step():
    """12 samples, 2 accumulated parts, 3 processes: pieces of 2, each sample once, each piece in order.

    As drawn: were they sorted before, batch norms would see pieces of one data set alone.
    """
    rows = torch.tensor([7, 3, 11, 0, 5, 9, 1, 10, 2, 6, 8, 4])
    pieces = [loop.parts_of(rows, 2, Distributed(rank, 3, "cpu")).tolist() for rank in range(3)]
    assert pieces == [[[3, 7], [1, 10]], [[0, 11], [2, 6]], [[5, 9], [4, 8]]]
    assert torch.equal(loop.parts_of(rows, 1, Distributed(0, 1, "cpu")), torch.arange(12)[None])


# ------------------------------------------------------------------------------- losses that are not finite

def test_what_is_not_finite_is_named_and_changes_nothing(people, tmp_path):
    """A weight that makes the task NaN; a gradient that alone is infinite. No weight and no state moves."""
    run = Training(people, tmp_path / "run")
    with torch.no_grad():
        run.model.head.x.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match=r"not finite at epoch 1, step 1: task, loss, gradient\. The weights "
                                       r"were not changed: look at samples (\d+, ){15}\d+, or lower --lr$"):
        run.run()

    run = Training(people, tmp_path / "other")
    seen = iter([1, 1, float("inf")])                                            # in the third step
    run.model.head.y.weight.register_hook(lambda gradient: gradient * next(seen))
    kept, loss_terms = [], loop.loss_terms

    def keep(*what):                         # the third call comes after two updates, and before none
        kept.append(copy.deepcopy([run.model.state_dict(), run.ema.state_dict(),
                                   *(optimiser.state_dict() for optimiser in run.state.optimisers)]))
        return loss_terms(*what)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadInput, match="step 3: gradient. The"):
        patch.setattr(loop, "loss_terms", keep)
        run.run()
    model, ema, *states = kept[2]
    assert checkpoint.checksum(model) == checkpoint.checksum(run.model.state_dict())
    assert checkpoint.checksum(ema) == checkpoint.checksum(run.ema.state_dict())
    now = [optimiser.state_dict()["state"] for optimiser in run.state.optimisers]
    assert checkpoint.checksum([state["state"] for state in states]) == checkpoint.checksum(now)
    assert checkpoint.checksum(kept[1]) != checkpoint.checksum(kept[2])          # an update would have shown


def test_where_there_is_something_to_resume_from_it_is_said(people, tmp_path, monkeypatch):
    run, loss_terms = Training(people, tmp_path), loop.loss_terms

    def spoiled(*what):
        terms = loss_terms(*what)
        return terms | {"loss": terms["loss"] * (float("inf") if run.state.epoch else 1)}

    monkeypatch.setattr(loop, "loss_terms", spoiled)
    with pytest.raises(BadInput, match="epoch 2, step 1: loss, gradient.* or lower --lr and continue with"):
        run.run()
    monkeypatch.setattr(loop, "loss_terms", loss_terms)
    expected = Training(people, tmp_path / "whole")
    again = Training(people, tmp_path)
    again.resume()
    assert expected.run() and again.run() and outcome(again) == outcome(expected)


# ------------------------------------------------------------------------------- stopped and resumed

# the teacher, whose batch norms count, in bfloat16 and in two parts, partly hidden people; 3 epochs
HARD = dict(build=teacher, amp=True, accumulate=2, batch_size=4, augmentation="occlusion", epochs=3,
            optimiser="adam")


@pytest.fixture
def few(people, monkeypatch):
    """16 of them, and a weight average over all of the few steps, which would be that of the last alone."""
    monkeypatch.setattr(optim, "EMA_FRACTION", 1)
    return people[0].first(16), people[1], people[2][:16], people[3]


def test_stopped_after_every_epoch_to_the_bit(few, tmp_path, monkeypatch):
    """--stop-after, whose time has passed at the end of every epoch."""
    whole = Training(few, tmp_path / "whole", **HARD)
    assert whole.run()
    monkeypatch.setattr(loop, "BEGAN", time.monotonic() - 120)
    for epoch in (1, 2, 3):
        run = Training(few, tmp_path / "run", stop_after=1, **HARD)
        if epoch > 1:
            run.resume()
        assert run.run() == (epoch == 3) and run.state.epoch == len(log_of(tmp_path / "run")) == epoch
    assert outcome(run) == outcome(whole)
    assert not torch.equal(run.ema.embed.project.weight, run.model.embed.project.weight)


def test_killed_within_an_epoch_to_the_bit(few, tmp_path, monkeypatch):
    """It ends within a step, as after SIGTERM: the epoch under way is lost, no more."""
    whole = Training(few, tmp_path / "whole", **HARD)
    assert whole.run()
    update, saved = loop.update_ema, []
    for last in (1, 3, 4, 5, 2, None):                       # steps from where it begins until it is killed
        run = Training(few, tmp_path / "run", **HARD)
        if (tmp_path / "run/last.pt").exists():
            run.resume()
        saved.append(run.state.epoch)
        steps = iter(range(1, 100))

        def update_and_die(*what, steps=steps, last=last):
            update(*what)
            if next(steps) == last:
                raise SystemExit(143)                        # what common.terminate does

        monkeypatch.setattr(loop, "update_ema", update_and_die)
        if last:
            with pytest.raises(SystemExit):
                run.run()
    assert run.run() and outcome(run) == outcome(whole) and saved == [0, 0, 0, 0, 1, 1]
    assert log_of(tmp_path / "run") == run.state.log


def test_more_epochs_follow_the_new_schedule(people, tmp_path, capsys):
    """Two epochs that were planned and three more: the rate decays where that of five epochs does."""
    assert Training(people, tmp_path).run()
    run = Training(people, tmp_path, epochs=5)
    run.resume()
    told = capsys.readouterr().out
    assert "was planned with --epochs 2, now it is 5: the rate decays at other steps" in told
    assert run.run() and [line["epoch"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5]
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates[1] == pytest.approx(1e-3 * rate_factor(2 * STEPS - 1, 2 * STEPS))
    assert rates[2:] == pytest.approx([1e-3 * rate_factor(n * STEPS - 1, 5 * STEPS) for n in (3, 4, 5)])


def test_a_run_may_go_on_with_a_lower_rate(people, tmp_path):
    Training(people, tmp_path).save()
    run = Training(people, tmp_path, lr=1e-4)
    run.resume()
    assert run.run()
    with pytest.raises(BadInput, match="with --lr 0.0001, now it is 0.001: it may be lowered, not raised"):
        Training(people, tmp_path, lr=1e-3).resume()
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert len(rates) == 2 and max(rates) <= 1e-4


def test_what_else_must_stay_is_named(people, tmp_path):
    Training(people, tmp_path).save()
    for name, value in dict(batch_size=8, accumulate=2, augmentation="occlusion", seed=1, amp=True).items():
        with pytest.raises(BadInput, match=f"trained with {name} .*, now it is {value}: give the flags of"):
            Training(people, tmp_path, **{name: value}).resume()
    with pytest.raises(BadInput, match=r"with select \['drawn'\], now it is \['b', 'drawn'\]: give"):
        Training(people, tmp_path, select=["drawn", "b"]).resume()
    with pytest.raises(BadInput, match="is cc gs none mini, not reg gs none mini: give the flags of"):
        Training(people, tmp_path, lambda: build_student("reg", "gs", preset="mini")).resume()


def test_a_run_knows_its_people_wherever_they_are(people, tmp_path):
    """Another path to them is the same run. Of changed labels or images it is said that they have changed."""
    (tmp_path / "here").mkdir(), (tmp_path / "there").mkdir()
    for file in ("a.jpg", "b.jpg"):
        for place in ("here", "there"):
            (tmp_path / place / file).write_bytes(file.encode())
    train, valid, *crops = people

    def training(place="here", **changes):
        sets = {name: copy.copy(samples) for name, samples in (("train", train), ("valid", valid))}
        for samples in sets.values():
            samples.files = tuple(tmp_path / place / file for file in ("a.jpg", "b.jpg"))
        for what, value in changes.items():
            name, field = what.split("_")
            setattr(sets[name], field, value)
        return Training((sets["train"], sets["valid"], *crops), tmp_path / "run")

    training().save()
    assert training("there").resume() == tmp_path / "run/last.pt"
    for changes, what in ((dict(train_joints=train.joints + 1), "training labels"),
                          (dict(train_visible=~train.visible), "training labels"),
                          (dict(train_side=2 * train.side), "training labels"),
                          (dict(valid_center=valid.center + 1), r"validation \(drawn\) labels")):
        with pytest.raises(BadInput, match=f"with {what} .*: the {what} have changed: bring the old"):
            training(**changes).resume()
    (tmp_path / "there/b.jpg").write_bytes(b"another image")
    for name, what in (("train", "training images"), ("valid", r"validation \(drawn\) images")):
        files = tuple(tmp_path / "there" / file for file in ("a.jpg", "b.jpg"))
        with pytest.raises(BadInput, match=f"with {what} .*: the {what} have changed: bring the old"):
            training(**{f"{name}_files": files}).resume()
    with pytest.raises(BadInput, match="with training labels 64 of drawn/.* 64 of else.*: give the flags"):
        training(train_name="else/train").resume()


def test_best_weights_left_behind_are_scored_anew(people, tmp_path):
    """last.pt alone travels; or no epoch was one that is scored."""
    assert Training(people, tmp_path).run()
    (tmp_path / "best.pt").unlink()
    run = Training(people, tmp_path, epochs=3)
    run.resume()
    assert run.run() and checkpoint.read(tmp_path / "best.pt")["metadata"]["epoch"] == 3
    with pytest.raises(BadInput, match="last.pt is at the end of epoch 3: --epochs 2 is less"):
        Training(people, tmp_path, epochs=2).resume()


def test_a_run_that_ends_early_keeps_the_score_of_its_end(people, tmp_path, monkeypatch):
    """Stopped where no epoch is scored, resumed with no epoch left, then with one more: the best stays."""
    train, valid, crops, valid_crops = people
    scores, args = iter([40.0, 60.0, 50.0]), Training(people, tmp_path, epochs=8).args

    def score(*_):
        value = next(scores)
        return {f"pckh@{t}": {"mean": value} for t in loop.THRESHOLDS}

    monkeypatch.setattr(loop, "lock", lambda *_: None)                     # in one process they would meet
    monkeypatch.setattr(loop, "evaluate", score)
    monkeypatch.setattr(loop, "build_model", lambda args: build_student("cc", "gs", preset="mini"))
    monkeypatch.setattr(loop, "load_data", lambda *_: ((train, crops), {"drawn": (valid, valid_crops)}))
    monkeypatch.setattr(loop, "write_result", lambda args, valid, log: None)
    for name, value in dict(device="cpu", train_teacher=False).items():
        setattr(args, name, value)
    best = lambda: checkpoint.read(tmp_path / "best.pt")["metadata"]
    args.stop_after = 1e-6
    for args.resume in (False, *4 * (True,)):
        loop.train_model(args, ONE)
    assert best()["pckh@0.5"] == 40 and len(log_of(tmp_path)) == 5
    args.epochs = 5
    loop.train_model(args, ONE)
    assert best()["pckh@0.5"] == 60 and best()["epoch"] == 5 and log_of(tmp_path)[4]["pckh@0.5"] == 60
    args.epochs, args.stop_after = 6, None
    loop.train_model(args, ONE)
    assert best()["pckh@0.5"] == 60 and [line.get("pckh@0.5") for line in log_of(tmp_path)] == [
        None, None, None, 40, 60, 50]


def test_of_a_state_the_average_is_loaded(people, tmp_path):
    """It is what the log's scores are of."""
    run = Training(people, tmp_path)
    run.ema.embed.project.bias.add_(1)
    run.save()
    loaded, _ = checkpoint.load(tmp_path / "last.pt")
    assert checkpoint.checksum(loaded.state_dict()) == checkpoint.checksum(run.ema.state_dict())
    assert checkpoint.checksum(loaded.state_dict()) != checkpoint.checksum(run.model.state_dict())


def test_a_damaged_state_does_not_replace_the_good_one(people, tmp_path):
    run = Training(people, tmp_path)
    run.save(), run.save()
    (tmp_path / "last.pt").write_bytes(b"damaged")
    run = Training(people, tmp_path)
    assert run.resume() == tmp_path / "previous.pt"
    run.save()
    for name in ("last.pt", "previous.pt"):
        checkpoint.read(tmp_path / name)
    assert (tmp_path / "last.damaged").read_bytes() == b"damaged"


def test_a_disk_that_fills_during_a_run_costs_the_epoch(people, tmp_path, monkeypatch):
    """The third of four epochs cannot be saved: the two before it stay, and the run goes on from there."""
    whole, run = (Training(people, tmp_path / name, epochs=4) for name in ("whole", "run"))
    assert whole.run()
    save = torch.save

    def full(content, file):
        if content["metadata"]["epoch"] == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match="last.pt could not be written.*No space left.*untouched"):
        run.run()
    def ended(content, file):
        file.write(b"half")
        raise SystemExit(143)

    (tmp_path / "run/last.partial").write_text("somebody's own")
    monkeypatch.setattr(torch, "save", ended)
    with pytest.raises(SystemExit):
        run.save()
    monkeypatch.setattr(torch, "save", save)
    (tmp_path / "run/last.partial").unlink()
    assert len(log_of(tmp_path / "run")) == 2 and not list(tmp_path.glob("run/*.partial"))
    for epoch, name in ((1, "previous.pt"), (2, "last.pt")):
        assert checkpoint.read(tmp_path / "run" / name)["metadata"]["epoch"] == epoch
    again = Training(people, tmp_path / "run", epochs=4)
    again.resume()
    assert again.run() and outcome(again) == outcome(whole)


def test_targets_of_a_view_are_asked_for_once_and_again_after_a_stop(people, tmp_path):
    """Views alternate; a resumed run asks for the targets of the view it is in, before its first step."""
    asked = []

    class Targets(SimpleNamespace):
        def prepare(self, view, batch_of):
            asked.append((view, tuple(batch_of([0, 1]).images.shape)))

        def __call__(self, images, view, rows):
            assert asked[-1][0] == view and len(images) == len(rows) == 16
            return None                                                          # nothing is learned from it

    for epochs in (3, 4):
        run = Training(people, tmp_path, views=2, epochs=epochs)
        if epochs == 4:
            run.resume()
        assert loop.fit(run.args, ONE, run.state, *run.data, Targets())
    assert asked == [(view, (2, 3, 32, 32)) for view in (0, 1, 0, 1)]
