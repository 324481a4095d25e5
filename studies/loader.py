"""The input side of training: whole batches from a cache of crops, against HRNet's published way.

    python studies/loader.py --data MPII              # or any folder in MPII's layout; without: drawings

Both make the same thing on one core: crops turned, zoomed and mirrored at random, normalised, and heatmaps of
16 joints.

    sample by sample    the image is decoded, one affine warp (Pillow) cuts the crop, a loop over joints
                        draws each Gaussian into its 64 x 64 map: HRNet's way, reimplemented here
    whole batches       crops.make_batch and crops.heatmaps, from a warm memory-mapped cache of crops
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, main_with_clear_errors
from crops import TOKENPOSE, crop_keypoints, heatmaps, invert, make_batch, store
from data_mpii import load_samples, open_image
from models import IMAGENET_MEAN, IMAGENET_STD
from synthetic import drawn_people

MEAN, STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
SIZE, BATCH, CELLS, SIGMA, REACH = 256, 64, 64, 2, 3     # REACH: deviations where a Gaussian ends (HRNet)
DRAWN, SECONDS = 512, 5


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
        return images, heatmaps(batch.xy, SIGMA, CELLS).mul_(batch.visible[..., None, None])

    return make


def images_a_second(make, samples):
    """Batches of BATCH samples in turn, for SECONDS."""
    done, began, random = 0, time.perf_counter(), torch.Generator().manual_seed(0)
    while time.perf_counter() - began < SECONDS:
        make(torch.randint(len(samples), (BATCH,), generator=random))
        done += BATCH
    return done / (time.perf_counter() - began)


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--data", type=Path,
                        help="folder in MPII's layout (default: drawings, written as JPEGs first)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            samples = load_samples(args.data, "valid")
        else:
            samples = drawn_people("valid", DRAWN, SIZE)
            for i in range(len(samples)):
                samples.image(i).save(f"{folder}/{i}.jpg", quality=95)
            samples = replace(samples, image=lambda i: open_image(f"{folder}/{i}.jpg"))
        crops = store(samples, SIZE, folder)
        params = TOKENPOSE.draw(len(samples), torch.Generator().manual_seed(0))
        ways = whole_batches(samples, crops, params), sample_by_sample(samples, params)
        one, other = (way(torch.arange(min(8, len(samples))))[0] for way in ways)
        off = (one - other).abs().mean()
        whole, alone = (images_a_second(way, samples) for way in ways)
    print(f"{SIZE} x {SIZE} crops and 16 heatmaps, one core, batches of {BATCH}: sample by sample "
          f"{alone:.0f} images a second, whole batches {whole:.0f}: {whole / alone:.1f} times\n"
          f"(crops differ by {off:.2f} deviations of a pixel's value: one is cut from a stored crop)")


if __name__ == "__main__":
    main_with_clear_errors(main)
