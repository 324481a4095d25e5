"""How the networks learn: what is borrowed, what was measured, and the few functions that follow from it."""

import numpy as np
import torch

from muon import Muon

# 'paper': DistilPose's recipe (Adam, 300 epochs, a tenth of the rate at 200 and at 260, 500 steps of warm-up) and
# TokenPose's batch on MPII (16 on each of 4 GPUs): borrowed, as the paper's own is not known.
# 'tiny': measured on drawn people with the cc gs student, 1,000 steps of 32, PCKh@0.5: Adam 34.7, Muon 41.5.
RECIPES = {"paper": dict(epochs=300, batch_size=64, lr=1e-3, optimiser="adam"),
           "tiny": dict(epochs=16, batch_size=32, lr=1e-3, optimiser="muon")}
MUON_RATE = 20           # Muon's learning rate over Adam's: 20 and 1e-3 gave those 41.5, 40 and 1e-3 (2e-3 for Adam) 36.5
DECAY_AT = (2 / 3, 13 / 15)              # shares of the training after which the rate is divided by ten
WARM_UP = 500                            # steps, at most a tenth of the training
AVERAGED = 0.02                          # what is scored and kept: a running mean of the weights over this share of the steps
VIEWS = {"drawn": 2, "photos": 4}        # in how many ways a tiny student is shown a person (others: ever new ones)
SCORE_EVERY = {"paper": 5, "tiny": 4}    # epochs; and after the last
DRAWINGS = {"student": 4000, "teacher": 40000}


def build_optimisers(model, name, lr):
    """Adam for every weight that learns, or Muon for the matrices of the encoder's blocks and Adam for all else."""
    learning = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    if name == "adam":
        return [torch.optim.Adam(learning.values(), lr=lr, fused=True)]
    matrices = [key for key, weight in learning.items() if ".blocks." in key and weight.ndim == 2]
    others = [key for key in learning if key not in matrices]
    return [Muon([learning[key] for key in matrices], lr=MUON_RATE * lr),
            torch.optim.Adam([learning[key] for key in others], lr=lr, fused=True)]


def rate_share(step, steps):
    """Learning rate over its highest: linear warm-up, then 1, divided by ten at each of DECAY_AT.

    Measured beside it (tiny cc gs, 1,000 steps): steps 29.8, a linear way to zero 29.0 PCKh@0.5.
    """
    warm = min(1, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    return warm * 0.1 ** sum(step >= share * steps for share in DECAY_AT)


@torch.no_grad()
def average(averaged, model, step, steps):
    """averaged <- averaged + w (model - averaged), w = max(1 / (step + 1), 1 / (AVERAGED steps)): a plain mean at first.

    A window of 500 of 2,000 steps (a quarter) cost the tiny cc gs student 2.2 PCKh@0.5: it reaches back before the decay.
    """
    pairs = [(mean, now) for mean, now in zip(averaged.state_dict().values(), model.state_dict().values())
             if mean.is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*pairs)), max(1 / (step + 1), min(1, 1 / (AVERAGED * steps))))


def generator(*numbers):
    """A random generator of its own for each tuple of numbers: the same however a run came to it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
