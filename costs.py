"""What the 16 students of the paper cost: parameters, multiply-adds, frames a second.

    python evaluate.py --costs

GFLOPs in the paper's tables are multiply-adds of matrix products and convolutions. They are counted here by PyTorch's
own counter running over the real network, its filters in their definition's form; the fast Fourier transforms, which the
counter does not know, are added by formula.
"""

import copy
import math
import statistics
import time
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gfl import by_definition
from models import build_student

# The paper's Tables A and B: student, filter, backbone, PCKh without and with distillation, M parameters, GFLOPs, fps.
PAPER = [
    ("reg", "gs", "none", 40.07, 65.3, 3.61, 0.77, 3325),
    ("reg", "gd", "none", 48.97, 76.0, 6.39, 1.28, 1560),
    ("reg", "gs", "w32", 71.90, 87.7, 11.25, 7.13, 645),
    ("reg", "gd", "w32", 67.81, 87.7, 14.03, 7.64, 525),
    ("reg", "gs", "w48", 71.0, 87.9, 20.3, 12.9, 425),
    ("reg", "attention", "none", 46.8, 79.30, 4.72, 1.6, 1481),
    ("reg", "attention", "w32", 68.39, 88.73, 12.36, 7.95, 506),
    ("reg", "attention", "w48", 72.8, 88.61, 21.4, 13.8, 367),
    ("cc", "gs", "none", 69.2, 77.87, 3.73, 0.78, 3668),
    ("cc", "gd", "none", 77.48, 80.63, 6.51, 1.28, 1854),
    ("cc", "gs", "w32", 88.13, 89.40, 11.37, 7.13, 717),
    ("cc", "gd", "w32", 87.67, 89.25, 14.14, 7.63, 606),
    ("cc", "gs", "w48", 88.87, 89.5, 20.4, 13.0, 456),
    ("cc", "attention", "none", 78.42, 81.94, 4.84, 1.60, 1831),
    ("cc", "attention", "w32", 88.83, 89.97, 12.48, 7.96, 597),
    ("cc", "attention", "w48", 89.07, 90.3, 21.5, 13.8, 396),
]
BATCH = {"none": 16, "w32": 4, "w48": 4}       # crops a forward pass when timing
ROUNDS, RUNS, LEAST = 4, 3, 0.2                # turns of each network; in a turn, after one run that warms up, runs timed and
                                               # seconds that these take at least


def fft_flops(input_shape, dims, *args, out_shape=None, **kwargs):
    """Operations of a real FFT and of its inverse: 5/2 N log2 N each, half a complex one, for every channel.

    N is the number of tokens, taken from the real side of the transform: forward it goes in, back it comes out.
    """
    real = max(input_shape, out_shape, key=lambda shape: math.prod(shape))
    N = math.prod(real[dim] for dim in dims)
    return round(2.5 * math.prod(real) * math.log2(N))


TRANSFORMS = {torch.ops.aten._fft_r2c: fft_flops, torch.ops.aten._fft_c2r: fft_flops}


def count_parameters(model):
    """All parameters, the fixed position embedding included, as the paper's tables count them."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model):
    """Multiply-adds of one crop through the model: PyTorch counts two operations to each."""
    model = copy.deepcopy(model).requires_grad_(False)        # the counter stumbles over parameters without a graph
    # Fused attention hides its two products from the counter; written out, they show.
    with by_definition(model), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False, custom_mapping=TRANSFORMS) as counter:
        model(torch.zeros(1, 3, model.size, model.size, device=next(model.parameters()).device))
    return counter.get_total_flops() / 2


def seconds_once(work, kind):
    """How long one run of work() takes: by events of the device on a GPU, by the wall clock on a CPU."""
    if kind == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def take_turns(works, kind="cpu"):
    """Times of runs, a list of seconds for each of `works`: functions, or pairs of one and of what opens its context.

    What is compared takes turns, as no machine is equally fast at all times.
    """
    works = [work if isinstance(work, tuple) else (work, nullcontext) for work in works]
    times = [[] for _ in works]
    for _ in range(ROUNDS):
        for (run, context), found in zip(works, times):
            with context():
                run()                            # the one before has left its own data in the caches
                turn = []
                while len(turn) < RUNS or sum(turn) < LEAST:
                    turn.append(seconds_once(run, kind))
            found += turn
    return times


@torch.inference_mode()
def measure_costs(device="cpu"):
    """One dictionary a row of PAPER: student, filter, backbone, params_m, gflops, fps, and the paper's own figures.

    fps: median over runs of a forward pass and decoding, float32, crops already on the device, joints back on the host.
    """
    rows, runs = [], []
    for student, filter, backbone, _, _, params, gflops, fps in PAPER:
        model = build_student(student, filter, backbone, preset="paper").eval().to(device)
        images = torch.rand(BATCH[backbone], 3, model.size, model.size, device=device)
        runs.append(lambda model=model, images=images: model.decode(model(images))[0].cpu())
        rows.append(dict(student=student, filter=filter, backbone=backbone,
                         params_m=count_parameters(model) / 1e6, gflops=count_multiply_adds(model) / 1e9, batch=BATCH[backbone],
                         paper_params_m=params, paper_gflops=gflops, paper_fps=fps))
    for row, times in zip(rows, take_turns(runs, torch.device(device).type)):
        row["fps"] = row["batch"] / statistics.median(times)
    return rows


def protocol(device="cpu"):
    """What the frames a second mean."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    batches = ", ".join(f"{batch} ({backbone})" for backbone, batch in BATCH.items())
    return (f"fps: {name}, PyTorch {torch.__version__}, float32, batch by backbone {batches};\n"
            f"medians of {ROUNDS} turns of at least {RUNS} runs; timed: normalisation, network and decoding,\n"
            f"from crops on the device to joints on the host (synchronised). The paper does not name its GPU.\n"
            f"GFLOPs: multiply-adds of products and convolutions, and of the transforms as FFTs.")


def cost_table(rows):
    """The rows as text, the paper's figure behind each measured one."""
    lines = [f"{'':24}{'M parameters':>18}{'GFLOPs':>18}{'frames a second':>20}",
             f"{'student':8}{'filter':10}{'backbone':8}" + f"{'here':>9}{'paper':>9}" * 2 + f"{'here':>11}{'paper':>9}"]
    for row in rows:
        lines.append(f"{row['student']:8}{row['filter']:10}{row['backbone']:8}"
                     f"{row['params_m']:9.3f}{row['paper_params_m']:9g}{row['gflops']:9.3f}{row['paper_gflops']:9g}"
                     f"{row['fps']:11.1f}{row['paper_fps']:9g}")
    return "\n".join(lines)
