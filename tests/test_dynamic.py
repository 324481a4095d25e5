"""The dynamic filter is dynamic, and stays so in training."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crops import make_batch, store
from distill import task_loss
from models import build_student
from synthetic import drawn_people
from train import build_optimisers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))
from dynamic import freeze, liveliness, watch  # noqa: E402

# With Muon for M, and without the standardised mean, more than half of the first block's units are dead
# after 800.
STEPS = 800 if os.environ.get("LONG_TESTS") else 150


def test_liveliness_by_hand():
    """One channel that turns over and one that stands; three of four hidden units ever above 0."""
    M = torch.tensor(
        [[[1.0, 0.25], [0, 0.25], [0, 0.25], [0, 0.25]], [[0, 0.25], [1, 0.25], [0, 0.25], [0, 0.25]]]
    )
    found = liveliness(M, torch.tensor([[1.0, 0, 2, 0], [0, 0, 2, 3]]))
    assert found == dict(deviation=pytest.approx(2 * 0.5 ** 0.5 / 8), dead=0.25, entropy=pytest.approx(0.5))


def test_m_lives_through_training():
    """STEPS from labels alone: M still differs between images, in every block, and few of its units are dead.
    """
    torch.manual_seed(0)
    samples = drawn_people("train", 256, 64)
    crops = store(samples, 64)
    model = build_student("cc", "gd", "none", "tiny")
    optimisers = build_optimisers(model, "muon", 1e-3)
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = make_batch(samples, crops, np.sort(random.choice(256, 16, replace=False)), 64)
        loss = task_loss(model.head, model(batch.images).prediction, batch.xy, batch.visible)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
    images = make_batch(samples, crops, np.arange(128), 64).images
    with torch.inference_mode():
        blocks = watch(model.eval(), lambda: model(images))
        for found in (liveliness(*block) for block in blocks):
            assert found["deviation"] > 0.02 and found["dead"] < 0.2, found
        freeze(model, [M.mean(0) for M, _ in blocks])
        assert all(
            float(M.std(0).max()) < 1e-6
            for M in [model.encoder.blocks[0].mixer.dynamic.mixture(torch.rand(2, 8, 10, 96))]
        )
