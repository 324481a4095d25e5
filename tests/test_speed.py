"""Speeds: the right thing is timed, and the report says what was measured."""

import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from commands import call, refused

import costs
import results
import speed
from common import fast_bfloat16
from costs import take_turns
from distill import loss_terms
from export import for_inference
from models import build_student, build_teacher

native = pytest.mark.skipif(not fast_bfloat16("cpu"), reason="this CPU has no native bfloat16")


def timing(filter, form, batch, fps, precision="float32", row="reg-none"):
    return speed.Timing(row, filter, form, precision, batch, fps, fps - 1, fps + 1, 0.5, 1e-6)


TIMINGS = [
    timing("gs", "plain", 1, 10),
    timing("gs", "optimised", 1, 20),
    timing("gs", "plain", 16, 30),
    timing("gs", "optimised", 16, 80),
    timing("gs", "optimised", 64, 90),
    timing("attention", "plain", 1, 5),
    timing("attention", "plain", 16, 9),
    timing("attention", "optimised", 1, 10),
    timing("attention", "compiled", 16, 45),
]


def test_ratios_worked_by_hand():
    one, many = speed.ratios(TIMINGS)
    assert one == ("reg-none", "gs", 3325 / 1481, "float32", 1, 20 / 10, 20 / 5, 20 / 10)
    assert many == ("reg-none", "gs", 3325 / 1481, "float32", 64, 90 / 45, 90 / 9, 90 / 30)
    assert speed.ratios_table(TIMINGS).splitlines()[-1].endswith("| 64 | 2.00 | 10.00 | 3.00 |")


def test_a_line_for_each_form_with_its_best_batch():
    lines = speed.speed_table(TIMINGS).splitlines()
    assert len(lines) == 2 + 5
    assert "| reg-none | gs | optimised | 20.0 | 90.0 (64) | 50% |" in lines


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiler takes a minute, and is tested in test_inference.py."""
    monkeypatch.setattr(
        speed, "for_inference", lambda model, dtype, compiled=False: for_inference(model, dtype)
    )


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=native)])
def test_every_form_is_timed_and_checked(fast, monkeypatch, mini, uncompiled):
    monkeypatch.setattr(speed, "fast_bfloat16", lambda device: fast)
    names = {"float32", "bfloat16"} if fast else {"float32"}
    monkeypatch.setattr(speed, "build_student", lambda *row, preset: build_student(*row, "mini"))
    monkeypatch.setitem(speed.LARGE["cpu"], "none", (3,))
    for name, value in (("ROUNDS", 2), ("RUNS", 1), ("LEAST", 0)):
        monkeypatch.setattr(costs, name, value)
    monkeypatch.setitem(speed.MATRIX, "cpu", 64)
    timings, rates = speed.measure_speed(["reg-none"])
    assert (
        len(timings) == 3 * len(speed.forms_of("cpu")) * len(names) * 2
        and set(rates) == {t.precision for t in timings} == names
    )
    for t in timings:
        assert t.low <= t.fps <= t.high and t.fps > 0 and t.fraction > 0
        assert t.off < (0.1 if t.precision == "bfloat16" else 1e-4), t


def test_turns_end_with_their_budget(monkeypatch):
    """Runs of a second on a clock of our own: a turn is an untimed run and a timed one; none begins when time
    is up.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        costs, "time", SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    )

    def run():
        clock.now += 1

    assert (
        take_turns([run] * 3, budget=6.5) == [[1, 1], [1], [1]] and clock.now == 8
    )  # 6.5 and less than two runs
    assert take_turns([run] * 3, budget=3) == [[1], [1], []]
    assert take_turns([run] * 3, budget=0) == [[], [], []]
    assert take_turns([run] * 3, budget=1000) == [[1] * costs.ROUNDS * costs.RUNS] * 3


def test_nothing_is_compiled_when_time_is_up(monkeypatch, capsys):
    monkeypatch.setattr(speed, "build_student", lambda *row, preset: build_student(*row, "tiny"))
    monkeypatch.setattr(speed, "PAPER", [row for row in speed.PAPER if row[:3] == ("cc", "gs", "none")])
    monkeypatch.setattr(speed, "precisions", lambda device: {"float32": torch.float32})
    monkeypatch.setattr(speed, "FEWEST_SECONDS", 2)
    monkeypatch.setitem(speed.LARGE["cpu"], "none", ())
    monkeypatch.setitem(speed.MATRIX, "cpu", 64)
    timings, _ = speed.measure_speed(["cc-none"], budget=0)
    assert [t.form for t in timings] == ["plain", "optimised"]
    assert "gs compiled float32, batch 1, is left out: the time is over" in capsys.readouterr().out


def test_the_machine_is_named(monkeypatch):
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": "A CPU", "avx2": True, "avx512_f": False}
    )
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    line = speed.machine_line("cpu", {"float32": 150e9})
    assert line == (
        "A CPU, 2 threads, avx2, ONEDNN_MAX_CPU_ISA=AVX2; "
        "products of large matrices: 150 billion operations a second in float32"
    )


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
    assert (
        order[:2] == ["A", "a"] and [name for name in order if name.isupper()] == ["A", "B"] * costs.ROUNDS
    )
    assert [order.count(name) for name in "ab"] == [len(seconds) + costs.ROUNDS for seconds in times]
    for seconds in times:
        assert len(seconds) >= costs.ROUNDS * costs.RUNS
        assert sum(seconds) >= costs.ROUNDS * costs.LEAST


@pytest.mark.parametrize("filter", ("gs", "attention"))
def test_each_form_is_what_it_says_when_its_turn_comes(filter, mini, uncompiled):
    """All are made before the first is timed. FFTs or softmax, not products or fused, where it is plain."""
    model = build_student("reg", filter, "none", "mini").eval()
    with torch.inference_mode():
        everyone = speed.contenders({filter: model}, torch.rand(1, 3, 32, 32), "cpu")
        contenders = [contender for contender in everyone if contender.form != "compiled"]
        assert {(contender.form, contender.precision) for contender in contenders} == {
            (form, precision) for form in ("plain", "optimised") for precision in speed.precisions("cpu")}
        for contender in contenders:
            with contender.context(), torch.profiler.profile() as profile:
                contender.run()
            names = " ".join(event.key for event in profile.key_averages())
            plain = contender.form == "plain"
            assert ("fft_rfft2" in names or "aten::softmax" in names) == plain, contender


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
    assert {t.form for t in timings} == {"plain", "optimised"}
    assert "cannot be compiled here: InvalidCxxCompiler" in capsys.readouterr().out


def test_plain_is_the_definition(mini):
    """Inside, no fused attention and no DFT matrices: the operations that run are FFTs, or products and a
    softmax.
    """
    for filter, expected in (("gs", "fft_rfft2"), ("gd", "fft_rfft2"), ("attention", "softmax")):
        model, called = build_student("reg", filter, "none", "mini").eval(), set()

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                called.add(getattr(function, "__name__", ""))  # noqa: B023
                return function(*args, **(kwargs or {}))

        with torch.inference_mode(), speed.plainly(model), torch.profiler.profile() as profile, Watch():
            model(torch.rand(1, 3, 32, 32))
        names = called | {event.key.split("::")[-1] for event in profile.key_averages()}
        assert any(expected in name for name in names), (filter, sorted(names))
        assert not any("flash" in name for name in names)


@pytest.mark.parametrize("row, taught", [("cc-gd-none", False), ("reg-gs-none", True), ("teacher", False)])
def test_training_speed(row, taught, mini):
    rates = dict.fromkeys(speed.PRECISIONS, 1e11)
    training = speed.training_speed(rates, preset="mini", row=row, taught=taught, seconds=0.5)
    assert training["batch"] == 8 and training["input"] > training["step"] > 0
    teacher = 2 * costs.count_multiply_adds(build_teacher("mini"))
    model = build_student(*row.split("-"), "mini") if row != "teacher" else None
    forward = 2 * costs.count_multiply_adds(model) if model else teacher
    operations = 3 * forward + taught * teacher                                             # backward: twice
    assert training["fraction"] == pytest.approx(training["step"] * operations / 1e11)


def test_a_timed_step_learns_as_train_does(mini):
    """The same terms, and weights that move: what is timed is a step."""
    torch.manual_seed(0)
    seen = []
    step, _, _ = speed.training_step("cc-gs-none", preset="mini", batch=4, taught=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "loss_terms", lambda *how: seen.append(loss_terms(*how)) or seen[-1])
        for _ in range(20):
            step()
    assert set(seen[0]) == {"task", "keypoint_tokens", "visual_tokens", "heatmap", "confidence", "loss"}
    assert seen[-1]["loss"].item() < seen[0]["loss"].item()


def test_tf32_is_for_gpus_and_its_flags_are_put_back():
    assert "tf32" not in speed.precisions("cpu") and "graph" not in speed.forms_of("cpu")
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for precision in speed.PRECISIONS:
        with speed.rounding(precision):
            assert [flag.allow_tf32 for flag in flags] == 2 * [precision == "tf32"]
    assert [flag.allow_tf32 for flag in flags] == before


def test_unknown_rows_are_refused(tmp_path):
    refused(call("studies/speed.py", "reg-w33", cwd=tmp_path), "choose from reg-none, reg-w32")


@native
@pytest.mark.parametrize("filter", ["gs", "gd"])
def test_the_definition_runs_in_bfloat16(filter, mini):
    model = build_student("reg", filter, "none", "mini").eval()
    with torch.inference_mode():
        ready = for_inference(model, torch.bfloat16)
        images = torch.rand(2, 3, 32, 32)
        fast = ready(images).visual_tokens.float()
        with speed.plainly(ready):
            assert (ready(images).visual_tokens.float() - fast).abs().max() < 0.05 * fast.abs().max()


def test_figures_are_saved_under_the_machines_name(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(speed, "measure_speed", lambda rows, device: (TIMINGS, {"float32": 1e11}))
    monkeypatch.setattr(speed, "training_speed", lambda *_: dict(preset="tiny", precision="float32", batch=32,
                                                                 step=300.0, fraction=1 / 3, input=9000.0))
    done = call("studies/speed.py", "--device", "cpu", "--save", "mine", cwd=tmp_path)
    entry = results.read("speed")["speed-mine"]
    assert done.returncode == 0 and entry["machine"].endswith("100 billion operations a second in float32")
    assert [speed.Timing(**timing) for timing in entry["timings"]] == TIMINGS
    assert entry["rates"] == {"float32": 1e11} and entry["training"][0]["fraction"] == 0.33333333
