"""How well people are found in whole photos, without boxes.

    python studies/finding.py --data everyday --checkpoint weights/student-small-photos.pt
    python studies/finding.py --data everyday --photos 100 --page        # as the browser finds them

Scored on the people of annot/valid.json whose box is at least LARGE of the photo's shorter side. What is seen
where nobody is counts against everybody's boxes: annot/boxes.json, or COCO's. A set of one person a photo
(LSP) needs none: a person's box is that of the labelled joints; `false`, `nobody` and `auroc` are left out.

    found    large people who have a predicted person whose box overlaps theirs by at least HALF (intersection
             over union; each prediction stands for one person), %
    joints   their labelled limb joints within half a unit of PCKh, missed people counted as missed joints, %
    false    predicted people who overlap nobody's box by NEAR, per photo
    nobody   photos of the same set with everybody cut away in which nobody is predicted, %
    photos, large, empty    how many photos, large people, photos with everybody cut away
    seconds  of the median photo
    auroc    how often a labelled person's box has a higher person_score than a square without people; of all
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
import people as people_py
from common import CommandLine, main_with_clear_errors, refuse
from confidence import auroc
from crops import FLIP
from data_coco import LIMB_JOINTS
from data_mpii import BOX_ENLARGEMENT, crops_without_people, load_samples
from evaluate import predict_crops
from export import SHIPPED_STUDENT, for_inference
from images import open_image
from people import Found, box_of_joints, find_people, person_score, poses_in_boxes, shared

LARGE, HALF, NEAR = 0.35, 0.5, 0.3
AGREE = 1 / 20               # of a crop: joints of it and of its mirror image agree, in the browser
EMPTY_SIDE = 0.3             # least shorter side of a photo without people, in the photo's


def percent(part, whole):
    return 100 * part / whole if whole else float("nan")


def match(people, boxes):
    """Pair predicted people with labelled boxes, largest overlap first -> {box number: person number}."""
    pairs = sorted(((shared(person.box, box)[0], b, p) for p, person in enumerate(people)
                    for b, box in enumerate(boxes)), reverse=True)
    matched = {}
    for part, b, p in pairs:
        if part >= HALF and b not in matched and p not in matched.values():
            matched[b] = p
    return matched


def without_people(image, boxes):
    """The largest strip of the photo beside, above or below all boxes; None where it is small."""
    width, height = image.size
    low = np.min([box[:2] for box in boxes], 0)
    high = np.max([np.add(box[:2], box[2:]) for box in boxes], 0)
    strips = [(0, 0, low[0], height), (high[0], 0, width, height), (0, 0, width, low[1]),
              (0, high[1], width, height)]
    best = max(strips, key=lambda s: min(s[2] - s[0], s[3] - s[1]))
    if min(best[2] - best[0], best[3] - best[1]) < EMPTY_SIDE * min(width, height):
        return None
    return image.crop([int(np.ceil(v)) if i < 2 else int(v) for i, v in enumerate(best)])


def agree(xy, sure, mirrored_xy, mirrored_sure, size):
    """Joints (..., K, 2) and confidences (..., K) of crops and of their mirror images -> the browser's.

    Its network gives joints, not distributions: their mean where they agree, else the surer, half as sure.
    """
    across, other = mirrored_xy[..., FLIP, :].clone(), mirrored_sure[..., FLIP]
    across[..., 0] = size - 1 - across[..., 0]
    near = (xy - across).norm(dim=-1) <= AGREE * size
    total = sure + other
    part = other / torch.where(total > 0, total, 1)                          # of the mirror image's joint
    mean = xy + part[..., None] * (across - xy)
    surer = torch.where((sure > other)[..., None], xy, across)
    return (torch.where(near[..., None], mean, surer),
            torch.where(near, total, torch.maximum(sure, other)) / 2)


def predict_crops_as_the_page(model, crops, flip_test=False):
    """evaluate.predict_crops with the browser's flip test."""
    joints = predict_crops(model, crops)
    return agree(*joints, *predict_crops(model, crops.flip(-1)), model.size) if flip_test else joints


def person_auroc(model, samples):
    """Does person_score tell crops of people from crops of nobody? 0.5: no, 1: always."""
    scores, nobody = [], crops_without_people(samples)
    if nobody is None:
        return float("nan")
    for people in samples, nobody:
        corners = people.center - (people.side[:, None] - 1) / 2
        scores += [[person_score(poses_in_boxes(model, people.image(i), [[*corners[i], side, side]],
                                                tight=False)[0])
                    for i, side in enumerate(people.side)]]
    return auroc(np.repeat([True, False], list(map(len, scores))), np.concatenate(scores))


def boxes_of_joints(samples):
    """{photo: [box]} where each has one person: around the labelled joints as `box_of_joints` draws it."""
    boxes = {}
    for file, joints, visible in zip(samples.files, samples.joints, samples.visible):
        labelled = joints[np.resize(np.flatnonzero(visible), len(joints))]
        boxes[file] = [box_of_joints(Found(None, labelled, np.ones(len(joints))))]
    return boxes


def measure(model, data, find=find_people, limit=None):
    """The figures of the module's docstring, as a dictionary, and seconds a photo."""
    samples = load_samples(data, "valid")
    listed = samples.everybody or (Path(data) / "annot/boxes.json").exists()
    alone = len(set(samples.files)) == len(samples.files)
    everybody = boxes_of_joints(samples) if alone and not listed else samples.everybody
    unknown = [file for file in samples.files if not len(everybody.get(file, ()))]
    refuse((unknown, f"{data} does not say where everybody in {unknown and unknown[0]} is: it needs "
                     f"annot/boxes.json, or COCO's layout"))
    by_photo = defaultdict(list)
    for i, file in enumerate(samples.files):
        by_photo[file].append(i)
    large = found = joints = right = false = photos = quiet = empty = 0
    seconds = []
    for file, rows in list(by_photo.items())[:limit]:
        image, boxes = open_image(file), everybody[file]
        began = time.perf_counter()
        people = find(model, image)
        seconds.append(time.perf_counter() - began)
        photos += 1
        least = LARGE * min(image.size)
        matched = match(people, boxes)
        for i in rows:                               # labelled people: which box is theirs?
            side = samples.side[i] / BOX_ENLARGEMENT
            middle = np.array(samples.center[i])
            b = int(np.argmin([np.abs(middle - (np.array(box[:2]) + np.array(box[2:]) / 2)).sum()
                               + abs(max(box[2:]) - side) for box in boxes]))
            if max(boxes[b][2:]) < least:
                continue
            large, found = large + 1, found + (b in matched)
            seen = samples.visible[i, LIMB_JOINTS]
            joints += seen.sum()
            if b in matched:
                error = np.linalg.norm(people[matched[b]].joints - samples.joints[i], axis=1)[LIMB_JOINTS]
                right += (error[seen] <= 0.5 * samples.head_size[i]).sum()
        if everybody is not samples.everybody:
            continue
        for person in people:
            false += max((shared(person.box, box)[0] for box in boxes), default=0) < NEAR
        strip = without_people(image, boxes)
        if strip:
            empty += 1
            quiet += not find(model, strip)
    return dict(photos=photos, large=large, found=percent(found, large), joints=percent(right, joints),
                false=false / photos if everybody is samples.everybody else float("nan"),
                nobody=percent(quiet, empty), empty=empty, seconds=float(np.median(seconds)))


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--data", type=Path, required=True,
                        help="folder: with annot/boxes.json, COCO's, or of one person a photo")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_STUDENT,
                        help="student (default: the shipped one)")
    parser.add_argument("--photos", type=int, help="so many photos, the first (default: all)")
    parser.add_argument("--page", action="store_true", help="find people as the browser does (demo/)")
    args = parser.parse_args()
    refuse((args.photos is not None and args.photos < 1, f"--photos {args.photos} must be above 0"))
    model, _ = checkpoint.load(args.checkpoint)
    refuse((not getattr(model.head, "scored", True),
            f"{args.checkpoint} was trained without confidence, by which people are found"))
    model = for_inference(model)
    if args.page:
        people_py.predict_crops = predict_crops_as_the_page
    figures = measure(model, args.data, limit=args.photos)
    if args.photos is None:
        figures["auroc"] = person_auroc(model, load_samples(args.data, "valid"))
    print("  ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in figures.items() if not np.isnan(value)))


if __name__ == "__main__":
    main_with_clear_errors(main)
