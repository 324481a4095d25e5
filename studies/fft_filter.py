"""The filter through FFTs: what gfl.GlobalFilter computes, in another way. For tests and timings."""

import sys
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gfl import GlobalFilter


def global_filter(x, K):
    """`gfl.global_filter_numpy` for tensors, differentiable.

    Input in half precision is transformed in float32 and returned in its own type: PyTorch has half-precision
    FFTs for powers of two only, and none in bfloat16.
    """
    H, W = x.shape[1:3]
    real = x if x.dtype in (torch.float32, torch.float64) else x.float()
    spectrum = torch.fft.rfft2(real, dim=(1, 2), norm="ortho")            # T(X)  (B, H, W//2+1, D)
    filtered = K * spectrum                                               # G(X) = K (.) T(X)
    out = torch.fft.irfft2(filtered, s=(H, W), dim=(1, 2), norm="ortho")  # X' = T^-1(G(X))  (B, H, W, D)
    return out.to(x.dtype)


@contextmanager
def through_ffts(model):
    """A context in which a model's filters run `global_filter`."""
    layers = [layer for layer in model.modules() if isinstance(layer, GlobalFilter)]
    for layer in layers:
        layer.forward = lambda x, *K: global_filter(x, torch.complex(*(  # no complex bfloat16
            part if part.dtype == torch.float64 else part.float() for part in K)))
    try:
        yield model
    finally:
        for layer in layers:
            del layer.forward
