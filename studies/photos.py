"""The runs behind the tables `photos`, `photo-parts`, `small`, `compared`: teachers and students on photos.

    python studies/photos.py --data DATA               # tiny networks
    python studies/photos.py --data DATA --small       # the shipped ones and their rivals, of preset small

sweep.py says how runs are skipped, stopped and resumed. What stands behind -- goes to every train.py.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import main_with_clear_errors
from crops import AUGMENTATIONS
from models import FILTERS, STUDENTS
from sweep import ROOT, RUNS, SEEDS, main, name_of

TAKEN_APART = ("cc", "gs")           # the student that is shown different augmentations
PHOTO_STUDENTS = (("cc", "gd"), ("reg", "gs"))
PHOTO_EPOCHS = {"teacher": 30, "student": 16, "long": 64}
SMALL_EPOCHS = {"teacher": 18, "student": 16, "compared": 8}
# what students of small-64 learn from, and its name in the table
STARTS = {"alone": "labels", "taught": "labels, terms", "started": "labels, weights",
          "distilled": "labels, weights, terms"}
SMALL_VIEWS = 5


def photo_runs(data):
    """{name: flags of train.py} of the tiny networks; the teacher starts from the one of drawings."""
    runs = {"photos-teacher": {"data": data, "train-teacher": True, "amp": True,
                               "init": ROOT / "weights" / "teacher-tiny-drawn.pt",
                               "epochs": PHOTO_EPOCHS["teacher"]}}
    taught, untaught = {"teacher": RUNS / "photos-teacher" / "best.pt"}, {"no-distill": True}

    def add(name, student, filter, flags):
        runs[f"photos-{name}"] = {"data": data, "student": student, "filter": filter,
                                  "epochs": PHOTO_EPOCHS["student"], **flags}

    for (student, filter), distill in product(PHOTO_STUDENTS, (True, False)):
        add(name_of(student, filter, distill, 0), student, filter, taught if distill else untaught)
    student, filter = PHOTO_STUDENTS[0]
    name = name_of(student, filter, True, 0)
    start = {**taught, "init": ROOT / "weights" / f"student-{student}-{filter}-drawn.pt"}
    add(f"{name}-pretrained", student, filter, start)
    add(f"{name}-long", student, filter, {**start, "views": 16, "epochs": PHOTO_EPOCHS["long"]})
    for augmentation in AUGMENTATIONS:
        add(f"{'-'.join(TAKEN_APART)}-{augmentation}", *TAKEN_APART, {**taught, "augmentation": augmentation})
    return runs


def small_runs(data):
    """{name: flags of train.py}: teacher and student of preset small, and students of small-64 to compare.

    STARTS: all have labels; 'taught' has the teacher's four terms besides, 'started' begins with its weights
    (all but mixers and head), 'distilled' has both. All six students with seed 0, PHOTO_STUDENTS with
    the others, too.
    """
    both = {"data": data, "amp": True}
    begun, taught = (RUNS / name / "best.pt" for name in ("small-teacher-64", "small-teacher"))
    runs = {"small-teacher-64": {**both, "train-teacher": True, "preset": "small-64",
                                 "epochs": SMALL_EPOCHS["teacher"]},
            "small-teacher": {**both, "train-teacher": True, "preset": "small", "init": begun,
                              "epochs": SMALL_EPOCHS["teacher"]},
            f"small-{name_of('cc', 'gd', True, 0)}": {
                **both, "student": "cc", "filter": "gd", "preset": "small", "views": SMALL_VIEWS,
                "epochs": SMALL_EPOCHS["student"], "teacher": taught, "init": taught}}
    terms = {"teacher": begun, "views": SMALL_VIEWS}
    flags = {"alone": {"no-distill": True}, "taught": terms, "started": {"no-distill": True, "init": begun},
             "distilled": {**terms, "init": begun}}
    for seed, student, filter, start in product(SEEDS, STUDENTS, FILTERS, STARTS):
        if seed == SEEDS[0] or (student, filter) in PHOTO_STUDENTS:
            runs[f"small-64-{student}-{filter}-{start}-{seed}"] = {
                **both, "student": student, "filter": filter, "preset": "small-64", **flags[start],
                "epochs": SMALL_EPOCHS["compared"], "seed": seed}
    return runs


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: small_runs(args.data) if args.small else photo_runs(args.data),
        ("--small", dict(action="store_true", help="networks of preset small, many hours on a CPU (default: "
                                                   "tiny)")),
        ("--data", dict(type=Path, required=True, help="folder of photos in MPII's layout"))))
