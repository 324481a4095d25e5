"""The paper's tables on real people: what the four terms are worth for students of preset small.

    python studies/photos.py --data lspet_refined everyday lsp --teacher weights/teacher-small-photos.pt
    python studies/photos.py --data ... --stop-after 120        # the same command resumes
    python studies/photos.py --data ... --rows cc-gs-none cc-gd-none         # some rows first

Fills results/photos.json. Rows are those of the paper's Tables A and B in which it has a student without a
backbone, and four with w24 in place of its HRNets. Columns, from a random start unless said:

    alone       labels
    terms       labels and the teacher's four terms: the paper's method
    weights     labels, terms and the teacher's weights to begin with (all but mixers and head), ours

All cells of a block have the same people, steps, views and scored epochs; each mixer has its own rate
(train.py). sweep.py says how runs are skipped, stopped and resumed. What stands behind -- goes to every
train.py.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import main_with_clear_errors
from models import FILTERS
from sweep import main

TEACHER = Path(__file__).resolve().parents[1] / "weights" / "teacher-small-photos.pt"
ROWS = {**{f"{student}-{filter}-none": ("alone", "terms")
           for student, filter in product(("cc", "reg"), FILTERS)},
        "cc-gs-w24": ("alone", "terms", "weights"), "cc-gd-w24": ("alone", "terms", "weights"),
        "cc-attention-w24": ("alone", "terms"), "reg-gs-w24": ("alone", "terms")}
EPOCHS = {"none": 12, "w24": 8}
SEEDS = {"cc-gs-none": (0, 1), "cc-gd-none": (0, 1), "cc-gs-w24": (0, 1)}        # others: 0
VIEWS = ["train.RECIPES.small.views=4"]          # targets are computed once for each


def photo_runs(data, teacher=TEACHER, rows=tuple(ROWS)):
    """{name: flags of train.py}, first seeds first. data: folders."""
    flags = {"alone": {"no-distill": True}, "terms": {"teacher": teacher},
             "weights": {"teacher": teacher, "init": teacher}}
    runs = {}
    for seed, row in product((0, 1), rows):
        student, filter, backbone = row.split("-")
        for column in ROWS[row] if seed in SEEDS.get(row, (0,)) else ():
            runs[f"photos-{row}-{column}-{seed}"] = {
                "data": data, "amp": True, "preset": "small", "student": student, "filter": filter,
                "backbone": backbone, **flags[column], "epochs": EPOCHS[backbone], "seed": seed,
                "changes": VIEWS}
    return runs


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: photo_runs(args.data, args.teacher, args.rows),
        ("--data", dict(type=Path, nargs="+", required=True, help="folders of photos, joined")),
        ("--teacher", dict(type=Path, default=TEACHER, help=f"default: weights/{TEACHER.name}")),
        ("--rows", dict(nargs="+", choices=tuple(ROWS), default=tuple(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)} (default: all)"))))
