"""Global Filter Layers: token mixers that multiply in the frequency domain.

    python -m pytest tests/test_gfl.py      # the filters against NumPy and against a convolution in space

Self-attention compares every token with every other one, O((HW)^2). A global filter lays the tokens out
as a picture, goes to the frequency domain, multiplies by a learnable filter K, and comes back:

    G(X) = K (.) T(X)              T: 2-D Fourier transform, (.): element-wise product
    X'   = T^-1(G(X))              in all O(HW log HW), and every output token sees every input token

Multiplying spectra is circular convolution in space, so the layer is a depth-wise convolution whose kernel is
as large as the token grid. Two filters are here:

    GS  global, static    K is a parameter, one complex number per frequency and channel          (GFNet's form)
    GD  global, dynamic   beside K, a filter K^ = K (x) M(X) whose mixture of basis filters
                          an MLP M chooses anew for every input                               (DFFormer's form)

Equations: poster of "Knowledge Distillation with Global Filters for Efficient Human Pose Estimation" (BMVC 2024).
Shapes: a token grid is (B, H, W, D), channels last: batch, rows, columns, channels. Its real-input spectrum is
(B, H, W // 2 + 1, D): the other half is its mirror image and is not kept. All transforms are orthonormal, so that
a filter of ones is the identity at any size.
"""

import numpy as np
import torch
from torch import nn

FILTER_STD = 0.02        # filters start as normal noise of this deviation (GFNet, DFFormer)
BASIS_FILTERS = 4        # F, how many basis filters a dynamic filter mixes (DFFormer)
EXPANSION = 2            # width of the dynamic filter's pointwise layers over D (DFFormer)
REWEIGHTING = 0.25       # width of the MLP M's hidden layer over D (DFFormer)


# ------------------------------------------------------------------------------- the definition, in NumPy

def global_filter_numpy(x, K):
    """The filter in five lines of NumPy: what every faster form has to agree with.

    x: real token grids (B, H, W, D). K: complex filter, (H, W // 2 + 1, D), or one per input with a leading B.
    Returns real token grids (B, H, W, D).
    """
    H, W = x.shape[1:3]
    spectrum = np.fft.rfft2(x, axes=(1, 2), norm="ortho")                      # T(X)          (B, H, W//2+1, D)
    filtered = K * spectrum                                                    # G(X) = K (.) T(X)
    return np.fft.irfft2(filtered, s=(H, W), axes=(1, 2), norm="ortho")        # X' = T^-1(G(X))  (B, H, W, D)


# ------------------------------------------------------------------------------- the definition, in PyTorch

def global_filter(x, K):
    """`global_filter_numpy` for tensors, differentiable.

    Half-precision input is transformed in float32, as FFTs exist in half precision only for powers of two (and
    not at all in bfloat16), and comes back in its own type.
    """
    H, W = x.shape[1:3]
    if tuple(K.shape[-3:-1]) != (H, W // 2 + 1):
        raise ValueError(f"the filter has {K.shape[-3]} x {K.shape[-2]} frequencies, which do not fit a token grid of "
                         f"{H} rows x {W} columns: that needs {H} x {W // 2 + 1}. Build the layer with "
                         f"grid=({H}, {W}), or feed it the grid it was built for.")
    real = x if x.dtype in (torch.float32, torch.float64) else x.float()
    spectrum = torch.fft.rfft2(real, dim=(1, 2), norm="ortho")                 # T(X)          (B, H, W//2+1, D)
    filtered = K * spectrum                                                    # G(X) = K (.) T(X)
    out = torch.fft.irfft2(filtered, s=(H, W), dim=(1, 2), norm="ortho")       # X' = T^-1(G(X))  (B, H, W, D)
    return out.to(x.dtype)


def to_complex(real, imag):
    """real + i imag in complex64, or complex128 for float64: PyTorch has no half-precision transform to feed."""
    dtype = torch.float64 if real.dtype == torch.float64 else torch.float32
    return torch.complex(real.to(dtype), imag.to(dtype))


# ------------------------------------------------------------------------------- GS

class StaticFilter(nn.Module):
    """GS: one learnable complex number per frequency and channel, the same for every input.

    grid: (H, W) of the token grids it will see, any sizes. dim: channels D. Parameters: 2 * H * (W // 2 + 1) * D.
    Input and output (B, H, W, D); ValueError when the grid is another one.
    """

    def __init__(self, grid, dim):
        super().__init__()
        H, W = grid
        # Real and imaginary part are parameters of their own, of three dimensions each: a complex parameter does
        # not survive .half(), and pairs in a fourth dimension are torn apart by .to(memory_format=channels_last).
        self.K_real = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, dim))
        self.K_imag = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, dim))

    def forward(self, x):
        return global_filter(x, to_complex(self.K_real, self.K_imag))


# ------------------------------------------------------------------------------- GD

class StarReLU(nn.Module):
    """s * relu(x)^2 + b with learnable s and b (MetaFormer baselines, arXiv 2210.13452)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scale * x.relu().square() + self.bias


class DynamicFilter(nn.Module):
    """DFFormer's dynamic filter: every channel of every input gets its own mixture of F basis filters.

        M(X) = softmax over F of MLP(mean of the tokens)           (B, F, E), E = 2 D channels
        K^   = K (x) M(X): K^_e = sum over f of M_fe K_f           (B, H, W // 2 + 1, E)
        X'   = W2 T^-1(K^ (.) T(StarReLU(W1 X)))                   W1: D -> E, W2: E -> D, pointwise, no biases

    grid: (H, W) of the token grids, dim: channels D. Input and output (B, H, W, D).
    """

    def __init__(self, grid, dim):
        super().__init__()
        H, W = grid
        wide, hidden = EXPANSION * dim, int(REWEIGHTING * dim)
        self.W1 = nn.Linear(dim, wide, bias=False)
        self.act = StarReLU()
        self.M1 = nn.Linear(dim, hidden, bias=False)
        self.M2 = nn.Linear(hidden, BASIS_FILTERS * wide, bias=False)
        self.K_real = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, BASIS_FILTERS))
        self.K_imag = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, BASIS_FILTERS))
        self.W2 = nn.Linear(wide, dim, bias=False)

    def mixture(self, x):
        """M(X) of token grids (B, H, W, D): weights (B, F, E) that sum to 1 over the F basis filters."""
        mean = x.mean(dim=(1, 2))                                              # (B, D)
        # StarReLU without its scale and bias: the tables' counts leave room for one learned pair, that of `act`
        logits = self.M2(self.M1(mean).relu().square())                        # (B, F * E)
        return logits.unflatten(-1, (BASIS_FILTERS, -1)).softmax(dim=1)        # (B, F, E)

    def forward(self, x):
        M = self.mixture(x).to(self.K_real.dtype)                              # (B, F, E)

        def mix(K):      # a sum, not a matrix product, which autocast would round to half precision
            return sum(K[..., f, None] * M[:, None, None, f] for f in range(BASIS_FILTERS))

        K_hat = to_complex(mix(self.K_real), mix(self.K_imag))                 # K^ = K (x) M(X)  (B, H, W//2+1, E)
        x = self.act(self.W1(x))                                               # (B, H, W, E)
        x = global_filter(x, K_hat)                                            # X' = T^-1(K^ (.) T(X))
        return self.W2(x)                                                      # (B, H, W, D)


class GlobalDynamicFilter(nn.Module):
    """GD: a static filter and, beside it, a dynamic one; their outputs are added.

    The parameter counts of the paper's tables say that GD holds both filters, not how they are joined. Side by side was
    better than one after the other (dynamic of static): 31.0 against 26.6 PCKh@0.5 after 600 steps of the tiny cc student
    (32 drawn people a step, distilled, seed 0).
    """

    def __init__(self, grid, dim):
        super().__init__()
        self.static = StaticFilter(grid, dim)
        self.dynamic = DynamicFilter(grid, dim)

    def forward(self, x):
        return self.static(x) + self.dynamic(x)
