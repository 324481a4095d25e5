"""The speed of parts: one filter layer, memory of a forward pass, the input side of training.

    python studies/speed_parts.py layer                 # a minute on two cores
    python studies/speed_parts.py memory                # half a minute, on the CPU
    python studies/speed_parts.py input --data MPII     # any folder in MPII's layout; without: drawings

    layer     one mixer of the paper's size (16 grids of 16 x 17, on a GPU 1,024; 192 channels), GS, GD and
              attention, in the forms of speed.py. Medians; 'times' is the speed over plain float32
    memory    by how much a process grows in forward passes, beside the network's weights; plain and optimised
              as in speed.py
    input     on one core: crops turned, zoomed and mirrored at random, normalised, and heatmaps of 16 joints.
              Sample by sample, HRNet's published way, reimplemented here: the image is decoded, one affine
              warp cuts the crop, a loop draws the Gaussian of each joint. Whole batches: crops.make_batch
              from a warm cache of crops, and distill.gaussian_heatmaps

Only precisions that the device computes natively are measured.
"""

import copy
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, check_device, default_device, main_with_clear_errors
from crops import TOKENPOSE, crop_keypoints, invert, make_batch, store
from distill import gaussian_heatmaps
from data_mpii import load_samples
from costs import describe_device, take_turns
from export import COMPILE
from gfl import GlobalDynamicFilter, StaticFilter
from models import FILTERS, IMAGENET_MEAN, IMAGENET_STD, Attention, build_student
from speed import FORMS, Recorded, build_form, forms_of, precisions, running
from synthetic import drawn_people

# ------------------------------------------------------------------------------- one mixer's layer

GRID, DIM, HEADS = (16, 17), 192, 8
GRIDS = {"cpu": 16, "cuda": 1024}        # token grids at once: on a GPU more than its cache holds
LAYERS = {"GS": StaticFilter, "GD": GlobalDynamicFilter,
          "attention": lambda grid, dim: Attention(dim, HEADS)}
LAYER_SECONDS = 30       # for the forms of one mixer, which take turns


@torch.inference_mode()
def measure_layers(device, seconds=LAYER_SECONDS, forms=FORMS):
    """A dictionary for each form of each mixer: seconds, bytes of input and output, distance from plain."""
    kind, grids = torch.device(device).type, GRIDS[torch.device(device).type]
    for name, build in LAYERS.items():
        torch.manual_seed(0)
        layer = build(GRID, DIM).to(device).eval().requires_grad_(False)
        x, figures, works = torch.randn(grids, *GRID, DIM, device=device), [], []
        with running(layer, "plain", "float32"):
            truth = layer(x)
        kept = [form for form in forms_of(device) if form in forms]
        for (precision, dtype), form in product(precisions(device).items(), kept):
            mixer, tokens = copy.deepcopy(layer).to(dtype), x.to(dtype)
            context = partial(running, mixer, form, precision)
            if form == "compiled":
                mixer = torch.compile(mixer, dynamic=False, **COMPILE[kind])
            elif form == "graph":
                mixer = Recorded(mixer)
            with context():
                off = float((mixer(tokens).float() - truth).abs().max() / truth.abs().max())
                mixer(tokens), mixer(tokens)             # a compiled one is recorded at the second or third
            figures.append(dict(mixer=name, precision=precision, form=form, grids=grids, off=off,
                                bytes=2 * tokens.nbytes))
            works.append((partial(mixer, tokens), context))
        for figure, turns in zip(figures, take_turns(works, kind, seconds)):
            if turns:
                yield figure | dict(seconds=statistics.median(turns))


def time_layers(args):
    print(describe_device(args.device))
    first = {}
    for found in measure_layers(args.device):
        times = first.setdefault(found["mixer"], found["seconds"]) / found["seconds"]
        print(f"{found['mixer']:10}{found['precision']:9} {found['form']:10} "
              f"{1e3 * found['seconds']:7.2f} ms  {times:5.2f} times  "
              f"off by {found['off']:.0e} of the largest", flush=True)


# ------------------------------------------------------------------------------- memory

CROPS_AT_ONCE = 16


def peak():
    """The most memory that this process ever held, MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3              # macOS counts in bytes, Linux in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@torch.inference_mode()
def growth(filter, form, precision):
    """MB that this process grows by in three forward passes of a reg student."""
    model = build_student("reg", filter, "none", "paper").eval()
    network, context = build_form(model, form, precision)
    images = torch.rand(CROPS_AT_ONCE, 3, model.size, model.size)
    before = peak()
    with context():
        for _ in range(3):
            network(images)
    return peak() - before


def compare_memory(args):
    """Each form in a process of its own, whose freed memory goes back to the system at once: by default glibc
    keeps a part of it, which would be counted.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for filter, precision in product(FILTERS, precisions("cpu")):
            plain, optimised = (pool.apply(growth, (filter, form, precision))
                                for form in ("plain", "optimised"))
            print(f"{filter:10}{precision:10}batch {CROPS_AT_ONCE}: plain {plain:6.0f} MB, "
                  f"optimised {optimised:6.0f} MB", flush=True)


# ------------------------------------------------------------------------------- the input side of training

MEAN, STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
SIZE, BATCH, CELLS, SIGMA, REACH = 256, 64, 64, 2, 3     # REACH: deviations where a Gaussian ends (HRNet)
DRAWN, INPUT_SECONDS = 512, 5


def one_sample(image, back, xy, visible):
    """HRNet's way: an image, its map crop -> image (6,), joints -> (3, SIZE, SIZE), (16, CELLS, CELLS)."""
    crop = image.transform((SIZE, SIZE), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    pixels = (np.asarray(crop, np.float32) / 255 - MEAN) / STD
    maps, reach = np.zeros((len(xy), CELLS, CELLS), np.float32), REACH * SIGMA
    offsets = np.arange(2 * reach + 1) - reach
    patch = np.exp(-(offsets[:, None] ** 2 + offsets ** 2) / (2 * SIGMA ** 2))
    for joint, (x, y) in enumerate(CELLS * xy):
        left, top = int(x) - reach, int(y) - reach
        if not visible[joint] or max(left, top) >= CELLS or min(left, top) + len(patch) <= 0:
            continue
        rows, columns = (slice(max(0, start), min(CELLS, start + len(patch))) for start in (top, left))
        maps[joint, rows, columns] = patch[rows.start - top:rows.stop - top,
                                           columns.start - left:columns.stop - left]
    return torch.from_numpy(pixels.transpose(2, 0, 1)), torch.from_numpy(maps)


def sample_by_sample(samples, params):
    """-> a function of rows. Maps crop -> image are made for all at once, in favour of HRNet's way."""
    matrix, xy, visible = crop_keypoints(samples, torch.arange(len(samples)), SIZE, params)
    back = invert(matrix)
    half = torch.full((2,), 0.5, dtype=torch.float64)        # Pillow counts from the edge of the first pixel
    back[..., 2] += half - back[..., :2] @ half
    back, xy, visible = back.flatten(1).tolist(), xy.numpy(), visible.numpy()

    def make(rows):
        parts = [one_sample(samples.image(i), back[i], xy[i], visible[i]) for i in rows.tolist()]
        return tuple(torch.stack(part) for part in zip(*parts))

    return make


def whole_batches(samples, crops, params):
    """-> a function of rows."""
    def make(rows):
        batch = make_batch(samples, crops, rows, SIZE, params=params)
        mean, std = (torch.from_numpy(values).view(3, 1, 1) for values in (MEAN, STD))
        images = batch.images.sub_(mean).div_(std)
        return images, gaussian_heatmaps(batch.xy, SIGMA, CELLS).mul_(batch.visible[..., None, None])

    return make


def images_a_second(make, samples):
    """Batches of BATCH samples in turn, for INPUT_SECONDS."""
    done, began, random = 0, time.perf_counter(), torch.Generator().manual_seed(0)
    while time.perf_counter() - began < INPUT_SECONDS:
        make(torch.randint(len(samples), (BATCH,), generator=random))
        done += BATCH
    return done / (time.perf_counter() - began)


def compare_inputs(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            samples = load_samples(args.data, "valid")
        else:                                                # written as JPEGs first
            samples = drawn_people("valid", DRAWN, SIZE)
            for i in range(len(samples)):
                samples.image(i).save(f"{folder}/{i}.jpg", quality=95)
            samples = replace(samples, image=lambda i: Image.open(f"{folder}/{i}.jpg").convert("RGB"))
        crops = store(samples, SIZE, folder)
        params = TOKENPOSE.draw(samples, torch.Generator().manual_seed(0))
        ways = whole_batches(samples, crops, params), sample_by_sample(samples, params)
        batch, stacked = (make(torch.arange(min(8, len(samples))))[0] for make in ways)
        off = (batch - stacked).abs().mean()
        whole, alone = (images_a_second(make, samples) for make in ways)
    print(f"{SIZE} x {SIZE} crops and 16 heatmaps, one core, batches of {BATCH}: sample by sample "
          f"{alone:.0f} images a second, whole batches {whole:.0f}: {whole / alone:.1f} times\n"
          f"(crops differ by {off:.2f} deviations of a pixel's value: one is cut from a stored crop)")


PARTS = {"layer": time_layers, "memory": compare_memory, "input": compare_inputs}


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--device", default=default_device(), help="of layer: cpu, cuda or cuda:N")
    parser.add_argument("--data", type=Path, help="of input: folder in MPII's layout (default: drawings)")
    args = parser.parse_args()
    check_device(args.device)
    PARTS[args.part](args)


if __name__ == "__main__":
    main_with_clear_errors(main)
