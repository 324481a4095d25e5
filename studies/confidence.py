"""How well are confidences calibrated? How often a joint of confidence c is right, within half a head size.

    python studies/confidence.py weights/student-cc-gd-drawn.pt
    python studies/confidence.py FILE --data DATA --flip-test

    ece     expected calibration error: mean over joints of |fraction right - mean confidence| of their bin
    auroc   probability that a joint that is right has a higher confidence than one that is wrong; 0.5: chance
    curve   for each bin of confidences: their mean, the fraction that is right, the number of joints
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, main_with_clear_errors
from evaluate import SCORED, load_to_score, predict

BINS = 10                # of equal width, as in Guo et al., "On Calibration of Modern Neural Networks", 2017
WITHIN = 0.5             # head sizes


def right_and_confidence(joints, confidences, samples):
    """-> whether each joint is right (J,), its confidence (J,), of labelled joints that PCKh's mean counts.

    joints (N, 16, 2) in pixels of the images, confidences (N, 16) in [0, 1].
    """
    error = np.linalg.norm(joints - samples.joints, axis=-1) / samples.head_size[:, None]     # (N, 16)
    counted = samples.visible & np.isin(np.arange(16), SCORED)
    return error[counted] <= WITHIN, confidences[counted].astype(float)


def auroc(right, confidence):
    """How often a right one (J,) has a higher confidence (J,) than a wrong one; 0 where one kind is missing.

    Mann and Whitney: AUROC = (sum of the ranks of the right ones - its least value) / pairs
    """
    positive, negative = right.sum(), (~right).sum()
    ranks = rankdata(confidence)[right].sum() - positive * (positive + 1) / 2
    return float(ranks / max(positive * negative, 1))


def calibration(*predictions):
    """-> {'ece', 'auroc', 'curve': [[mean confidence, fraction right, joints], ...]}; arguments as above."""
    right, confidence = right_and_confidence(*predictions)                                   # (J,) each
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    curve = [[float(confidence[bins == b].mean()), float(right[bins == b].mean()), int((bins == b).sum())]
             for b in range(BINS) if (bins == b).any()]
    ece = sum(count * abs(fraction - mean) for mean, fraction, count in curve) / len(right)
    return dict(ece=float(ece), auroc=auroc(right, confidence), curve=curve)


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--data", default="drawn", help="folder of photos (default: synthetic people)")
    parser.add_argument("--flip-test", action="store_true", help="average the predictions of mirror images")
    args = parser.parse_args()
    for path in args.checkpoint:
        model, _, samples, crops = load_to_score(path, args.data)
        scores = calibration(*predict(model, samples, crops, flip_test=args.flip_test), samples)
        print(f"{path}: ece {scores['ece']:.3f}, auroc {scores['auroc']:.3f}")
        for mean, fraction, count in scores["curve"]:
            print(f"confidence {mean:.2f}: {fraction:.2f} right of {count:,} joints")


if __name__ == "__main__":
    main_with_clear_errors(main)
