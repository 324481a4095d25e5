"""How well are confidences calibrated? How often a joint of confidence c is right, within half a head size.

    python studies/confidence.py weights/student-cc-gd-drawn.pt
    python studies/confidence.py FILE --data DATA --flip-test
    python studies/confidence.py FILE --data DATA --calibrate OUT     # a copy with calibrated confidences

    ece     expected calibration error: mean over joints of |fraction right - mean confidence| of their bin
    auroc   probability that a joint that is right has a higher confidence than one that is wrong; 0.5: chance
    curve   for each bin of confidences: their mean, the fraction that is right, the number of joints
"""

import sys
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
from common import BadInput, CommandLine, main_with_clear_errors
from evaluate import SCORED, load_to_score, predict
from models import CoordinateHead

BINS = 10                # of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", 2017
WITHIN = 0.5             # head sizes
TEMPERATURES = 0.3, 3    # where it is looked for


def right_and_confidence(joints, confidences, samples, rows=slice(None)):
    """-> whether each joint is right (J,), its confidence (J,), of labelled joints that PCKh's mean counts.

    joints (N, 16, 2) in pixels of the images, confidences (N, 16) in [0, 1]; rows: which of the N.
    """
    error = np.linalg.norm(joints - samples.joints, axis=-1) / samples.head_size[:, None]     # (N, 16)
    counted = (samples.visible & np.isin(np.arange(16), SCORED))[rows]
    return error[rows][counted] <= WITHIN, confidences[rows][counted].astype(float)


def calibration(*predictions):
    """-> {'ece', 'auroc', 'curve': [[mean confidence, fraction right, joints], ...]}; arguments as above."""
    right, confidence = right_and_confidence(*predictions)                                   # (J,) each
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    curve = [[float(confidence[bins == b].mean()), float(right[bins == b].mean()), int((bins == b).sum())]
             for b in range(BINS) if (bins == b).any()]
    ece = sum(count * abs(fraction - mean) for mean, fraction, count in curve) / len(right)
    positive, negative = right.sum(), (~right).sum()
    # Mann and Whitney: AUROC = (sum of the ranks of the right ones - its least value) / pairs
    ranks = rankdata(confidence)[right].sum() - positive * (positive + 1) / 2
    return dict(ece=float(ece), auroc=float(ranks / max(positive * negative, 1)), curve=curve)


def calibrate(model, samples, crops, flip_test):
    """Set a cc student's temperature to that with the least mean of (confidence - right)^2, and return it.

    A temperature of the logits (Guo et al.), for the confidence alone: no joint moves.
    """
    def brier(temperature):
        model.head.temperature = temperature
        predictions = predict(model, samples, crops, flip_test=flip_test)
        right, confidence = right_and_confidence(*predictions, samples)
        return np.square(confidence - right).mean()

    model.head.temperature = round(float(minimize_scalar(brier, bounds=TEMPERATURES, method="bounded",
                                                         options=dict(xatol=0.01)).x), 2)
    return model.head.temperature


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--data", default="drawn", help="folder in MPII's layout (default: synthetic people)")
    parser.add_argument("--flip-test", action="store_true", help="average the predictions of mirror images")
    parser.add_argument("--calibrate", type=Path, metavar="OUT",
                        help="fit the temperature of a cc student's confidences on half of the samples, "
                             "report those of the others, and write a copy with it, in float16")
    args = parser.parse_args()
    if args.calibrate and (len(args.checkpoint) > 1 or args.calibrate.exists()):
        raise BadInput("--calibrate takes one checkpoint and the name of a file that is not there yet")
    for path in args.checkpoint:
        model, metadata, samples, crops = load_to_score(path, args.data)
        rows = slice(None)
        if args.calibrate:
            if not isinstance(model.head, CoordinateHead):
                raise BadInput(f"{path} is no cc student: only their confidences have a temperature")
            half = len(samples) // 2
            rows = slice(half, None)
            print(f"temperature {calibrate(model, samples.first(half), crops[:half], args.flip_test)}")
            checkpoint.save(args.calibrate, model, metadata, half=True)
        scores = calibration(*predict(model, samples, crops, flip_test=args.flip_test), samples, rows)
        print(f"{path}: ece {scores['ece']:.3f}, auroc {scores['auroc']:.3f}")
        for mean, fraction, count in scores["curve"]:
            print(f"confidence {mean:.2f}: {fraction:.2f} right of {count:,} joints")


if __name__ == "__main__":
    main_with_clear_errors(main)
