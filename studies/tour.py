"""Run the snippets of docs/tour.md and draw its pictures; matplotlib is needed (requirements-extra.txt).

    python studies/tour.py                   # docs/tour/*.png, in seconds
"""

import io
import re
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import CommandLine, check_writable, main_with_clear_errors
from distill import WEIGHTS, coordinate_labels, marginals
from pictures import pyplot, response
from images import LIMBS

PAGE = ROOT / "docs" / "tour.md"
GREY, BLUE, ORANGE = "0.55", "tab:blue", "tab:orange"


def snippets(page=PAGE):
    """The page's Python snippets in order -> pairs (code, what the page says that it prints)."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)


def run_snippets(page=PAGE):
    """Run them in one namespace, in the repository's folder -> (namespace, list of what each printed)."""
    namespace, printed = {}, []
    for code, _ in snippets(page):
        with redirect_stdout(io.StringIO()) as out, chdir(ROOT):
            exec(compile(code, str(page), "exec"), namespace)
        printed.append(out.getvalue())
    return namespace, printed


def three_colours(grid):
    """Tokens (H, W, D) -> RGB (H, W, 3) in [0, 1]: their three main directions."""
    flat = grid.flatten(0, 1) - grid.flatten(0, 1).mean(0)
    scores = torch.pca_lowrank(flat, 3, center=False, niter=8)[0]
    low, high = scores.quantile(0.02, 0), scores.quantile(0.98, 0)
    return ((scores - low) / (high - low)).clamp(0, 1).view(*grid.shape[:2], 3).numpy()


def crop_of(tour):
    return tour["batch"].images[0].permute(1, 2, 0).numpy()


def show(panel, image, title, **options):
    drawn = panel.imshow(image, **options)
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])
    return drawn


def crop(plt, tour):
    figure, panel = plt.subplots(figsize=(3.4, 3.4))
    show(panel, crop_of(tour), "crop, 64 x 64 pixels")
    for edge in range(8, 64, 8):
        panel.axhline(edge - 0.5, color="white", lw=0.4, alpha=0.7)
        panel.axvline(edge - 0.5, color="white", lw=0.4, alpha=0.7)
    where = 64 * tour["batch"].xy[0].numpy() - 0.5
    for a, b, colour in LIMBS:
        panel.plot(*where[[a, b]].T, color=np.array(colour) / 255, lw=1.5)
    panel.plot(*where.T, "o", color="white", markeredgecolor="black", ms=4)
    return figure


def tokens(plt, tour):
    figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2.9), width_ratios=(8, 10))
    show(left, crop_of(tour), "crop")
    show(right, three_colours(tour["grid"][0]), "token grid, 8 x (8 + 2)")
    right.axvline(7.5, color="white", lw=2)
    return figure


def spectrum(plt, tour):
    figure, panel = plt.subplots(figsize=(3.6, 2.9))
    T = tour["spectrum"][0]
    magnitude = response(T.real, T.imag).log10()
    figure.colorbar(show(panel, magnitude, "log10 |T(X)|, mean of 96 channels", cmap="magma"), ax=panel)
    return figure


def filters(plt, tour):
    figure, panels = plt.subplots(1, 2, figsize=(6.4, 2.7))
    both = (tour["K"], "static, |K|"), (tour["K_hat"][0], "dynamic for this image, |K̂|")
    for panel, (K, title) in zip(panels, both):
        figure.colorbar(show(panel, response(K.real, K.imag), title, cmap="magma"), ax=panel)
    return figure


def filtered(plt, tour):
    before, after = tour["grid"][0], tour["seen"]["mixed"][0]
    channels = after[:, :8].flatten(0, 1).std(0).argsort(descending=True)[:4]      # where most happens
    figure, rows = plt.subplots(2, 4, figsize=(7, 3.5))
    for row, grid, what in zip(rows, (before, after), ("X", "X'")):
        for panel, channel in zip(row, channels):
            largest = grid[..., channel].abs().max()
            colours = dict(cmap="RdBu_r", vmin=-largest, vmax=largest)
            show(panel, grid[..., channel], f"{what}, channel {channel}", **colours)
            panel.axvline(7.5, color="black", lw=1)
    return figure


def simcc(plt, tour):
    joint, head = tour["JOINT"], tour["student"].head
    labels = coordinate_labels(tour["batch"].xy, head.sigma, tour["x"].shape[-1])
    teacher = marginals(tour["raw"].heatmaps[tour["one"]], tour["x"].shape[-1])
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.4), sharey=True)
    logits = tour["x"], tour["y"]
    for panel, name, label, student, marginal in zip(panels, "xy", labels, logits, teacher):
        bins = (np.arange(label.shape[-1]) + 0.5) / 2 - 0.5
        panel.fill_between(bins, label[0, joint], color=GREY, alpha=0.4, label="label")
        panel.plot(bins, student.softmax(-1)[0, joint], color=BLUE, label="student")
        panel.plot(bins, marginal[0, joint], color=ORANGE, label="teacher")
        panel.set_xlabel(f"{name} in pixels of the crop")
    panels[0].set_ylabel("probability")
    panels[0].legend(fontsize=8)
    return figure


def heatmap(plt, tour):
    figure, panels = plt.subplots(1, 2, figsize=(6, 3))
    maps = tour["raw"].heatmaps[tour["PERSON"]]
    both = (maps[tour["JOINT"]], "right wrist"), (maps.amax(0), "all 16 joints")
    for panel, (seen, title) in zip(panels, both):
        show(panel, crop_of(tour).mean(-1), title, cmap="gray", extent=(0, 1, 1, 0))
        opacity = 0.25 + 0.75 * seen.clamp(0, 1).numpy()
        panel.imshow(seen, cmap="inferno", alpha=opacity, extent=(0, 1, 1, 0), vmin=0, vmax=1)
    return figure


def terms(plt, tour):
    weights = {"task": 1} | WEIGHTS["cc"]
    values = {name: value.item() for name, value in tour["terms"].items() if name in weights}
    figure, panel = plt.subplots(figsize=(6, 2.4))
    places = np.arange(len(values))
    panel.barh(places - 0.2, list(values.values()), 0.38, color=GREY, label="term")
    weighted = [weights[name] * value for name, value in values.items()]
    panel.barh(places + 0.2, weighted, 0.38, color=BLUE, label="times its weight")
    panel.set_yticks(places, [f"{name} ({weights[name]:g})" for name in values])
    panel.invert_yaxis()
    panel.legend(fontsize=8)
    return figure


PICTURES = {"1-crop": crop, "2-tokens": tokens, "3-spectrum": spectrum, "4-filter": filters,
            "5-filtered": filtered, "6-simcc": simcc, "7-heatmap": heatmap, "8-terms": terms}


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--out", type=Path, default=PAGE.with_suffix(""), help="folder (default: docs/tour/)")
    args = parser.parse_args()
    plt = pyplot()
    check_writable(args.out, "--out ")
    args.out.mkdir(parents=True, exist_ok=True)
    tour, printed = run_snippets()
    for number, ((_, promised), output) in enumerate(zip(snippets(), printed), 1):
        if output != promised:
            print(f"snippet {number} of {PAGE.name} printed\n{output}where the page says\n{promised}")
    for name, draw in PICTURES.items():
        figure = draw(plt, tour)
        figure.tight_layout()
        figure.savefig(args.out / f"{name}.png", dpi=100)
        plt.close(figure)
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main_with_clear_errors(main)
