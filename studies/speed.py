"""How fast each mixer is on this machine, in each form, side by side in one run.

    python studies/speed.py         # regression students without a backbone: ten minutes at most on two cores
    python studies/speed.py reg-w32 cc-none  # other rows of the paper; 'all' for all of them (on a GPU)
    python studies/speed.py --save epyc      # and keep the figures, as speed-epyc in results/speed.json

    plain        the filters' definition (FFT), or attention as separate products and softmax
    optimised    export.for_inference: products with DFT matrices, fused attention, folded batch norms
    graph        its kernels on one batch, recorded as a CUDA graph and replayed at once (on a GPU)
    compiled     the same through torch.compile (on a GPU with CUDA graphs)

Networks have random weights, crops are on the device, decoding is not timed. All that is compared takes
turns, the product of two large matrices of the same type included. The fraction is of that product's rate:
the paper's operations (two a multiply-add, FFTs for the filters in every form) a second over it. Only
precisions that the device computes natively are measured; tf32 is float32 whose products and convolutions
round their inputs to 10 bits (on a GPU).
"""

import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (BadInput, CommandLine, check_device, default_device, fast_bfloat16,
                    main_with_clear_errors)
from crops import AUGMENTATIONS, make_batch, on_device, store
from distill import WEIGHTS, TeacherTargets, loss_terms
from costs import PAPER, count_multiply_adds, describe_device, take_turns
from export import for_inference
from fft_filter import through_ffts
from models import PRESETS, build_student, build_teacher
from results import add, rounded
from synthetic import drawn_people
from optim import build_optimisers, update_ema
from train import RATE, RECIPES

FORMS = ("plain", "optimised", "graph", "compiled")
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
LARGE = {"cpu": {"none": (16,), "w32": (8,), "w48": (8,)},                    # crops a forward pass, beside 1
         "cuda": dict.fromkeys(("none", "w32", "w48"), (64, 256))}             # the best of these
MATRIX = {"cpu": 3000, "cuda": 8192}  # rows and columns of the large product
BATCH_SECONDS = 200                  # for one row at one batch: no network is compiled in its last third
TRAINING_SECONDS = 20
FEWEST_SECONDS = 20                  # to time all forms, however long they took to compile


class Timing(NamedTuple):
    """One form of one network at one batch."""
    row: str                 # student-backbone
    filter: str
    form: str
    precision: str
    batch: int
    fps: float               # median, frames a second
    low: float               # quartiles
    high: float
    fraction: float          # of the machine's rate of matrix products
    off: float        # largest difference of a token from the plain float32 network's, over the largest token


ROWS = tuple(dict.fromkeys(f"{row[0]}-{row[2]}" for row in PAPER))


# ------------------------------------------------------------------------------- the forms

def precisions(device):
    """Those of PRECISIONS that a device computes natively: others may be a hundred times slower."""
    gpu = torch.device(device).type == "cuda"
    native = dict(float32=True, tf32=gpu and torch.cuda.get_device_capability(device)[0] >= 8,
                  bfloat16=fast_bfloat16(device))
    return {name: dtype for name, dtype in PRECISIONS.items() if native[name]}


def forms_of(device):
    """Those of FORMS that a device has."""
    return [form for form in FORMS if form != "graph" or torch.device(device).type == "cuda"]


@contextmanager
def rounding(precision):
    """Inside, a GPU's products and convolutions in float32 round to TF32, or do not."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


@contextmanager
def plainly(model):
    """Inside, filters are FFTs, and attention is separate products and softmax."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)             # of CPUs, too
    try:
        with through_ffts(model), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class Recorded:
    """A network whose kernels are recorded as a CUDA graph at the first call, and replayed at each."""
    pool = None                              # of memory: all graphs share it, as no two run at once

    def __init__(self, network):
        self.network, self.graph = network, None

    def __call__(self, images):
        if self.graph is None:
            Recorded.pool = Recorded.pool or torch.cuda.graph_pool_handle()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):                       # libraries choose their kernels before
                self.network(images), self.network(images)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=Recorded.pool):
                self.output = self.network(images)
        self.graph.replay()
        return self.output


@contextmanager
def running(network, form, precision):
    """The context that a form runs in."""
    with rounding(precision), plainly(network) if form == "plain" else nullcontext():
        yield


def build_form(model, form, precision):
    """A network in one of FORMS and PRECISIONS -> (network, function that opens the context to run it in)."""
    network, dtype = model, PRECISIONS[precision]
    if form != "plain" or dtype != torch.float32:
        network = for_inference(model, dtype, compiled=form == "compiled")
    context = partial(running, network, form, precision)
    return Recorded(network) if form == "graph" else network, context


COUNTED = {}             # operations by network: counting takes seconds


def operations_of(model):
    """Operations a crop, two for a multiply-add."""
    network = *model.config.values(), model.size
    if network not in COUNTED:
        COUNTED[network] = 2 * count_multiply_adds(model)
    return COUNTED[network]


class Contender(NamedTuple):
    """One form of one network; or, without a filter, the product of two large matrices."""
    filter: str
    form: str
    precision: str
    run: Callable
    context: Callable
    operations: float        # a crop; a product
    off: float = 0           # as in Timing


def products(device, kind):
    """A Contender for each precision that multiplies two large matrices."""
    n = MATRIX[kind]
    for precision, dtype in precisions(device).items():
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        yield Contender("", "", precision, lambda a=a, b=b: a @ b, partial(rounding, precision), 2 * n ** 3)


def contenders(models, images, kind, until=float("inf"), forms=FORMS, only=tuple(PRECISIONS)):
    """A Contender for each form of each of the models {filter: network}, run once; failures are reported.

    until: time.monotonic() after which nothing more is compiled. only: precisions.
    """
    truth = {}
    for filter, model in models.items():
        with running(model, "plain", "float32"):
            truth[filter] = model(images[:1]).visual_tokens
    forms = [form for form in forms_of(images.device) if form in forms]
    if "compiled" in forms:
        torch._dynamo.config.recompile_limit = 64            # of PoseNet.forward, which all networks share
    kept = [precision for precision in precisions(images.device) if precision in only]
    for form, precision, filter in product(forms, kept, models):
        problem = "the time is over" if form == "compiled" and time.monotonic() > until else ""
        try:
            if not problem:
                network, context = build_form(models[filter], form, precision)
                with context():
                    # compared at once: a CUDA graph writes its next output to the same memory
                    tokens = network(images).visual_tokens[:1].float()
                    off = float((tokens - truth[filter]).abs().max() / truth[filter].abs().max())
                    if kind == "cuda":           # a CUDA graph is recorded at the second run or the third
                        network(images), network(images)
        except torch.OutOfMemoryError:
            problem = "no memory"
        except RuntimeError as error:
            if form not in ("graph", "compiled"):
                raise
            made = "compiled" if form == "compiled" else "recorded"
            problem = f"it cannot be {made} here: {str(error).splitlines()[0][:100]}"
        if problem:
            tqdm.write(f"{filter} {form} {precision}, batch {len(images)}, is left out: {problem}")
            continue
        yield Contender(filter, form, precision, partial(network, images), context,
                        operations_of(models[filter]), off)


@torch.inference_mode()
def measure_speed(rows, device="cpu", budget=BATCH_SECONDS, fewest=None, batches=None, preset="paper", **how):
    """rows: names 'student-backbone' -> list of Timing, {precision: operations a second of matrix products}.

    budget: seconds for each row at each batch; the compilation that is under way when two thirds are over is
    finished. fewest: seconds to time all forms, at least (default: FEWEST_SECONDS). batches: default 1 and
    those of LARGE. how: forms and precisions, as `contenders` takes them.
    """
    kind = torch.device(device).type
    timings, rates = [], {precision: [] for precision in precisions(device)}
    pairs = [(row, batch) for row in rows for batch in batches or (1, *LARGE[kind][row.split("-")[1]])]
    for row, batch in tqdm(pairs, desc="students and batches", leave=False, disable=None):
        began = time.monotonic()
        torch._dynamo.reset()         # it compiles one function only so many times, for all networks together
        student, backbone = row.split("-")
        models = {filter: build_student(student, filter, backbone, preset=preset).eval().to(device)
                  for s, filter, b, *_ in PAPER if (s, b) == (student, backbone)}
        size = next(iter(models.values())).size
        images = torch.rand(batch, 3, size, size, device=device)
        matrices = list(products(device, kind))
        networks = list(contenders(models, images, kind, began + budget * 2 / 3, **how))
        try:
            works = [(contender.run, contender.context) for contender in matrices + networks]
            least = FEWEST_SECONDS if fewest is None else fewest
            times = take_turns(works, kind, max(began + budget - time.monotonic(), least))
        except torch.OutOfMemoryError:           # each fits alone, all of them do not
            tqdm.write(f"{row}, batch {batch}, is left out: no memory for all of them at once")
            continue
        for contender, seconds in zip(matrices, times):
            rates[contender.precision].append(contender.operations / statistics.median(seconds))
        by_filter = sorted(zip(networks, times[len(matrices):]),
                           key=lambda pair, order=tuple(models): order.index(pair[0].filter))
        for contender, seconds in by_filter:
            if not seconds:
                tqdm.write(f"{' '.join(contender[:3])}, batch {batch}, is left out: the time is over")
                continue
            high, median, low = batch / np.quantile(seconds, (0.25, 0.5, 0.75))
            fraction = contender.operations * median / rates[contender.precision][-1]
            timings.append(Timing(row, *contender[:3], batch, median, low, high, fraction, contender.off))
    return timings, {precision: statistics.median(values) for precision, values in rates.items() if values}


# ------------------------------------------------------------------------------- training

@cache
def drawings(number, size):
    """Drawn people and their stored crops."""
    drawn = drawn_people("train", number, size)
    return drawn, store(drawn, size)


def training_step(row, device="cpu", preset="tiny", batch=None, amp=False, taught=False, compiled=False):
    """-> a function that does one step as train.fit does, one that makes its batch, operations an image.

    row: such as 'cc-gd-none', or 'teacher'. taught: by a teacher with random weights.
    """
    recipe, of_teacher = RECIPES[preset], row == "teacher"
    model = build_teacher(preset) if of_teacher else build_student(*row.split("-"), preset)
    model = model.to(device, memory_format=torch.channels_last)
    ema, optimisers = copy.deepcopy(model), build_optimisers(model, recipe["optimiser"], RATE)
    network, numbers = torch.compile(model) if compiled else model, count()
    rows = torch.arange(batch or recipe["batch_size"])
    drawn, crops = drawings(len(rows), model.size)
    crops, params = on_device(crops, device), AUGMENTATIONS["tokenpose"].draw(drawn, torch.Generator())
    make = partial(make_batch, drawn, crops, rows, model.size, device, params)
    operations, weights, teacher = 3 * operations_of(model), {}, None        # backward is twice forward
    if taught:
        heavy = build_teacher(preset).to(device, memory_format=torch.channels_last).eval()
        fast = for_inference(heavy, torch.bfloat16 if amp else torch.float32)
        teacher, weights = TeacherTargets(fast, make().images), WEIGHTS[row.split("-")[0]]
        operations += operations_of(heavy)

    def step():
        crops = make()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            output = network(crops.images)
        targets = teacher(crops.images, 0, rows) if taught else None
        for optimiser in optimisers:
            optimiser.zero_grad()
        terms = loss_terms(model.head, output, crops, targets, weights)
        terms["loss"].backward()
        torch.stack([term.detach() for term in terms.values()]).tolist()
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        for optimiser in optimisers:
            optimiser.step()
        update_ema(ema, model, next(numbers), 10 ** 6)

    return step, make, operations


def training_speed(rates, device="cpu", preset="tiny", seconds=TRAINING_SECONDS, **how):
    """Images a second of a training step and of its input side alone; the GPU's memory that it takes, GB.

    rates: of measure_speed, for the fraction of the rate that the step reaches. how: of training_step.
    """
    how = dict(row="cc-gd-none", batch=RECIPES[preset]["batch_size"],
               amp=preset == "paper" and "bfloat16" in rates) | how
    kind, precision = torch.device(device).type, "bfloat16" if how["amp"] else "float32"
    if kind == "cuda":
        gc.collect()                                 # compiled networks, which refer to themselves
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if kind == "cuda" else 0
    step, make, operations = training_step(device=device, preset=preset, **how)
    step()                                                                    # and what is compiled, is
    inputs, whole = (how["batch"] / statistics.median(times) for times in
                     take_turns([make, step], kind, seconds))
    memory = (torch.cuda.max_memory_allocated() - before) / 1e9 if kind == "cuda" else None
    return dict(preset=preset, precision=precision, **how, input=inputs, step=whole, memory=memory,
                fraction=whole * operations / rates[precision])


# ------------------------------------------------------------------------------- the report

def table(header, rows):
    """Lists of cells as a table in Markdown."""
    if not rows:
        return "(not measured yet)"
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def best(timings, row, filter, precision, batch=None, forms=FORMS):
    """The fastest of some timings at a batch of 1 or (None) at the best larger one; None if there is none."""
    return max((t for t in timings if (t.row, t.filter, t.precision) == (row, filter, precision)
                and t.form in forms and (t.batch == 1) == (batch == 1)), key=lambda t: t.fps, default=None)


def speed_table(timings):
    """Frames a second of each form, at batch 1 and at the best larger one, and its fraction of the rate."""
    measured, rows = [name for name in PRECISIONS if name in {timing.precision for timing in timings}], []
    for row, filter, form in dict.fromkeys(timing[:3] for timing in timings):
        cells = []
        for precision in measured:
            one, many = (best(timings, row, filter, precision, batch, (form,)) for batch in (1, None))
            cells += [f"{one.fps:.1f}" if one else "", f"{many.fps:.1f} ({many.batch})" if many else "",
                      f"{100 * many.fraction:.0f}%" if many else ""]
        rows.append([row, filter, form, *cells])
    columns = [f"{precision}, {what}" for precision in measured
               for what in ("batch 1", "large batch", "fraction")]
    return table(["students", "mixer", "form", *columns], rows)


def ratios(timings):
    """How many times as fast a filter is as attention, the best form of each.

    Yields (row, filter, the paper's ratio, precision, batch, over fused attention of this precision, over
    attention written out in float32, over the filter's own plain form of this precision).
    """
    paper = {row[:3]: row[7] for row in PAPER}
    for row, filter in dict.fromkeys((t.row, t.filter) for t in timings if t.filter != "attention"):
        student, backbone = row.split("-")
        stated = paper[student, filter, backbone] / paper[student, "attention", backbone]
        for precision in PRECISIONS:
            for batch in (1, None):
                mine, fused = (best(timings, row, mixer, precision, batch, FORMS[1:])
                               for mixer in (filter, "attention"))
                written = best(timings, row, "attention", "float32", batch, FORMS[:1])
                plain = best(timings, row, filter, precision, batch, FORMS[:1])
                if mine and fused and written and plain:
                    times = (mine.fps / other.fps for other in (fused, written, plain))
                    yield row, filter, stated, precision, mine.batch, *times


def ratios_table(timings):
    """`ratios` as a table."""
    return table(["students", "mixer", "the paper's ratio", "precision", "batch", "times fused attention",
                  "times written-out attention, float32", "times its own plain form"],
                 [[row, filter, f"{paper:.2f}", precision, str(batch), *(f"{times:.2f}" for times in over)]
                  for row, filter, paper, precision, batch, *over in ratios(timings)])


def machine_line(device, rates):
    """The machine that a table is of: its name, instruction sets and rates of large products."""
    return f"{describe_device(device)}; products of large matrices: " + ", ".join(
        f"{rate / 1e9:.0f} billion operations a second in {precision}" for precision, rate in rates.items())


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("rows", nargs="*", default=["reg-none"], metavar="ROW",
                        help=f"{', '.join(ROWS)}, or all (default: reg-none)")
    parser.add_argument("--device", default=default_device(),
                        help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--save", metavar="MACHINE", help="keep all figures in results/speed.json, too")
    args = parser.parse_args()
    rows = ROWS if args.rows == ["all"] else args.rows
    if unknown := set(rows) - set(ROWS):
        raise BadInput(f"{sorted(unknown)[0]}: choose from {', '.join(ROWS)}, or all")
    check_device(args.device)
    timings, rates = measure_speed(rows, args.device)
    machine = machine_line(args.device, rates)
    print(machine, speed_table(timings), ratios_table(timings), sep="\n\n")
    presets = ("tiny",) if args.device == "cpu" else PRESETS
    training = [training_speed(rates, args.device, preset) for preset in presets]
    for speed in training:
        print(f"training the {speed['preset']} cc gd student, {speed['precision']}, batch {speed['batch']}: "
              f"{speed['step']:.0f} a second, {100 * speed['fraction']:.0f}% of that rate; "
              f"its input side alone: {speed['input']:.0f}")
    if args.save:
        add(f"speed-{args.save}", rounded(dict(machine=machine, rates=rates, training=training,
                                               timings=[timing._asdict() for timing in timings])))


if __name__ == "__main__":
    main_with_clear_errors(main)
