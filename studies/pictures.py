"""Pictures of results, filters, samples and predictions; matplotlib is needed (requirements-extra.txt).

    python studies/pictures.py curves                           # PCKh by epoch, with and without the teacher
    python studies/pictures.py photo-curves                     # on photos, from labels and with the terms
    python studies/pictures.py filters --checkpoint GS.pt GD.pt  # frequency response of the filters
    python studies/pictures.py predictions --checkpoint FILE [--data DATA]  # best, median and worst samples
    python studies/pictures.py strip --checkpoint FILE  # good and typical predictions on drawings
    python studies/pictures.py finding  # how people are found in an image of three drawn ones
    python studies/pictures.py samples --data DATA [--split train]  # some samples with joints
    python studies/pictures.py drawings [--count 48 --seed 0 --size 64]  # drawings, and their rate

Each writes one file into --out (default: docs/; `drawings`, and pictures of --data, because of the photos'
licences, go to predictions/, which git ignores).
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
from common import BadInput, CommandLine, check_writable, main_with_clear_errors, optional, refuse
from crops import crop_matrix, cut, make_batch, store, transform
from data_mpii import load_samples
from dynamic import watch
from evaluate import SCORED, load_to_score, predict, validation_samples
from gfl import GlobalDynamicFilter, StaticFilter
from models import FILTERS, STUDENTS
from images import contact_sheet, draw_poses, draw_skeleton
from evaluate import prediction_sheet
from export import SHIPPED_STUDENT, for_inference
from people import box_of_joints, candidates, find_people, person_score, poses_in_boxes, windows
from photos import EPOCHS, ROWS
from results import result
from sweep import SEEDS, name_of
from synthetic import SERIES, draw_people, draw_person, drawn_people

RATIO = 0.5                  # of two people's filters: colours end at 2 to this power
SHOWN, SIZE = 24, 192        # samples of a data set, side of their crops
STRIP, TILE = 8, 160         # drawings in each row of the strip, side of their tiles
LARGER, TIGHTER = 4, 0.85    # the strip's drawings: pixels a side over the network's, shown part of the crop
SCENE = 0, 5, 22             # drawings side by side, in which people are found
COLUMNS = 6                  # samples in each row of the predictions: best, middling, worst


def pyplot():
    optional("matplotlib").use("Agg")
    import matplotlib.pyplot as plt
    return plt


def curves(args):
    """PCKh@0.5 by epoch on drawings, with the teacher and without."""
    def name(distill):
        return lambda title, seed: f"drawn-{name_of(*title.split(), distill, seed)}"

    blocks = [[f"{student} {filter}" for filter in FILTERS] for student in STUDENTS]
    return "curves.png", curves_of(blocks, {"distilled": name(True), "labels alone": name(False)},
                                   "1,000 held-out drawings", sharey=True)


def photo_curves(args):
    """PCKh@0.5 by epoch on photos, from labels alone and with the four terms; a block a backbone."""
    def name(column):
        return lambda title, seed: f"photos-{title.replace(' ', '-')}-{column}-{seed}"

    blocks = [[row.replace("-", " ") for row in ROWS if row.endswith(backbone)] for backbone in EPOCHS]
    names = {"labels, terms": name("terms"), "labels alone": name("alone")}
    return "photo-curves.png", curves_of(blocks, names, "mean of the validation people of three sets")


def curves_of(blocks, names, scored_on, sharey="row"):
    """A figure with a row of panels a block, a panel for each student that was run, a thin line for each run.

    blocks: lists of titles; a block of which nothing was run has no row. names: {label: function of title and
    seed that gives a run's name}, two of them. sharey: matplotlib's.
    """
    plt = pyplot()
    runs = {title: {label: [run for seed in SEEDS if (run := result(name(title, seed)))]
                    for label, name in names.items()} for title in sum(blocks, [])}
    blocks = [[title for title in block if any(runs[title].values())] for block in blocks]
    blocks = [block for block in blocks if block]
    if not blocks:
        raise BadInput("results/ has none of these runs: studies/drawn.py and studies/photos.py make them")
    figure, panels = plt.subplots(len(blocks), max(map(len, blocks)), squeeze=False, sharey=sharey,
                                  figsize=(10, 0.5 + 2.5 * len(blocks)))
    labels = {}
    for block, row in zip(blocks, panels):
        for panel in row[len(block):]:
            panel.axis("off")
        for title, panel in zip(block, row):
            for (label, made), colour in zip(runs[title].items(), ("tab:blue", "tab:orange")):
                for log in (run["log"] for run in made):
                    labels[label], = panel.plot(log["epoch"], log["pckh@0.5"], color=colour, lw=1)
            panel.set_title(title, fontsize=10)
            panel.set_xticks(sorted({epoch for line in panel.lines for epoch in line.get_xdata()}))
            panel.grid(alpha=0.3)
    panels[0, 0].legend(labels.values(), labels.keys(), fontsize=8)
    figure.supxlabel(f"epoch ({scored_on})")
    figure.supylabel("PCKh@0.5")
    return figure


def response(real, imag):
    """Filter of half a spectrum (H, F, D), W odd -> its mean magnitude, whole, frequency 0 in the middle."""
    H = len(real)
    opposite = (-torch.arange(H)) % H                                          # row u -> row -u
    real, imag = real.clone(), imag.clone()
    # of column 0 the inverse transform of a real output takes (K(u, 0) + conj K(-u, 0)) / 2
    real[:, 0] = (real[:, 0] + real[opposite, 0]) / 2
    imag[:, 0] = (imag[:, 0] - imag[opposite, 0]) / 2
    half = torch.hypot(real, imag).mean(-1)                                    # (H, F)
    mirror = half[opposite][:, 1:].flip(1)                                     # |K(-u, -f)| = |K(u, f)|
    return torch.cat([torch.roll(mirror, H // 2, 0), torch.roll(half, H // 2, 0)], 1)


@torch.inference_mode()
def filters(args):
    """Static filters of each network; for GD the dynamic filter for one person and its ratio to another's."""
    plt = pyplot()
    rows = []
    for path in args.checkpoint:
        model, _ = checkpoint.load(path)
        pair = validation_samples(args.data or "drawn", model.size, 2)
        batch = make_batch(pair, store(pair, model.size), np.arange(2), model.size)
        title = checkpoint.describe(model.config)
        static = [m for m in model.modules() if isinstance(m, StaticFilter)]
        if not static:
            raise BadInput(f"{path} ({title}) holds no filters to look at: name a gs or gd student")
        rows.append((f"{title}\nstatic", [response(m.K_real, m.K_imag) for m in static], None))
        dynamic = [m.dynamic for m in model.modules() if isinstance(m, GlobalDynamicFilter)]
        mixtures = [logits.softmax(1) for logits, _ in watch(model, lambda model=model: model(batch.images))]
        if dynamic:
            one, other = ([response(m.K_real @ M[n], m.K_imag @ M[n]) for m, M in zip(dynamic, mixtures)]
                          for n in range(2))
            images = batch.images.permute(0, 2, 3, 1)
            rows.append(("dynamic,\nthis person", one, images[0]))
            rows.append(("this person's\nover the other's", [b / a for a, b in zip(one, other)], images[1]))
    columns = 1 + max(len(maps) for _, maps, _ in rows)
    figure, panels = plt.subplots(len(rows), columns, figsize=(1.5 * columns, 1.6 * len(rows)), squeeze=False)
    for (title, maps, image), row in zip(rows, panels):
        for panel in row:
            panel.axis("off")
        if image is not None:
            row[0].imshow(image)
        row[0].set_title(title, fontsize=8)
        for n, (panel, seen) in enumerate(zip(row[1:], maps)):
            if "over" in title:      # a ratio: white where both are the same
                panel.imshow(seen.log2(), cmap="RdBu_r", vmin=-RATIO, vmax=RATIO)
            else:
                panel.imshow(seen.log(), cmap="magma")
            panel.set_title(f"layer {n + 1}", fontsize=8)
    return "filters.png", figure


def strip(args):
    """Two rows of drawings with predictions: the best of the held-out ones, and some around the median.

    The network sees crops of its own size; they are drawn once more, larger, to be looked at.
    """
    model, _, samples, stored = load_to_score(args.checkpoint[0], "drawn")
    joints, confidence = predict(model, samples, stored)
    order = by_error(samples, joints)
    middle = (len(order) - STRIP) // 2
    sheet = Image.new("RGB", (STRIP * TILE, 2 * TILE))
    for n, i in enumerate([*order[:STRIP], *order[middle:middle + STRIP]]):
        drawing = draw_person(SERIES["valid"], int(i), LARGER * model.size)
        center = LARGER * samples.center[i:i + 1] + (LARGER - 1) / 2
        side = TIGHTER * LARGER * samples.side[i:i + 1]
        matrix = crop_matrix(center, side, 2 * TILE)
        crop = Image.fromarray(cut(Image.fromarray(drawing.image), matrix[0], 2 * TILE))
        xy = transform(matrix, torch.from_numpy(LARGER * joints[i:i + 1] + (LARGER - 1) / 2))[0].numpy()
        draw_skeleton(crop, xy, np.ones(len(xy), bool), width=5, confidence=confidence[i])
        crop = crop.resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(crop, (n % STRIP * TILE, n // STRIP * TILE))
    return "strip.jpg", sheet


def by_error(samples, joints):
    """Rows of samples by the mean error of their scored joints, best first; those without labels left out."""
    error = np.linalg.norm(joints - samples.joints, axis=-1) / samples.head_size[:, None]
    error = np.where(samples.visible, error, np.nan)[:, SCORED]
    scored = np.flatnonzero(~np.isnan(error).all(1))
    return scored[np.argsort(np.nanmean(error[scored], axis=1))]


def predictions(args):
    """Held-out samples by mean error: best, median and worst, a row each; labels are white."""
    model, _, samples, stored = load_to_score(args.checkpoint[0], args.data or "drawn")
    joints, _ = predict(model, samples, stored)
    order = by_error(samples, joints)
    middle = (len(order) - COLUMNS) // 2
    chosen = np.concatenate([order[:COLUMNS], order[middle:middle + COLUMNS], order[-COLUMNS:]])
    name = f"predictions-{args.data.resolve().name if args.data else 'drawn'}.jpg"
    return name, prediction_sheet(samples, stored, chosen, joints, model.size, columns=COLUMNS, side=160)


def samples(args):
    """Some crops of a split, with their joints."""
    people = load_samples(args.data, args.split)
    print(f"{people.name}: {len(people):,} samples of {len(set(people.files)):,} images, "
          f"{people.visible.mean():.1%} of the joints labelled" + (f"; {people.note}" if people.note else ""))
    shown = np.unique(np.linspace(0, len(people) - 1, SHOWN).astype(int))
    matrix = crop_matrix(people.center[shown], people.side[shown], SIZE)
    crops = np.stack([cut(people.image(i), one, SIZE) for i, one in zip(shown, matrix)])
    joints = transform(matrix, torch.from_numpy(people.joints[shown]))
    sheet = contact_sheet(crops, (joints, people.visible[shown]))
    return f"samples-{args.data.resolve().name}-{args.split}.png", sheet


def drawings(args):
    """Drawn people with their joints."""
    if args.count < 1 or args.size < 16 or args.seed < 0:
        raise BadInput("--count must be at least 1, --size 16 and --seed 0")
    began = time.perf_counter()
    drawn = draw_people(args.count, args.seed, args.size, workers=1)
    print(f"{args.count / (time.perf_counter() - began):.0f} drawings a second on one core")
    margin = (drawn.image.shape[1] - args.size) // 2
    inner = drawn.image[:, margin:-margin, margin:-margin]
    return "drawings.png", contact_sheet(inner, (drawn.joints - margin, drawn.visible), columns=8, side=256)


def finding(args):
    """Windows, refined boxes, and who is found in the end, each box as dark as its person_score is high."""
    plt = pyplot()
    path = args.checkpoint[0] if args.checkpoint else SHIPPED_STUDENT
    model = for_inference(checkpoint.load(path)[0])
    drawn = drawn_people("valid", max(SCENE) + 1, 256)
    image = Image.fromarray(np.concatenate([np.asarray(drawn.image(i)) for i in SCENE], 1))
    seen = poses_in_boxes(model, image, windows(*image.size), tight=False)
    boxes = list(map(box_of_joints, candidates(seen)))
    found = find_people(model, image)
    titles = (f"{len(seen)} windows", f"the boxes of the joints in the {len(boxes)} best of them",
              f"two crops later: {len(found)} people")
    figure, panels = plt.subplots(3, figsize=(7, 7.4))
    for panel, title, people in zip(panels, titles, (seen, poses_in_boxes(model, image, boxes), found)):
        shown = image if panel is not panels[2] else draw_poses(image.copy(), found)
        panel.imshow(shown)
        for person in people:
            x, y, width, height = person.box
            score = person_score(person)
            panel.add_patch(plt.Rectangle((x, y), width, height, fill=False, edgecolor="tab:red",
                                          alpha=score ** 2, linewidth=1.5))
            if panel is not panels[0]:
                panel.text(x, y, f"{score:.2f}", color="tab:red", fontsize=8, va="bottom")
        panel.set_title(title, fontsize=9)
        panel.set_axis_off()
        panel.set_xlim(-40, image.width + 40)
        panel.set_ylim(image.height + 20, -40)
    return "finding.jpg", figure


PICTURES = {make.__name__.replace("_", "-"): make for make in (
    curves, photo_curves, filters, predictions, strip, samples, drawings, finding)}


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("what", choices=tuple(PICTURES))
    parser.add_argument("--checkpoint", type=Path, nargs="+", help="networks to look at")
    parser.add_argument("--data", type=Path, help="folder of photos (default: drawn people)")
    parser.add_argument("--split", choices=("train", "valid"), default="valid", help="(default: valid)")
    parser.add_argument("--count", type=int, default=48, help="how many drawings (default: 48)")
    parser.add_argument("--seed", type=int, default=0, help="which series of drawings (default: 0)")
    parser.add_argument("--size", type=int, default=64, help="side of its crop in pixels (default: 64)")
    parser.add_argument("--out", type=Path, help="folder (default: docs/; drawings, --data: predictions/)")
    args = parser.parse_args()
    private = args.data or args.what == "drawings"
    args.out = args.out or (Path("predictions") if private else Path(__file__).resolve().parents[1] / "docs")
    refuse((args.what == "samples" and not args.data, "samples need --data: a folder of photos"),
           (args.what == "strip" and args.data, "strip shows drawings: leave out --data"),
           (args.what in ("filters", "predictions", "strip") and not args.checkpoint,
            f"{args.what} need --checkpoint: which network to look at"))
    check_writable(args.out, "--out ")
    args.out.mkdir(parents=True, exist_ok=True)
    name, picture = PICTURES[args.what](args)
    if isinstance(picture, Image.Image):
        picture.save(args.out / name, quality=88)
    else:                                            # of matplotlib
        picture.tight_layout()
        picture.savefig(args.out / name, dpi=110)
    print(args.out / name)


if __name__ == "__main__":
    main_with_clear_errors(main)
