"""Losses for the heatmap teacher compared: same network, images and steps for each.

    python studies/teacher_loss.py --steps 600            # about half an hour on two cores

    mse   mean squared error between the output and the Gaussian heatmap (HRNet, TokenPose)
    bce   binary cross-entropy, every cell of the heatmap a probability of its own
    ce    cross-entropy over positions, the heatmap as one distribution: what distill.heatmap_task does
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, fast_bfloat16, main_with_clear_errors
from crops import AUGMENTATIONS, heatmaps, make_batch, store
from distill import heatmap_task, over_visible
from evaluate import evaluate
from models import build_teacher
from synthetic import drawn_people
from train import rate_fraction

BATCH, RATE, PEOPLE = 32, 1e-3, 8000


def mse(logits, batch, head):
    target = heatmaps(batch.xy, head.sigma, head.size)
    return over_visible((logits - target).square().mean((-2, -1)), batch.visible)


def bce(logits, batch, head):
    target = heatmaps(batch.xy, head.sigma, head.size)
    found = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return over_visible(found.mean((-2, -1)), batch.visible)


def ce(logits, batch, head):
    return heatmap_task(logits, batch.xy, batch.visible, head.sigma)


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--steps", type=int, default=600, help=f"of {BATCH} samples each (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    args = parser.parse_args()
    train, valid = drawn_people("teacher", PEOPLE, 64, os.cpu_count()), drawn_people("valid", 500, 64)
    for loss in (mse, bce, ce):
        torch.manual_seed(args.seed)
        model = build_teacher("tiny").to(memory_format=torch.channels_last)
        crops, valid_crops = store(train, model.size), store(valid, model.size)
        optimiser = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=RATE)
        random = torch.Generator().manual_seed(args.seed)
        for step in range(args.steps):
            optimiser.param_groups[0]["lr"] = RATE * rate_fraction(step, args.steps)
            rows = torch.randint(len(train), (BATCH,), generator=random).numpy()
            params = AUGMENTATIONS["upright"].draw(PEOPLE, random)
            batch = make_batch(train, crops, rows, model.size, params=params)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16("cpu")):
                logits = model(batch.images).prediction
            value = loss(logits, batch, model.head)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        # The highest cell is the same before and after any rising activation, so one decoding serves all
        # three.
        found = evaluate(model, valid, valid_crops)
        half, tenth = (scores["mean"] for scores in found.values())
        print(f"{loss.__name__:4} PCKh@0.5 {half:6.2f}  PCKh@0.1 {tenth:5.2f}  "
              f"loss of the last step {value.item():.4f}", flush=True)


if __name__ == "__main__":
    main_with_clear_errors(main)
