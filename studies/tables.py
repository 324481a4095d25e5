"""The tables of README and docs, from results/: what drawn.py, photos.py, paper.py, speed.py and
evaluate.py --json wrote there.

    python studies/tables.py  # writes between the marks <!-- table NAME --> and <!-- end --> of PAGES

A blank cell has not been run.
"""

import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import BadInput, CommandLine, main_with_clear_errors
from evaluate import GROUPS, PAPER, count_multiply_adds
from models import FILTERS, PRESETS, STUDENTS, build_teacher
from parts import CELLS
from photos import PHOTO_STUDENTS, STARTS, TAKEN_APART
from speed import Timing, ratios_table, speed_table
from sweep import RESULTS, ROOT, SEEDS, name_of, result, table
from train import RECIPES

HEADS = {"reg": "regression", "cc": "SimCC"}
MIXERS = {"gs": "static filter (GS)", "gd": "dynamic filter (GD)", "attention": "attention"}
DYNAMIC = "dynamic", "dynamic-photos", "join"        # groups of parts.py of which M's liveliness is asked
HEADINGS = {"dynamic": "M sees", "dynamic-photos": "on photos, M sees",
            "recipe-photos": "small-64 on photos, cc gd from labels", "join": "static and dynamic filter",
            "attention": "cc from labels alone", "mixers": "cc distilled", "long": "4,000 steps",
            "terms": "learns from", "tokens": "the teacher's tokens"}
MACHINES = "speed", "speed-avx2", "speed-amx"    # files of speed.py in results/
MPII_PEOPLE = 22246      # of its training split
RATE = 1e14         # operations a second: a tenth of what NVIDIA states for an H200 in bfloat16 (989 TFLOP/s)


def scores(names, threshold):
    """PCKh of those of the runs that are done."""
    return [found["scores"][f"pckh@{threshold}"]["mean"] for found in map(result, names) if found]


def mean_and_spread(values, digits=1):
    """'54.3 ± 0.8': mean and standard deviation; blank where nothing was run."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def scored_epochs(names):
    """A footnote where runs were scored at different epochs, else empty; names end in the seed."""
    scored = {}                                      # epochs -> seeds of the runs that were scored at these
    for name in names:
        epochs = tuple(line["epoch"] for line in (result(name) or {}).get("log", ()) if "pckh@0.5" in line)
        if epochs:
            scored.setdefault(epochs, []).append(name.rpartition("-")[2])
    if len(scored) < 2:
        return ""
    most, *others = sorted(scored, key=lambda epochs: -len(scored[epochs]))
    return (f"\n\nScored at epochs {', '.join(map(str, most))}, of which the best counts; but "
            + "; ".join(f"{scored[epochs].count(seed)} of {sum(of.count(seed) for of in scored.values())} "
                        f"runs of seed {seed} at {', '.join(map(str, epochs))}"
                        for epochs in others for seed in sorted(set(scored[epochs]))) + ".")


def headline_table():
    """The README's: six students on drawings (tiny) and on photos (small-64), alone and with the teacher."""
    rows = []
    for student, filter in product(STUDENTS, FILTERS):
        names = partial(name_of, student, filter)
        cells = [mean_and_spread(scores([f"{data}-{names(distill, seed)}" for seed in SEEDS], 0.5))
                 for data in ("drawn", "small-64") for distill in (False, True)]
        title = f"{HEADS[student]}, {MIXERS.get(filter, filter)}"
        rows.append([title, *cells, paper_scores(student, filter)])
    return table(["student", "drawings, alone", "distilled", "photos, alone", "distilled", "the paper, MPII"],
                 rows)


def paper_scores(student, filter):
    """'40.07 → 65.3': PCKh@0.5 in the paper of a student without backbone, alone and distilled; or blank."""
    return next((f"{row[3]:g} → {row[4]:g}" for row in PAPER if row[:3] == (student, filter, "none")), "")


def drawn_table():
    """Six students, without and with the teacher."""
    rows = []
    for student, filter in product(STUDENTS, FILTERS):
        cells = []
        for threshold in (0.5, 0.1):
            alone, distilled = (
                scores([f"drawn-{name_of(student, filter, distill, seed)}" for seed in SEEDS], threshold)
                for distill in (False, True))
            both = alone and distilled
            gain = f"{statistics.mean(distilled) - statistics.mean(alone):+.1f}" if both else ""
            cells += [mean_and_spread(alone), mean_and_spread(distilled), gain]
        rows.append([student, filter, *cells, paper_scores(student, filter)])
    return table(["student", "filter", "@0.5 alone", "distilled", "gain", "@0.1 alone", "distilled", "gain",
                  "the paper's @0.5, on MPII"], rows) + scored_epochs(
        [f"drawn-{name_of(student, filter, distill, seed)}"
         for student, filter, distill, seed in product(STUDENTS, FILTERS, (True, False), SEEDS)])


def parts_table(group):
    """The cells of a group of parts.py that were run: PCKh, and what is asked of the part."""
    def mean_of(found, value):
        return mean_and_spread([value(each) for each in found], 2)

    rows, blocks = [], range(PRESETS["tiny"].depth)
    for cell, (title, *_) in CELLS[group].items():
        names = [f"parts-{cell}-{seed}" for seed in SEEDS]
        found = [each for each in map(result, names) if each]
        if not found:
            continue
        row = [title, str(len(found)), *(mean_and_spread(scores(names, t)) for t in (0.5, 0.1))]
        if group == "terms":
            constant = all(run["confidence"]["auroc"] == 0.5 for run in found)       # no term trains it
            row += ["–" if constant else mean_of(found, lambda run, key=key: run["confidence"][key])
                    for key in ("ece", "auroc")]
        elif group in DYNAMIC:
            row += [", ".join(f"{statistics.mean(run['dynamic']['blocks'][b][key] for run in found):.2f}"
                              for b in blocks) for key in ("deviation", "dead")]
            row += [mean_of(found, lambda run: run["dynamic"]["frozen"] - run["dynamic"]["live"])]
        rows.append(row)
    more = ["deviation by block", "dead by block", "frozen"] if group in DYNAMIC else []
    more = ["ECE", "AUROC"] if group == "terms" else more
    return table([HEADINGS[group], "seeds", "PCKh@0.5", "@0.1", *more], rows)


def photo_table():
    """Teacher and students on photos, joint by joint."""
    students = [(f"{student} {filter} {'distilled' if distill else 'alone'}",
                 f"photos-{name_of(student, filter, distill, 0)}")
                for (student, filter), distill in product(PHOTO_STUDENTS, (False, True))]
    pretrained = "cc gd distilled, pre-trained on drawn people"
    return joints_table(("teacher", "photos-teacher"), *students,
                        (pretrained, "photos-cc-gd-distilled-0-pretrained"),
                        (f"{pretrained}, 64 epochs of 16 views", "photos-cc-gd-distilled-0-long"))


def compared_table():
    """Six students of preset small-64 on photos: what the teacher's weights give, and what its terms."""
    rows = []
    for student, filter in product(STUDENTS, FILTERS):
        names = {start: [f"small-64-{student}-{filter}-{start}-{seed}" for seed in SEEDS] for start in STARTS}
        rows.append([student, filter, *(mean_and_spread(scores(names[start], threshold))
                                        for threshold in (0.5, 0.1) for start in STARTS)])
    return table(["student", "mixer", *(f"@{threshold} {title}" for threshold in (0.5, 0.1)
                                        for title in STARTS.values())], rows)


def joints_table(*titles):
    """The scores of runs by joint; titles: (what the row is called, name of its run). Blank where not run."""
    rows, joints = [], (*GROUPS, "mean")
    for title, name in titles:
        found = result(name)
        half = found["scores"]["pckh@0.5"] if found else {}
        rows.append([title, *(f"{half[joint]:.1f}" if half else "" for joint in joints),
                     *(f"{found[of][f'pckh@{t}']['mean']:.1f}" if found and of in found else ""
                       for of, t in (("flip_test", 0.5), ("scores", 0.1), ("flip_test", 0.1)))])
    return table(["network", *joints, "flip test", "mean @0.1", "flip test"], rows)


def photo_parts_table():
    """One student of photos and what it is shown."""
    titles = {"upright": "`upright`: turned by up to 20 degrees, zoomed by a tenth, mirrored",
              "tokenpose": "`tokenpose`: turned by up to 60 degrees, zoomed by a quarter, mirrored",
              "colour": "`colour`: that, and light and colours",
              "occlusion": "`occlusion`: that, and a part of half of them hidden"}
    prefix = "photos-" + "-".join(TAKEN_APART)
    rows = [[title, *(mean_and_spread(scores([f"{prefix}-{part}"], t)) for t in (0.5, 0.1))]
            for part, title in titles.items()]
    return table([f"{' '.join(TAKEN_APART)} distilled on photos", "PCKh@0.5", "PCKh@0.1"], rows)


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
        operations = [2 * work for _, work in runs]
        cells = [[f"{each / 1e9:.0f}" for each in operations],
                 [f"{each * images / RATE / 3600:.1f}" for each in operations], []]
        for name, _ in runs:
            seen = [line["images_per_second"] for line in (result(name) or {"log": []})["log"]]
            rate = statistics.median(seen) if seen else 0
            cells[2] += [f"{rate:.0f} ({images / rate / 3600:.1f})"] if rate else []
        rows.append([title, *map(" / ".join, cells)])
    total = 2 * sum(work for runs in networks.values() for _, work in runs) * images / RATE / 3600
    rows.append(["all 33 runs", "", f"{total:.0f}", ""])
    return table(["network: alone / distilled", "billion operations an image", "hours at 100 TFLOP/s",
                  "measured: images a second (hours of 300 epochs)"], rows)


def paper_table():
    """The paper's 16 rows beside those measured here; costs.json: what evaluate.py --costs --json wrote."""
    costs = result("costs")
    rows = []
    for i, (student, filter, backbone, alone, distilled, parameters, gflops, fps) in enumerate(PAPER):
        mpii, photos = ([mean_and_spread(scores([f"{data}-{student}-{filter}-{backbone}-{side}"], 0.5))
                         for side in ("alone", "distilled")] for data in ("mpii", "lspet"))
        here = costs["rows"][i] if costs else None
        rows.append([student, filter, backbone, f"{alone:g} → {distilled:g}",
                     *(" → ".join(pair).strip() if any(pair) else "" for pair in (mpii, photos)),
                     f"{parameters:g}", f"{here['params_m']:.3f}" if here else "",
                     f"{gflops:g}", f"{here['gflops']:.3f}" if here else "",
                     f"{fps}", f"{here['fps']:.1f}" if here and here["fps"] else ""])
    return table(["student", "filter", "backbone", "PCKh, paper", "MPII, here", "Leeds photos, here",
                  "M parameters, paper", "here", "GFLOPs, paper", "here", "fps, paper", "fps, here"], rows)


def of_machine(make, name):
    """make(list of Timing) of what speed.py --json wrote to results/NAME.json, and a line on its machine."""
    figures = result(name) or {"timings": []}
    timings = [Timing(*(timing[field] for field in Timing._fields)) for timing in figures["timings"]]
    return make(timings) + (f"\n\n{figures['machine']}" if "machine" in figures else "")


TABLES = {"headline": headline_table, "drawn": drawn_table, "photos": photo_table,
          "photo-parts": photo_parts_table, "compared": compared_table,
          "small": partial(joints_table, ("teacher", "small-teacher"),
                           ("cc gd distilled", "small-cc-gd-distilled-0")),
          "paper": paper_table, "hours": hours_table,
          **{name: partial(of_machine, speed_table, name) for name in MACHINES},
          **{f"{name}-ratios": partial(of_machine, ratios_table, name) for name in MACHINES},
          **{group: partial(parts_table, group) for group in CELLS}}
PAGES = {"README.md": ("headline",),
         "docs/results.md": ("drawn", *CELLS, "photos", "photo-parts", "small", "compared", "paper"),
         "docs/mpii.md": ("hours",),
         "docs/speed.md": (*MACHINES, *(f"{name}-ratios" for name in MACHINES))}


def write_tables(page, names):
    """Replace what stands between <!-- table NAME --> and <!-- end --> of a page, for each of the names."""
    text = page.read_text()
    for name in names:
        head, mark, rest = text.partition(f"<!-- table {name} -->\n")
        if not mark or "<!-- end -->" not in rest:
            raise BadInput(f"{page} has no place for the table '{name}': "
                           f"lines <!-- table {name} --> and <!-- end -->")
        text = head + mark + "\n" + TABLES[name]() + "\n\n" + rest[rest.index("<!-- end -->"):]
    page.write_text(text)
    print(f"{page}: {', '.join(names)} written from {RESULTS.name}/")


def main():
    CommandLine(__doc__).parse_args()
    for page, names in PAGES.items():
        write_tables(ROOT / page, names)


if __name__ == "__main__":
    main_with_clear_errors(main)
