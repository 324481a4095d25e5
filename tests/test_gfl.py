"""Are the filters what the equations say? Oracles: NumPy's FFT, a convolution written in space, finite
differences.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fft_filter import global_filter, through_ffts
from gfl import (
    BASIS_FILTERS,
    DynamicFilter,
    GlobalDynamicFilter,
    GlobalFilter,
    StarReLU,
    StaticFilter,
    dft_matrices,
    global_filter_numpy,
)

PAPER_GRID = (16, 17)
SHAPES = [
    (1, *PAPER_GRID, 192),
    (2, 8, 10, 96),
    (3, 1, 1, 1),
    (2, 1, 7, 3),
    (2, 7, 1, 3),
    (1, 5, 9, 4),
    (2, 6, 4, 5),
]
random = np.random.default_rng(0)
SHAPES += [tuple(random.integers(1, high) for high in (4, 20, 20, 8)) for _ in range(25)]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def random_filter(H, W, D, dtype=torch.float64):
    return torch.complex(
        torch.randn(H, W // 2 + 1, D, dtype=dtype), torch.randn(H, W // 2 + 1, D, dtype=dtype)
    )


def matrix_filter(x, K):
    """The form in matrix products, with the definition's arguments."""
    layer = GlobalFilter(x.shape[1:3])
    for name, matrix in zip(("over_w", "over_h", "back_w"), dft_matrices(*x.shape[1:3])):
        setattr(layer, name, matrix.to(x.dtype))
    return layer(x, K.real, K.imag)


FORMS = pytest.mark.parametrize("form", [global_filter, matrix_filter])


def relative_error(result, expected):
    return np.linalg.norm(result - expected) / np.linalg.norm(expected)


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_numpy(shape, dtype, form):
    torch.manual_seed(0)
    x, K = torch.randn(shape, dtype=dtype), random_filter(*shape[1:], dtype)
    expected = global_filter_numpy(x.double().numpy(), K.numpy().astype(np.complex128))
    assert relative_error(form(x, K).double().numpy(), expected) <= TOLERANCE[dtype]


@FORMS
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 4, 6, 2), (2, 3, 3, 1), (1, *PAPER_GRID, 2)])
def test_is_a_depth_wise_circular_convolution(shape, form):
    """out[i, j] = sum over m, n of kernel[m, n] * x[i - m, j - n], indices modulo the grid, channel by
    channel.
    """
    B, H, W, D = shape
    kernel, x = random.standard_normal((H, W, D)), random.standard_normal(shape)
    expected = np.zeros(shape)
    for m in range(H):
        for n in range(W):
            expected += kernel[m, n] * np.roll(x, (m, n), axis=(1, 2))
    spectrum = np.fft.rfft2(kernel, axes=(0, 1))  # the orthonormal transforms leave no factor in the product
    result = form(torch.from_numpy(x), torch.from_numpy(spectrum)).numpy()
    assert relative_error(result, expected) < 1e-12


@pytest.mark.parametrize("layer", [StaticFilter, DynamicFilter, GlobalDynamicFilter])
@pytest.mark.parametrize("grid", [(4, 5), (3, 4), (1, 3)])
def test_gradients(layer, grid):
    torch.manual_seed(0)
    layer = layer(grid, 4).double()
    x = torch.randn(2, *grid, 4, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters())

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_linear_in_the_tokens():
    torch.manual_seed(0)
    layer = StaticFilter((6, 7), 5).double()
    x, y = torch.randn(2, 3, 6, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(2 * x - 3 * y), 2 * layer(x) - 3 * layer(y), rtol=1e-12, atol=1e-12)


@FORMS
@pytest.mark.parametrize("grid", [(6, 7), (5, 4), (1, 1)])
def test_a_filter_of_ones_changes_nothing(grid, form):
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    ones = torch.ones(grid[0], grid[1] // 2 + 1, 3, dtype=torch.complex128)
    torch.testing.assert_close(form(x, ones), x, rtol=1e-12, atol=1e-12)


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_dynamic_filter_mixes_its_basis_by_the_equation(in_float64):
    """The module against its equation, channel by channel and filter by filter, in NumPy."""
    torch.manual_seed(0)
    H, W, D = 5, 6, 4
    layer = DynamicFilter((H, W), D).eval()           # untrained statistics: DFFormer's own form
    with torch.no_grad():
        layer.act.scale.fill_(0.9), layer.act.bias.fill_(-0.4)
        layer.M2.weight.mul_(30)                       # else the mixtures stay too even to tell inputs apart
    x = torch.randn(3, H, W, D, dtype=torch.float64)
    parameter = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    basis = parameter["K_real"] + 1j * parameter["K_imag"]                                 # (H, W//2+1, F)
    for one, out in zip(x.numpy(), layer(x).detach().numpy()):
        logits = (np.maximum(one.mean((0, 1)) @ parameter["M1.weight"].T, 0) ** 2) @ parameter["M2.weight"].T
        weights = np.exp(logits.reshape(BASIS_FILTERS, -1))
        weights /= weights.sum(0)                                                          # (F, E)
        wide = 0.9 * np.maximum(one @ parameter["W1.weight"].T, 0) ** 2 - 0.4              # (H, W, E)
        for e in range(wide.shape[-1]):
            K = sum(weights[f, e] * basis[..., f] for f in range(BASIS_FILTERS))
            wide[..., e] = global_filter_numpy(wide[None, ..., e, None], K[..., None])[0, ..., 0]
        np.testing.assert_allclose(out, wide @ parameter["W2.weight"].T, rtol=1e-10, atol=1e-12)


def test_dynamic_filter_depends_on_the_input():
    torch.manual_seed(0)
    layer = DynamicFilter((4, 4), 8)
    mixture = layer.mixture(torch.randn(2, 4, 4, 8))
    assert mixture.shape == (2, BASIS_FILTERS, 16)
    torch.testing.assert_close(mixture.sum(1), torch.ones(2, 16))
    assert not torch.allclose(mixture[0], mixture[1])


@pytest.mark.parametrize("layer", [StaticFilter, DynamicFilter, GlobalDynamicFilter])
def test_another_grid_is_refused_naming_both_shapes(layer):
    layer = layer((16, 17), 8)
    with pytest.raises(ValueError, match=r"16 x 9 frequencies.*14 rows x 14 columns.*14 x 8"):
        layer(torch.randn(2, 14, 14, 8))


def test_parameter_counts_of_the_paper():
    def count(layer):
        return sum(parameter.numel() for parameter in layer.parameters())

    assert count(StaticFilter(PAPER_GRID, 192)) == 55_296
    assert count(GlobalDynamicFilter(PAPER_GRID, 192)) == 55_296 + 231_554


@pytest.mark.parametrize("layer", [StaticFilter, DynamicFilter, GlobalDynamicFilter])
def test_layers_compute_their_definition_in_training_too(layer):
    """Output and every gradient of the matrix form against the rfft2 form, which really is another
    computation.
    """
    torch.manual_seed(0)
    layer = layer(PAPER_GRID, 24)
    x = torch.randn(2, *PAPER_GRID, 24)

    def results():
        layer.zero_grad()
        out = layer(x)
        out.square().sum().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]

    fast = results()
    with through_ffts(layer):
        plain = results()
    assert not torch.equal(fast[0], plain[0])
    for one, other in zip(fast, plain):
        assert relative_error(one.numpy(), other.numpy()) < 1e-5


@pytest.mark.parametrize("layer", [StaticFilter, GlobalDynamicFilter])
def test_bfloat16_autocast(layer):
    torch.manual_seed(0)
    layer = layer(PAPER_GRID, 32)
    x = torch.randn(2, *PAPER_GRID, 32)
    with torch.autocast("cpu", torch.bfloat16):                      # small enough for every CPU
        low = layer(x.bfloat16())
    low.float().sum().backward()
    full = layer(x)
    assert low.dtype == torch.bfloat16
    assert relative_error(low.detach().float().numpy(), full.detach().numpy()) < 0.02   # bfloat16 has 8 bits
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_star_relu_stays_in_bfloat16():
    """Its parameters, of shape (1,), do not make float32 of it, which is slower (docs/lab.md)."""
    act, x = StarReLU(), torch.tensor([-2.0, 0.0, 3.0])
    act.scale.data.fill_(0.5), act.bias.data.fill_(1)
    with torch.autocast("cpu", torch.bfloat16):
        low = act(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low.tolist() == act(x).tolist() == [1, 1, 5.5]


@pytest.mark.parametrize("layer", [StaticFilter, GlobalDynamicFilter])
def test_survives_channels_last_and_half(layer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer((4, 8), 8))
    x = torch.randn(2, 4, 8, 8)
    expected = model[1](x)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)[1](x), expected)
    assert torch.isfinite(model.half()[1](x.half())).all()


def test_the_layer_in_the_readme_is_the_static_filter():
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    names = {"torch": torch, "nn": nn}
    exec(text.partition("```python\n")[2].partition("```")[0], names)
    torch.manual_seed(0)
    ours, theirs = StaticFilter((16, 17), 8), names["StaticFilter"](16, 17, 8)
    theirs.K.data = torch.stack([ours.K_real, ours.K_imag], -1)
    x = torch.randn(2, 16, 17, 8)
    torch.testing.assert_close(theirs(x), ours(x))
