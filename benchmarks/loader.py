"""The input side of training: whole batches from a cache of crops, against the way HRNet's published loader works.

    python benchmarks/loader.py --data MPII              # or any folder in MPII's layout; without: drawn people
    python benchmarks/loader.py --data MPII --size 64

Both make the same thing on one core: crops turned, zoomed and mirrored at random, normalised, and heatmaps of 16 joints.

    sample by sample    the picture is decoded, one affine warp (Pillow) cuts the crop, a loop over joints draws each Gaussian
                        into its 64 x 64 map: HRNet's way, written anew here
    whole batches       crops.make_batch and crops.heatmaps, from a warm memory-mapped cache of crops
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from crops import TOKENPOSE, crop_matrix, heatmaps, invert, make_batch, place, store  # noqa: E402
from data_mpii import load_people  # noqa: E402
from inputs import BadInput, main_with_clear_errors  # noqa: E402
from models import IMAGENET_MEAN, IMAGENET_STD, PRESETS  # noqa: E402
from synthetic import drawn_people  # noqa: E402

BATCH, CELLS, SIGMA, REACH = 64, 64, 2, 3        # REACH: a Gaussian ends at so many deviations (HRNet)
DRAWN, SECONDS = 512, 5


def one_sample(picture, people, i, size, variation):
    """HRNet's way: one picture -> (3, size, size) normalised, heatmaps (16, CELLS, CELLS)."""
    rotation, zoom, flip = (float(part[i]) for part in variation[:3])
    matrix = crop_matrix(people.center[i:i + 1], people.side[i:i + 1] * zoom, size, [rotation], [bool(flip)])
    back = invert(matrix)[0].flatten().tolist()
    crop = picture.transform((size, size), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)
    image = (np.asarray(crop, np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    _, xy, visible = (part[0] for part in place(people, torch.tensor([i]), size, variation))
    maps, reach = np.zeros((len(xy), CELLS, CELLS), np.float32), REACH * SIGMA
    for joint, (x, y) in enumerate((CELLS * xy).tolist()):
        column, row = int(x), int(y)
        left, top = column - reach, row - reach
        if not visible[joint] or left >= CELLS or top >= CELLS or column + reach < 0 or row + reach < 0:
            continue
        offsets = np.arange(2 * reach + 1) - reach
        patch = np.exp(-(offsets[:, None] ** 2 + offsets ** 2) / (2 * SIGMA ** 2))
        rows, columns = (slice(max(0, start), min(CELLS, start + len(patch))) for start in (top, left))
        maps[joint, rows, columns] = patch[rows.start - top:rows.stop - top, columns.start - left:columns.stop - left]
    return torch.from_numpy(image.transpose(2, 0, 1).astype(np.float32)), torch.from_numpy(maps)


def sample_by_sample(people, size, rows, variation):
    samples = [one_sample(people.picture(i), people, i, size, variation) for i in rows.tolist()]
    return tuple(torch.stack(part) for part in zip(*samples))


def whole_batch(people, crops, size, rows, variation):
    batch = make_batch(people, crops, rows, size, variation=variation)
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (IMAGENET_MEAN, IMAGENET_STD))
    return (batch.images - mean) / std, heatmaps(batch.xy, SIGMA, CELLS) * batch.visible[..., None, None]


def images_a_second(make, people):
    """Batches of BATCH people in turn, for SECONDS."""
    done, began, random = 0, time.perf_counter(), torch.Generator().manual_seed(0)
    while time.perf_counter() - began < SECONDS:
        make(torch.randint(len(people), (BATCH,), generator=random))
        done += BATCH
    return done / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder in MPII's layout (default: drawn people, written as JPEGs first)")
    parser.add_argument("--size", type=int, default=PRESETS["paper"].size, help="side of the crops (default: 256)")
    args = parser.parse_args()
    if args.size < 16:
        raise BadInput(f"--size {args.size} must be at least 16")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            people = load_people(args.data, "valid")
        else:
            people = drawn_people("valid", DRAWN, args.size)
            for i in range(len(people)):
                people.picture(i).save(f"{folder}/{i}.jpg", quality=95)
            people = replace(people, picture=lambda i: Image.open(f"{folder}/{i}.jpg").convert("RGB"))
        crops = store(people, args.size, folder)
        variation = TOKENPOSE.draw(len(people), torch.Generator().manual_seed(0))
        whole = images_a_second(lambda rows: whole_batch(people, crops, args.size, rows, variation), people)
        alone = images_a_second(lambda rows: sample_by_sample(people, args.size, rows, variation), people)
    print(f"{args.size} x {args.size} crops and 16 heatmaps, one core, batches of {BATCH}: sample by sample {alone:.0f} images "
          f"a second, whole batches {whole:.0f}: {whole / alone:.1f} times")


if __name__ == "__main__":
    main_with_clear_errors(main)
