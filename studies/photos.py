"""The runs behind the tables `small` and `compared`: teachers and students on photos, many hours on a CPU.

    python studies/photos.py --data DATA        # fills results/small.json

    small       the networks that are shipped: teacher and student on crops of 128 x 128 pixels
    small-64    all six students on crops of 64 x 64 pixels, with STARTS of four kinds

sweep.py says how runs are skipped, stopped and resumed. What stands behind -- goes to every train.py.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import main_with_clear_errors
from models import FILTERS, STUDENTS
from sweep import RUNS, SEEDS, main, name_of

SHIPPED_EPOCHS = {"teacher": 18, "student": 16}
COMPARED_EPOCHS = 8
VIEWS = 5
# All students learn from labels. What they have from the teacher besides, and its name in the table: 'taught'
# its four terms; 'started' its weights to begin with, all but mixers and head; 'distilled' both
STARTS = {"alone": "labels", "taught": "labels, terms", "started": "labels, weights",
          "distilled": "labels, weights, terms"}
REPEATED = ("cc", "gd"), ("reg", "gs")           # with all seeds; the others with the first one


def small_runs(data):
    """{name: flags of train.py}."""
    photos = {"data": data, "amp": True}
    teacher_64, teacher = (RUNS / name / "best.pt" for name in ("small-teacher-64", "small-teacher"))
    runs = {"small-teacher-64": {**photos, "train-teacher": True, "preset": "small-64",
                                 "epochs": SHIPPED_EPOCHS["teacher"]},
            "small-teacher": {**photos, "train-teacher": True, "preset": "small", "init": teacher_64,
                              "epochs": SHIPPED_EPOCHS["teacher"]},
            f"small-{name_of('cc', 'gd', True, 0)}": {
                **photos, "student": "cc", "filter": "gd", "preset": "small", "views": VIEWS,
                "epochs": SHIPPED_EPOCHS["student"], "teacher": teacher, "init": teacher}}
    terms = {"teacher": teacher_64, "views": VIEWS}
    flags = {"alone": {"no-distill": True}, "taught": terms,
             "started": {"no-distill": True, "init": teacher_64}, "distilled": {**terms, "init": teacher_64}}
    for seed, student, filter, start in product(SEEDS, STUDENTS, FILTERS, STARTS):
        if seed == SEEDS[0] or (student, filter) in REPEATED:
            runs[f"small-64-{student}-{filter}-{start}-{seed}"] = {
                **photos, "student": student, "filter": filter, "preset": "small-64", **flags[start],
                "epochs": COMPARED_EPOCHS, "seed": seed}
    return runs


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: small_runs(args.data),
        ("--data", dict(type=Path, required=True, help="folder of photos in MPII's layout"))))
