"""A random human skeleton in 3-D: what the drawn people of synthetic.py are drawn around.

Bones of human lengths are turned by angles that human joints can reach. The 16 joints and their order are those of MPII;
'right' is the person's own right.

Body axes: x to the person's left, y up, z forward. Lengths are in body heights (a standing person is 1 tall), angles in
degrees.
"""

import math
from typing import NamedTuple

import numpy as np

from data_mpii import HEAD_SIZE_PER_SCALE, PIXELS_PER_SCALE

(R_ANKLE, R_KNEE, R_HIP, L_HIP, L_KNEE, L_ANKLE, PELVIS, THORAX, UPPER_NECK, HEAD_TOP,
 R_WRIST, R_ELBOW, R_SHOULDER, L_SHOULDER, L_ELBOW, L_WRIST) = range(16)         # MPII's order
SIDES = ((-1, R_HIP, R_KNEE, R_ANKLE, R_SHOULDER, R_ELBOW, R_WRIST),
         (+1, L_HIP, L_KNEE, L_ANKLE, L_SHOULDER, L_ELBOW, L_WRIST))       # x of each side, its joints

# Bone lengths in body heights, after Drillis & Contini (1966): spine, neck, upper arm, forearm, thigh, shin,
# half the shoulders, half the hips. They vary between people by a share of JITTER. The head, upper neck to
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
SAME_ARMS = 0.4                      # share of people whose arms do alike
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
