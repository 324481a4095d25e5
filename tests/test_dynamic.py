"""The dynamic filter is dynamic, and stays so in training."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))
from dynamic import freeze, liveliness, train_and_watch  # noqa: E402

# Of M's hidden units a third is dead after 800 steps in the first block, with Muon for M and without the
# standardised mean more than half; after 150 steps at most 0.17.
STEPS, DEAD = (800, 0.45) if os.environ.get("LONG_TESTS") else (150, 0.2)


def test_liveliness_by_hand():
    """One channel that turns over and one that stands; three of four hidden units ever above 0."""
    logits = torch.zeros(2, 4, 2)
    logits[0, 0, 0] = logits[1, 1, 0] = 30
    assert liveliness(logits, torch.tensor([[1.0, 0, 2, 0], [0, 0, 2, 3]])) == dict(
        deviation=pytest.approx(2 * 0.5 ** 0.5 / 8), dead=0.25, entropy=pytest.approx(0.5),
        logits=pytest.approx((2 * (22.5 ** 2 + 3 * 7.5 ** 2) / 15) ** 0.5))


def test_m_lives_through_training():
    """STEPS from labels alone: M still differs between images, in every block, and few of its units are dead.
    """
    (model, blocks), = train_and_watch([STEPS])
    for block in blocks:
        life = liveliness(*block)
        assert life["deviation"] > 0.02 and life["dead"] < DEAD, life
    freeze(model, [logits.softmax(1).mean(0) for logits, _ in blocks])
    with torch.inference_mode():
        M = model.encoder.blocks[0].mixer.dynamic.mixture(torch.rand(2, 8, 10, 96))
    assert float(M.std(0).max()) < 1e-6


@pytest.mark.long
def test_the_plain_mean_kills_a_fifth_of_m():
    """What the test above must reject: the mean token as it is, after as many steps."""
    (_, blocks), = train_and_watch([150], standardised=False)
    assert max(liveliness(*block)["dead"] for block in blocks) > 0.2
