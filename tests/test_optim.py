"""The rate, the weight average, who learns what, and Muon's steps against torch.optim's."""

import copy

import pytest
import torch
from torch import nn

from models import build_student, build_teacher
from optim import EMA_FRACTION, MUON_RATE, Muon, build_optimisers, orthogonal, rate_factor, update_ema


def test_rate_rises_and_falls_by_tenths():
    factors = [rate_factor(step, 300) for step in range(300)]
    assert factors[:3] == pytest.approx([1 / 30, 2 / 30, 3 / 30]) and factors[29] == factors[199] == 1
    assert factors[200] == factors[259] == pytest.approx(0.1)
    assert factors[260] == factors[299] == pytest.approx(0.01)


def test_running_mean_of_weights():
    """A plain mean at first; later over a fraction of the steps; counters are left alone."""
    model = nn.BatchNorm1d(1)
    ema = copy.deepcopy(model)
    for step, value in enumerate((1.0, 2.0, 6.0)):
        nn.init.constant_(model.weight, value)
        model.num_batches_tracked += 1
        update_ema(ema, model, step, 10 ** 6)
    assert ema.weight.item() == pytest.approx(3) and ema.num_batches_tracked == 0
    nn.init.constant_(model.weight, 103.0)
    update_ema(ema, model, 10 ** 6, 10 ** 6)
    assert ema.weight.item() == pytest.approx(3 + 100 / (EMA_FRACTION * 10 ** 6))


@pytest.mark.parametrize("build", [lambda: build_student("cc", "gd", preset="tiny"),
                                   lambda: build_student("reg", "gs", "w16", "tiny"),
                                   lambda: build_teacher("tiny")])
def test_every_learning_weight_has_one_optimiser(build):
    model = build()
    learning = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    held = {}
    for name in ("adam", "muon"):
        held[name] = [[learning[id(p)] for group in optimiser.param_groups for p in group["params"]]
                      for optimiser in build_optimisers(model, name, 1e-3)]
        assert sorted(sum(held[name], [])) == sorted(learning.values())
    muon, adam = build_optimisers(model, "muon", 1e-3)
    assert muon.param_groups[0]["lr"] == pytest.approx(1e-3 * MUON_RATE)
    assert adam.param_groups[0]["lr"] == 1e-3
    assert all(p.ndim == (4 if learning[id(p)].startswith("backbone.") else 2)
               for p in muon.param_groups[0]["params"])
    assert {name for name in learning.values() if name.startswith("head.")} < set(held["muon"][1])


def test_muon_learns_the_matrices_of_a_dynamic_filter_but_its_mixing():
    """W1 and W2 with Muon; not K, which has three dimensions, nor M, whose softmax its steps saturate."""
    model = build_student("cc", "gd", "w16", "tiny")
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adam = ([names[id(p)] for p in optimiser.param_groups[0]["params"]]
                  for optimiser in build_optimisers(model, "muon", 1e-3))
    learns = lambda held: {name.split(".", 3)[3] for name in held if "blocks.0.mixer." in name}
    assert learns(muon) == {"mixer.dynamic.W1.weight", "mixer.dynamic.W2.weight"}
    assert {f"mixer.{part}" for part in ("dynamic.M1.weight", "dynamic.M2.weight", "dynamic.K_real",
                                         "dynamic.K_imag", "static.K_real", "static.K_imag")} < learns(adam)
    assert "backbone.conv1.weight" in adam and "backbone.conv2.weight" in muon


def test_muon_takes_the_steps_of_torch_optim_muon():
    """Two optimisers, the same gradients, ten steps; matrices that lie, that stand, and two of one shape."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (16, 16), (8, 24), (24, 8))]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    # a convolution's kernel takes the step of its matrix
    kernel = nn.Parameter(ours[0].detach().clone().view(8, 6, 2, 2).to(memory_format=torch.channels_last))
    ours.append(kernel), theirs.append(nn.Parameter(ours[0].detach().clone()))
    optimisers = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0)
    start = [weight.detach().clone() for weight in ours]
    for _ in range(10):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.flatten(1).clone()
        for optimiser in optimisers:
            optimiser.step()
    for begin, one, other in zip(start, ours, theirs):
        moved = (one - begin).norm()
        assert (one.flatten(1) - other).norm() < 0.02 * moved                    # bfloat16, in another order


def test_orthogonal_updates():
    matrices = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonal(matrices))
    assert 0.6 < singular.min() and singular.max() < 1.3                         # what five iterations reach
