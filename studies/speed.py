"""How fast each mixer is on this machine, in each form, side by side in one run.

    python studies/speed.py         # regression students without a backbone: ten minutes at most on two cores
    python studies/speed.py reg-w32 cc-none  # other rows of the paper; 'all' for all of them (on a GPU)
    python studies/speed.py --save epyc      # and keep the figures, as speed-epyc in results/speed.json

    plain        the filters' definition (FFT), or attention as separate products and softmax
    optimised    export.for_inference: products with DFT matrices, fused attention, folded batch norms
    compiled     the same through torch.compile

Networks have random weights, crops are on the device, decoding is not timed. All that is compared takes
turns, the product of two large matrices of the same type included. The fraction is of that product's rate:
the paper's operations (two a multiply-add, FFTs for the filters in every form) a second over it. Only
precisions that the device computes natively are measured.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (BadInput, CommandLine, check_device, default_device, fast_bfloat16,
                    main_with_clear_errors)
from crops import AUGMENTATIONS, make_batch, store
from distill import task_loss
from costs import PAPER, count_multiply_adds, describe_device, take_turns
from export import for_inference
from fft_filter import through_ffts
from models import PRESETS, build_student
from results import add, rounded
from synthetic import drawn_people
from optim import build_optimisers
from train import RATE, RECIPES

FORMS = ("plain", "optimised", "compiled")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGE = {"cpu": {"none": (16,), "w32": (8,), "w48": (8,)},                    # crops a forward pass, beside 1
         "cuda": dict.fromkeys(("none", "w32", "w48"), (64, 256, 1024))}       # the best of these
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
    return {name: dtype for name, dtype in PRECISIONS.items() if name != "bfloat16" or fast_bfloat16(device)}


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


def build_form(model, form, dtype):
    """A network in one of FORMS -> (network, function that opens the context to run it in)."""
    if form == "plain":
        network = model if dtype == torch.float32 else for_inference(model, dtype)
        return network, lambda: plainly(network)
    return for_inference(model, dtype, compiled=form == "compiled"), nullcontext


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
        yield Contender("", "", precision, lambda a=a, b=b: a @ b, nullcontext, 2 * n ** 3)


def contenders(models, images, kind, until=float("inf")):
    """A Contender for each form of each of the models {filter: network}, run once; failures are reported.

    until: time.monotonic() after which nothing more is compiled.
    """
    operations = {filter: 2 * count_multiply_adds(model) for filter, model in models.items()}
    truth = {}
    for filter, model in models.items():
        with plainly(model):
            truth[filter] = model(images[:1]).visual_tokens
    for form, (precision, dtype), filter in product(FORMS, precisions(images.device).items(), models):
        problem = "the time is over" if form == "compiled" and time.monotonic() > until else ""
        try:
            if not problem:
                network, context = build_form(models[filter], form, dtype)
                with context():
                    # compared at once: a CUDA graph writes its next output to the same memory
                    tokens = network(images).visual_tokens[:1].float()
                    off = float((tokens - truth[filter]).abs().max() / truth[filter].abs().max())
                    if kind == "cuda":           # a CUDA graph is recorded at the second run or the third
                        network(images), network(images)
        except torch.OutOfMemoryError:
            problem = "no memory"
        except RuntimeError as error:
            if form != "compiled":
                raise
            problem = f"it cannot be compiled here: {str(error).splitlines()[0][:100]}"
        if problem:
            tqdm.write(f"{filter} {form} {precision}, batch {len(images)}, is left out: {problem}")
            continue
        yield Contender(filter, form, precision, partial(network, images), context, operations[filter], off)


@torch.inference_mode()
def measure_speed(rows, device="cpu", budget=BATCH_SECONDS):
    """rows: names 'student-backbone' -> list of Timing, {precision: operations a second of matrix products}.

    budget: seconds for each row at each batch; the compilation that is under way when two thirds are over is
    finished.
    """
    kind = torch.device(device).type
    timings, rates = [], {precision: [] for precision in precisions(device)}
    pairs = [(row, batch) for row in rows for batch in (1, *LARGE[kind][row.split("-")[1]])]
    for row, batch in tqdm(pairs, desc="students and batches", leave=False, disable=None):
        began = time.monotonic()
        torch._dynamo.reset()         # it compiles one function only so many times, for all networks together
        student, backbone = row.split("-")
        models = {filter: build_student(student, filter, backbone, preset="paper").eval().to(device)
                  for s, filter, b, *_ in PAPER if (s, b) == (student, backbone)}
        size = next(iter(models.values())).size
        images = torch.rand(batch, 3, size, size, device=device)
        matrices = list(products(device, kind))
        networks = list(contenders(models, images, kind, began + budget * 2 / 3))
        try:
            works = [(contender.run, contender.context) for contender in matrices + networks]
            times = take_turns(works, kind, max(began + budget - time.monotonic(), FEWEST_SECONDS))
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

def training_speed(rates, device="cpu", preset="tiny", count=512):
    """Images a second of a training step of the cc gd student without teacher, and of its input side alone.

    rates: of measure_speed, for the fraction of the rate that the step reaches: backward is twice the work of
    forward.
    """
    precision = "bfloat16" if preset == "paper" and "bfloat16" in rates else "float32"
    drawn = drawn_people("train", count, PRESETS[preset].size)
    crops = torch.from_numpy(store(drawn, PRESETS[preset].size)).to(device)
    params = AUGMENTATIONS["tokenpose"].draw(range(count), torch.Generator().manual_seed(0))
    rows = torch.arange(min(count, RECIPES[preset]["batch_size"]))
    model = build_student("cc", "gd", "none", preset).to(device)
    optimisers = build_optimisers(model, RECIPES[preset]["optimiser"], RATE)

    def step():
        batch = make_batch(drawn, crops, rows, model.size, device, params)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            output = model(batch.images)
        for optimiser in optimisers:
            optimiser.zero_grad()
        task_loss(model.head, output.prediction, batch.xy, batch.visible, batch.empty).backward()
        for optimiser in optimisers:
            optimiser.step()

    works = [partial(make_batch, drawn, crops, rows, model.size, device, params), step]
    inputs, whole = (len(rows) / statistics.median(times)
                     for times in take_turns(works, torch.device(device).type, TRAINING_SECONDS))
    return dict(preset=preset, precision=precision, batch=len(rows), input=inputs, step=whole,
                fraction=whole * 3 * 2 * count_multiply_adds(model) / rates[precision])


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
    torch.backends.cudnn.allow_tf32 = False      # float32 in convolutions, too, as in products
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
