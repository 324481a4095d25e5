"""Published teachers: every key accounted for, and the same heatmaps as TokenPose's own arithmetic."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
from checkpoint import published_teacher
from common import BadInput
from hrnet import HRNet


def published(real_data, title):
    """Random tensors under the names and in the shapes of a published network."""
    lists = json.loads((real_data / "official_keys.json").read_text())
    keys = next(keys for name, keys in lists.items() if name.startswith(title))
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in keys.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            weights[name] = 0.5 + torch.rand(shape, generator=random)
        else:                                     # small enough that nothing saturates through 12 layers
            weights[name] = torch.randn(shape, generator=random) / max(1, int(np.prod(shape[1:]))) ** 0.5
    return weights


def tokenpose_forward(weights, images):
    """TokenPose-B after its description, from its own names: keypoint tokens first, positions added before
    every layer.

    The backbone is HRNet's, tested by itself against its parameter names (test_models.py).
    """
    w = {
        name.removeprefix("transformer."): tensor
        for name, tensor in weights.items()
        if name.startswith("transformer.")
    }
    backbone = HRNet(48).eval()
    backbone.load_state_dict({name.removeprefix("pre_feature."): tensor for name, tensor in weights.items()
                              if name.startswith("pre_feature.")})
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    features = backbone((images - mean[:, None, None]) / std[:, None, None])  # (B, 48, 64, 64)
    B = len(features)
    patches = [features[:, :, 4 * i:4 * i + 4, 4 * j:4 * j + 4].permute(0, 2, 3, 1).reshape(B, -1)
               for i in range(16) for j in range(16)]
    visual = torch.stack(patches, 1) @ w["patch_to_embedding.weight"].T + w["patch_to_embedding.bias"]
    x = torch.cat([w["keypoint_token"].expand(B, -1, -1), visual + w["pos_embedding"]], 1)  # (B, 272, 192)
    for layer in range(12):
        name = f"transformer.layers.{layer}."
        if layer:
            x = torch.cat([x[:, :16], x[:, 16:] + w["pos_embedding"]], 1)
        y = F.layer_norm(x, (192,), w[name + "0.fn.norm.weight"], w[name + "0.fn.norm.bias"])
        q, k, v = (y @ w[name + "0.fn.fn.to_qkv.weight"].T).chunk(3, -1)
        heads = []
        for h in range(8):
            part = slice(24 * h, 24 * h + 24)
            heads.append((q[..., part] @ k[..., part].transpose(1, 2) / 24 ** 0.5).softmax(-1) @ v[..., part])
        x = (
            x
            + torch.cat(heads, -1) @ w[name + "0.fn.fn.to_out.0.weight"].T
            + w[name + "0.fn.fn.to_out.0.bias"]
        )
        y = F.layer_norm(x, (192,), w[name + "1.fn.norm.weight"], w[name + "1.fn.norm.bias"])
        y = F.gelu(y @ w[name + "1.fn.fn.net.0.weight"].T + w[name + "1.fn.fn.net.0.bias"])
        x = x + y @ w[name + "1.fn.fn.net.3.weight"].T + w[name + "1.fn.fn.net.3.bias"]
    y = F.layer_norm(x[:, :16], (192,), w["mlp_head.0.weight"], w["mlp_head.0.bias"])
    y = y @ w["mlp_head.1.weight"].T + w["mlp_head.1.bias"]
    y = F.layer_norm(y, (512,), w["mlp_head.2.weight"], w["mlp_head.2.bias"])
    return (y @ w["mlp_head.3.weight"].T + w["mlp_head.3.bias"]).view(B, 16, 64, 64)


@torch.no_grad()
def test_tokenpose_b_gives_tokenposes_heatmaps(real_data, tmp_path):
    weights = published(real_data, "tokenpose_b")
    torch.save(
        {"state_dict": {"module." + name: tensor for name, tensor in weights.items()}, "epoch": 3},
        tmp_path / "b.pth",
    )
    teacher, metadata = checkpoint.load(tmp_path / "b.pth")
    assert metadata["used"].endswith(f"all {len(weights)} weights used, 0 left over")
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    expected, found = tokenpose_forward(weights, images), teacher(images).prediction
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)
    assert torch.equal(teacher.head.heatmaps(found), found)              # values, not logits

    checkpoint.save(tmp_path / "ours.pt", teacher, metadata)  # and it survives as a checkpoint of ours
    again, _ = checkpoint.load(tmp_path / "ours.pt")
    assert torch.equal(again(images).prediction, found)


def test_what_is_amiss_is_named(real_data, tmp_path):
    weights = published(real_data, "tokenpose_b")
    last = "transformer.transformer.layers.11.1.fn.fn.net.3.bias"
    for content, message in (
        (
            {name: tensor for name, tensor in weights.items() if name != last},
            "lacks 1 weights, encoder.blocks.11.mlp.2.bias",
        ),
        (weights | {last: torch.zeros(7)}, "has another shape of 1 weights, encoder.blocks.11.mlp.2.bias"),
        (weights | {"transformer.surprise": torch.zeros(1)}, "holds unknown 1 weights, transformer.surprise"),
        (published(real_data, "tokenpose_l"), "is a TokenPose-L, which stacks three transformers"),
    ):
        with pytest.raises(BadInput, match=message):
            published_teacher(content, "x.pth")
    torch.save({"state_dict": weights, "perf": np.float64(90.1)}, tmp_path / "pickled.pth")
    with pytest.raises(
        BadInput, match=r"pickled.pth cannot be read safely: it holds more than tensors \(numpy"
    ):
        checkpoint.load(tmp_path / "pickled.pth")
