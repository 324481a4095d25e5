"""PCKh@0.5 over the 12 joints that networks for phones and browsers predict, too.

    python studies/peers.py weights/student-small-photos.pt --data LSPET --flip-test

    12 joints     shoulders, elbows, wrists, hips, knees, ankles, all labelled ones together
    either side   for each person the better of the prediction and its left-right swap
    upright       people whose head, from upper neck to top, is within 45 degrees of up; and the others
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, main_with_clear_errors
from crops import FLIP
from evaluate import load_to_score, predict

LIMBS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]       # of MPII's 16 joints: all but the trunk and the head
NECK, TOP = 8, 9
WITHIN = 0.5                                             # head sizes
UP = 45                                                  # degrees


def shared_scores(joints, samples):
    """-> {'12 joints', 'either side', 'upright', 'others'} in percent.

    joints: (N, 16, 2) in pixels of the images.
    """
    def right(joints):                                                                        # (N, 12)
        error = np.linalg.norm(joints - samples.joints, axis=-1) / samples.head_size[:, None]
        return (error <= WITHIN)[:, LIMBS] & labelled

    def percent(hits, rows=slice(None)):
        return 100 * hits[rows].sum() / labelled[rows].sum()

    labelled = samples.visible[:, LIMBS]                                                      # (N, 12)
    plain, swapped = right(joints), right(joints[:, FLIP])
    better = np.where((swapped.sum(1) > plain.sum(1))[:, None], swapped, plain)
    x, y = (samples.joints[:, TOP] - samples.joints[:, NECK]).T                               # (N,) each
    upright = np.degrees(np.arctan2(np.abs(x), -y)) <= UP
    return {"12 joints": percent(plain), "either side": percent(better), "upright": percent(plain, upright),
            "others": percent(plain, ~upright)}


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True, help="folder in MPII's layout")
    parser.add_argument("--flip-test", action="store_true", help="average the predictions of mirror images")
    args = parser.parse_args()
    model, _, samples, crops = load_to_score(args.checkpoint, args.data)
    joints, _ = predict(model, samples, crops, flip_test=args.flip_test)
    print(", ".join(f"{name} {value:.1f}" for name, value in shared_scores(joints, samples).items()))


if __name__ == "__main__":
    main_with_clear_errors(main)
