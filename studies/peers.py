"""PCKh@0.5 over the 12 joints that networks for phones and browsers predict, too, and PCK@0.2 of LSP.

    python studies/peers.py weights/student-small-photos.pt --data LSPET everyday LSP --flip-test

    12 joints     shoulders, elbows, wrists, hips, knees, ankles, all labelled ones together
    PCK@0.2       limbs, neck and head top, 14 joints, within 0.2 torsos (left shoulder to right hip)
    either side   for each person the better of the prediction and its left-right swap
    upright       people whose head, from upper neck to top, is within 45 degrees of up; and the others
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, main_with_clear_errors
from crops import FLIP
from data_coco import LIMB_JOINTS
from evaluate import load_to_score, predict

NECK, TOP = 8, 9
L_SHOULDER, R_HIP = 13, 2
WITHIN, WITHIN_TORSO = 0.5, 0.2                          # head sizes, torsos
UP = 45                                                  # degrees


def shared_scores(joints, samples):
    """-> {'12 joints', 'either side', 'upright', 'others', 'PCK@0.2'} in percent; NaN without such labels.

    joints: (N, 16, 2) in pixels of the images.
    """
    def percent(hits, counted, rows=slice(None)):
        return 100 * hits[rows][counted[rows]].mean() if counted[rows].any() else np.nan

    def near(joints, unit, within):                                                           # (N, 16)
        return np.linalg.norm(joints - samples.joints, axis=-1) <= within * unit[:, None]

    truth, labelled = samples.joints, samples.visible
    limbs = labelled[:, LIMB_JOINTS]                                                          # (N, 12)
    plain = near(joints, samples.head_size, WITHIN)[:, LIMB_JOINTS]
    swapped = near(joints[:, FLIP], samples.head_size, WITHIN)[:, LIMB_JOINTS]
    better = np.where(((swapped & limbs).sum(1) > (plain & limbs).sum(1))[:, None], swapped, plain)
    x, y = (truth[:, TOP] - truth[:, NECK]).T                                                 # (N,) each
    has_head, upright = labelled[:, [TOP, NECK]].all(1), np.degrees(np.arctan2(np.abs(x), -y)) <= UP
    torso = np.linalg.norm(truth[:, L_SHOULDER] - truth[:, R_HIP], axis=-1)                   # (N,)
    known = labelled & labelled[:, [L_SHOULDER, R_HIP]].all(1)[:, None]
    parts = [*LIMB_JOINTS, NECK, TOP]
    return {"12 joints": percent(plain, limbs), "either side": percent(better, limbs),
            "upright": percent(plain, limbs, has_head & upright),
            "others": percent(plain, limbs, has_head & ~upright),
            "PCK@0.2": percent(near(joints, torso, WITHIN_TORSO)[:, parts], known[:, parts])}


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", nargs="+", required=True, help="folders of photos")
    parser.add_argument("--flip-test", action="store_true", help="average the predictions of mirror images")
    args = parser.parse_args()
    for folder in args.data:
        model, _, samples, crops = load_to_score(args.checkpoint, folder)
        joints, _ = predict(model, samples, crops, flip_test=args.flip_test)
        scores = shared_scores(joints, samples)
        print(f"{samples.name}: " + ", ".join(f"{name} {value:.1f}" for name, value in scores.items()))


if __name__ == "__main__":
    main_with_clear_errors(main)
