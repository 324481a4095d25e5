"""Global Filter Layers: token mixers that multiply in the frequency domain.

    python -m pytest tests/test_gfl.py      # the filters against NumPy and against a convolution in space

Self-attention compares every token with every other one, O((HW)^2). A global filter treats the token grid as
an image: it goes to the frequency domain, multiplies by a learnable filter K, and returns:

    G(X) = K (.) T(X)              T: 2-D Fourier transform, (.): element-wise product
    X'   = T^-1(G(X))              O(HW log HW) with FFTs; every output depends on every input token

A product of spectra is a circular convolution in space, so the layer is a depth-wise convolution whose kernel
is as large as the token grid. There are two filters:

    GS  global, static    K is a parameter, one complex number per frequency and channel   (GFNet's form)
    GD  global, dynamic   the sum of GS and of a filter with K^ = K_basis (x) M(X): M, an MLP,
                          mixes basis filters with weights that depend on the input        (K^: DFFormer's)

Equations: the paper's poster. A token grid is (B, H, W, D): batch, rows, columns, channels. Its spectrum is
(B, H, W // 2 + 1, D), without the complex conjugates in its other half. Transforms are orthonormal.
At the paper's size: a grid of 16 x 17, keypoint tokens beside 16 x 16 visual ones, and K of 16 x 9 x D.
"""

import math

import numpy as np
import torch
from torch import nn

FILTER_STD = 0.02        # filters start as normal noise of this standard deviation (GFNet, DFFormer)
BASIS_FILTERS = 4        # N, how many basis filters a dynamic filter mixes (DFFormer)
EXPANSION = 2            # width of W1 and W2 of the dynamic filter, in D (DFFormer)
REWEIGHTING = 0.25       # width of the MLP M's hidden layer, in D (DFFormer)


# ------------------------------------------------------------------------------- the definition, in NumPy

def global_filter_numpy(x, K):
    """The filter in five lines of NumPy: what the layers below have to agree with.

    x: real token grids (B, H, W, D). K: complex filter (H, W // 2 + 1, D), or (B, H, W // 2 + 1, D) for one
    per input. Returns real token grids (B, H, W, D).
    """
    H, W = x.shape[1:3]
    spectrum = np.fft.rfft2(x, axes=(1, 2), norm="ortho")                # T(X)  (B, H, W//2+1, D)
    filtered = K * spectrum                                              # G(X) = K (.) T(X)
    return np.fft.irfft2(filtered, s=(H, W), axes=(1, 2), norm="ortho")  # X' = T^-1(G(X))  (B, H, W, D)


# ------------------------------------------------------------------------------- the same, as matrix products

def dft_matrices(H, W):
    """The orthonormal rfft2 of an H x W grid as two real matrices: first along rows, then along columns.

        over w: (cos, -sin)(2 pi f w / W) / sqrt(W)    W values -> real and imaginary parts, F frequencies
        over h: e^(-i 2 pi u h / H) / sqrt(H)          of pairs: the real part is (cos, sin) . (real, imag),
                                                       the imaginary part (-sin, cos) . (real, imag)

    Returns float64 tensors over_w (2 F, W), over_h (2 H, 2 H), back_w (W, 2 F), with F = W // 2 + 1. over_h
    maps a vector with entries (h, part) to one with entries (part, u), part being real or imaginary. The
    inverse over h is the transpose of over_h. The inverse over w, back_w, is the transpose of over_w with all
    frequencies but 0 and W / 2 doubled: they stand for their dropped conjugates, too.
    """
    F = W // 2 + 1
    w_angle = 2 * math.pi * torch.arange(F, dtype=torch.float64)[:, None] * torch.arange(W) / W  # (F, W)
    h_angle = 2 * math.pi * torch.arange(H, dtype=torch.float64)[:, None] * torch.arange(H) / H  # (H, H)
    over_w = torch.cat([w_angle.cos(), -w_angle.sin()]) / math.sqrt(W)
    cos, sin = h_angle.cos(), h_angle.sin()
    over_h = torch.cat([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)]) / math.sqrt(H)
    times = torch.tensor([1 if f == 0 or 2 * f == W else 2 for f in range(F)], dtype=torch.float64)
    return over_w, over_h.flatten(1), over_w.T * times.repeat(2)


class GlobalFilter(nn.Module):
    """X' = T^-1(K (.) T(X)) in real numbers. grid: (H, W). No parameters.

    On so small a grid, products with DFT matrices are faster than FFTs. They also run in bfloat16, and need
    no complex numbers, which compilers and ONNX handle badly (docs/speed.md).
    """

    def __init__(self, grid):
        super().__init__()
        self.grid = tuple(grid)
        for name, matrix in zip(("over_w", "over_h", "back_w"), dft_matrices(*grid)):
            self.register_buffer(name, matrix.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x, K_real, K_imag):
        """x (B, H, W, D) -> (B, H, W, D). K_real, K_imag: (H, W // 2 + 1, D), or with a leading B."""
        B, H, W, D = x.shape
        F = W // 2 + 1
        if (H, W) != self.grid or tuple(K_real.shape[-3:-1]) != (H, F):
            raise ValueError(f"the filter has {K_real.shape[-3]} x {K_real.shape[-2]} frequencies of a grid "
                             f"{self.grid}, a token grid of {H} rows x {W} columns has {H} x {F}: build the "
                             f"layer with grid=({H}, {W})")
        K_real, K_imag = K_real.unsqueeze(-4), K_imag.unsqueeze(-4)         # (1, H, F, D), or (B, 1, H, F, D)
        along_w = self.over_w @ x                                              # (B, H, 2 F, D)
        spectrum = (self.over_h @ along_w.view(B, 2 * H, F * D)).view(B, 2, H, F, D)          # T(X)
        real, imag = spectrum.unbind(1)                                        # (B, H, F, D) each
        turned = torch.stack([-imag, real], 1)                                 # i T(X)
        # G(X) = K (.) T(X) = K_real T(X) + K_imag (i T(X))
        filtered = (spectrum * K_real).addcmul_(turned, K_imag)                # (B, 2, H, F, D)
        back_h = self.over_h.T @ filtered.view(B, 2 * H, F * D)                # (B, 2 H, F D)
        return self.back_w @ back_h.view(B, H, 2 * F, D)                       # X' = T^-1(G(X))  (B, H, W, D)


# ------------------------------------------------------------------------------- GS

class StaticFilter(nn.Module):
    """GS: one learnable complex number per frequency and channel, the same for every input.

    grid: (H, W) of its token grids, any sizes. dim: channels D. Parameters: 2 * H * (W // 2 + 1) * D.
    Input and output (B, H, W, D); ValueError when the grid is another one.
    """

    def __init__(self, grid, dim):
        super().__init__()
        H, W = grid
        # Two parameters that are real and 3-D: .to(dtype) would drop a complex one's imaginary part, and
        # .to(memory_format=channels_last) would reorder a 4-D one.
        self.K_real = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, dim))
        self.K_imag = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, dim))
        self.filter = GlobalFilter(grid)

    def forward(self, x):
        return self.filter(x, self.K_real, self.K_imag)


# ------------------------------------------------------------------------------- GD

class StarReLU(nn.Module):
    """s * relu(x)^2 + b with learnable s and b (MetaFormer baselines, arXiv 2210.13452)."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = x.relu()
        scale, bias = self.scale.to(x.dtype), self.bias.to(x.dtype)     # bfloat16 stays bfloat16: faster
        return torch.addcmul(bias, scale * x, x)


class DynamicFilter(nn.Module):
    """DFFormer's dynamic filter: every channel of every input gets its own mixture of N basis filters.

        M(X) = softmax over N of MLP(1 + z), z: mean token, standardised       (B, N, E), E = 2 D channels
        K^   = K_basis (x) M(X): K^_e = sum over n of M_ne K_n     (B, H, W // 2 + 1, E)
        X'   = W2 T^-1(K^ (.) T(StarReLU(W1 X)))                   W1: D -> E, W2: E -> D, linear, no biases

    grid: (H, W) of the token grids, dim: channels D. Input and output (B, H, W, D). Parameters: 6.25 D^2 +
    8 H (W // 2 + 1) + 2 (D a multiple of 4).

    DFFormer gives M the mean token itself. Here that differs little between images, and M came to ignore it:
    so M sees 1 + z, where a batch norm without parameters standardises (docs/lab.md).
    """

    def __init__(self, grid, dim):
        super().__init__()
        H, W = grid
        wide, hidden = EXPANSION * dim, int(REWEIGHTING * dim)
        self.W1 = nn.Linear(dim, wide, bias=False)
        self.act = StarReLU()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.norm.running_mean.fill_(1)          # untrained, eval() has 1 + z = mean token, as in DFFormer
        self.norm.running_var.fill_(1 - self.norm.eps)
        self.M1 = nn.Linear(dim, hidden, bias=False)
        self.M2 = nn.Linear(hidden, BASIS_FILTERS * wide, bias=False)
        self.K_real = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, BASIS_FILTERS))    # of K_basis
        self.K_imag = nn.Parameter(FILTER_STD * torch.randn(H, W // 2 + 1, BASIS_FILTERS))
        self.filter = GlobalFilter(grid)
        self.W2 = nn.Linear(wide, dim, bias=False)

    def mixture(self, x):
        """M(X) of token grids (B, H, W, D): weights (B, N, E) that sum to 1 over the N basis filters."""
        # z = (mean token - its mean over images) / its standard deviation over images         (B, D)
        z = self.norm(x.mean(dim=(1, 2)))
        # StarReLU without scale and bias: the paper's parameter counts have room for one pair, in `act`
        logits = self.M2(self.M1(1 + z).relu().square())                       # (B, N * E)
        return logits.unflatten(-1, (BASIS_FILTERS, -1)).softmax(dim=1)        # (B, N, E)

    def forward(self, x):
        M = self.mixture(x)[:, None]                                           # (B, 1, N, E)
        mixed_real, mixed_imag = self.K_real @ M, self.K_imag @ M              # K^ = K_basis (x) M(X)
        x = self.act(self.W1(x))                                               # (B, H, W, E)
        x = self.filter(x, mixed_real, mixed_imag)                             # X' = T^-1(K^ (.) T(X))
        return self.W2(x)                                                      # (B, H, W, D)


class GlobalDynamicFilter(nn.Module):
    """GD: a static filter and, beside it, a dynamic one; their outputs are added.

    The paper's parameter counts show that GD holds both, not how they are joined (in series: docs/lab.md).
    """

    def __init__(self, grid, dim):
        super().__init__()
        self.static = StaticFilter(grid, dim)
        self.dynamic = DynamicFilter(grid, dim)

    def forward(self, x):
        return self.static(x) + self.dynamic(x)
