"""A trained network made ready for use: the same outputs, sooner.

    python evaluate.py --speed             # what each of these is worth on your machine

    batch norm     y = g (conv(x) - m) / sqrt(v + eps) + b is one convolution with scaled weights and a bias: it is folded
    channels last  the memory layout that convolutions are fastest in
    bfloat16       backbone and encoder in half the bytes; the head stays in float32: bfloat16 tells 256 positions apart,
                   a crop has 256 pixels
    compiled       element-wise operations fused, weights frozen (on a GPU: CUDA graphs): half a minute on the first batch of
                   each size
"""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

COMPILE = {"cpu": dict(options={"freezing": True}), "cuda": dict(mode="reduce-overhead")}


def fold_batch_norms(model):
    """Every batch norm into the convolution before it, in place: hrnet.py registers the one right before the other."""
    for module in list(model.modules()):
        children = list(module.named_children())
        for (first, conv), (second, norm) in zip(children, children[1:]):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())


def for_inference(model, dtype=torch.float32, compiled=False):
    """A copy of a PoseNet that can only be used, not trained: run it within torch.inference_mode().

    dtype: torch.bfloat16 for backbone and encoder in half precision. compiled: by torch.compile, which needs a C++ compiler.
    Takes and returns what the network does: crops float32 (B, 3, size, size) -> Output, whose prediction is float32.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norms(model)
    for part in (model.backbone, model.embed, model.encoder):
        part.to(dtype=dtype, memory_format=torch.channels_last)
    if compiled:
        model.compile(dynamic=False, **COMPILE[model.mean.device.type])
    return model
