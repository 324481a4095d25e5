"""COCO's people as the same samples as MPII's, and crops without people, between the boxes of everybody.

    python train.py --train-teacher --preset small --data COCO
    python evaluate.py --checkpoint best.pt --data COCO

Put the data like this (from cocodataset.org: 2017 Train images, 2017 Val images, 2017 Train/Val annotations):

    COCO/annotations/person_keypoints_train2017.json, person_keypoints_val2017.json
    COCO/train2017/*.jpg, COCO/val2017/*.jpg

These two folders may also lie in COCO/images/, or their images may lie there directly. val2017 is the
validation split. Everybody with a labelled limb joint is taken, in both splits. Crowds are left out: theirs
is one box for many people.

A keypoint of COCO is the index of a pixel: 0 is the centre of the first pixel, as everywhere here. A box is
measured from the edge of the first pixel, half a pixel before its centre. The middle of a box is therefore at
x + (width - 1) / 2, as in people.py.
"""

import json
from collections import Counter, defaultdict
from os.path import isfile
from pathlib import Path

import numpy as np

from common import BadInput, check_all, refuse
from images import FARTHEST, check_image, open_safely, upright_size

COCO_KEYPOINTS = ["nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder",
                  "right_shoulder", "left_elbow", "right_elbow", "left_wrist",
                  "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee",
                  "left_ankle", "right_ankle"]
# The keypoints whose mean each of MPII's joints is, in its order (data_mpii.JOINTS). COCO has no upper neck
# and no head top: they stay unlabelled.
SOURCES = (["right_ankle"], ["right_knee"], ["right_hip"], ["left_hip"], ["left_knee"], ["left_ankle"],
           ["left_hip", "right_hip"], ["left_shoulder", "right_shoulder"], [], [],
           ["right_wrist"], ["right_elbow"], ["right_shoulder"],
           ["left_shoulder"], ["left_elbow"], ["left_wrist"])
LIMB_JOINTS = [joint for joint, names in enumerate(SOURCES) if len(names) == 1]          # 12 of the 16 joints
FACE = 5                             # the first five keypoints are no joints here
UNITS_PER_SIDE = 6                   # of PCKh, see `unit_of`
SMALLEST_UNIT = 4                    # pixels
SMALLEST_BOX = 1                     # pixels; people with a shorter side, such as 0, are left out
EMPTY_PER_PHOTO, EMPTY_TRIES = 1, 50          # squares without people, attempts at one
EMPTY_SIDES, EMPTY_OVERLAP = (0.2, 1.0), 0.1  # of the photo's shorter side; of a square or box
SPLITS = {"train": "train2017", "valid": "val2017"}


def find_annotations(root, split):
    """COCO's json file with a split, 'train' or 'valid'; None in a folder that is not COCO's.

    BadInput where the folder has COCO's labels, but not those with the keypoints of this split.
    """
    files = {name: root / "annotations" / f"person_keypoints_{year}.json" for name, year in SPLITS.items()}
    if files[split].is_file():
        return files[split]
    if any(file.is_file() for file in files.values()) or any(root.glob("annotations/instances_*2017.json")):
        raise BadInput(f"there is no {files[split]} (instances_*.json have no keypoints): it is in "
                       f"annotations_trainval2017.zip of cocodataset.org")
    return None


def find_images(root, year):
    """The folder that holds, or should hold, the images of train2017 or val2017."""
    images = root / "images"
    if (root / year).is_dir() or not images.is_dir():
        return root / year
    if (images / year).is_dir() or not any(path.is_file() for path in images.iterdir()):
        return images / year
    return images


def load_people(root, file, split, images=True):
    """The people of one split, by the names of data_mpii.Samples; side: of a person's own box.

    file: what `find_annotations` returns. images: as in data_mpii.load_samples. BadInput if it cannot be
    used.
    """
    folder = find_images(root, SPLITS[split])
    listed, annotations = read_annotations(file)
    before, present, everybody, beyond = {}, set(), defaultdict(list), []

    def check(index):
        """-> image, box, keypoints; None for an entry that is left out."""
        entry = annotations[index]
        name, box, keypoints = check_annotation(entry, listed)
        if (number := before.setdefault(str(entry["id"]), index)) != index:
            raise BadInput(f"has the id of entry {number}")
        if images and name not in present:                 # many images show several people
            check_image(folder / name, folder)
            present.add(name)
        everybody[folder / name].append(box)
        beyond.append(ends_beyond(box, listed[str(entry["image_id"])]))
        crowd, limbs = entry.get("iscrowd"), any(keypoints[3 * FACE + 2::3])
        return None if crowd or not limbs or min(box[2:]) < SMALLEST_BOX else (name, box, keypoints)

    checked = check_all(file, check, len(annotations))
    people = [person for person in checked if person]
    refuse((sum(beyond) > len(beyond) / 2,
            f"{file}: {sum(beyond):,} of {len(beyond):,} boxes end outside the width and height that it "
            f"gives their images: a bbox must be x, y, width, height, not two corners"),
           (not people, f"{file} has nobody with a labelled limb joint: take COCO's own file"))
    image, box, keypoints = zip(*people)
    corner, size = np.split(np.array(box), 2, axis=1)                          # (N, 2) each
    joints, visible = to_mpii(np.reshape(keypoints, (-1, len(COCO_KEYPOINTS), 3)))  # (N, 16, 2), (N, 16)
    side = size.max(1)                                                         # (N,)
    note = (f"no head boxes: PCKh's unit is 1/{UNITS_PER_SIDE} of the longer side of the limb joints' box, "
            f"at least {SMALLEST_UNIT} pixels; left out: {len(checked) - len(people):,} crowds and people "
            f"without a box or a labelled limb joint")
    return dict(joints=joints, visible=visible, center=corner + (size - 1) / 2, side=side,
                head_size=unit_of(joints, visible, side), files=tuple(folder / name for name in image),
                note=note, everybody=dict(everybody))


def to_mpii(keypoints):
    """COCO's keypoints (N, 17, 3) of x, y, visibility -> MPII's joints (N, 16, 2), visible (N, 16) bool.

    Visibility is 0 (unlabelled), 1 (labelled, but occluded) or 2 (visible). A joint is labelled if all of its
    keypoints are, with 1 or 2. Other joints are at 0, 0.
    """
    joints, visible = np.zeros((len(keypoints), 16, 2)), np.zeros((len(keypoints), 16), bool)
    for joint, names in enumerate(SOURCES):
        if names:
            sources = [COCO_KEYPOINTS.index(name) for name in names]
            joints[:, joint] = keypoints[:, sources, :2].mean(1)
            visible[:, joint] = (keypoints[:, sources, 2] > 0).all(1)
    return joints * visible[..., None], visible


def unit_of(joints, visible, side):
    """PCKh's unit of length (N,) in pixels, of people without head boxes. side: (N,) of their boxes, pixels.

        unit = max(SMALLEST_UNIT, longer side of the box around the labelled limb joints / UNITS_PER_SIDE)

    In the Leeds Sports Poses a head segment is 0.167 of that side, the median of whole people. For half
    bodies the unit is smaller and the score stricter. With one labelled limb joint that side is `side`.
    """
    limbs, seen = joints[:, LIMB_JOINTS], visible[:, LIMB_JOINTS, None]        # (N, 12, 2), (N, 12, 1)
    low, high = limbs.min(1, where=seen, initial=np.inf), limbs.max(1, where=seen, initial=-np.inf)  # (N, 2)
    length = np.where(seen.sum((1, 2)) > 1, (high - low).max(1), side)
    return np.maximum(SMALLEST_UNIT, length / UNITS_PER_SIDE)


# ------------------------------------------------------------------------------- the json file

def read_annotations(file):
    """COCO's json file -> its images' entries by id (as text), and its annotations, unchecked."""
    def without_outline(entry):                    # outlines are most of the file
        entry.pop("segmentation", None)
        return entry

    try:
        content = json.loads(file.read_bytes(), object_hook=without_outline)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{file} cannot be read as json ({error}): download it again") from error
    images, annotations, categories = (content.get(part) if isinstance(content, dict) else None
                                       for part in ("images", "annotations", "categories"))
    if not (isinstance(images, list) and isinstance(annotations, list)):
        raise BadInput(f"{file} has no lists of images and annotations: take COCO's own file")
    if not any(isinstance(entry, dict) and "keypoints" in entry for entry in annotations):
        raise BadInput(f"{file} has no annotations with keypoints: take person_keypoints_*2017.json of "
                       f"annotations_trainval2017.zip from cocodataset.org")
    for category in categories if isinstance(categories, list) else []:
        if isinstance(category, dict) and category.get("keypoints", COCO_KEYPOINTS) != COCO_KEYPOINTS:
            raise BadInput(f"{file} has other keypoints than COCO, or in another order: they must be "
                           f"{', '.join(COCO_KEYPOINTS)}")
    listed = {str(image.get("id")): image for image in images if isinstance(image, dict)}
    if len(listed) < len(images):
        raise BadInput(f"{file}: {len(images) - len(listed):,} of its images are no entry or have the "
                       f"id of another one: correct them")
    return listed, annotations


def check_annotation(entry, listed):
    """An annotation -> (image, box, keypoints). BadInput says what is wrong. listed: see `read_annotations`.

    box: x, y, width, height. keypoints: 51 numbers, x, y and visibility of each.
    """
    refuse((not isinstance(entry, dict), "is not an annotation"))
    refuse(*((key not in entry, f"has no '{key}'") for key in ("id", "image_id", "bbox", "keypoints")))
    name = listed.get(str(entry["image_id"]), {}).get("file_name")
    box, keypoints = entry["bbox"], entry["keypoints"]
    refuse((not isinstance(name, str), f"image_id {entry['image_id']!r:.80} is of no image with a file_name"),
           (not isinstance(box, list) or len(box) != 4, "bbox must be four numbers: x, y, width, height"),
           (not isinstance(keypoints, list) or len(keypoints) != 3 * len(COCO_KEYPOINTS),
            f"keypoints must be {3 * len(COCO_KEYPOINTS)} numbers: x, y, visibility of each"))
    numbers = all(type(number) in (int, float) and abs(number) < FARTHEST for number in (*box, *keypoints))
    refuse((Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name,
            f"image {name!r:.200} does not name a file inside the folder of images"),
           (not numbers, f"bbox and keypoints must be finite numbers, within {FARTHEST:,} pixels"))
    refuse((min(box[2:]) < 0, f"bbox {box} has a side below 0"),
           (not {0, 1, 2}.issuperset(keypoints[2::3]),
            "visibility, every third number of keypoints, must be 0, 1 or 2"),
           (entry.get("iscrowd", 0) not in (0, 1), "iscrowd must be 0 or 1"))
    return name, box, keypoints


def ends_beyond(box, image):
    """Does a box end more than a pixel outside its image, where the image's entry has width and height?

    Some files write 0 where they are unknown.
    """
    ends = zip(box, box[2:], (image.get(side) for side in ("width", "height")))
    return any(type(limit) is int and 0 < limit < low + side - 1 for low, side, limit in ends)


# ------------------------------------------------------------------------------- crops without people

def read_everybody(root, images=True):
    """annot/boxes.json, where it is: {image: [[x, y, width, height] of everybody in it]} -> the same by path.

    In pixels from 0. It gives a set in MPII's layout what COCO's has. BadInput where none of its images is
    there (images=False: unchecked).
    """
    file = root / "annot" / "boxes.json"
    boxes = read_boxes(file, empty=True) if file.is_file() else {}
    everybody = {root / "images" / name: np.array(people, np.float32).reshape(-1, 4)
                 for name, people in boxes.items()}
    if images and everybody and not any(map(isfile, everybody)):
        raise BadInput(f"{file} names no image that is there, and {str(next(iter(everybody)))[:160]} first: "
                       f"names must be paths below {root / 'images'}")
    return everybody


def read_boxes(file, flag="", empty=False):
    """{"photo.jpg": [[x, y, width, height], ...], ...} of a json file; BadInput for anything else.

    flag: what names the file, such as "--boxes ". empty: boxes may have sides of 0.
    """
    try:
        boxes = json.loads(Path(file).read_bytes(), object_pairs_hook=without_twins)
        if not (isinstance(boxes, dict) and all(isinstance(people, list) for people in boxes.values())):
            raise ValueError("it does not name images and list boxes of each")
        return {name: [check_box(box, empty) for box in people] for name, people in boxes.items()}
    except OSError as error:
        raise BadInput(f"{flag}{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{flag}{file} must be json such as {{\"photo.jpg\": [[x, y, width, height]]}}: "
                       f"{' '.join(str(error).split())[:160]}") from error


def check_box(box, empty=False):
    """A list of four numbers, x, y, width, height -> the same as floats. ValueError for anything else."""
    if not (isinstance(box, list) and len(box) == 4
            and all(type(number) in (int, float) and abs(number) < FARTHEST for number in box)
            and (min(box[2:]) > 0 or empty and min(box[2:]) == 0)):
        raise ValueError(f"the box {box!r:.80} is not x y width height with a size "
                         f"{'of 0 or ' if empty else ''}above 0, within {FARTHEST:,} pixels")
    return list(map(float, box))


def without_twins(pairs):
    """A json object's pairs -> dictionary. ValueError for a key that is named twice."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{key} is named twice")
    return dict(pairs)


def squares_without_people(files, everybody):
    """Random squares that show nobody, from those files of which everybody's box is known.

    By the names of data_mpii.Samples, or None. A square is taken where it shares at most EMPTY_OVERLAP of
    itself, or of a box, with each of them. Such squares teach the confidence to be low (distill.py).
    """
    squares, shown, random = [], [], np.random.default_rng(0)
    for path in dict.fromkeys(file for file in files if file in everybody):
        width, height = open_safely(path, upright_size)
        people = np.reshape(everybody[path], (-1, 4))
        for _ in range(EMPTY_PER_PHOTO):
            side = min(width, height) * np.exp(random.uniform(*np.log(EMPTY_SIDES), size=EMPTY_TRIES))
            x, y = (random.uniform(0, 1, EMPTY_TRIES) * (size - side) for size in (width, height))
            across, down = (np.minimum(low + side, people[:, [i]] + people[:, [i + 2]])
                            - np.maximum(low, people[:, [i]]) for i, low in enumerate((x, y)))
            area = across.clip(0) * down.clip(0)                               # (boxes, tries)
            smaller = np.minimum(side ** 2, (people[:, 2] * people[:, 3])[:, None])
            free = np.flatnonzero((area <= EMPTY_OVERLAP * smaller).all(0))
            if len(free):
                squares.append((x[free[0]], y[free[0]], side[free[0]]))
                shown.append(path)
    if not squares:
        return None
    squares = np.array(squares, np.float32)
    center, side = squares[:, :2] + (squares[:, 2:] - 1) / 2, squares[:, 2]    # (M, 2), (M,)
    joints = np.repeat(center[:, None], len(SOURCES), 1)                       # (M, 16, 2), none is there
    return dict(joints=joints, visible=np.zeros(joints.shape[:2], bool), center=center, side=side,
                head_size=side / 10, files=tuple(shown), empty=np.ones(len(side), bool))
