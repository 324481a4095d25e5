"""Is the dynamic filter dynamic? What M(X) of each block does over images, and what it is worth.

    python studies/dynamic.py weights/student-cc-gd-drawn.pt
    python studies/dynamic.py FILE --data DATA
    python studies/dynamic.py               # M in its first 300 steps: today's form, and what it replaced

    deviation   of M over images: standard deviation of each weight, mean over channels and basis filters
    dead        fraction of M's hidden units that are 0 for every image
    entropy     of the weights of a channel, in units of log N: 1 is an even mixture, 0 a single basis filter
    logits      their standard deviation around their mean over the N basis filters
    frozen      PCKh@0.5 with M replaced, in every block, by its mean over images
"""

import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
import gfl
import optim
from common import BadInput, CommandLine, main_with_clear_errors
from crops import make_batch, store
from distill import task_loss
from evaluate import evaluate, load_to_score
from gfl import DynamicFilter
from models import build_student
from synthetic import drawn_people
from train import RATE

PEOPLE, BATCH = 256, 16                          # drawings to learn from in `train_and_watch`, and of a step


def watch(model, run):
    """run() while M is watched -> its logits (images, N, E) and hidden units (images, hidden), by block."""
    filters = [module for module in model.modules() if isinstance(module, DynamicFilter)]
    seen = [([], []) for _ in filters]
    hooks = [layer.register_forward_hook(lambda _, inputs, output, keep=keep: keep.append(output.detach()))
             for dynamic, pair in zip(filters, seen, strict=True)
             for layer, keep in zip((dynamic.M2, dynamic.M1), pair, strict=True)]
    run()
    for hook in hooks:
        hook.remove()
    return [(torch.cat(logits).unflatten(-1, (gfl.BASIS_FILTERS, -1)), torch.cat(hidden).relu())
            for logits, hidden in seen]


def liveliness(logits, hidden):
    """-> {deviation, dead, entropy, logits} of one block, as the module's docstring says."""
    M = logits.softmax(1)
    entropy = -torch.xlogy(M, M).sum(1).mean() / torch.tensor(gfl.BASIS_FILTERS).log()
    dead = (hidden == 0).all(0).float().mean()
    return dict(deviation=float(M.std(0).mean()), dead=float(dead), entropy=float(entropy),
                logits=float((logits - logits.mean(1, keepdim=True)).std()))


def freeze(model, means):
    """Replace M of every block by a constant (N, E), in place."""
    filters = [module for module in model.modules() if isinstance(module, DynamicFilter)]
    for dynamic, mean in zip(filters, means, strict=True):
        dynamic.mixture = lambda x, mean=mean: mean.expand(len(x), -1, -1)


def liveliness_and_loss(model, samples, crops):
    """{'blocks': a liveliness each, 'live': PCKh@0.5, 'frozen': with M at its mean}; leaves M frozen."""
    scores = {}
    blocks = watch(model, lambda: scores.update(live=evaluate(model, samples, crops)))
    freeze(model, [logits.softmax(1).mean(0) for logits, _ in blocks])
    scores["frozen"] = evaluate(model, samples, crops)
    return dict(blocks=[liveliness(*block) for block in blocks],
                **{name: values["pckh@0.5"]["mean"] for name, values in scores.items()})


def train_and_watch(steps, standardised=True, muon=False):
    """Train a tiny cc gd student from labels; after each of `steps` yield it and what `watch` sees.

    standardised: M sees 1 + z, else the mean token (DFFormer). muon: M learns with Muon, not with Adam.
    """
    torch.manual_seed(0)
    samples, random = drawn_people("train", PEOPLE, 64), np.random.default_rng(0)
    crops, model = store(samples, 64), build_student("cc", "gd", "none", "tiny")
    adam_alone = optim.ADAM_ALONE
    optim.ADAM_ALONE = () if muon else adam_alone
    optimisers = optim.build_optimisers(model, "muon", RATE)
    optim.ADAM_ALONE = adam_alone
    for step in range(1, max(steps) + 1):
        for module in model.train().modules():
            if isinstance(module, DynamicFilter) and not standardised:
                module.norm.eval()                           # mean and variance stay 1
        batch = make_batch(samples, crops, np.sort(random.choice(PEOPLE, BATCH, replace=False)), 64)
        for optimiser in optimisers:
            optimiser.zero_grad()
        task_loss(model.head, model(batch.images).prediction, batch.xy, batch.visible, batch.empty).backward()
        for optimiser in optimisers:
            optimiser.step()
        if step in steps:
            images = make_batch(samples, crops, np.arange(PEOPLE // 2), 64).images
            with torch.inference_mode():
                seen = watch(model.eval(), lambda: model(images))
            yield model, seen


def print_training():
    """M after 50, 150 and 300 steps, in four forms."""
    steps = 50, 150, 300
    for standardised, muon in product((True, False), (False, True)):
        for step, (_, blocks) in zip(steps, train_and_watch(steps, standardised, muon), strict=True):
            seen = [liveliness(*block) for block in blocks]
            print(f"{'1 + z' if standardised else 'mean token'}, {'Muon' if muon else 'Adam'}, {step} steps: "
                  + "; ".join(f"{name} {', '.join(f'{block[name]:.2f}' for block in seen)}"
                              for name in seen[0]), flush=True)


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="*", help="gd students (default: training, watched)")
    parser.add_argument("--data", default="drawn", help="folder of photos (default: synthetic people)")
    args = parser.parse_args()
    if not args.checkpoint:
        print_training()
    for path in args.checkpoint:
        model, _, samples, crops = load_to_score(path, args.data)
        if model.config.get("filter") != "gd":
            raise BadInput(f"{path} is {checkpoint.describe(model.config)}, without dynamic filters: name a "
                           f"gd student")
        scores = liveliness_and_loss(model, samples, crops)
        for number, block in enumerate(scores["blocks"], 1):
            print(f"block {number}: " + "  ".join(f"{name} {value:.3f}" for name, value in block.items()))
        print(f"{path}: PCKh@0.5 {scores['live']:.2f}, with M frozen at its mean {scores['frozen']:.2f}")


if __name__ == "__main__":
    main_with_clear_errors(main)
