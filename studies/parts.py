"""What each part is worth: one table a group, on drawings, preset tiny, 1,000 steps in every cell.

    python studies/parts.py                     # all groups, some minutes a run on two cores
    python studies/parts.py dynamic attention   # two of them; --seeds 0 for one seed

    dynamic     what M of the dynamic filter sees, and the static control
    join        static and dynamic filter side by side, or in series
    attention   attention's heads, rate, optimiser, warm-up; the filters at the same rates
    terms       each term of the loss beside labels, for cc gs and reg gs
    tokens      the teacher's tokens standardised, or raw as in DistilPose

sweep.py says how runs are skipped, stopped and resumed, changed.py what the changes are. What stands behind
-- goes to every train.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import main_with_clear_errors
from distill import TERMS
from sweep import SEEDS, main

EPOCHS = 8               # of 125 steps; scored at 4 and 8
GS = {"student": "cc", "filter": "gs"}
GD = {"student": "cc", "filter": "gd"}
ALONE = {"no-distill": True}
RAW = ["raw-tokens"]


def weights(student, keypoint, visual):
    """Changes that set a1 and a2."""
    return [f"distill.WEIGHTS.{student}.keypoint_tokens={keypoint}",
            f"distill.WEIGHTS.{student}.visual_tokens={visual}"]


# group -> {cell: (flags, changes)}; the same cell may stand in several groups
CELLS = {
    "dynamic": {"gd": (GD, []), "gd-constant": (GD, ["constant"]), "gd-half": (GD, ["half"]),
                "gd-half-triple-rate": (GD, ["half", "triple-rate"]), "gd-triple-rate": (GD, ["triple-rate"]),
                "gd-z-alone": (GD, ["z-alone"]), "gd-plain-mean": (GD, ["plain-mean"]),
                "gd-plain-mean-muon": (GD, ["plain-mean", "train.ADAM_ALONE=[]"])},
    "join": {"gd": (GD, []), "gd-in-series": (GD, ["in-series"])},
    "attention": {
        **{f"{filter}-alone{name}": ({"student": "cc", "filter": filter, **ALONE, **flags}, [])
           for filter in ("attention", "gs", "gd")
           for name, flags in (("", {}), ("-half-rate", {"lr": 5e-4}), ("-double-rate", {"lr": 2e-3}))},
        **{f"attention-alone-{'-'.join(changes).replace('train.', '')}":
           ({"student": "cc", "filter": "attention", **ALONE, **flags}, changes)
           for changes, flags in (
               (["separate-qkv"], {}), (["adam-attention"], {}), (["two-heads"], {}), (["eight-heads"], {}),
               (["weight-decay"], {}), (["long-warm-up"], {}))},
        "attention-alone-adam": ({"student": "cc", "filter": "attention", "optimiser": "adam", **ALONE}, [])},
    "terms": {f"{student}-gs-{name}": ({"student": student, "filter": "gs", **flags}, [])
              for student in ("cc", "reg")
              for name, flags in (("alone", ALONE), *((term, {"terms": [term]}) for term in TERMS),
                                  ("all", {}))},
    "tokens": {"cc-gs-raw-as-distilpose": (GS, [*RAW, *weights("cc", 5e-4, 5e-4)]),
               **{f"cc-gs-raw-{a}": (GS, [*RAW, *weights("cc", a, a / 3)]) for a in (0.1, 0.3, 1, 3)},
               "cc-gs-all": (GS, [])},
}


def parts_runs(groups=tuple(CELLS), seeds=SEEDS):
    """{name: flags of train.py and changes}."""
    return {f"parts-{cell}-{seed}": {**flags, "epochs": EPOCHS, "seed": seed, "changes": changes}
            for seed in seeds for group in groups for cell, (flags, changes) in CELLS[group].items()}


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: parts_runs(args.groups or CELLS, args.seeds),
        ("groups", dict(nargs="*", help=f"of {', '.join(CELLS)} (default: all)")),
        ("--seeds", dict(type=int, nargs="+", default=SEEDS, help="seeds of the runs (default: 0 1 2)"))))
