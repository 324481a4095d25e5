"""PCKh of predictions, and what the networks cost.

    python evaluate.py                                             # cost table, and PCKh of the newest checkpoint
    python evaluate.py --checkpoint weights/teacher-tiny-drawn.pt  # PCKh on drawn people
    python evaluate.py --checkpoint best.pt --data MPII            # PCKh on MPII, add --flip-test for both mirror images
    python evaluate.py --predictions preds.mat --data MPII         # PCKh of anybody's predictions
    python evaluate.py --costs                                     # the paper's Tables A and B, measured here
    python evaluate.py --speed                                     # filters against attention, plain, ready and compiled

PCKh@t: the share of joints whose error is at most t times the head size, 0.6 x the diagonal of the head box.

    PCKh@t = 100 * mean over labelled joints of [ ||prediction - label|| / head size <= t ]

Pelvis and thorax count in no mean, as everywhere in the literature on MPII. Two means are in use, and both are
printed: HRNet's, weighted by how often a joint is labelled (`mean`), and the plain mean of 14 joints
(`mean_unweighted`). @0.1 is threshold 0.10; HRNet's "Mean@0.1" is really 0.11.
"""

import json
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from tqdm import tqdm

import checkpoint
from costs import cost_table, measure_costs, protocol
from crops import invert, make_batch, store, transform
from data_mpii import load_people, read_truth
from inputs import BadInput, CommandLine, check_device, default_device, main_with_clear_errors
from parallel import Team
from synthetic import drawn_people

# Joint groups as every table on MPII prints them: right and left together, the head by its top.
GROUPS = {"head": [9], "shoulder": [12, 13], "elbow": [11, 14], "wrist": [10, 15],
          "hip": [2, 3], "knee": [1, 4], "ankle": [0, 5]}
SCORED = [joint for joint in range(16) if joint not in (6, 7)]       # pelvis and thorax left out
THRESHOLDS = (0.5, 0.1)
BATCH = 64
HELD_OUT = 1000                      # drawings to score on


# ------------------------------------------------------------------------------- PCKh

def pckh(joints, truth, visible, head_size, threshold):
    """PCKh in percent, by group and both means. joints, truth (N, 16, 2), visible (N, 16), head_size (N,) pixels."""
    error = np.linalg.norm(joints - truth, axis=-1) / head_size[:, None]             # (N, 16)
    hit = (error <= threshold) & visible
    hits, counts = hit.sum(0), visible.sum(0)                                        # (16,)

    def share(joints):
        count = counts[joints].sum()
        return float(100 * hits[joints].sum() / count) if count else float("nan")

    groups = {name: mean_of_known([share([joint]) for joint in joints]) for name, joints in GROUPS.items()}
    return groups | {"mean": share(SCORED), "mean_unweighted": mean_of_known([share([joint]) for joint in SCORED])}


def mean_of_known(values):
    """Plain mean of the values that are not NaN; NaN where none is (a joint that nobody has labelled)."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def score(joints, truth, visible, head_size):
    """{'pckh@0.5': {...}, 'pckh@0.1': {...}} of predictions (N, 16, 2) in pixels of the pictures."""
    return {f"pckh@{t}": pckh(joints, truth, visible, head_size, t) for t in THRESHOLDS}


def print_score(scores):
    """A table of what `score` returns, one row a threshold."""
    print(" " * 9 + "".join(f"{name:>11}" for name in (*GROUPS, "mean", "unweighted")))
    for name, values in scores.items():
        print(f"{name:9}" + "".join(f"{value:11.2f}" for value in values.values()))


# ------------------------------------------------------------------------------- predictions of a network

@torch.inference_mode()
def predict(model, people, stored, device="cpu", flip_test=False, team=Team(0, 1, "cpu"), between=lambda: None):
    """Joints (N, 16, 2) in pixels of the pictures and confidences (N, 16), of people with stored crops.

    flip_test: of the mean of what the network says of a crop and of its mirror image (with_mirror of heads.py).
    team: processes that share the work; each gets the whole answer.
    between: called before each batch, equally often by every process; it may end the run.
    """
    model.eval()
    mine = len(range(team.rank, len(people), team.world))
    # taken at once: small pieces kept among the network's large ones would keep these from being given back (100,000 people
    # took 0.8 GB more)
    joints, confidences, done = np.empty((mine, 16, 2)), np.empty((mine, 16), np.float32), 0
    for rows in tqdm(np.array_split(np.arange(len(people)), range(BATCH * team.world, len(people), BATCH * team.world)),
                     desc="evaluating", leave=False, disable=None):
        between()
        rows = rows[team.rank::team.world]
        if not len(rows):
            continue
        batch = make_batch(people, stored, rows, model.size, device)
        places, confidence = look(model, batch.images, flip_test)
        joints[done:done + len(rows)] = transform(invert(batch.matrix), places.cpu())          # crop -> picture
        confidences[done:done + len(rows)] = confidence.cpu()
        done += len(rows)
    return team.gather(joints), team.gather(confidences)


def look(model, images, flip_test=False):
    """Joints (B, 16, 2) in pixels of the crops `images` (B, 3, size, size), and confidences (B, 16)."""
    output = model(images)
    if flip_test:
        mirrored = model(images.flip(-1))
        output = output._replace(prediction=model.head.with_mirror(output.prediction, mirrored.prediction))
    return model.decode(output)


def evaluate(model, people, stored, device="cpu", **how):
    """Scores of a network on people with stored crops; how: flip_test, team and between, as in `predict`."""
    return score(predict(model, people, stored, device, **how)[0], people.joints, people.visible, people.head_size)


def mean_pose_score(train, valid):
    """Scores of a guess that ignores the picture: the mean joint of the training people within their boxes."""
    inside = (train.joints - train.center[:, None]) / train.side[:, None, None]      # (N, 16, 2), box = [-0.5, 0.5]
    mean = (inside * train.visible[..., None]).sum(0) / np.maximum(train.visible.sum(0), 1)[:, None]
    return score(valid.center[:, None] + valid.side[:, None, None] * mean, valid.joints, valid.visible, valid.head_size)


# ------------------------------------------------------------------------------- a file of predictions

def read_predictions(file, count):
    """preds of a .mat file, (N, 16, 2), (16, 2, N) or (2, 16, N), 1-based as MPII's own pixels -> (N, 16, 2) 0-based."""
    try:
        mat = loadmat(file)
    except Exception as error:
        raise BadInput(f"{file} is not a Matlab file ({error!r:.80})") from error
    if "preds" not in mat:
        raise BadInput(f"{file} holds no 'preds' (it has {[key for key in mat if key[0] != '_']})")
    preds = mat["preds"]
    if preds.dtype.kind not in "fiu" or not np.isfinite(preds).all():
        raise BadInput(f"preds of {file} must be finite real numbers")
    for axes in ((0, 1, 2), (2, 0, 1), (2, 1, 0)):
        if preds.ndim == 3 and preds.transpose(axes).shape == (count, 16, 2):
            return preds.transpose(axes).astype(np.float64) - 1
    raise BadInput(f"preds of {file} have shape {preds.shape}, the truth has {count} people: need ({count}, 16, 2)")


# ------------------------------------------------------------------------------- command line

def validation_people(data, size):
    """The people that figures are about: the valid split of an MPII folder, or the held-out drawings."""
    return drawn_people("valid", HELD_OUT, size) if data == "drawn" else load_people(data, "valid")


def newest_checkpoint():
    """The checkpoint of drawn people written last in runs/, or else one that came with the repository."""
    shipped = sorted((Path(__file__).parent / "weights").glob("*.pt"))
    own = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    drawn = [path for path in shipped + own if str(checkpoint.read(path)["facts"].get("data")).startswith("drawn")]
    return drawn[-1] if drawn else None


def parse_arguments():
    parser = CommandLine(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="network to score (default, where nothing is "
                        "asked for: the newest of runs/*/best.pt that learned from drawn people, or the shipped one)")
    parser.add_argument("--predictions", type=Path, help="a .mat file of predictions to score, in MPII's 1-based pixels")
    parser.add_argument("--data", default="drawn",
                        help="folder in MPII's layout, or 'drawn' for people drawn by synthetic.py (default: drawn)")
    parser.add_argument("--flip-test", action="store_true", help="average over each crop and its mirror image")
    parser.add_argument("--costs", action="store_true", help="parameters, GFLOPs, frames a second of all 16 students")
    parser.add_argument("--speed", nargs="*", metavar="ROW", help="frames a second of filters and attention, in every form, "
                        "side by side: reg-none, reg-w32, reg-w48, cc-none, cc-w32, cc-w48 or all (default: reg-none)")
    parser.add_argument("--device", default=default_device(),
                        help="where to run: cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--cache", type=Path, default=Path("runs/crops"), help="folder for cut crops (default: runs/crops)")
    parser.add_argument("--json", type=Path, help="write all figures to this file, too")
    return parser.parse_args()


def score_predictions(args):
    """Scores of --predictions, against annot/gt_valid.mat of --data."""
    if not args.predictions.is_file():
        raise BadInput(f"there is no file {args.predictions}")
    if args.data == "drawn":
        raise BadInput("--predictions need --data, the MPII folder that they are scored against")
    truth = Path(args.data) / "annot" / "gt_valid.mat"
    if not truth.is_file():
        raise BadInput(f"--predictions are scored against {truth}, which is not there: name MPII's folder with --data")
    joints, visible, head_size = read_truth(truth)
    predictions = read_predictions(args.predictions, len(joints))
    print(f"{args.predictions}: PCKh against {truth}, {len(joints):,} people")
    return score(predictions, joints, visible, head_size)


def score_checkpoint(args, path):
    """Scores of a network on the validation people of --data."""
    model, facts = checkpoint.load(path, args.device)
    people = validation_people(args.data, model.size)
    stored = store(people, model.size, None if args.data == "drawn" else args.cache)
    print(f"{path} ({checkpoint.describe(model.config)}): PCKh on {len(people):,} people of {people.name}"
          + (", flip test" if args.flip_test else "") + (f"; {people.note}" if people.note else ""))
    learned = str(facts.get("data")).partition("/")[0]
    if learned not in ("None", "as published", people.name.partition("/")[0]):
        print(f"it learned from {learned}, and is scored on others"
              + (": --data names the folder of photos" if args.data == "drawn" else ""))
    return evaluate(model, people, stored, args.device, flip_test=args.flip_test)


def main():
    args = parse_arguments()
    timed = args.costs or args.speed is not None
    if args.predictions and (args.checkpoint or timed or args.flip_test):
        raise BadInput("--predictions are scored as they are: leave out --checkpoint, --costs, --speed and --flip-test")
    check_device(args.device)
    if args.json and not args.json.resolve().parent.is_dir():
        raise BadInput(f"--json {args.json}: there is no folder {args.json.parent} to write into: make it first")
    if args.data != "drawn" and not (args.predictions or args.checkpoint):
        raise BadInput("--data says whom to score on: name what is to be scored, with --checkpoint or --predictions")
    figures, nothing_asked = {}, not (args.checkpoint or args.predictions or timed)
    if args.costs or nothing_asked:
        print("measuring the paper's 16 students, two to three minutes on two cores")
        figures |= dict(rows=measure_costs(args.device), protocol=protocol(args.device))
        print(cost_table(figures["rows"]), figures["protocol"], sep="\n")
    if args.speed is not None:
        from speed import ROWS, report_speed         # not above: it uses the training loop, which scores with this file
        rows = ROWS if args.speed == ["all"] else args.speed or ["reg-none"]
        if unknown := set(rows) - set(ROWS):
            raise BadInput(f"--speed {sorted(unknown)[0]}: choose from {', '.join(ROWS)}, or all")
        figures |= report_speed(rows, args.device)
    path = args.checkpoint or (newest_checkpoint() if nothing_asked else None)
    if args.predictions:
        figures |= score_predictions(args)
    elif path:
        figures |= score_checkpoint(args, path)
    if "pckh@0.5" in figures:
        print_score({name: values for name, values in figures.items() if name.startswith("pckh")})
    if path:
        print(f"next: python predict.py YOUR_PICTURE --checkpoint {path}")
    if args.json:
        # json knows no NaN: a joint that nobody has labelled becomes null
        known = json.loads(json.dumps(figures), parse_constant=lambda name: None)
        args.json.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main_with_clear_errors(main)
