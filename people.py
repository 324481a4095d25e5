"""People in a whole image, found by a pose network alone.

    python predict.py photo.jpg                # finds everybody in a photo
    python studies/finding.py --data DATA      # how many it finds, and how many it sees where nobody is

A pose network is sure of its joints where a person fills its crop, and unsure elsewhere: it has learned from
crops without people, too. That is enough to find people, without a detector:

    windows        squares of a few sizes, less than half a side apart, all over the image; 16 joints in each
    person_score   how sure the network is of the joints: the best windows are kept
    box_of_joints  the box of a person, by the sure joints, is the next crop, which fits better; twice
    candidates     windows that are sure enough and not too alike
    suppress       of people who share box or joints the one with the highest sum of confidences stays

Boxes are x, y, width, height in pixels, joints (16, 2) in pixels, confidences (16,) in [0, 1].
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from crops import crop_matrix, cut, invert, transform
from data_mpii import BOX_ENLARGEMENT
from evaluate import predict_crops
from images import rgb

WINDOW_SIDES = 1.0, 0.75, 0.55     # of windows, in the image's shorter side
STEP = 0.4                  # most between two windows, in their sides
THIN = 6                    # a longer strip is taken for one that is this many times as long as wide
SUREST = 8                  # joints of which a person's score is the mean: half of the body may be hidden
CANDIDATE, PERSON = 0.2, 0.6       # least scores: of a window that is refined, of a person in the end
MOST = 24                   # windows that are refined
SURE, LEAST = 0.1, 6        # confidence of joints that a box is drawn around, and their least number
BEYOND = 0.15               # by how much a person is larger than the box of the joints, in its longer side
ROUNDS = 2                  # refinements
# Two are one where they share more: of their boxes' union, of the smaller box, of clear joints (1: not asked)
SAME, SAME_CANDIDATE = (0.6, 0.9, 0.5), (0.75, 0.95, 1)      # people; windows that are refined
CLEAR, CLOSE = 0.3, 0.1     # least confidence of shared joints; most distance, in the smaller box's side
BATCH = 32                  # crops in the network at once


class Found(NamedTuple):
    """One person in one image."""
    box: list                        # x, y, width, height in pixels of the image
    joints: np.ndarray               # (16, 2) x, y in pixels of the image
    confidence: np.ndarray           # (16,) in [0, 1]


# ------------------------------------------------------------------------------- poses in boxes

def box_matrix(box, size, tight=True):
    """Affine map image -> crop (2, 3): a square around the box, with MPII's margin around a tight one."""
    x, y, width, height = box
    side = max(width, height) * (BOX_ENLARGEMENT if tight else 1)
    return crop_matrix([[x + (width - 1) / 2, y + (height - 1) / 2]], [side], size)[0]


@torch.inference_mode()
def poses_in_boxes(model, image, boxes, device="cpu", flip_test=False, tight=True):
    """A list of Found: the pose in each of some boxes of a Pillow image. tight: as in `box_matrix`."""
    image, matrices = rgb(image), [box_matrix(box, model.size, tight) for box in boxes]
    people, reduce = [], cache(image.reduce)             # averages a large image down once for each factor
    for start in range(0, len(boxes), BATCH):
        maps = torch.stack(matrices[start:start + BATCH])
        crops = torch.from_numpy(np.stack([cut(image, matrix, model.size, reduce) for matrix in maps]))
        xy, confidence = predict_crops(model, crops.to(device).permute(0, 3, 1, 2).float() / 255, flip_test)
        joints = transform(invert(maps), xy.cpu())                                     # crop -> image
        people += map(Found, boxes[start:start + BATCH], joints.numpy(), confidence.cpu().numpy())
    return people


# ------------------------------------------------------------------------------- people in an image

def windows(width, height):
    """Squares [x, y, side, side] that cover an image: the whole of it, then smaller and smaller ones."""
    longer = max(width, height)
    squares = [[(width - longer) / 2, (height - longer) / 2, longer, longer]]
    for fraction in WINDOW_SIDES:
        side = fraction * max(min(width, height), longer / THIN)
        columns, rows = (places(size - side, STEP * side) for size in (width, height))
        squares += [[x, y, side, side] for y in rows for x in columns]
    return squares


def places(room, step):
    """Where windows begin: from 0 to room, at most a step apart; in the middle where the image is smaller."""
    if room <= 0:
        return np.array([room / 2])
    return np.linspace(0, room, 1 + int(np.ceil(room / step)))


def person_score(person):
    """Mean confidence of the surest joints, in [0, 1]: is a person, or half of one, there?"""
    return float(np.sort(person.confidence)[-SUREST:].mean())


def box_of_joints(person):
    """The box of a person: around the sure joints, at least LEAST of them, and what is beyond these."""
    least = min(SURE, np.sort(person.confidence)[-LEAST])
    joints = person.joints[person.confidence >= least]
    low, high = joints.min(0) + 0.5, joints.max(0) + 0.5     # a box begins at the edge of a pixel
    beyond = BEYOND / 2 * max(*(high - low), 1)
    return [*(low - beyond), *(high - low + 2 * beyond)]


def shared(one, other):
    """The intersection of two boxes, over their union and over the smaller of them."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = one, other
    across, down = min(ax + aw, bx + bw) - max(ax, bx), min(ay + ah, by + bh) - max(ay, by)
    area = max(across, 0) * max(down, 0)
    return area / (aw * ah + bw * bh - area), area / min(aw * ah, bw * bh)


def shared_joints(person, other):
    """The fraction of a person's clear joints that are where the same joints of another are."""
    side = min(max(box_of_joints(found)[2:]) for found in (person, other))
    close = np.linalg.norm(person.joints - other.joints, axis=1) <= CLOSE * side
    clear = person.confidence >= CLEAR
    return (close & clear).sum() / max(clear.sum(), 1)


def is_new(person, others, same=SAME):
    """Is this nobody of the others? Somebody seen again has a similar box, one within it, or the joints."""
    for other in others:
        of_boxes = shared(box_of_joints(person), box_of_joints(other))
        if any(part > most for part, most in zip((*of_boxes, shared_joints(person, other)), same)):
            return False
    return True


def suppress(people, same=SAME):
    """The people, the highest sum of confidences first, without those who are one of them seen again."""
    kept = []
    for person in sorted(people, key=lambda person: person.confidence.sum(), reverse=True):
        if is_new(person, kept, same):
            kept.append(person)
    return kept


def candidates(people):
    """Those who may become people when they are looked at again: not too unsure, too alike or too many."""
    return suppress([person for person in people if person_score(person) >= CANDIDATE], SAME_CANDIDATE)[:MOST]


def find_people(model, image, device="cpu", flip_test=True):
    """Everybody in a Pillow image: a list of Found, as `suppress` orders them; empty where nobody is.

    flip_test: average the last crops with their mirror images. Where nobody is the two seldom agree.
    """
    image = rgb(image)
    people = poses_in_boxes(model, image, windows(*image.size), device, tight=False)
    for number in range(ROUNDS):
        boxes, last = list(map(box_of_joints, candidates(people))), number + 1 == ROUNDS
        people = poses_in_boxes(model, image, boxes, device, flip_test and last)
    return suppress([person._replace(box=box_of_joints(person)) for person in people
                     if person_score(person) >= PERSON])
