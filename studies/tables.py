"""The tables of README and docs, made of results/.

    python studies/tables.py  # writes between the marks <!-- table NAME --> and <!-- end --> of PAGES

These are of drawn.py, parts.py, photos.py, paper.py, speed.py and evaluate.py --json. A blank cell has not
been run.
"""

import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import BadInput, CommandLine, main_with_clear_errors
from costs import PAPER, count_multiply_adds
from models import FILTERS, PRESETS, STUDENTS, build_teacher
from parts import CELLS, TERMS
from photos import ROWS
from results import RESULTS, by_set, pckh, read, result
from speed import Timing, ratios_table, speed_table, table
from sweep import ROOT, SEEDS, name_of
from train import RECIPES

HEADS = {"reg": "regression", "cc": "SimCC"}
MIXERS = {"gs": "static filter (GS)", "gd": "dynamic filter (GD)", "attention": "attention"}
HEADINGS = {"dynamic": "M sees", "dynamic-photos": "on photos, M sees",
            "labels-photos": "SimCC's labels, on photos", "attention": "cc from labels alone",
            "mixers": "cc distilled", "long": "4,000 steps", "terms": "learns from",
            "terms-photos": "`cc gs none` learns from", "backbone-photos": "`cc gs w24` learns from",
            "teacher-photos": "`cc gs none` learns from", "control-photos": "`cc gd none`, M sees",
            "attention-photos": "`cc attention none`", "tokens": "the teacher's tokens"}
# the rows of a group that are in docs/results.md; all are in docs/lab.md
DECISIVE = {"dynamic": ("gd", "gd-constant", "gd-keypoint-mean"),
            "terms": [*(f"cc-gs-{name}" for name in ("alone", *TERMS, "all")),
                      "reg-gs-alone", "reg-gs-confidence", "reg-gs-all"]}
# small-64: what students have from the teacher beside labels, and its name in the table
STARTS = {"alone": "labels", "started": "labels, weights", "distilled": "labels, weights, terms"}
PAPERS_BACKBONE = {"none": "none", "w24": "w32"}       # what our backbones are set beside
MACHINES = "speed-epyc", "speed-epyc-avx2", "speed-xeon"       # entries of results/speed.json
MPII_PEOPLE = 22246      # of its training split
RATE = 1e14         # operations a second: a tenth of what NVIDIA states for an H200 in bfloat16 (989 TFLOP/s)


def scores(names, threshold, kind="scores"):
    """PCKh of those of the runs that are done. kind: or flip_test."""
    return [pckh(run, threshold, scores=kind) for run in map(result, names) if run]


def by_seed(name):
    """{seed: entry} of the runs NAME-SEED that are done."""
    return {seed: run for seed in SEEDS if (run := result(f"{name}-{seed}"))}


def gain(alone, told):
    """'+7.3': mean difference of {seed: PCKh} over the seeds that both have; blank where there is none."""
    both = alone.keys() & told.keys()
    return f"{statistics.mean(told[seed] - alone[seed] for seed in both):+.1f}" if both else ""


def mean_and_spread(values, digits=1):
    """'54.3 ± 0.8': mean and standard deviation; blank where nothing was run."""
    values = list(values)
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


# ------------------------------------------------------------------------------- drawings and photos

def headline_table():
    """The README's: six students without a backbone, from labels alone and with the teacher's four terms."""
    rows = []
    for student, filter in product(STUDENTS, FILTERS):
        drawn = [mean_and_spread(scores([f"drawn-{name_of(student, filter, distill, 0)}"], 0.5))
                 for distill in (False, True)]
        real = [mean_and_spread(scores([f"photos-{student}-{filter}-none-{column}-0"], 0.5))
                for column in ("alone", "terms")]
        title = f"{HEADS[student]}, {MIXERS.get(filter, filter)}"
        rows.append([title, *drawn, *real, paper_scores(student, filter)])
    return table(["student", "synthetic: labels", "and terms", "photos: labels", "and terms",
                  "the paper, MPII"], rows)


def paper_scores(student, filter, backbone="none"):
    """'40.07 → 65.3': PCKh@0.5 in the paper, alone and distilled; or blank."""
    return next((f"{row[3]:g} → {row[4]:g}" for row in PAPER if row[:3] == (student, filter, backbone)), "")


def drawn_table():
    """Six students, without and with the teacher. †: seeds 1 and 2 are of older code (results.md: which)."""
    mark = lambda cell: cell + "†" * ("±" in cell)
    rows = []
    for student, filter in product(STUDENTS, FILTERS):
        cells = []
        for threshold in (0.5, 0.1):
            alone, distilled = (
                {seed: pckh(run, threshold)
                 for seed, run in by_seed(f"drawn-{student}-{filter}-{column}").items()}
                for column in ("alone", "distilled"))
            cells += [mark(mean_and_spread(alone.values())), mark(mean_and_spread(distilled.values())),
                      gain(alone, distilled)]
        rows.append([student, filter, *cells, paper_scores(student, filter)])
    return table(["student", "filter", "@0.5 alone", "distilled", "gain", "@0.1 alone", "distilled", "gain",
                  "the paper's @0.5, on MPII"], rows) + scored_epochs(
        [f"drawn-{name_of(student, filter, distill, seed)}"
         for student, filter, distill, seed in product(STUDENTS, FILTERS, (True, False), SEEDS)])


def scored_epochs(names):
    """A footnote where runs were scored at different epochs, else empty; names end in the seed."""
    seeds_of = {}                                    # epochs -> seeds of the runs that were scored at these
    for name in names:
        if run := result(name):
            seeds_of.setdefault(tuple(run["log"]["epoch"]), []).append(name.rpartition("-")[2])
    if len(seeds_of) < 2:
        return ""
    usual, *others = sorted(seeds_of, key=lambda epochs: -len(seeds_of[epochs]))
    return (f"\n\nScored at epochs {', '.join(map(str, usual))}, of which the best counts; but "
            + "; ".join(f"{seeds_of[epochs].count(seed)} of "
                        f"{sum(seeds.count(seed) for seeds in seeds_of.values())} "
                        f"runs of seed {seed} at {', '.join(map(str, epochs))}"
                        for epochs in others for seed in sorted(set(seeds_of[epochs]))) + ".")


def real_people_table():
    """The rows of photos.py: PCKh@0.5, the mean of the validation sets and each; beside the paper's."""
    rows, sets = [], list(dict.fromkeys(name for run in read("photos").values() for name in by_set(run)))
    for row in ROWS:
        student, filter, backbone = row.split("-")
        runs = {column: by_seed(f"photos-{row}-{column}") for column in ("alone", "terms", "weights")}
        means = {column: {seed: pckh(run) for seed, run in runs[column].items()} for column in runs}
        both = runs["alone"].keys() & runs["terms"].keys()                 # seeds
        arrows = [" → ".join(f"{statistics.mean(pckh(run, data=name) for run in having):.1f}"
                             for column in ("alone", "terms")
                             if (having := [run for seed, run in runs[column].items()
                                            if name in by_set(run) and (seed in both or not both)]))
                  for name in sets]
        rows.append([student, filter, backbone, mean_and_spread(means["alone"].values()),
                     mean_and_spread(means["terms"].values()), gain(means["alone"], means["terms"]),
                     mean_and_spread(means["weights"].values()), *arrows,
                     paper_scores(student, filter, PAPERS_BACKBONE[backbone])])
    return table(["student", "mixer", "backbone", "labels", "labels, terms", "gain", "and weights",
                  *(f"{name}: labels → terms" for name in sets), "the paper, MPII"], rows)


def compared_table():
    """Six students of preset small-64 on photos: what the teacher's weights give, and what its terms."""
    rows = []
    for student, filter in product(STUDENTS, FILTERS):
        names = {start: [f"small-64-{student}-{filter}-{start}-{seed}" for seed in SEEDS] for start in STARTS}
        rows.append([student, filter, *(mean_and_spread(scores(names[start], threshold))
                                        for threshold in (0.5, 0.1) for start in STARTS)])
    return table(["student", "mixer", *(f"@{threshold} {title}" for threshold in (0.5, 0.1)
                                        for title in STARTS.values())], rows)


# ------------------------------------------------------------------------------- what each part is worth

def parts_table(group, decisive=False):
    """The cells of a group of parts.py that were run: PCKh, and what is asked of the part."""
    kind = group.removesuffix("-photos")
    of_filters = ["deviation by block", "dead by block", "frozen"], dynamic_cells
    of_terms = ["ECE", "AUROC"], confidence_cells
    more, about = {"dynamic": of_filters, "control": of_filters,
                   "terms": of_terms, "teacher": of_terms}.get(kind, ([], None))
    rows = []
    for cell in DECISIVE[group] if decisive else CELLS[group]:
        names = [f"parts-{cell}-{seed}" for seed in SEEDS]
        if runs := [run for run in map(result, names) if run]:
            rows.append([CELLS[group][cell][0], str(len(runs)), *(mean_and_spread(scores(names, threshold))
                                                                  for threshold in (0.5, 0.1)),
                         *(about(runs) if about else [])])
    return table([HEADINGS[group], "seeds", "PCKh@0.5", "@0.1", *more], rows)


def dynamic_cells(runs):
    """What M does over images (dynamic.py), by block, and what PCKh loses with M at its mean."""
    means = [", ".join(f"{statistics.mean(run['dynamic']['blocks'][block][key] for run in runs):.2f}"
                       for block in range(PRESETS["tiny"].depth)) for key in ("deviation", "dead")]
    return [*means, mean_and_spread([run["dynamic"]["frozen"] - run["dynamic"]["live"] for run in runs], 2)]


def confidence_cells(runs):
    """How good the confidences are (confidence.py); a dash where no term trains them."""
    if all(run["confidence"]["auroc"] == 0.5 for run in runs):
        return ["–", "–"]
    return [mean_and_spread([run["confidence"][key] for run in runs], 2) for key in ("ece", "auroc")]


# ------------------------------------------------------------------------------- the paper's rows, and speed

def paper_table():
    """All rows of the paper's Tables A and B, the paper's figures beside those measured here."""
    costs = read("costs")                            # of evaluate.py --costs --json results/costs.json
    rows = []
    for i, (student, filter, backbone, alone, distilled, parameters, gflops, fps) in enumerate(PAPER):
        mpii = [mean_and_spread(scores([f"mpii-{student}-{filter}-{backbone}-{side}"], 0.5, "flip_test"))
                for side in ("alone", "distilled")]
        here = costs["rows"][i] if costs else None
        rows.append([student, filter, backbone, f"{alone:g} → {distilled:g}",
                     " → ".join(mpii).strip() if any(mpii) else "",
                     f"{parameters:g}", f"{here['params_m']:.3f}" if here else "",
                     f"{gflops:g}", f"{here['gflops']:.3f}" if here else "",
                     f"{fps}", f"{here['fps']:.1f}" if here and here["fps"] else ""])
    return table(["student", "filter", "backbone", "PCKh, paper", "MPII, here",
                  "M parameters, paper", "here", "GFLOPs, paper", "here", "fps, paper", "fps, here"], rows)


def hours_table():
    """Hours to train the paper's rows, alone and distilled: by the paper's GFLOPs, and as measured."""
    teacher = count_multiply_adds(build_teacher("paper"))
    networks = {"teacher": (("mpii-teacher", 3 * teacher),)}           # backward is twice the work of forward
    for student, filter, backbone, _, _, _, gflops, _ in PAPER:
        name, alone = f"mpii-{student}-{filter}-{backbone}", 3 * 1e9 * gflops
        networks[f"{student} {filter} {backbone}"] = ((f"{name}-alone", alone),
                                                      (f"{name}-distilled", alone + teacher))
    images, rows = RECIPES["paper"]["epochs"] * MPII_PEOPLE, []
    for title, runs in networks.items():
        operations = [2 * multiply_adds for _, multiply_adds in runs]
        rates = [run["images_per_second"] for run in (result(name) for name, _ in runs) if run]
        rows.append([title, " / ".join(f"{count / 1e9:.0f}" for count in operations),
                     " / ".join(f"{count * images / RATE / 3600:.1f}" for count in operations),
                     " / ".join(f"{rate:.0f} ({images / rate / 3600:.1f})" for rate in rates)])
    total = 2 * sum(multiply_adds for runs in networks.values() for _, multiply_adds in runs)
    rows.append(["all 33 runs", "", f"{total * images / RATE / 3600:.0f}", ""])
    return table(["network: alone / distilled", "billion operations an image", "hours at 100 TFLOP/s",
                  "measured: images a second (hours of 300 epochs)"], rows)


def of_machine(make, name):
    """make(list of Timing) of an entry that speed.py --save wrote, and a line on its machine."""
    entry = result(name) or {"timings": []}
    timings = [Timing(*(timing[field] for field in Timing._fields)) for timing in entry["timings"]]
    return make(timings) + (f"\n\n{entry['machine']}" if "machine" in entry else "")


# ------------------------------------------------------------------------------- the pages

TABLES = {"headline": headline_table, "drawn": drawn_table, "compared": compared_table,
          "real": real_people_table,
          "paper": paper_table, "hours": hours_table,
          **{name: partial(of_machine, speed_table, name) for name in MACHINES},
          **{f"{name}-ratios": partial(of_machine, ratios_table, name) for name in MACHINES},
          **{group: partial(parts_table, group) for group in CELLS},
          **{f"{group}-decisive": partial(parts_table, group, decisive=True) for group in DECISIVE}}
PAGES = {"README.md": ("headline",),
         "docs/results.md": ("drawn", "real", "dynamic-decisive", "terms-decisive", "paper"),
         "docs/lab.md": (*CELLS, "compared"),
         "docs/mpii.md": ("hours",),
         "docs/speed.md": (*MACHINES, *(f"{name}-ratios" for name in MACHINES))}


def write_tables(page, names):
    """Replace what stands between <!-- table NAME --> and <!-- end --> of a page, for each of the names."""
    text = page.read_text(encoding="utf-8")
    for name in names:
        head, mark, rest = text.partition(f"<!-- table {name} -->\n")
        if not mark or "<!-- end -->" not in rest:
            raise BadInput(f"{page} has no place for the table '{name}': "
                           f"lines <!-- table {name} --> and <!-- end -->")
        text = head + mark + "\n" + TABLES[name]() + "\n\n" + rest[rest.index("<!-- end -->"):]
    page.write_text(text, encoding="utf-8")
    print(f"{page}: {', '.join(names)} written from {RESULTS.name}/")


def main():
    CommandLine(__doc__).parse_args()
    for page, names in PAGES.items():
        write_tables(ROOT / page, names)


if __name__ == "__main__":
    main_with_clear_errors(main)
