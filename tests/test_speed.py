"""Speeds: the right thing is timed, and the report says what was measured."""

import time
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import costs
import speed
from commands import call, refused
from inference import for_inference
from models import build_student


def timing(filter, form, batch, fps, precision="float32", row="reg-none"):
    return speed.Timing(row, filter, form, precision, batch, fps, fps - 1, fps + 1, 0.5, 1e-6, 0)


TIMINGS = [timing("gs", "plain", 1, 10), timing("gs", "ready", 1, 20), timing("gs", "plain", 16, 30), timing("gs", "ready", 16, 80),
           timing("gs", "ready", 64, 90), timing("attention", "plain", 1, 5), timing("attention", "plain", 16, 9),
           timing("attention", "ready", 1, 10), timing("attention", "compiled", 16, 45)]


def test_ratios_worked_by_hand():
    one, many = speed.ratios(TIMINGS)
    assert one == ("reg-none", "gs", 3325 / 1481, "float32", 1, 20 / 10, 20 / 5, 20 / 10)
    assert many == ("reg-none", "gs", 3325 / 1481, "float32", 64, 90 / 45, 90 / 9, 90 / 30)
    assert "2.00 times fused" in speed.ratio_lines(TIMINGS)


def test_a_line_for_each_form_with_its_best_batch():
    lines = speed.speed_lines(TIMINGS).splitlines()
    assert len(lines) == 1 + 5
    line, = (line for line in lines if "gs        ready" in line)
    assert "20.0" in line and " 64 " in line and "90.0" in line and "80.0" not in line and "50%" in line


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiler takes a minute, and is tested in test_inference.py."""
    monkeypatch.setattr(speed, "for_inference", lambda model, dtype, compiled=False: for_inference(model, dtype))


def test_every_form_is_timed_and_checked(monkeypatch, mini, uncompiled):
    monkeypatch.setattr(speed, "build_student", lambda *row, preset: build_student(*row, "mini"))
    monkeypatch.setitem(speed.LARGE["cpu"], "none", (3,))
    for name, value in (("ROUNDS", 2), ("RUNS", 1), ("LEAST", 0)):
        monkeypatch.setattr(costs, name, value)
    monkeypatch.setitem(speed.MATRIX, "cpu", 64)
    timings, rates = speed.measure_speed(["reg-none"])
    assert len(timings) == 3 * len(speed.FORMS) * 2 * 2 and set(rates) == set(speed.PRECISIONS)
    for t in timings:
        assert t.low <= t.fps <= t.high and t.fps > 0 and t.share > 0
        assert t.off < (0.1 if t.precision == "bfloat16" else 1e-4), t


def test_all_take_turns(monkeypatch):
    """Each runs in every round, once untimed and at least RUNS times timed, within its own context."""
    monkeypatch.setattr(costs, "LEAST", 0.02)
    order, within = [], []

    def run(name):
        assert within == [name]
        order.append(name)
        time.sleep(0.002)

    @contextmanager
    def context(name):
        order.append(name.upper()), within.append(name)
        yield
        within.clear()

    times = costs.take_turns([(partial(run, name), partial(context, name)) for name in "ab"])
    assert order[:2] == ["A", "a"] and [name for name in order if name.isupper()] == ["A", "B"] * costs.ROUNDS
    assert [order.count(name) for name in "ab"] == [len(found) + costs.ROUNDS for found in times]
    assert all(len(found) >= costs.ROUNDS * costs.RUNS and sum(found) >= costs.ROUNDS * costs.LEAST for found in times)


@pytest.mark.parametrize("filter", ("gs", "attention"))
def test_each_form_is_what_it_says_when_its_turn_comes(filter, mini, uncompiled):
    """All are made before the first is timed: FFTs and softmax, in both precisions, where it is plain and there alone."""
    model = build_student("reg", filter, "none", "mini").eval()
    with torch.inference_mode():
        found = [each for each in speed.contenders({filter: model}, torch.rand(1, 3, 32, 32), "cpu") if each.form != "compiled"]
        assert {(each.form, each.precision) for each in found} == {(f, p) for f in ("plain", "ready") for p in speed.PRECISIONS}
        for each in found:
            with each.context(), torch.profiler.profile() as profile:
                each.run()
            names = " ".join(event.key for event in profile.key_averages())
            assert ("fft_rfft2" in names or "aten::softmax" in names) == (each.form == "plain"), each


def test_what_cannot_be_compiled_is_told_and_left_out(monkeypatch, capsys, mini):
    def no_compiler(model, dtype, compiled=False):
        if not compiled:
            return for_inference(model, dtype)

        def fails(images):
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler")
        return fails

    monkeypatch.setattr(speed, "build_student", lambda *row, preset: build_student(*row, "mini"))
    monkeypatch.setattr(speed, "for_inference", no_compiler)
    monkeypatch.setattr(speed, "PAPER", [row for row in speed.PAPER if row[:3] == ("cc", "gs", "none")])
    monkeypatch.setitem(speed.LARGE["cpu"], "none", (2,))
    monkeypatch.setitem(speed.MATRIX, "cpu", 64)
    monkeypatch.setattr(costs, "LEAST", 0)
    timings, _ = speed.measure_speed(["cc-none"])
    assert {t.form for t in timings} == {"plain", "ready"}
    assert "cannot be compiled here: InvalidCxxCompiler" in capsys.readouterr().out


def test_plain_is_the_definition(mini):
    """Inside, no fused attention and no DFT matrices: the operations that run are FFTs, or products and a softmax."""
    for filter, expected in (("gs", "fft_rfft2"), ("gd", "fft_rfft2"), ("attention", "softmax")):
        model, called = build_student("reg", filter, "none", "mini").eval(), set()

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                called.add(getattr(function, "__name__", ""))
                return function(*args, **(kwargs or {}))

        with torch.inference_mode(), speed.plainly(model), torch.profiler.profile() as profile, Watch():
            model(torch.rand(1, 3, 32, 32))
        names = called | {event.key.split("::")[-1] for event in profile.key_averages()}
        assert any(expected in name for name in names), (filter, sorted(names))
        assert not any("flash" in name for name in names)


def test_training_speed():
    found = speed.training_speed(dict.fromkeys(speed.PRECISIONS, 1e11), people=40)
    assert found["batch"] == 32 and found["input"] > found["step"] > 0
    forward = 2 * costs.count_multiply_adds(build_student("cc", "gd", "none", "tiny"))
    assert found["share"] == pytest.approx(found["step"] * 3 * forward / 1e11)            # backward is twice as much


def test_unknown_rows_are_refused(tmp_path):
    refused(call("evaluate.py", "--speed", "reg-w33", cwd=tmp_path), "choose from reg-none, reg-w32")


@pytest.mark.parametrize("filter", ["gs", "gd"])
def test_the_definition_runs_in_bfloat16(filter, mini):
    model = build_student("reg", filter, "none", "mini").eval()
    with torch.inference_mode():
        ready = for_inference(model, torch.bfloat16)
        images = torch.rand(2, 3, 32, 32)
        fast = ready(images).visual_tokens.float()
        with speed.plainly(ready):
            assert (ready(images).visual_tokens.float() - fast).abs().max() < 0.05 * fast.abs().max()
