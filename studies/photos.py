"""The runs behind the tables `photos` and `photo-parts`: tiny teacher and students on photos.

    python studies/photos.py --data DATA

sweep.py says how runs are skipped, stopped and resumed. What stands behind -- goes to every train.py.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import main_with_clear_errors
from crops import AUGMENTATIONS
from sweep import ROOT, RUNS, main, name_of

TAKEN_APART = ("cc", "gs")           # the student that is shown different augmentations
PHOTO_STUDENTS = (("cc", "gd"), ("reg", "gs"))
PHOTO_EPOCHS = {"teacher": 30, "student": 16, "long": 64}
PRETRAINED = ROOT / "weights" / "teacher-tiny-drawn.pt"


def photo_runs(data, init=PRETRAINED):
    """{name: flags of train.py}; init: checkpoint that the teacher starts from."""
    runs = {"photos-teacher": {"data": data, "train-teacher": True, "amp": True, "init": init,
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


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: photo_runs(args.data, args.init),
        ("--data", dict(type=Path, required=True, help="folder of photos in MPII's layout")),
        ("--init", dict(type=Path, default=PRETRAINED,
                        help="what the teacher starts from (default: the shipped one)"))))
