"""From a person in an image to the network's square input and back: crops, augmentation, batches.

    python -m pytest tests/test_crops.py

    crop_matrix   image -> crop, an affine map: a box around a person, rotated, mirrored, resized. Loading,
                  augmentation, decoding and drawing all use this function or its inverse (`invert`).
    cut           one image through such a map (Pillow), once per sample, with a margin
    warp          a batch of stored crops to the network's input, through another such map, at every step

A pixel's coordinate is that of its centre: the crop's first pixel has its centre at 0 and its left edge at
-0.5. Outside the image, and beyond a stored crop's margin, everything is black, or grey where augmentation
raises the brightness. An augmented crop is interpolated twice, a plain one once.
"""

import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import BadInput, check_writable, locked
from data_mpii import BOX_ENLARGEMENT
from images import READER

MARGIN = 1.5                # stored crops are this many times as wide as the network's input: room to turn
                            # and zoom out; what lies outside is black
SLICE, CHUNK = 256, 1024    # crops handed to the threads, and copied to a GPU, at a time
# pixels that a CPU warps at once: they fit its cache (84 instead of 226 ms for 64 crops of 256)
WARPED_AT_ONCE = 384 * 384
ROUNDED = 2 ** 20           # maps of shrunk images are rounded to multiples of 1 / this
CROPS = Path("runs/crops")  # folder of the stored crops, where --cache names no other
HIDDEN = 0.15, 0.4          # shortest, longest side of the occluding rectangle, fractions of the crop
# Where a person is cut off: outward normals of the line (image axes, y down), and their probabilities. Most
# people who are not whole in a photo lack their legs.
CUTS = ((0, 1), (0, -1), (1, 0), (-1, 0)), (0.55, 0.15, 0.15, 0.15)
CUT_AT = 0.4, 0.85          # least and largest fraction of the person, along that normal, that is kept
BLACK = 0.5                 # fraction of cut people with everything beyond the line black
# Boxes that do not fit: range of the side, and how far the middle moves at most, in sides of the plain box
LOOSE_ZOOM, LOOSE_OFFSET = (0.9, 1.6), 0.25
LEAST_JOINTS, SMALLEST = 4, 0.4     # of a part: visible joints; side of its box / side of the person's box
# Joint k (of data_mpii.JOINTS) of a mirrored person is joint FLIP[k] of the original: sides are swapped.
FLIP = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]


# ------------------------------------------------------------------------------- the one affine map

def crop_matrix(center, side, size, rotation=0.0, flip=False):
    """Maps (B, 2, 3) from image pixels to pixels of a size x size crop, in float64.

    center: (B, 2) middle of the box in the image. side: (B,) its side in image pixels. rotation: (B,) degrees
    by which the image is rotated, counter-clockwise as seen. flip: (B,) bool, mirror left and right.

        u = diag(mirror, 1) S R (x - center) + middle,      S = size / side, middle = (size - 1) / 2

    x: image pixel, u: crop pixel, mirror: -1 where flipped, R = [[cos, sin], [-sin, cos]]: the image's y axis
    points down.
    """
    center = torch.as_tensor(center, dtype=torch.float64)                      # (B, 2)
    side = torch.as_tensor(side, dtype=torch.float64)                          # (B,)
    angle = torch.deg2rad(torch.as_tensor(rotation, dtype=torch.float64)).expand_as(side)
    mirror = 1 - 2 * torch.as_tensor(flip, dtype=torch.float64).expand_as(side)
    cos, sin = angle.cos(), angle.sin()
    s_cos, s_sin = size / side * cos, size / side * sin                        # S cos, S sin
    turn = torch.stack([mirror * s_cos, mirror * s_sin, -s_sin, s_cos], -1).unflatten(-1, (2, 2))  # (B, 2, 2)
    shift = (size - 1) / 2 - turn @ center[..., None]                          # (B, 2, 1)
    return torch.cat([turn, shift], dim=-1)


def invert(matrix):
    """The maps back: (B, 2, 3) -> (B, 2, 3)."""
    a, b, c, d = matrix[..., :2].flatten(-2).unbind(-1)
    adjugate = torch.stack([d, -b, -c, a], -1).unflatten(-1, (2, 2))
    back = adjugate / (a * d - b * c)[..., None, None]
    return torch.cat([back, -back @ matrix[..., 2:]], dim=-1)


def compose(second, first):
    """The maps that do `first`, then `second`: (B, 2, 3)."""
    turn = second[..., :2]
    return torch.cat([turn @ first[..., :2], turn @ first[..., 2:] + second[..., 2:]], dim=-1)


def transform(matrix, points):
    """Points (B, K, 2) through maps (B, 2, 3), in float64."""
    return points.double() @ matrix[..., :2].transpose(-1, -2) + matrix[..., 2].unsqueeze(-2)


# ------------------------------------------------------------------------------- pixels through the map

def cut(image, matrix, size, reduce=None):
    """One RGB image (Pillow) through one map (2, 3) -> crop (size, size, 3) uint8.

    An image that shrinks to half or less is averaged down first, which avoids aliasing. reduce:
    `image.reduce` with a memory, for many cuts of one image.
    """
    shrink = max(1, int(1 / math.sqrt(abs(float(torch.linalg.det(matrix[:, :2]))))))
    if shrink > 1:
        image = (reduce or image.reduce)(shrink)
        first = (shrink - 1) / 2                  # the reduced image's first pixel, in the original
        matrix = compose(matrix, torch.tensor([[shrink, 0, first], [0, shrink, first]], dtype=torch.float64))
    # Pillow takes the inverse map, and coordinates from the edge of the first pixel instead of its centre.
    half = torch.full((2,), 0.5, dtype=torch.float64)
    back = invert(matrix)
    back[:, 2] += half - back[:, :2] @ half
    if shrink > 1:      # points often lie exactly between pixels: rounding errors must not move them across
        back = back.mul(ROUNDED).round().div(ROUNDED)
    return np.asarray(image.transform((size, size), Image.Transform.AFFINE, back.flatten().tolist(),
                                        Image.Resampling.BILINEAR))


def warp(images, matrix, size):
    """Images (B, 3, H, W) float through maps (B, 2, 3) -> (B, 3, size, size), bilinear, black outside."""
    H, W = images.shape[-2:]

    def unit(width, height):    # pixels -> [-1, 1] of grid_sample, edge to edge
        rows = [[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1]]
        return torch.tensor(rows, dtype=torch.float64)

    # from [-1, 1] of the crop to [-1, 1] of the image
    theta = compose(unit(W, H), compose(invert(matrix.cpu()), invert(unit(size, size))))
    theta = theta.to(images.device, images.dtype)
    # F.affine_grid as two sums, in a third of its time on a CPU
    middles = (2 * torch.arange(size, device=theta.device, dtype=theta.dtype) + 1) / size - 1
    along_x = middles[:, None] * theta[:, None, None, :, 0]                                # (B, 1, size, 2)
    # (B, size, 1, 2)
    along_y = middles[:, None, None] * theta[:, None, None, :, 1] + theta[:, None, None, :, 2]
    grid = along_x + along_y
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# ------------------------------------------------------------------------------- augmentation

class AugmentationParams(NamedTuple):
    """How each of N crops differs from the plain one."""
    rotation: torch.Tensor     # (N,) degrees
    zoom: torch.Tensor         # (N,) side of the box, in sides of the plain one: above 1 the crop shows more
    flip: torch.Tensor         # (N,) bool
    gain: torch.Tensor         # (N, 3) what red, green and blue are multiplied by
    shift: torch.Tensor        # (N, 1) what is then added to all three
    hidden: torch.Tensor       # (N, 4) occluding rectangle: middle x, y, width, height, fractions of the crop
    paint: torch.Tensor        # (N, 3) its colour
    offset: torch.Tensor       # (N, 2) how far the middle of the box moves, image pixels
    border: torch.Tensor       # (N, 3) n_x, n_y, d: the picture ends where n . x > d (image pixels, or inf)


class Augmentation(NamedTuple):
    """How far random crops differ from the plain one."""
    rotation: float            # standard deviation of the angle, degrees; clipped at twice that
    rotation_chance: float     # fraction of the crops that are turned at all
    zoom: float                # standard deviation of the box's size around 1; clipped at that
    flip_chance: float         # fraction of the crops that are mirrored
    colour: float = 0          # gain of each colour 1 ± this at most, shift of the brightness ± half of it
    hidden_chance: float = 0   # fraction of the crops that get an occluding rectangle
    part_chance: float = 0     # fraction of the crops that show a part of the person (`cut_people`)
    loose_chance: float = 0    # fraction of the crops whose box does not fit: another size, off the middle

    def draw(self, samples, random):
        """The AugmentationParams of all N samples, from a torch.Generator."""
        count = len(samples)
        rotation = self.rotation * torch.randn(count, generator=random)
        rotation = rotation.clamp(-2 * self.rotation, 2 * self.rotation)
        rotation *= torch.rand(count, generator=random) < self.rotation_chance
        zoom = 1 + (self.zoom * torch.randn(count, generator=random)).clamp(-self.zoom, self.zoom)
        flip = torch.rand(count, generator=random) < self.flip_chance
        gain = 1 + self.colour * (2 * torch.rand(count, 3, generator=random) - 1)
        shift = self.colour * (torch.rand(count, 1, generator=random) - 0.5)
        least, most = HIDDEN
        sides = least + (most - least) * torch.rand(count, 2, generator=random)
        sides *= torch.rand(count, 1, generator=random) < self.hidden_chance
        hidden = torch.cat([torch.rand(count, 2, generator=random), sides], 1)
        paint = torch.rand(count, 3, generator=random)
        offset, border = torch.zeros(count, 2), torch.tensor([0, 0, math.inf]).expand(count, 3)
        if self.part_chance:
            part, offset, border = cut_people(samples, self.part_chance, random)
            zoom = zoom * part
        if self.loose_chance:
            loose = torch.rand(count, generator=random) < self.loose_chance
            least, most = LOOSE_ZOOM
            larger = least + (most - least) * torch.rand(count, generator=random)
            beside = LOOSE_OFFSET * (2 * torch.rand(count, 2, generator=random) - 1)
            offset = offset + loose[:, None] * beside * torch.from_numpy(samples.side)[:, None]
            zoom = torch.where(loose, larger * zoom, zoom)
        return AugmentationParams(rotation, zoom, flip, gain, shift, hidden, paint, offset, border)


def cut_people(samples, chance, random):
    """Boxes around parts of people: half bodies, and people cut by the border of the photo.

    A line across the image cuts the person; the box becomes that of the joints on its inner side, up to the
    line. For a fraction BLACK of these the picture ends there. chance: fraction of the people who are cut.
    Returns zoom (N,), offset (N, 2) and border (N, 3) of AugmentationParams.
    """
    joints, visible, center, side = (
        torch.from_numpy(array) for array in (samples.joints, samples.visible, samples.center, samples.side))
    normals, often = (torch.tensor(part, dtype=torch.float32) for part in CUTS)
    least, most = CUT_AT
    count = len(samples)
    normal = normals[torch.multinomial(often, count, replacement=True, generator=random)]          # (N, 2)
    fraction, drawn, black = torch.rand(3, count, generator=random)
    along = (joints * normal[:, None]).sum(-1)                                                 # (N, 16) n . x
    first, last = along.where(visible, math.inf).amin(1), along.where(visible, -math.inf).amax(1)
    line = first + (least + (most - least) * fraction) * (last - first)                        # (N,)
    kept = visible & (along <= line[:, None])                                                  # (N, 16)
    low = joints.where(kept[..., None], math.inf).amin(1)                                      # (N, 2)
    high = joints.where(kept[..., None], -math.inf).amax(1)
    low = torch.where(normal == -1, -line[:, None], low)                  # n = -1: n . x = line is x = -line
    high = torch.where(normal == 1, line[:, None], high)
    part = BOX_ENLARGEMENT * (high - low).amax(1) / side                                       # (N,)
    happens = (drawn < chance) & (kept.sum(1) >= LEAST_JOINTS) & (part >= SMALLEST)
    return (part.where(happens, 1), ((low + high) / 2 - center).where(happens[:, None], 0),
            torch.cat([normal, line.where(happens & (black < BLACK), math.inf)[:, None]], 1))


def end_pictures(images, matrix, border):
    """Images (B, 3, size, size) of crops (matrix: (B, 2, 3)), black beyond the lines `border` (B, 3).

        n . x > d in the image,  x = A u + t in crop pixels u:   (n A) . u > d - n . t
    """
    back, size = invert(matrix), images.shape[-1]
    # n A = (across, down), n . t = shift; (B,) each
    across, down, shift = (border[:, None, :2].double() @ back)[:, 0].unbind(-1)
    pixels = torch.arange(size, dtype=torch.float64)
    beyond = down[:, None, None] * pixels[:, None] + across[:, None, None] * pixels \
        > (border[:, 2] - shift)[:, None, None]                                            # (B, size, size)
    return images.masked_fill(beyond[:, None].to(images.device), 0)


def hide(images, hidden, paint):
    """Paint rectangles (B, 4), see AugmentationParams, in colours (B, 3) on images (B, 3, size, size)."""
    middles = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]        # (size,)
    middle, sides = hidden.view(-1, 2, 2).unbind(1)                                        # (B, 2) each: x, y
    across, down = ((middles - middle[..., None]).abs() < sides[..., None] / 2).unbind(1)  # (B, size) each
    return torch.where(down[:, None, :, None] & across[:, None, None, :], paint[:, :, None, None], images)


TOKENPOSE = Augmentation(rotation=30, rotation_chance=0.6, zoom=0.25, flip_chance=0.5)    # its recipe on MPII
AUGMENTATIONS = {"upright": Augmentation(rotation=10, rotation_chance=0.6, zoom=0.1, flip_chance=0.5),
                 "tokenpose": TOKENPOSE,
                 "colour": TOKENPOSE._replace(colour=0.25),
                 "occlusion": TOKENPOSE._replace(colour=0.25, hidden_chance=0.5),
                 "parts": TOKENPOSE._replace(colour=0.1, part_chance=0.2, loose_chance=0.05)}


# ------------------------------------------------------------------------------- batches

def stored_size(size):
    """Side of the stored crops of a network with input side `size`: that and equal margins on both sides."""
    return size + 2 * round(size * (MARGIN - 1) / 2)


def stored_matrix(center, side, size):
    """Image -> stored crop: the map without augmentation, with the margin around it.

    The margins are whole pixels: without augmentation the second map only shifts by these, and blurs nothing.
    """
    wide = stored_size(size)
    return crop_matrix(center, torch.as_tensor(side) * wide / size, wide)


def store(samples, size, folder=None):
    """The crops of all samples with their margin, cut once: (N, wide, wide, 3) uint8.

    folder: cache of memory-mapped files, or None to keep the crops in memory. The name of a file contains a
    digest of the images (path, size, modification time), the version of their reader, and boxes. One process
    cuts while others wait; cutting that was stopped is resumed where the system has locks (not on Windows).
    """
    wide = stored_size(size)
    matrix = stored_matrix(samples.center, samples.side, size)
    shape = (len(samples), wide, wide, 3)
    if folder is None:
        crop = np.dtype((np.uint8, shape[1:]))                                 # an element is a whole crop
        return np.fromiter(cut_all(samples, matrix, wide), crop, len(samples))
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in samples.files]
    digest = hashlib.sha256(repr((READER, stats, shape)).encode() + matrix.numpy().tobytes()).hexdigest()[:16]
    file = Path(folder) / f"crops-{samples.name.replace('/', '-').replace(' ', '-')}-{wide}-{digest}.bin"
    partial = file.with_suffix(".bin.partial")
    total, crop_bytes = math.prod(shape), math.prod(shape[1:])
    is_cut = lambda: file.exists() and file.stat().st_size == total
    if not is_cut():
        check_writable(file.parent, "--cache ")
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent) as alone:
            partial = partial if alone else partial.with_suffix(f".{os.getpid()}.partial")
            if not is_cut():                                  # else another process has cut them meanwhile
                start = partial.stat().st_size // crop_bytes if partial.exists() else 0
                if shutil.disk_usage(file.parent).free < total - start * crop_bytes:
                    raise BadInput(f"{file.parent} lacks room for {total / 1e9:.1f} GB of crops: name "
                                   f"another folder with --cache")
                print(f"cutting {len(samples):,} crops of {wide} x {wide} pixels into {file} "
                      f"({total / 1e9:.2f} GB)" + (f", after the first {start:,}" if start else ""))
                try:
                    with open(partial, "ab") as out:         # whole crops that are there are kept
                        out.truncate(start * crop_bytes)
                        out.writelines(cut_all(samples, matrix, wide, start))
                        out.flush()
                        os.fsync(out.fileno())
                except OSError as error:                     # others write, too; or a quota
                    raise BadInput(f"{partial} cannot be written ({error.strerror}): name another "
                                   f"folder with --cache") from error
                os.replace(partial, file)
    return np.memmap(file, np.uint8, "r", shape=shape)


def cut_all(samples, matrix, wide, start=0):
    """The stored crops (wide, wide, 3) of all samples from number `start` on, in order."""
    def cut_one(i):
        try:
            return cut(samples.image(i), matrix[i], wide)
        except BadInput as error:
            raise BadInput(f"{samples.name}, entry {i}: {error}") from error

    with ThreadPoolExecutor() as pool, tqdm(total=len(samples), initial=start, desc="crops", leave=False,
                                            disable=None) as bar:              # Pillow releases the GIL
        for first in range(start, len(samples), SLICE):
            for crop in pool.map(cut_one, range(first, min(first + SLICE, len(samples)))):
                bar.update()
                yield crop


def on_device(crops, device):
    """Stored crops, on the GPU if they fit into half of its free memory, so that no step waits for a copy."""
    if device == "cpu":
        return crops
    torch.cuda.empty_cache()                             # PyTorch's cache is free memory, too
    if crops.nbytes >= torch.cuda.mem_get_info(device)[0] / 2:
        return crops
    moved = torch.empty(crops.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(crops), CHUNK):            # a mapped file is read-only, so a copy
        moved[start:start + CHUNK] = torch.from_numpy(crops[start:start + CHUNK].copy())
    return moved


class Batch(NamedTuple):
    """Input and labels of one step."""
    images: torch.Tensor       # (B, 3, size, size) RGB in [0, 1]
    xy: torch.Tensor           # (B, K, 2) joints as fractions of the crop
    visible: torch.Tensor      # (B, K) bool: labelled, inside the crop, and not beyond a border
    matrix: torch.Tensor       # (B, 2, 3) image -> crop, float64 on the CPU
    empty: torch.Tensor        # (B,) bool: nobody is there


def crop_keypoints(samples, rows, size, params=None):
    """Matrix, xy and visible of the Batch of samples `rows` (B,). params: AugmentationParams of all N."""
    center, side, joints, visible = (
        torch.from_numpy(array)[rows]
        for array in (samples.center, samples.side, samples.joints, samples.visible))
    rotation, zoom, flip = 0.0, 1.0, torch.zeros(len(rows), dtype=torch.bool)
    if params:
        rotation, zoom, flip = (param[rows] for param in (params.rotation, params.zoom, params.flip))
        center, border = center + params.offset[rows], params.border[rows]
        visible = visible & ((joints * border[:, None, :2]).sum(-1) <= border[:, 2:])
    matrix = crop_matrix(center, side * zoom, size, rotation, flip)
    xy = (transform(matrix, joints) + 0.5) / size                              # pixels -> fractions
    xy = torch.where(flip[:, None, None], xy[:, FLIP], xy).float()
    visible = torch.where(flip[:, None], visible[:, FLIP], visible)
    return matrix, xy, visible & ((xy >= 0) & (xy <= 1)).all(-1)


def make_batch(samples, stored, rows, size, device="cpu", params=None):
    """The Batch of samples `rows` (B,). stored: all crops (N, wide, wide, 3), array or tensor on the device.

    params: as in `crop_keypoints`.
    """
    rows = torch.as_tensor(rows)
    matrix, xy, visible = crop_keypoints(samples, rows, size, params)
    plain = stored_matrix(torch.from_numpy(samples.center)[rows], torch.from_numpy(samples.side)[rows], size)
    if torch.is_tensor(stored):
        pixels = stored[rows.to(device)]
    else:
        pixels = torch.from_numpy(stored[rows.numpy()]).to(device)
    pixels = pixels.permute(0, 3, 1, 2)                                                   # (B, 3, wide, wide)
    again = compose(matrix, invert(plain))                                     # stored crop -> input
    count = max(1, WARPED_AT_ONCE // pixels[0, 0].numel()) if pixels.device.type == "cpu" else len(rows)
    images = torch.cat([warp(some.float(), maps, size)
                        for some, maps in zip(pixels.split(count), again.split(count))]).div_(255)
    if params and not (params.gain == 1).all():
        gain, shift = (param[rows, :, None, None].to(device) for param in (params.gain, params.shift))
        images.mul_(gain).add_(shift).clamp_(0, 1)
    if params and (params.border[rows, 2] < math.inf).any():
        images = end_pictures(images, matrix, params.border[rows])
    if params and params.hidden[:, 2:].any():
        images = hide(images, *(param[rows].to(device) for param in (params.hidden, params.paint)))
    empty = torch.from_numpy(samples.empty)[rows]
    return Batch(images, xy.to(device), visible.to(device), matrix, empty.to(device))
