"""A network made ready for use says what the trained one says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import export
from common import fast_bfloat16
from crops import make_batch, store
from export import fold_batch_norms, for_inference
from models import FILTERS, build_student, build_teacher
from synthetic import drawn_people

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


def unsettled(model):
    """Batch norms that do something: statistics and scales off 0 and 1."""
    torch.manual_seed(0)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor, low, high in (
            (norm.running_mean, -0.5, 0.5),
            (norm.running_var, 0.5, 2),
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.5, 0.5),
        ):
            nn.init.uniform_(tensor, low, high)
    return model.eval()


@pytest.mark.parametrize("build", [lambda: build_teacher("tiny"), lambda: build_student("cc", "gs", "w32")])
@torch.inference_mode()
def test_folded_batch_norms_change_nothing_but_rounding(build):
    model = unsettled(build())
    images = torch.rand(2, 3, model.size, model.size)
    ready = for_inference(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())          # a copy was folded
    for found, expected in zip(ready(images)[:2], model(images)[:2]):
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_a_norm_is_folded_into_its_own_convolution():
    """Worked by hand: a 1 x 1 convolution by 3, mean 2, variance 4, scale 5, bias 1: y = 5 (3 x - 2) / 2 + 1.
    """
    pair = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=0)).eval()
    for tensor, value in (
        (pair[0].weight, 3),
        (pair[1].running_mean, 2),
        (pair[1].running_var, 4),
        (pair[1].weight, 5),
        (pair[1].bias, 1),
    ):
        nn.init.constant_(tensor, value)
    fold_batch_norms(pair)
    assert pair(torch.full((1, 1, 1, 1), 7.0)).item() == pytest.approx(48.5)


@pytest.fixture(scope="module")
def crops():
    people = drawn_people("valid", 200, 64)
    return make_batch(people, store(people, 64), np.arange(200), 64).images


@pytest.mark.skipif(not fast_bfloat16("cpu"), reason="this CPU has no native bfloat16")
@pytest.mark.parametrize("weights", ["student-cc-gd-drawn.pt", "teacher-tiny-drawn.pt"])
@torch.inference_mode()
def test_bfloat16_moves_few_joints(weights, crops):
    """Argmax between two like peaks may go either way; the others stay where they are."""
    model, _ = checkpoint.load(WEIGHTS / weights)
    (found, sure), (expected, confidence) = (
        net.decode(net(crops)) for net in (for_inference(model, torch.bfloat16), model)
    )
    moved = (found - expected).norm(dim=-1)  # pixels of 64
    assert (
        moved.median() < 0.3 and (moved > 2).float().mean() < 0.05 and (sure - confidence).abs().mean() < 0.02
    )
    assert found.dtype == torch.float32


@pytest.mark.parametrize("filter", FILTERS)
def test_a_network_compiles_as_one_graph(filter):
    model = for_inference(build_student("cc", filter, "none", "tiny"))
    whole = torch.compile(model, fullgraph=True, backend="eager")              # a graph break is an error
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(whole(images).visual_tokens, model(images).visual_tokens)


@torch.inference_mode()
def test_compiled_is_the_same(crops):
    model, _ = checkpoint.load(WEIGHTS / "student-cc-gd-drawn.pt")
    compiled = for_inference(model, compiled=True)
    try:
        found = compiled(crops[:32])
    except RuntimeError as error:
        if "compiler" in str(error).lower():
            pytest.skip("no C++ compiler")
        raise
    assert torch.allclose(found.visual_tokens, model(crops[:32]).visual_tokens, atol=1e-3)
    assert torch.equal(compiled.decode(found)[0], model.decode(model(crops[:32]))[0])


def test_bfloat16_without_native_units_is_float32_and_says_so(monkeypatch):
    model, _ = checkpoint.load(WEIGHTS / "student-cc-gd-drawn.pt")
    monkeypatch.setattr(export, "fast_bfloat16", lambda device: False)
    with pytest.warns(UserWarning, match="no native bfloat16"):
        assert for_inference(model, torch.bfloat16).embed.project.weight.dtype == torch.float32
