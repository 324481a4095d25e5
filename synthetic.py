"""Synthetic people: an endless pose data set, drawn by the program, that needs no download.

    python studies/pictures.py drawings         # a contact sheet with the joints drawn on it, and the speed

Each drawing is a small 3-D scene. A skeleton with human proportions takes a random pose (bones turned by
angles that human joints can reach), is dressed with capsules (a capsule is all that is near a line segment:
thighs, feet, even eyes and hair are capsules), is seen by a camera from any side, and is painted in front of
clutter. Nothing in the clothes tells right from left; what does is what tells front from back: face, hair,
shirt front, rucksack, the way the feet point and the knees bend.

The 16 joints, their order, and the meaning of center, scale and head box are those of the MPII data set
(http://human-pose.mpi-inf.mpg.de), so that whatever reads MPII can read these drawings. 'Right' is the
person's own right: left in the image when the person faces us.

Body axes: x to the person's left, y up, z forward. Camera axes: x right in the image, y up, z towards us.
Lengths are in body heights (a standing person is 1 tall), angles in degrees, until they meet the pixels.
"""

import math
import os
import sys
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain
from multiprocessing import active_children, current_process, get_context
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_mpii import (BOX_ENLARGEMENT, CENTER_SHIFT, HEAD_SIZE_OF_DIAGONAL, HEAD_SIZE_PER_SCALE,
                       PIXELS_PER_SCALE, Samples, box)

SERIES = {"train": 0, "valid": 1, "teacher": 2}        # seeds: no person is in two splits

MARGIN = 1.5             # side of the image over the nominal side of the crop: room to rotate and scale

ELEVATION, ROLL = (-15, 35), 8       # the camera looks from below .. above, and is tilted by up to this
CAMERA_DISTANCE = (4, 12)            # in body heights: nearer parts look slightly larger
CROP_FRACTION = (0.85, 1.1)          # side of the crop over its nominal side
OFFSET, LABEL = 0.06, 0.02           # person off the image's middle, label off the person: fractions of crop

SKIN = (255, 219, 188), (240, 194, 157), (216, 160, 118), (172, 115, 77), (126, 79, 52), (84, 54, 40)
HAIR = (28, 22, 20), (62, 40, 26), (110, 70, 38), (196, 152, 84), (150, 62, 30), (170, 168, 165)
SHOES = (30, 30, 34), (235, 235, 230), (96, 62, 40), (178, 44, 44), (40, 66, 130)
EYES, LIPS = (24, 20, 24), (170, 60, 60)
# Fractions of people who have these
WARDROBE = dict(long_sleeves=0.5, long_trousers=0.65, long_hair=0.35, hat=0.2, rucksack=0.2, gloves=0.07)

AMBIENT, DIFFUSE = 0.42, 0.68        # light that comes from everywhere, light that comes from the lamp
STRIPED, SKINLIKE = 0.2, 0.3         # fractions of the boxes, and of the sticks and balls, in the background
FAR = 10                             # the background is this many image sides behind the person
NOISE = 6                            # grey levels that a colour value is off by at most
POOL_FROM = 1000                     # fewer drawings than this are done before a pool of workers has started
CHUNK = 64                           # drawings that a worker is asked for at a time


# ------------------------------------------------------------------------------- a random skeleton in 3-D

# Bones of human lengths are turned by angles that human joints can reach.

(R_ANKLE, R_KNEE, R_HIP, L_HIP, L_KNEE, L_ANKLE, PELVIS, THORAX, UPPER_NECK, HEAD_TOP,
 R_WRIST, R_ELBOW, R_SHOULDER, L_SHOULDER, L_ELBOW, L_WRIST) = range(16)         # MPII's order
SIDES = ((-1, R_HIP, R_KNEE, R_ANKLE, R_SHOULDER, R_ELBOW, R_WRIST),
         (+1, L_HIP, L_KNEE, L_ANKLE, L_SHOULDER, L_ELBOW, L_WRIST))       # x of each side, its joints

# Bone lengths in body heights, after Drillis & Contini (1966): spine, neck, upper arm, forearm, thigh, shin,
# half the shoulders, half the hips. They vary between people by a fraction of JITTER. The head, upper neck to
# head top, is that of MPII, 4/3 of the unit of PCKh, and does not vary.
LENGTHS, JITTER = (0.275, 0.035, 0.18, 0.15, 0.245, 0.246, 0.105, 0.055), 0.08
HEAD = 4 / 3 * HEAD_SIZE_PER_SCALE / PIXELS_PER_SCALE

# Ranges of joint angles in degrees. Legs: how far the spine leans forward, then (hip forward, knee bend) of
# one leg and of the other, then how far both spread sideways. Chance decides which leg is left.
LEGS = (
    ((-5, 10), (-5, 10), (0, 12), (-5, 10), (0, 12), (0, 12)),          # stand
    ((-5, 10), (-5, 10), (0, 12), (-10, 20), (10, 50), (0, 15)),        # stand at ease
    ((0, 12), (15, 35), (0, 20), (-25, -5), (5, 45), (0, 6)),           # walk
    ((5, 25), (45, 95), (60, 120), (-30, 0), (10, 90), (0, 8)),         # run
    ((-10, 25), (75, 100), (60, 110), (75, 100), (60, 110), (0, 25)),   # sit
    ((15, 50), (70, 120), (80, 140), (70, 120), (80, 140), (0, 30)),    # crouch
    ((0, 20), (60, 90), (70, 100), (-20, 5), (30, 80), (0, 12)),        # lunge
    ((-10, 20), (-10, 20), (0, 40), (-10, 20), (0, 40), (15, 40)),      # stand wide
    ((30, 85), (-5, 15), (0, 15), (-5, 15), (0, 15), (0, 20)),          # bend down
    ((-15, 10), (50, 100), (0, 40), (-10, 10), (0, 15), (0, 20)),       # kick
)
# Arms: shoulder forward, shoulder out, forearm turned inward, elbow bend.
ARMS = (
    ((-15, 20), (3, 20), (0, 40), (5, 40)),                             # hang
    ((-50, 55), (2, 15), (10, 40), (10, 100)),                          # swing
    ((5, 45), (5, 25), (30, 75), (50, 120)),                            # in front of the belly
    ((-35, -10), (35, 55), (60, 80), (90, 120)),                        # hand on the hip
    ((-15, 25), (60, 105), (-80, 10), (0, 60)),                         # out
    ((-15, 20), (120, 170), (-90, -30), (5, 70)),                       # up
    ((-10, 20), (60, 100), (-90, -70), (60, 120)),                      # wave
    ((45, 110), (0, 20), (-10, 40), (0, 70)),                           # reach forward
)
SAME_ARMS = 0.4                      # fraction of people whose arms do alike
TWIST, SIDE_BEND = 25, 12            # the spine turns and bends sideways by up to this
HEAD_TURN, HEAD_NOD = 40, 20         # the head turns from the chest and nods by up to this


class Skeleton(NamedTuple):
    """A posed person in body axes, pelvis at the origin. A frame's columns point left, up and forward."""
    joints: np.ndarray       # (16, 3) body heights
    chest: np.ndarray        # (3, 3) frame
    head: np.ndarray         # (3, 3) frame
    shins: list              # right and left (3, 3) frame
    forearms: list           # right and left (3, 3) frame


def turn(axis, degrees):
    """Rotation (3, 3) about axis 0, 1 or 2, right-handed."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    R = np.zeros((3, 3))
    R[axis, axis], R[i, i], R[i, j], R[j, i], R[j, j] = 1, c, -s, s, c
    return R


def forward(degrees):
    """Rotation (3, 3) that swings a hanging limb forward: down, -y, goes towards +z."""
    return turn(0, -degrees)


def pose(rng):
    """A random Skeleton within the ranges of LEGS and ARMS."""
    spine, neck, upper_arm, forearm, thigh, shin, half_shoulders, half_hips = (
        rng.uniform(1 - JITTER, 1 + JITTER, size=8) * LENGTHS)
    lean, *legs, spread = (rng.uniform(*limits) for limits in LEGS[rng.integers(len(LEGS))])
    if rng.random() < 0.5:
        legs = legs[2:] + legs[:2]
    gestures = rng.integers(len(ARMS), size=2)
    if rng.random() < SAME_ARMS:
        gestures[:] = gestures[0]
    twist, bend, head_turn, nod = rng.uniform(-1, 1, 4) * (TWIST, SIDE_BEND, HEAD_TURN, HEAD_NOD)

    chest = forward(-lean) @ turn(2, bend) @ turn(1, twist)
    head = chest @ turn(1, head_turn) @ forward(nod)
    joints, shins, forearms = np.zeros((16, 3)), [], []
    joints[THORAX] = chest[:, 1] * spine
    joints[UPPER_NECK] = joints[THORAX] + chest[:, 1] * neck
    joints[HEAD_TOP] = joints[UPPER_NECK] + head[:, 1] * HEAD
    for (side, hip, knee, ankle, shoulder, elbow, wrist), gesture in zip(SIDES, gestures):
        flexion, bend, *legs = legs
        upper = turn(2, side * spread) @ forward(flexion)
        lower = upper @ forward(-bend)                                    # knees bend backward
        joints[hip] = side * half_hips, 0, 0
        joints[knee] = joints[hip] - upper[:, 1] * thigh
        joints[ankle] = joints[knee] - lower[:, 1] * shin
        shins.append(lower)

        flexion, out, inward, bend = (rng.uniform(*limits) for limits in ARMS[gesture])
        upper = chest @ turn(2, side * out) @ forward(flexion) @ turn(1, -side * inward)
        lower = upper @ forward(bend)                                     # elbows bend forward
        joints[shoulder] = joints[THORAX] + chest[:, 0] * side * half_shoulders
        joints[elbow] = joints[shoulder] - upper[:, 1] * upper_arm
        joints[wrist] = joints[elbow] - lower[:, 1] * forearm
        forearms.append(lower)
    return Skeleton(joints, chest, head, shins, forearms)


# ------------------------------------------------------------------------------- the body on the skeleton

def dress(skeleton, rng):
    """A person's capsules: ends (K, 2, 3) and radii (K, 2) in body heights, colours (K, 3) in 0..255."""
    joints, chest, head, shins, forearms = skeleton
    thorax = joints[THORAX]
    skin, hair, shoes = (palette[rng.integers(len(palette))] for palette in (SKIN, HAIR, SHOES))
    shirt, trousers, extra = rng.integers(15, 250, size=(3, 3))
    trim = (shirt + 128) % 256                                          # stands out from the jacket around it
    wears = {name: rng.random() < fraction for name, fraction in WARDROBE.items()}
    parts = []

    def capsule(colour, start, end, *radii):
        parts.append((start, end, radii, colour))

    def on_chest(x, y, z):
        return thorax + chest @ (x, y, z)

    def on_head(x, y, z):
        return joints[UPPER_NECK] + head @ (x, y, z)

    for (_, *limbs), shin, forearm in zip(SIDES, shins, forearms):
        hip, knee, ankle, shoulder, elbow, wrist = joints[limbs]
        capsule(trousers, hip, knee, 0.056, 0.043)
        capsule(trousers if wears["long_trousers"] else skin, knee, ankle, 0.037, 0.025)
        capsule(shoes, ankle + shin @ (0, -0.02, -0.015), ankle + shin @ (0, -0.03, 0.09), 0.028, 0.020)
        capsule(shirt, shoulder, elbow, 0.036, 0.029)
        capsule(shirt if wears["long_sleeves"] else skin, elbow, wrist, 0.027, 0.020)
        capsule(extra if wears["gloves"] else skin, wrist, wrist - forearm[:, 1] * 0.05, 0.022, 0.019)
        capsule(shirt, 0.5 * hip + 0.15 * thorax, 0.7 * thorax + 0.3 * shoulder, 0.066, 0.066)
    capsule(trousers, joints[R_HIP], joints[L_HIP], 0.060, 0.060)
    capsule(shirt, 0.18 * thorax, thorax, 0.069, 0.069)
    capsule(shirt, joints[R_SHOULDER], joints[L_SHOULDER], 0.038, 0.038)
    # An open jacket: what it shows in front is the clearest sign, at 64 px, of the way a person faces.
    capsule(trim, on_chest(0, -0.03, 0.048), on_chest(0, -0.20, 0.048), 0.044, 0.044)
    if wears["rucksack"]:
        capsule(extra, on_chest(0, -0.05, -0.075), on_chest(0, -0.19, -0.08), 0.055, 0.062)

    capsule(skin, thorax, on_head(0, 0.04, -0.005), 0.033, 0.033)                        # neck
    capsule(skin, on_head(0, 0.045, 0.014), on_head(0, 0.10, 0), 0.043, 0.060)                   # jaw to brow
    capsule(skin, on_head(0, 0.075, 0.06), on_head(0, 0.062, 0.066), 0.007, 0.010)               # nose
    capsule(LIPS, on_head(-0.014, 0.034, 0.050), on_head(0.014, 0.034, 0.050), 0.006, 0.006)
    for x in (-0.025, 0.025):
        capsule(EYES, on_head(x, 0.094, 0.050), on_head(x, 0.084, 0.051), 0.010, 0.010)
    capsule(hair, on_head(0, 0.112, -0.006), on_head(0, 0.085, -0.020), 0.058, 0.056)
    if wears["long_hair"]:
        capsule(hair, on_head(0, 0.09, -0.025), on_head(0, -0.03, -0.045), 0.052, 0.040)
    if wears["hat"]:                                                                             # and peak
        capsule(extra, on_head(0, 0.118, -0.004), on_head(0, 0.112, -0.010), 0.062, 0.062)
        capsule(extra, on_head(-0.02, 0.118, 0.075), on_head(0.02, 0.118, 0.075), 0.022, 0.022)
    starts, ends, radii, colours = (np.array(column, float) for column in zip(*parts))
    return np.stack([starts, ends], axis=1), radii, colours


# ------------------------------------------------------------------------------- the camera and the brush

def view(azimuth, elevation, roll):
    """Rotation (3, 3) from body axes to camera axes.

    azimuth 0: the person faces us, 90: faces the right edge of the image, 180: shows us the back.
    elevation > 0: we look down. roll > 0: the person leans to the left edge of the image.
    """
    return turn(2, roll) @ turn(0, elevation) @ turn(1, azimuth)


def paint(image, depth, start, end, radii, colour, light):
    """Paint one shaded capsule wherever it is nearer than what is there.

    image (3, P, P) and depth (P, P), float32, are changed. start, end (3,): px right, down and towards us.
    radii (2,): px. light: unit vector towards the lamp, in the axes of start and end.
    """
    (ax, ay, az), (bx, by, bz), (ra, rb) = start.tolist(), end.tolist(), radii.tolist()  # floats keep float32
    P = len(depth)
    left, right = max(0, int(min(ax - ra, bx - rb))), min(P, int(max(ax + ra, bx + rb)) + 2)
    top, bottom = max(0, int(min(ay - ra, by - rb))), min(P, int(max(ay + ra, by + rb)) + 2)
    if left >= right or top >= bottom:
        return
    image, depth = image[:, top:bottom, left:right], depth[top:bottom, left:right]
    x = np.arange(left, right, dtype=np.float32) - ax                     # (w,)
    y = np.arange(top, bottom, dtype=np.float32)[:, None] - ay            # (h, 1)
    dx, dy = bx - ax, by - ay
    squared = dx * dx + dy * dy + 1e-6                                    # px^2, never zero
    t = x * (dx / squared) + y * (dy / squared)                           # (h, w)
    t = np.minimum(np.maximum(t, 0), 1)                                   # nearest on the axis, 0 start 1 end
    x, y = x - t * dx, y - t * dy                                         # offset from that point
    radius = ra + t * (rb - ra)
    apart = x * x + y * y
    bulge = np.sqrt(np.maximum(radius * radius - apart, 0))               # height of the round surface
    surface = az + t * (bz - az) + bulge
    cover = np.minimum(np.maximum(radius + 0.5 - np.sqrt(apart), 0), 1)   # soft edge, one pixel wide
    cover *= surface > depth
    cosine = np.maximum(x * light[0] + y * light[1] + bulge * light[2], 0) / radius           # Lambert's
    shaded = (AMBIENT + DIFFUSE * cosine) * np.float32(colour)[:, None, None]                 # (3, h, w)
    image += cover * (shaded - image)
    np.copyto(depth, surface, where=cover > 0.5)


def clutter(P, light, rng):
    """A background without people: image (3, P, P) float32 and depth (P, P), far behind the person."""
    corners = rng.uniform(20, 235, size=(3, 2, 2))
    corners = (corners + corners.mean(0)) / 2                             # walls and meadows are rather grey
    ramp = np.linspace((1, 0), (0, 1), P, axis=1)                         # (2, P)
    image = (ramp.T @ corners @ ramp).astype(np.float32)                # (3, P, P) blends the four corners
    for _ in range(rng.integers(6)):                                      # boxes, some of them striped
        x, y, w, h = (P * rng.random(4) * (0.9, 0.9, 0.6, 0.6)).astype(int)
        window = image[:, y:y + h, x:x + w]
        window[:] = rng.integers(20, 235, size=(3, 1, 1))
        if rng.random() < STRIPED:
            waves = rng.uniform(-40, 40, size=2)
            phase = waves[0] * ramp[1, :window.shape[1], None] + waves[1] * ramp[1, :window.shape[2]]
            window += rng.uniform(-60, 60) * (np.sin(phase) > 0)
    depth = np.full((P, P), -np.inf, dtype=np.float32)
    for _ in range(rng.integers(1, 7)):                                   # balls, sticks that could be limbs
        start = P * (rng.random(3) - (0, 0, FAR))
        end = start + 0.15 * P * rng.normal(size=3)
        colour = SKIN[rng.integers(len(SKIN))] if rng.random() < SKINLIKE else rng.integers(15, 250, size=3)
        paint(image, depth, start, end, P * rng.uniform(0.01, 0.08, size=2), colour, light)
    return image, depth


# ------------------------------------------------------------------------------- drawings

class Drawing(NamedTuple):
    """One person, or N, stacked. Pixel coordinates are x, y; the centre of the top left pixel is (0, 0)."""
    image: np.ndarray        # (P, P, 3) uint8 RGB, P = round(1.5 * size)
    joints: np.ndarray       # (16, 2) float32 px
    visible: np.ndarray      # (16,) bool: labelled: within the image, be it behind the body
    center: np.ndarray       # (2,) float32 px, as in MPII's file
    scale: float             # body height / 200 px, as in MPII's file
    head_box: np.ndarray     # (4,) float32 px: x1, y1, x2, y2


def draw_person(seed: int, index: int, size: int = 64) -> Drawing:
    """Drawing number `index` of the endless series `seed`, for a crop of about size x size px."""
    rng = np.random.default_rng((seed, index))
    P = round(MARGIN * size)
    crop = P / MARGIN * rng.uniform(*CROP_FRACTION)
    height = crop / BOX_ENLARGEMENT                                       # px per body height
    scale = height / PIXELS_PER_SCALE

    skeleton = pose(rng)
    ends, radii, colours = dress(skeleton, rng)
    camera = view(rng.uniform(0, 360), rng.uniform(*ELEVATION), rng.uniform(-ROLL, ROLL))
    distance = rng.uniform(*CAMERA_DISTANCE)
    offset, label = crop * rng.uniform(-1, 1, size=(2, 2)) * [[OFFSET], [LABEL]]

    def project(points):
        """(..., 3) in body axes to px right, down and towards us; and how much nearness enlarges, (...)."""
        points = points @ camera.T * (1, -1, 1)
        nearness = 1 / (1 - points[..., 2:] / distance)
        return points * nearness * height, nearness[..., 0]

    joints = project(skeleton.joints)[0][:, :2]                           # (16, 2)
    middle = (joints.min(0) + joints.max(0)) / 2
    shift = (P - 1) / 2 + offset - middle
    joints += shift
    ends, nearness = project(ends)                                        # (K, 2, 3), (K, 2)
    ends[..., :2] += shift
    radii *= nearness * height

    light = rng.normal(size=3) * (1, 0.5, 0.3) + (0, -0.5, 1)             # mostly from above and our side
    light = (light / np.linalg.norm(light)).tolist()
    image, depth = clutter(P, light, rng)
    for k in np.argsort(ends[..., 2].mean(1)):                            # far to near: soft edges need it
        paint(image, depth, *ends[k], radii[k], colours[k], light)
    image += 2 * NOISE * (rng.random(image.shape, dtype=np.float32) - 0.5)

    head = joints[[UPPER_NECK, HEAD_TOP]].mean(0)
    half = HEAD_SIZE_PER_SCALE * scale / HEAD_SIZE_OF_DIAGONAL / math.sqrt(8)    # half a side of the square
    return Drawing(image=image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy(),
                   joints=joints.astype(np.float32),
                   visible=((joints >= -0.5) & (joints < P - 0.5)).all(1),
                   center=(shift + middle + label - (0, CENTER_SHIFT * scale)).astype(np.float32),
                   scale=scale,
                   head_box=np.concatenate([head - half, head + half]).astype(np.float32))


def draw_people(count, seed, size=64, workers=1):
    """The first `count` drawings of the series `seed`, stacked, the same for any number of worker processes.

    workers: processes, at most one for every CHUNK. More than one import the caller's script again: it should
    then call this from within `if __name__ == "__main__":`, as train.py does, or each runs the whole script.
    A worker starts no others. A script without a file, from standard input, draws alone.
    """
    P = round(MARGIN * size)
    drawings = Drawing(np.empty((count, P, P, 3), np.uint8), np.empty((count, 16, 2), np.float32),
                       np.empty((count, 16), bool), np.empty((count, 2), np.float32),
                       np.empty(count, np.float32), np.empty((count, 4), np.float32))
    chunks = [range(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
    pool = None
    script = getattr(sys.modules["__main__"], "__file__", None)
    can_import = script is None or os.path.isfile(script)                     # "<stdin>" is no file
    if workers > 1 and count >= POOL_FROM and current_process().name == "MainProcess" and can_import:
        with suppress(OSError):                               # a machine without shared memory: alone, then
            # its workers end with us, even where we are killed
            pool = get_context("spawn").Pool(min(workers, len(chunks)))
    with pool or nullcontext():
        draw = partial(draw_some, seed, size)
        for n, drawing in enumerate(chain.from_iterable(in_pool(pool, draw, chunks) if pool else
                                                        map(draw, chunks))):
            for column, value in zip(drawings, drawing):
                column[n] = value
    return drawings


def draw_some(seed, size, indices):
    return [draw_person(seed, index, size) for index in indices]


def in_pool(pool, function, values):
    """function(value) of each, in order. What a worker was at when it died (memory was full) is done here.

    Pool.map waits for ever for that.
    """
    alive = lambda: {worker.pid for worker in active_children()}         # a pool replaces those that die
    first, tasks = alive(), [pool.apply_async(function, [value]) for value in values]
    for value in values:
        task = tasks.pop(0)                                              # with its result, which is large
        while not task.ready() and alive() == first:
            task.wait(1)
        yield task.get() if task.ready() else function(value)


def drawn_people(split: str, count: int, size: int, workers: int = 1) -> Samples:
    """The first `count` drawings of a split, train, valid or teacher (no student sees it), as MPII's samples.

    size: side of the crops in pixels. workers: processes, as in `draw_people`.
    """
    drawings = draw_people(count, SERIES[split], size, workers=workers)
    center, side = box(drawings.center, drawings.scale)
    x1, y1, x2, y2 = drawings.head_box.T
    return Samples(f"drawn/{split}", drawings.joints, drawings.visible, center, side,
                  HEAD_SIZE_OF_DIAGONAL * np.hypot(x2 - x1, y2 - y1),
                  lambda i: Image.fromarray(drawings.image[i]))
