"""How fast each mixer is on this machine, in each form, side by side in one run.

    python studies/speed.py                              # regression students without a backbone: some minutes on two cores
    python studies/speed.py reg-w32 cc-none              # other rows of the paper; 'all' for all of them (on a GPU)

    plain       the filters' definition (FFT) or attention written out step by step (products, softmax, products); in
                bfloat16 with folded batch norms
    ready       export.for_inference: filters as products with DFT matrices, fused attention, folded batch norms
    compiled    the same, compiled

Times are of networks with random weights, crops on the device, without decoding. All that is compared takes turns, as
machines are not equally fast at all times. The share is of the rate at which this machine multiplies two large matrices of the
same type, which takes turns with them, too: the paper's count of operations (two a multiply-add, FFTs for the filters whatever
form they have) a second over that rate.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import BadInput, CommandLine, Distributed, check_device, default_device, main_with_clear_errors
from crops import store
from evaluate import PAPER, check_json, count_multiply_adds, take_turns, write_json
from export import for_inference
from gfl import by_definition
from models import PRESETS, build_student
from synthetic import drawn_people
from train import RECIPES, fit, initial_state

FORMS = ("plain", "ready", "compiled")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGE = {"cpu": {"none": (16,), "w32": (8,), "w48": (8,)},                     # crops a forward pass, beside 1
         "cuda": dict.fromkeys(("none", "w32", "w48"), (64, 256, 1024))}       # the best of these
MATRIX = {"cpu": 3000, "cuda": 8192}  # rows and columns of the large product


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
    share: float             # of the machine's rate of matrix products
    off: float               # largest difference of a token from the plain float32 network's, over the largest token
    memory: float            # bytes that it took at the peak beside the network, on a GPU; 0 on a CPU (studies/memory.py)


def row_name(row):
    """'reg-w32' of a row of PAPER."""
    return f"{row[0]}-{row[2]}"


ROWS = tuple(dict.fromkeys(map(row_name, PAPER)))


# ------------------------------------------------------------------------------- the forms

@contextmanager
def plainly(model):
    """Inside, filters are FFTs and attention is written out, in the precision of its tokens."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)             # of all devices, whatever its name says
    try:
        with by_definition(model), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def fresh_peak(kind):
    """Start counting a GPU's peak memory anew -> what is in use already."""
    if kind == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def variants(model):
    """(form, precision, network, what opens the context to run it in)."""
    for precision, dtype in PRECISIONS.items():
        network = model if dtype == torch.float32 else for_inference(model, dtype)
        yield "plain", precision, network, lambda network=network: plainly(network)
        yield "ready", precision, for_inference(model, dtype), nullcontext
        yield "compiled", precision, for_inference(model, dtype, compiled=True), nullcontext


class Contender(NamedTuple):
    """One form of one network, ready to be timed; or, without a filter, the product of two large matrices."""
    filter: str
    form: str
    precision: str
    run: Callable
    context: Callable
    operations: float        # a crop; a product
    off: float = 0           # as in Timing
    memory: float = 0


def products(device, kind):
    """A Contender a precision that multiplies two large matrices."""
    n = MATRIX[kind]
    for precision, dtype in PRECISIONS.items():
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        yield Contender("", "", precision, lambda a=a, b=b: a @ b, nullcontext, 2 * n ** 3)


def contenders(models, images, kind):
    """A Contender a form of each of the models {filter: network}, tried once; none of what does not work here."""
    for filter, model in models.items():
        operations = 2 * count_multiply_adds(model)
        with plainly(model):
            truth = model(images[:1]).visual_tokens
        for form, precision, network, context in variants(model):
            try:
                before = fresh_peak(kind)
                with context():
                    # at once: a CUDA graph writes its next output where this one is
                    off = float((network(images).visual_tokens[:1].float() - truth).abs().max() / truth.abs().max())
                    if kind == "cuda":           # and records itself, with its own memory, at the second run or the third
                        network(images), network(images)
            except RuntimeError as error:        # memory ends; compilers are not everywhere
                full = isinstance(error, torch.OutOfMemoryError)
                if not full and form != "compiled":
                    raise
                tqdm.write(f"{filter} {form} {precision}, batch {len(images)}, is left out: "
                           + ("no memory" if full else f"it cannot be compiled here: {str(error).splitlines()[0][:100]}"))
                continue
            memory = torch.cuda.max_memory_allocated() - before if kind == "cuda" else 0
            yield Contender(filter, form, precision, lambda network=network: network(images), context, operations, off, memory)


@torch.inference_mode()
def measure_speed(rows, device="cpu"):
    """rows: names 'student-backbone' -> a list of Timing, and {precision: operations a second of matrix products}."""
    kind = torch.device(device).type
    timings, rates = [], {precision: [] for precision in PRECISIONS}
    work = [(row, batch) for row in rows for batch in (1, *LARGE[kind][row.split("-")[1]])]
    for row, batch in tqdm(work, desc="students and batches", leave=False, disable=None):
        torch._dynamo.reset()                    # it compiles one function only so many times, for all networks together
        student, backbone = row.split("-")
        models = {filter: build_student(student, filter, backbone, preset="paper").eval().to(device)
                  for s, filter, b, *_ in PAPER if (s, b) == (student, backbone)}
        size = next(iter(models.values())).size
        images = torch.rand(batch, 3, size, size, device=device)
        matrices = list(products(device, kind))
        networks = list(contenders(models, images, kind))
        try:
            times = take_turns([(each.run, each.context) for each in matrices + networks], kind)
        except torch.OutOfMemoryError:           # each fits alone, all of them do not
            tqdm.write(f"{row}, batch {batch}, is left out: no memory for all of them at once")
            continue
        for contender, found in zip(matrices, times):
            rates[contender.precision].append(contender.operations / statistics.median(found))
        now = {precision: found[-1] for precision, found in rates.items()}
        for contender, found in zip(networks, times[len(matrices):]):
            high, median, low = (batch / t for t in np.quantile(found, (0.25, 0.5, 0.75)))
            share = contender.operations * median / now[contender.precision]
            timings.append(Timing(row, *contender[:3], batch, median, low, high, share, contender.off, contender.memory))
    return timings, {precision: statistics.median(found) for precision, found in rates.items()}


# ------------------------------------------------------------------------------- training

def training_speed(rates, device="cpu", preset="tiny", people=512):
    """Images per second of the cc gd student's training without a teacher, and of its input side alone.

    rates: of measure_speed, of which the training's share is stated: backward is twice the work of forward. The second of
    two epochs counts.
    """
    samples = drawn_people("train", people, PRESETS[preset].size)
    data = samples, store(samples, PRESETS[preset].size)
    precision = "float32" if preset == "tiny" else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        recipe = RECIPES[preset]
        args = SimpleNamespace(**recipe | dict(batch_size=min(people, recipe["batch_size"]), epochs=2), accumulate=1, seed=0,
                               amp=precision == "bfloat16", student="cc", terms=(), views=0, distill=False, preset=preset,
                               augmentation="tokenpose", compile=False, deterministic=False, out=Path(folder))
        model = build_student("cc", "gd", "none", preset).to(device)
        one = Distributed(0, 1, device)
        fit(args, one, initial_state(args, one, model, samples), data, (samples.first(16), data[1][:16]))
        line = json.loads((args.out / "log.jsonl").read_text().splitlines()[-1])
    step = line["images_per_second"]
    return dict(preset=preset, precision=precision, batch=args.batch_size, input=line["input_alone"], step=step,
                share=step * 3 * 2 * count_multiply_adds(model) / rates[precision])


# ------------------------------------------------------------------------------- the report

def best(timings, row, filter, precision, batch=None, forms=FORMS):
    """The fastest of some timings, at a batch of 1 or (None) at the best larger one; None where nothing was timed."""
    found = [t for t in timings if (t.row, t.filter, t.precision) == (row, filter, precision) and t.form in forms
             and (t.batch == 1) == (batch == 1)]
    return max(found, key=lambda t: t.fps, default=None)


def speed_lines(timings):
    """A line a form: frames a second at batch 1 and at the best larger batch, with quartiles."""
    lines = [f"{'row':10}{'mixer':10}{'form':10}{'precision':10}{'batch 1: fps':>13}{'quartiles':>15}"
             f"{'batch':>7}{'fps':>10}{'quartiles':>17}{'share':>7}{'off':>9}"]
    for row, filter, form, precision in dict.fromkeys(t[:4] for t in timings):
        one, many = (best(timings, row, filter, precision, batch, (form,)) for batch in (1, None))
        line = f"{row:10}{filter:10}{form:10}{precision:10}"
        line += f"{one.fps:13.1f}{f'{one.low:.1f} - {one.high:.1f}':>15}" if one else " " * 28
        if many:
            line += (f"{many.batch:7}{many.fps:10.1f}{f'{many.low:.1f} - {many.high:.1f}':>17}{100 * many.share:6.0f}%"
                     f"{max(t.off for t in (one, many) if t):9.0e}")
        lines.append(line)
    return "\n".join(lines)


def ratios(timings):
    """How many times as fast a filter is as attention, the best form of each.

    Yields (row, filter, the paper's ratio, precision, batch, over fused attention of this precision, over attention written
    out in float32, over the filter's own plain form of this precision).
    """
    paper = {row[:3]: row[7] for row in PAPER}
    for row, filter in dict.fromkeys((t.row, t.filter) for t in timings if t.filter != "attention"):
        student, backbone = row.split("-")
        stated = paper[student, filter, backbone] / paper[student, "attention", backbone]
        for precision in PRECISIONS:
            for batch in (1, None):
                mine, fused = (best(timings, row, mixer, precision, batch, FORMS[1:]) for mixer in (filter, "attention"))
                written = best(timings, row, "attention", "float32", batch, FORMS[:1])
                plain = best(timings, row, filter, precision, batch, FORMS[:1])
                if mine and fused and written and plain:
                    times = (mine.fps / other.fps for other in (fused, written, plain))
                    yield row, filter, stated, precision, mine.batch, *times


def ratio_lines(timings):
    """`ratios` as text."""
    return "\n".join(f"{row} {filter} : attention (the paper's: {stated:.2f}), {precision}, {f'batch {batch}':9} "
                     f"{fused:6.2f} times fused, same precision, {written:6.2f} times written out, float32, "
                     f"{plain:6.2f} times its own plain form"
                     for row, filter, stated, precision, batch, fused, written, plain in ratios(timings))


def report_speed(rows, device):
    """Measure, print, and return what --json keeps."""
    torch.backends.cudnn.allow_tf32 = False      # float32 in convolutions, too, as in products
    timings, rates = measure_speed(rows, device)
    print(speed_lines(timings), ratio_lines(timings), sep="\n")
    for precision, rate in rates.items():
        print(f"products of large matrices, {precision}: {rate / 1e9:.0f} billion operations a second")
    training = [training_speed(rates, device, preset) for preset in (("tiny",) if device == "cpu" else PRESETS)]
    for found in training:
        print(f"training the {found['preset']} cc gd student, {found['precision']}, {found['batch']} people a step: "
              f"{found['step']:.0f} a second, {100 * found['share']:.0f}% of that rate; "
              f"its input side alone: {found['input']:.0f}")
    return dict(timings=[t._asdict() for t in timings], rates=rates, training=training)


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("rows", nargs="*", default=["reg-none"], metavar="ROW",
                        help=f"{', '.join(ROWS)}, or all (default: reg-none)")
    parser.add_argument("--device", default=default_device(),
                        help="where to run: cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, help="write all figures to this file, too")
    args = parser.parse_args()
    rows = ROWS if args.rows == ["all"] else args.rows
    if unknown := set(rows) - set(ROWS):
        raise BadInput(f"{sorted(unknown)[0]}: choose from {', '.join(ROWS)}, or all")
    check_device(args.device)
    check_json(args.json)
    figures = report_speed(rows, args.device)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main_with_clear_errors(main)
