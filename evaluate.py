"""PCKh: the accuracy of predictions.

    python evaluate.py                                  # cost table, and PCKh of the newest tiny network
    python evaluate.py --checkpoint weights/teacher-tiny-drawn.pt  # PCKh on drawings
    python evaluate.py --checkpoint best.pt --data MPII  # PCKh on MPII; --flip-test averages mirror images
    python evaluate.py --predictions preds.mat --data MPII  # PCKh of a file of predictions
    python evaluate.py --costs                          # the paper's Tables A and B, measured here

PCKh@t is the fraction of joints whose error is at most t head sizes. A head size is 0.6 x the diagonal of the
person's head box.

    PCKh@t = 100 * mean over labelled joints of [ ||prediction - label|| / head size <= t ]

Sets without head boxes have another unit: 25 x MPII's `scale` pixels, or in COCO's layout a sixth of the
longer side of the box around the limb joints. Pelvis and thorax are left out of every mean, as in the
literature on MPII. Two means are in use and both are printed: HRNet's, weighted by how often a joint is
labelled (`mean`), and the plain mean of 14 joints (`mean_unweighted`). @0.1 is threshold 0.10; HRNet's
"Mean@0.1" uses 0.11.
"""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from common import (BadInput, CommandLine, check_device, check_folder, check_not_read, default_device,
                    json_path, main_with_clear_errors, place_of, print_beside, read_mat, refuse)
from costs import COST_SECONDS, cost_table, measure_costs, protocol
from crops import CROPS, invert, make_batch, store, transform
from data_mpii import JOINTS, load_samples, read_truth
from images import WHITE, contact_sheet
from synthetic import drawn_people

# Joint groups (of data_mpii.JOINTS) as every table on MPII prints them: right and left together, the head by
# its top. The upper neck, 8, is in both means and in no group.
GROUPS = {"head": [9], "shoulder": [12, 13], "elbow": [11, 14], "wrist": [10, 15],
          "hip": [2, 3], "knee": [1, 4], "ankle": [0, 5]}
SCORED = [joint for joint in range(16) if joint not in (6, 7)]       # without pelvis and thorax
THRESHOLDS = (0.5, 0.1)
BATCH = 64
HELD_OUT = 1000                      # drawings to score on


# ------------------------------------------------------------------------------- PCKh

def pckh(joints, truth, visible, head_size, threshold):
    """PCKh in percent by group, and both means: {'head': ..., 'mean_unweighted': ...}; NaN without labels.

    joints, truth: (N, 16, 2) pixels. visible: (N, 16) bool, labelled joints. head_size: (N,) pixels.
    """
    error = np.linalg.norm(joints - truth, axis=-1) / head_size[:, None]             # (N, 16)
    hits, counts = ((error <= threshold) & visible).sum(0), visible.sum(0)           # (16,)
    percent = 100 * hits / np.where(counts, counts, np.nan)                          # (16,)
    groups = {name: mean_of_known(percent[group]) for name, group in GROUPS.items()}
    return groups | {"mean": float(100 * hits[SCORED].sum() / (counts[SCORED].sum() or np.nan)),
                     "mean_unweighted": mean_of_known(percent[SCORED])}


def mean_of_known(values):
    """Plain mean of the values that are not NaN; NaN where there is none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def score(joints, truth, visible, head_size):
    """{'pckh@0.5': {...}, 'pckh@0.1': {...}}; shapes and units as in `pckh`."""
    return {f"pckh@{t}": pckh(joints, truth, visible, head_size, t) for t in THRESHOLDS}


def print_score(scores):
    """Print what `score` returns as a table, one row a threshold."""
    print(" " * 9 + "".join(f"{name:>11}" for name in (*GROUPS, "mean", "unweighted")))
    for name, values in scores.items():
        print(f"{name:9}" + "".join(f"{value:11.2f}" for value in values.values()))


# ------------------------------------------------------------------------------- predictions of a network

@torch.inference_mode()
def predict(model, samples, stored, device="cpu", flip_test=False):
    """Joints (N, 16, 2) in pixels of the images and confidences (N, 16) in [0, 1], from stored crops.

    flip_test: average each prediction with that of the mirrored crop (with_mirror of models.py).
    """
    model.eval()
    # Allocated before the loop: small arrays made between large temporary ones would fragment the memory.
    joints, confidences = np.empty((len(samples), 16, 2)), np.empty((len(samples), 16), np.float32)
    parts = np.split(np.arange(len(samples)), range(BATCH, len(samples), BATCH))
    for rows in tqdm(parts, desc="evaluating", leave=False, disable=None):
        batch = make_batch(samples, stored, rows, model.size, device)
        xy, confidence = predict_crops(model, batch.images, flip_test)
        joints[rows] = transform(invert(batch.matrix), xy.cpu())                           # crop -> image
        confidences[rows] = confidence.cpu()
    return joints, confidences


def predict_crops(model, images, flip_test=False):
    """Crops (B, 3, size, size) in [0, 1] -> joints (B, 16, 2) in pixels of the crop, confidences (B, 16)."""
    output = model(images)
    if flip_test:
        mirrored = model(images.flip(-1))
        output = output._replace(prediction=model.head.with_mirror(output.prediction, mirrored.prediction))
    return model.decode(output)


def evaluate(model, samples, stored, device="cpu", flip_test=False):
    """Scores of a network on samples with stored crops; arguments as in `predict`."""
    joints, _ = predict(model, samples, stored, device, flip_test)
    return score(joints, samples.joints, samples.visible, samples.head_size)


def prediction_sheet(samples, stored, rows, joints, size, **layout):
    """A contact sheet of samples `rows`: predicted joints (N, 16, 2) in colour over labels in white.

    stored, size: crops of all N samples, side of the network's input. layout: columns and side of the sheet.
    """
    batch, visible = make_batch(samples, stored, rows, size), samples.visible[rows]
    crops = (255 * batch.images.permute(0, 2, 3, 1)).round().byte().numpy()
    labels, predicted = (transform(batch.matrix, torch.from_numpy(xy[rows]))
                         for xy in (samples.joints, joints))
    return contact_sheet(crops, (labels, visible, WHITE), (predicted, np.ones_like(visible)), **layout)


def mean_pose_score(train, valid):
    """Scores of a guess that ignores the image: joints at their mean places in the training set's boxes."""
    inside = (train.joints - train.center[:, None]) / train.side[:, None, None]  # (N, 16, 2), -0.5 .. 0.5
    mean = (inside * train.visible[..., None]).sum(0) / np.maximum(train.visible.sum(0), 1)[:, None]
    guess = valid.center[:, None] + valid.side[:, None, None] * mean
    return score(guess, valid.joints, valid.visible, valid.head_size)


def read_predictions(file, count):
    """preds of a .mat file, (N, 16, 2), (16, 2, N) or (2, 16, N), 1-based MPII pixels -> (N, 16, 2) 0-based.

    Raises BadInput where the file holds anything else, or not `count` people.
    """
    mat = read_mat(file)
    if "preds" not in mat:
        raise BadInput(f"{file} holds no 'preds' (it has {[key for key in mat if key[0] != '_']})")
    preds = mat["preds"]
    if preds.dtype.kind not in "fiu":
        raise BadInput(f"preds of {file} must be real numbers")
    for axes in ((0, 1, 2), (2, 0, 1), (2, 1, 0)):
        if preds.ndim == 3 and preds.transpose(axes).shape == (count, 16, 2):
            joints = preds.transpose(axes).astype(np.float64) - 1
            wrong = ~np.isfinite(joints).all(-1)                               # (N, 16)
            if wrong.any():
                person, joint = np.argwhere(wrong)[0]
                raise BadInput(f"preds of {file} must be finite: {JOINTS[joint]} of person {person} (of 0 to "
                               f"{count - 1}) is not; {wrong.any(1).sum()} people have such joints")
            return joints
    raise BadInput(f"preds of {file} have shape {preds.shape}, the truth has {count} people: "
                   f"need ({count}, 16, 2)")


# ------------------------------------------------------------------------------- command line

def names_of(folders):
    """The name of each folder of --data, without its path."""
    return [folder if folder == "drawn" else Path(folder).resolve().name for folder in folders]


def validation_samples(data, size, count=None):
    """The samples to score on: the valid split of a folder, or the held-out drawings; or the first `count`.

    size: side of the crops in pixels.
    """
    if data == "drawn":
        return drawn_people("valid", min(count or HELD_OUT, HELD_OUT), size)
    samples = load_samples(data, "valid")
    return samples.first(count) if count else samples


def load_to_score(path, data, cache=CROPS, device="cpu"):
    """A network and what --data names to score it on -> (model, metadata, Samples, their stored crops)."""
    model, metadata = checkpoint.load(path, device)
    samples = validation_samples(data, model.size)
    return model, metadata, samples, store(samples, model.size, None if data == "drawn" else cache)


def newest_checkpoint():
    """The newest best.pt in runs/*-tiny-drawn*, else a shipped network as small: scored in seconds."""
    newest = sorted(Path("runs").glob("*-tiny-drawn*/best.pt"), key=lambda path: path.stat().st_mtime)
    for path in reversed(newest):
        try:
            checkpoint.load(path)
            return path
        except BadInput as error:
            print(f"left out: {error}")
    return Path(__file__).parent / "weights" / "student-cc-gd-drawn.pt"


def score_predictions(args):
    """Scores of --predictions, against annot/gt_valid.mat of --data."""
    truth = Path(args.data) / "annot" / "gt_valid.mat"
    refuse((not args.predictions.is_file(), f"there is no file {args.predictions}"),
           (args.data == "drawn", "--predictions need --data, the MPII folder that they are scored against"),
           (not truth.is_file(), f"--predictions are scored against {truth}, which is not there: name MPII's "
                                 f"folder with --data"))
    joints, visible, head_size = read_truth(truth)
    predictions = read_predictions(args.predictions, len(joints))
    print(f"{args.predictions}: PCKh against {truth}, {len(joints):,} samples")
    return score(predictions, joints, visible, head_size)


def score_checkpoint(args, path):
    """Scores of a network on the validation samples of --data."""
    model, metadata, samples, stored = load_to_score(path, args.data, args.cache, args.device)
    print(f"{path} ({checkpoint.describe(model.config)}): PCKh on {len(samples):,} samples of {samples.name}"
          + (", flip test" if args.flip_test else "") + (f"; {samples.note}" if samples.note else ""))
    learned = str(metadata.get("data")).partition("/")[0]
    # sets that it learned from; "None": not stated, "as published": not by us, and no reason to warn
    if {"None", "as published", samples.name.partition("/")[0]}.isdisjoint(learned.split("+")):
        print(f"it was trained on {learned} and is scored on a set of another name"
              + (": --data names the folder of photos" if args.data == "drawn" else ""))
    return evaluate(model, samples, stored, args.device, flip_test=args.flip_test)


def write_json(path, figures):
    """Write figures as json, with null for NaN and text for paths. If it cannot: BadInput, what was stays."""
    known = json.loads(json.dumps(figures, default=str), parse_constant=lambda name: None)
    place, mode, target = place_of(path)
    try:
        with open(place, mode) as file:
            file.write(json.dumps(known, indent=1) + "\n")
        if target:
            os.replace(place, target)
    except OSError as error:
        if target:
            place.unlink(missing_ok=True)
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error


def score_all(args):
    """Measure and print what the command line asks for, and write --json."""
    figures, nothing_asked = {}, not (args.checkpoint or args.predictions or args.costs)
    if args.costs or nothing_asked:
        print(f"timing the paper's 16 students for at most {COST_SECONDS} seconds", flush=True)
        figures |= dict(rows=measure_costs(args.device), protocol=protocol(args.device))
        print(cost_table(figures["rows"]), figures["protocol"], sep="\n")
    path = args.checkpoint or (newest_checkpoint() if nothing_asked else None)
    if args.predictions:
        figures |= score_predictions(args)
    elif path:
        figures |= score_checkpoint(args, path)
    if "pckh@0.5" in figures:
        print_score({name: values for name, values in figures.items() if name.startswith("pckh")})
    if path:
        print(f"next: python predict.py YOUR_IMAGE --checkpoint {shlex.quote(str(path))}")
    if args.json:
        write_json(args.json, figures)


def main():
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="network to score (default, without other arguments: the newest of "
                                        "runs/*-tiny-drawn*/best.pt, or a shipped one)")
    add("--predictions", type=Path, help="a .mat file of predictions to score, in MPII's 1-based pixels")
    add("--data", default="drawn", help="folder in MPII's or COCO's layout (default: drawn, for drawings)")
    add("--flip-test", action="store_true", help="average over each crop and its mirror image")
    add("--costs", action="store_true", help="parameters, GFLOPs, frames a second of all 16 students")
    add("--device", default=default_device(), help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--cache", type=Path, default=CROPS, help="folder for cut crops (default: runs/crops)")
    add("--json", type=json_path, help="write all figures to this file, too (-: standard output)")
    args = parser.parse_args()
    check_device(args.device)
    check_folder(args.json, "--json ")
    read = [] if args.data == "drawn" else [*Path(args.data).glob("*.mat"), *Path(args.data).glob("annot*/*")]
    check_not_read(args.json, filter(None, [args.checkpoint, args.predictions, *read]))
    refuse((args.predictions and (args.checkpoint or args.costs or args.flip_test),
            "--predictions are scored as they are: leave out --checkpoint, --costs, --flip-test"),
           (args.flip_test and args.costs and not args.checkpoint,
            "--flip-test is for a network: name it with --checkpoint"),
           (args.data != "drawn" and not (args.predictions or args.checkpoint),
            "--data names what to score on: name what to score with --checkpoint or --predictions"))
    with print_beside(args.json):
        score_all(args)


if __name__ == "__main__":
    main_with_clear_errors(main)
