"""What the networks cost: parameters, multiply-adds, frames a second, beside the paper's Tables A and B.

    python evaluate.py --costs          # all 16 students, measured here

GFLOPs in the paper's tables are multiply-adds of matrix products and convolutions. PyTorch's own counter
counts them here over the real network. The filters' transforms are counted as FFTs, by formula. Element-wise
products, K (.) T(X) among them, are not counted.
"""

import copy
import math
import os
import platform
import statistics
import time
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common import ONEDNN_LIMIT
from gfl import GlobalFilter
from models import build_student

# The paper's Tables A and B: student, filter, backbone, PCKh without and with distillation, M parameters,
# GFLOPs, fps.
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
COST_BATCH = {"none": 16, "w32": 4, "w48": 4}       # crops a forward pass when timing
COST_SECONDS = 75                    # for the frames a second of all 16 networks together
ROUNDS, RUNS, LEAST = 4, 3, 0.2    # turns of each network; timed runs and seconds of a turn, at least
# those that set the rate of products, and environment variables that forbid some of them
INSTRUCTION_SETS = "avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "sve", "bf16"
LIMITS = "ATEN_CPU_CAPABILITY", *ONEDNN_LIMIT


def count_parameters(model):
    """Number of parameters: a complex number of a filter counts as two, and the fixed position embedding is
    included, as in the paper's tables; DFT matrices and batch norms' statistics, buffers, are not.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def fft_multiply_adds(x):
    """Of a real 2-D FFT over token grids (B, H, W, D): half of 5/2 N log2 N operations a channel, N = H W."""
    B, H, W, D = x.shape
    return round(2.5 * B * D * H * W * math.log2(H * W)) / 2


def count_multiply_adds(model):
    """Multiply-adds of one crop, counted without computing: torch's meta device has shapes alone."""
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)  # the counter needs no graph
    transforms = []

    def there_and_back(x, *K):
        transforms.append(2 * fft_multiply_adds(x))
        return x

    for layer in model.modules():
        if isinstance(layer, GlobalFilter):
            layer.forward = there_and_back
    # Fused attention hides its two products from the counter; the MATH backend shows them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, model.size, model.size, device="meta"))
    return counter.get_total_flops() / 2 + sum(transforms)      # PyTorch counts two operations a multiply-add


def describe_device(device="cpu"):
    """Name of the GPU, or of the CPU with its threads, instruction sets and the limits set on them."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    capabilities = torch.cpu.get_capabilities()
    cpu = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    sets = [name for name in INSTRUCTION_SETS if capabilities.get(name)]
    return ", ".join([f"{cpu}, {threads} thread{'s' * (threads > 1)}", *sets, *limits])


def seconds_once(work, kind):
    """Seconds from a call of work() until the device has finished."""
    began = time.perf_counter()
    work()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def take_turns(works, kind="cpu", budget=math.inf):
    """Time functions side by side: a list of seconds for each of `works`, empty where no time was left.

    works: functions, or pairs of a function and one that opens the context it runs in. They take turns, as no
    machine is equally fast at all times: ROUNDS turns each, of one untimed run and at least RUNS timed ones.
    budget: seconds for all of them. Each turn may take an equal part of what is left, but does one timed run
    at least; no turn begins when nothing is left. The whole thus takes at most the budget and two runs of the
    slowest.
    """
    works = [work if isinstance(work, tuple) else (work, nullcontext) for work in works]
    times = [[] for _ in works]
    end, turns = time.monotonic() + budget, ROUNDS * len(works)
    for turn in range(turns):
        began = time.monotonic()
        if began >= end:
            break
        limit = began + (end - began) / (turns - turn)
        (run, context), seconds = works[turn % len(works)], []
        with context():
            seconds_once(run, kind)              # the caches hold the data of the turn before
            while not seconds or ((len(seconds) < RUNS or sum(seconds) < LEAST) and time.monotonic() < limit):
                seconds.append(seconds_once(run, kind))
        times[turn % len(works)] += seconds
    return times


@torch.inference_mode()
def measure_costs(device="cpu", budget=COST_SECONDS):
    """A dictionary for each row of PAPER: student, filter, backbone, params_m, gflops, fps, and the paper's.

    fps: median of a forward pass and decoding in float32, from crops on the device to joints on the host;
    None where the budget, in seconds, ran out first.
    """
    rows, runs = [], []
    for student, filter, backbone, _, _, params, gflops, fps in PAPER:
        model = build_student(student, filter, backbone, preset="paper").eval().to(device)
        images = torch.rand(COST_BATCH[backbone], 3, model.size, model.size, device=device)
        runs.append(lambda model=model, images=images: model.decode(model(images))[0].cpu())
        rows.append(dict(student=student, filter=filter, backbone=backbone, batch=COST_BATCH[backbone],
                         params_m=count_parameters(model) / 1e6, gflops=count_multiply_adds(model) / 1e9,
                         paper_params_m=params, paper_gflops=gflops, paper_fps=fps))
    times = take_turns(runs, torch.device(device).type, budget)
    for row, seconds in zip(rows, times):
        row["fps"] = row["batch"] / statistics.median(seconds) if seconds else None
    return rows


def protocol(device="cpu"):
    """How the frames a second and the GFLOPs were measured, as text."""
    tf32 = "" if torch.device(device).type == "cpu" else " (convolutions in TF32, PyTorch's default)"
    batches = ", ".join(f"{batch} ({backbone})" for backbone, batch in COST_BATCH.items())
    return (f"fps: {describe_device(device)};\n"
            f"PyTorch {torch.__version__}, float32{tf32}, batch by backbone {batches};\n"
            f"medians of up to {ROUNDS} turns within {COST_SECONDS} seconds for all 16; timed:\n"
            f"normalisation, network and decoding, from crops on the device to joints on the host.\n"
            f"The paper does not name its GPU. "
            f"GFLOPs: multiply-adds of products and convolutions, and of the transforms as FFTs.")


def cost_table(rows):
    """The rows of `measure_costs` as text, the paper's figure behind each measured one."""
    lines = [f"{'':24}{'M parameters':>18}{'GFLOPs':>18}{'frames a second':>20}",
             f"{'student':8}{'filter':10}{'backbone':8}" + f"{'here':>9}{'paper':>9}" * 2
             + f"{'here':>11}{'paper':>9}"]
    for row in rows:
        fps = "" if row["fps"] is None else f"{row['fps']:.1f}"
        lines.append(f"{row['student']:8}{row['filter']:10}{row['backbone']:8}"
                     f"{row['params_m']:9.3f}{row['paper_params_m']:9g}"
                     f"{row['gflops']:9.3f}{row['paper_gflops']:9g}{fps:>11}{row['paper_fps']:9g}")
    if missing := sum(row["fps"] is None for row in rows):
        lines.append(f"networks not timed, as the {COST_SECONDS} seconds for the table were over: {missing}")
    return "\n".join(lines)
