"""What each part is worth, one table a group: drawings, preset tiny, 1,000 steps a cell unless it says more.

    python studies/parts.py                     # all groups, some minutes a run on two cores
    python studies/parts.py dynamic --seeds 0   # one group, one seed
    python studies/parts.py dynamic-photos --data lspet
    python studies/parts.py labels-photos --data lspet_refined
    python studies/parts.py terms-photos --data lspet_refined everyday lsp    # likewise the next 4

    dynamic          what M of the dynamic filter sees, the static control, filters in series
    dynamic-photos   the same on photos, from labels alone, 16 epochs
    labels-photos    width of SimCC's labels: a small-64 student on photos, from labels alone, 8 epochs
    attention        attention's rate, heads, optimiser, warm-up; the filters at the same rates
    mixers           attention and both filters, distilled, at two rates
    long             all six students from labels alone, 4,000 steps
    terms            each term of the loss beside labels, for cc gs and reg gs
    terms-photos     the terms on photos: cc gs of preset small without a backbone, 4 epochs
    backbone-photos  the same with w24, with and without the loss of the backbone's own heatmaps
    teacher-photos   the terms by the first teacher of photos, before which
                     git show 753515d:weights/teacher-small-photos.pt > runs/first-teacher.pt
    control-photos   cc gd of preset small without a backbone and its static control, labels alone, 4 epochs
    attention-photos cc attention of preset small without a backbone at three rates, labels alone, 4 epochs
    tokens           the teacher's tokens standardised, or raw as in DistilPose

sweep.py says how runs are skipped, stopped and resumed, changed.py what the changes are. What stands behind
-- goes to every train.py.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import BadInput, main_with_clear_errors, refuse
from distill import WEIGHTS
from models import FILTERS, STUDENTS
from sweep import RUNS, SEEDS, main

EPOCHS = 8               # of 125 steps; scored at 4 and 8
LONG_EPOCHS = 32         # of the group `long`
PHOTO_EPOCHS = 16        # of tiny students on photos
COMPARED_EPOCHS = 8      # of students of small-64
SHORT_EPOCHS = 4         # of students of small
TERMS = tuple(WEIGHTS["cc"])
FIRST_TEACHER = RUNS.parent / "first-teacher.pt"                 # it has learned from LSPET alone
GS, GD, SELF_ATTENTION = ({"student": "cc", "filter": filter} for filter in ("gs", "gd", "attention"))
LABELS = {"no-distill": True}
FOUR_VIEWS = "train.RECIPES.tiny.views=4"
RATES = {"-double-rate": "2e-3", "": "1e-3", "-half-rate": "5e-4", "-quarter-rate": "2.5e-4"}


def token_weights(student, keypoint, visual):
    """Changes that set a1 and a2."""
    return [f"distill.WEIGHTS.{student}.keypoint_tokens={keypoint}",
            f"distill.WEIGHTS.{student}.visual_tokens={visual}"]


def terms_of(student, *terms):
    """Changes that leave of the four terms these alone."""
    return [f"distill.WEIGHTS.{student}.{other}=0" for other in TERMS if other not in terms]


def of_labels(filter, title, *changes, **flags):
    """A cell of the cc student with this mixer that learns from labels alone."""
    return title, {"student": "cc", "filter": filter, **LABELS, **flags}, list(changes)


def of_photos(title, *changes):
    """A cell of the cc gd student of preset small-64 that learns from labels alone."""
    return of_labels("gd", title, *changes, preset="small-64", amp=True, epochs=COMPARED_EPOCHS)


def told_of_photos(title, *changes, views=2, mixer=GS, backbone="none", **flags):
    """A cell of a cc student of preset small, on photos in so many views."""
    short = {"backbone": backbone, "preset": "small", "amp": True, "epochs": SHORT_EPOCHS}
    return title, {**mixer, **short, **flags}, [f"train.RECIPES.small.views={views}", *changes]


def at_rates(cell, title, filter, names, **flags):
    """{cell: cc student with this mixer} at the rates of these names; "" of filters is the default."""
    lr = {name: {} if filter != "attention" and not name else {"lr": float(RATES[name])} for name in names}
    return {f"{cell}{name}": (f"{title}, rate {RATES[name]}",
                              {"student": "cc", "filter": filter, **lr[name], **flags}, []) for name in names}


ATTENTION = {"separate-qkv": "q, k, v as three matrices", "adam-attention": "Adam for qkv and output",
             "long-warm-up": "warm-up over 300 steps", "two-heads": "2 heads", "eight-heads": "8 heads",
             "weight-decay": "weight decay 0.1"}
# group -> {cell: (title in the table, flags of train.py, changes)}; a cell may stand in several groups
CELLS = {
    "dynamic": {
        "gd": ("**1 + z**, z: the mean token, standardised over images", GD, []),
        "gd-constant": ("ones: a static control with the same parameters, trained", GD, ["constant"]),
        "gd-half": ("0.5 + z", GD, ["half"]),
        "gd-slow-M": ("1 + z, and M learns at half the rate", GD, ["slow-M"]),
        "gd-slower-M": ("1 + z, and M learns at a fifth of the rate", GD, ["slower-M"]),
        "gd-half-rate": ("1 + z, the whole network at half the rate", {**GD, "lr": 5e-4}, []),
        "gd-half-triple-rate": ("0.5 + z, and M learns at three times the rate", GD, ["half", "triple-rate"]),
        "gd-visual-mean": ("1 + z of the visual tokens alone", GD, ["visual-mean"]),
        "gd-keypoint-mean": ("1 + z of the keypoint tokens alone", GD, ["keypoint-mean"]),
        "gd-mean-before-norm": ("1 + z of the tokens before the layer norm", GD, ["mean-before-norm"]),
        "gd-sharp-M": ("1 + z, softmax at a third of the temperature", GD, ["sharp-M"]),
        "gd-gelu-M": ("1 + z, GELU instead of squared ReLU", GD, ["gelu-M"]),
        "gd-large-basis": ("1 + z, basis filters begin ten times as large", GD, ["large-basis"]),
        "gd-plain-mean": ("the mean token, as in DFFormer", GD, ["plain-mean"]),
        "gd-plain-mean-muon": ("the mean token, and M learns with Muon", GD,
                               ["plain-mean", "optim.ADAM_ALONE=[]"]),
        "gd-in-series": ("1 + z, and the dynamic filter behind the static one", GD, ["in-series"])},
    "dynamic-photos": {
        "photos-gd-alone": of_labels("gd", "**1 + z**", FOUR_VIEWS),
        "photos-gd-alone-constant": of_labels("gd", "ones: the static control", FOUR_VIEWS, "constant")},
    "labels-photos": {
        "small-64": of_photos("4 bins, the preset's sigma then", "labels-4"),
        "small-64-narrow": of_photos("half as wide", "labels-2"),
        "small-64-wide": of_photos("twice as wide", "labels-8")},
    "attention": {
        "attention-alone": of_labels("attention", "attention, rate 1e-3: Muon for qkv as one, 4 heads",
                                     lr=1e-3),
        **at_rates("attention-alone", "attention", "attention",
                   ("-double-rate", "-half-rate", "-quarter-rate"), **LABELS),
        "attention-alone-separate-qkv": of_labels("attention", "q, k, v as three matrices, rate 1e-3",
                                                  "separate-qkv", lr=1e-3),
        **{f"attention-alone-{change}-half-rate": of_labels("attention", f"{title}, rate 5e-4", change,
                                                           lr=5e-4)
           for change, title in ATTENTION.items()},
        **at_rates("gs-alone", "gs", "gs", ("", "-half-rate", "-quarter-rate"), **LABELS),
        **at_rates("gd-alone", "gd", "gd", ("", "-half-rate"), **LABELS)},
    "mixers": {**at_rates("attention-all", "attention", "attention", ("", "-half-rate")),
               **at_rates("cc-gs-all", "gs", "gs", ("", "-half-rate")),
               **at_rates("gd", "gd", "gd", ("", "-half-rate"))},
    "long": {f"{student}-{filter}-alone-long": (f"{student} {filter}", {
                 "student": student, "filter": filter, **LABELS, "epochs": LONG_EPOCHS}, [])
             for student, filter in product(STUDENTS, FILTERS)},
    "terms": {f"{student}-gs-{name}": (f"{student} gs: {title}",
                                       {"student": student, "filter": "gs", **flags}, changes)
              for student in ("cc", "reg")
              for name, title, flags, changes in (
                  ("alone", "labels alone", LABELS, []),
                  *((term, f"labels and {term.replace('_', ' ')}", {}, terms_of(student, term))
                    for term in TERMS),
                  ("heatmap-10", "labels and heatmap, a3 = 10", {},
                   [*terms_of(student, "heatmap"), f"distill.WEIGHTS.{student}.heatmap=10"]),
                  ("sharp-heatmap", "labels and heatmap, squared", {},
                   [*terms_of(student, "heatmap"), "sharp-heatmaps"]),
                  ("soft-heatmap", "labels and heatmap, its square root", {},
                   [*terms_of(student, "heatmap"), "soft-heatmaps"]),
                  ("mirrored-heatmap", "labels and heatmap, averaged with the mirror image's", {},
                   [*terms_of(student, "heatmap"), "mirrored-heatmaps"]),
                  ("confidence-1", "labels and confidence, a4 = 1", {},
                   [*terms_of(student, "confidence"), f"distill.WEIGHTS.{student}.confidence=1"]),
                  ("all", "labels and all four", {}, []),
                  ("all-new-views", "labels and all four, a new view in every epoch", {},
                   ["train.RECIPES.tiny.views=0"]))},
    "terms-photos": {
        "told-alone": told_of_photos("labels alone", **LABELS),
        "told-all": told_of_photos("labels and all four"),
        **{f"told-{term}": told_of_photos(f"labels and {term.replace('_', ' ')}", *terms_of("cc", term))
           for term in TERMS},
        "told-tokens-half": told_of_photos("all four, a1 and a2 halved", *token_weights("cc", 1.5, 0.5)),
        "told-tokens-twice": told_of_photos("all four, a1 and a2 doubled", *token_weights("cc", 6, 2)),
        "told-heatmap-3": told_of_photos("all four, a3 = 3", "distill.WEIGHTS.cc.heatmap=3"),
        "told-confidence-1": told_of_photos("all four, a4 = 1", "distill.WEIGHTS.cc.confidence=1"),
        "told-new-views": told_of_photos("all four, a new view in every epoch", views=0),
        "told-two-thirds": told_of_photos("all four, off for the last third", "two-thirds"),
        "told-normed": told_of_photos("all four, tokens behind a layer norm", "normed-tokens")},
    "backbone-photos": {
        f"told-w24-{name}": told_of_photos(title, *changes, backbone="w24", **flags)
        for name, title, flags, changes in (
            ("alone", "labels alone", LABELS, []),
            ("all", "labels and all four", {}, []),
            ("alone-quiet", "labels alone, no loss of the backbone's heatmaps", LABELS, ["quiet-backbone"]),
            ("all-quiet", "labels and all four, no loss of the backbone's heatmaps", {}, ["quiet-backbone"]),
            ("keypoint_tokens", "labels and keypoint tokens", {}, terms_of("cc", "keypoint_tokens")),
            ("normed", "all four, tokens behind a layer norm", {}, ["normed-tokens"]))},
    "teacher-photos": {
        "told-first-teacher": told_of_photos("all four of the first teacher, of one set",
                                             teacher=FIRST_TEACHER)},
    "control-photos": {
        "small-gd": told_of_photos("**1 + z**", mixer=GD, **LABELS),
        "small-gd-constant": told_of_photos("ones: the static control", "constant", mixer=GD, **LABELS)},
    "attention-photos": {
        f"told-attention-alone{name}": told_of_photos(
            f"rate {RATES[name]}", mixer=SELF_ATTENTION, lr=float(RATES[name]), **LABELS)
        for name in ("", "-half-rate", "-quarter-rate")},
    "tokens": {
        "cc-gs-raw-as-distilpose": ("raw, a1 = a2 = 5e-4 (DistilPose)", GS,
                                    ["raw-tokens", *token_weights("cc", 5e-4, 5e-4)]),
        **{f"cc-gs-raw-{a}": (f"raw, a1 = {a}, a2 = a1 / 3", GS,
                              ["raw-tokens", *token_weights("cc", a, a / 3)])
           for a in (0.1, 0.3, 1, 3)},
        "cc-gs-all": ("**standardised**, a1 = 3, a2 = 1", GS, [])},
}


def parts_runs(groups=tuple(CELLS), seeds=SEEDS, data=None):
    """{name: flags of train.py and changes}; data: folders, without which there are no groups of photos."""
    if unknown := [group for group in groups if group not in CELLS]:
        raise BadInput(f"there is no group {unknown[0]}: choose of {', '.join(CELLS)}")
    if not data and list(groups) != list(CELLS):
        refuse(*((group.endswith("-photos"), f"{group} needs photos: name their folders with --data")
                 for group in groups))
    if not FIRST_TEACHER.exists():
        refuse(("teacher-photos" in groups and list(groups) != list(CELLS),
                f"teacher-photos needs {FIRST_TEACHER}: --help says how it is made"))
        if data and "teacher-photos" in groups:
            print(f"left out: teacher-photos, which needs {FIRST_TEACHER}: --help says how it is made")
        groups = [group for group in groups if group != "teacher-photos"]
    runs = {}
    for seed, group in product(seeds, groups):
        photos = {"epochs": PHOTO_EPOCHS, "data": data} if group.endswith("-photos") else {}
        for cell, (_, flags, changes) in CELLS[group].items() if data or not photos else ():
            runs[f"parts-{cell}-{seed}"] = {"epochs": EPOCHS, **photos, **flags, "seed": seed,
                                            "changes": changes}
    return runs


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: parts_runs(args.groups or CELLS, args.seeds, args.data),
        ("groups", dict(nargs="*", help=f"of {', '.join(CELLS)} (default: all)")),
        ("--data", dict(type=Path, nargs="+", help="folders of photos, joined (default: no photos)")),
        ("--seeds", dict(type=int, nargs="+", default=SEEDS, help="seeds of the runs (default: 0 1 2)"))))
