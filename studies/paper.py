"""The runs behind the tables `paper` and `hours`: the paper's 16 students on MPII, alone and distilled.

    python studies/paper.py --data MPII --init hrnet_w32.pth hrnet_w48.pth  # one run on each GPU
    python studies/paper.py --data MPII --init hrnet_w32.pth hrnet_w48.pth -- --epochs 100   # shorter

Results go to results/mpii.json, a file with the name of the folder (small letters, _ for hyphens); tables.py
reads that of a folder called MPII. Runs are in the folders that train.py chooses by itself: a row that was
trained by its own command, with the same recipe and --init, is taken as done. sweep.py says how runs are
skipped, stopped and resumed.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import BadInput, main_with_clear_errors
from costs import PAPER
from data_mpii import find_labels
from sweep import main
from train import RATE, RECIPES


def paper_runs(data, weights=()):
    """{name: flags of train.py}: the teacher, students without a backbone, cc gs with HRNet-W32, the rest.

    weights: published files of HRNet-W32 and -W48, or none.
    """
    folder = data.resolve().name
    begin = {backbone: {"init": file} for backbone, file in zip(("w32", "w48"), weights)}
    recipe = RECIPES["paper"]
    common = {"data": data, "preset": "paper", "amp": True, "epochs": recipe["epochs"],
              "batch-size": recipe["batch_size"], "lr": RATE, "seed": 0, "accumulate": 1}
    teacher = Path("runs") / f"teacher-paper-{folder}"
    study = folder.lower().replace("-", "_")                  # what stands before a hyphen is a file's name
    runs = {f"{study}-teacher": {**common, "train-teacher": True, **begin.get("w48", {}), "out": teacher}}
    worth = {("cc", "gs", "none"): 0, ("cc", "gs", "w32"): 2}
    rows = sorted((row[:3] for row in PAPER), key=lambda row: worth.get(row, 1 if row[2] == "none" else 3))
    for (student, filter, backbone), distill in product(rows, (True, False)):
        name = f"{student}-{filter}-{backbone}"
        runs[f"{study}-{name}-{'distilled' if distill else 'alone'}"] = {
            **common, "student": student, "filter": filter, "backbone": backbone, **begin.get(backbone, {}),
            **({"teacher": teacher / "best.pt"} if distill else {"no-distill": True}),
            "out": Path("runs") / f"{name}-paper-{folder}{'' if distill else '-no-distill'}"}
    return runs


def check_split(data):
    """The folder. BadInput where its validation people would be split by image, from MPII's release."""
    if find_labels(data, "valid").suffix == ".mat":
        raise BadInput(f"{data} has MPII's release alone, which does not say who is for validation: add "
                       f"annot/train.json, valid.json and gt_valid.mat (docs/mpii.md), or the table would "
                       f"compare scores of other people")
    return data


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: paper_runs(check_split(args.data), args.init),
        ("--data", dict(type=Path, required=True, help="folder of photos in MPII's layout")),
        ("--init", dict(type=Path, nargs=2, default=(), metavar=("W32", "W48"),
                        help="published HRNet weights to start from (default: random)"))))
