"""Published weights in, ours out: HRNet's backbones, TokenPose's and DistilPose's teachers.

    python train.py --student cc --filter gs --backbone w32 --backbone-weights hrnet_w32_imagenet.pth ...
    python evaluate.py --checkpoint tokenpose_b_mpii.pth --data MPII        # score a published teacher first
    python train.py --student cc --filter gs --teacher tokenpose_b_mpii.pth --data MPII --preset paper

TokenPose-B with HRNet-W48 and 12 layers is the layout of our teacher but for its head: 512 wide (ours 384, as in the paper's
tables), and what it puts out is the heatmap itself, as it learned with mean squared error. Every weight that a network needs
must be in the file, in its shape; every weight of the file must be known, or it is not the file it is taken for.
"""

import re

from inputs import BadInput
from models import build_teacher

# Our name for each of TokenPose's, first match wins; its own HRNet has our names behind 'pre_feature.'.
TOKENPOSE = (
    (r"pre_feature\.", "backbone."),
    (r"transformer\.keypoint_token$", "encoder.keypoint_tokens"),
    (r"transformer\.pos_embedding$", "encoder.position"),                            # (1, 256, D), ours (16, 16, D)
    (r"transformer\.patch_to_embedding\.", "embed.project."),
    (r"transformer\.transformer\.layers\.(\d+)\.0\.fn\.norm\.", r"encoder.blocks.\1.norm1."),
    (r"transformer\.transformer\.layers\.(\d+)\.0\.fn\.fn\.to_qkv\.", r"encoder.blocks.\1.mixer.qkv."),
    (r"transformer\.transformer\.layers\.(\d+)\.0\.fn\.fn\.to_out\.0\.", r"encoder.blocks.\1.mixer.out."),
    (r"transformer\.transformer\.layers\.(\d+)\.1\.fn\.norm\.", r"encoder.blocks.\1.norm2."),
    (r"transformer\.transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.0\.", r"encoder.blocks.\1.mlp.0."),
    (r"transformer\.transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.3\.", r"encoder.blocks.\1.mlp.2."),
    (r"transformer\.mlp_head\.", "head.layers."),
)
# DistilPose keeps the same tensors behind other prefixes.
DISTILPOSE = ((r"keypoint_head\.tokenpose\.", "transformer."), (r"backbone\.", "pre_feature."))

# What published HRNet files hold beyond the map that leaves our backbone: stage 3's way to its coarser branches, the fourth
# stage, and heads for joints or for ImageNet's classes.
BEYOND_STAGE_3 = ("stage3.3.fuse_layers.1.", "stage3.3.fuse_layers.2.", "transition3.", "stage4.", "final_layer.",
                  "incre_modules.", "downsamp_modules.", "classifier.")


def state_dict(content):
    """The tensors by name in what a published file holds: bare, or under 'state_dict'; without DataParallel's prefix."""
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = tensors if isinstance(tensors, dict) else {}
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()
            if isinstance(name, str) and hasattr(tensor, "shape")}


def rename(name, table):
    for pattern, ours in table:
        new, found = re.subn("^" + pattern, ours, name)
        if found:
            return new
    return name


def fill(model, found, path, beyond=()):
    """found: tensors by our names, into model. -> a line on what was used; BadInput names what is amiss."""
    needed = model.state_dict()
    left_over = [name for name in found if name.startswith(tuple(beyond))] if beyond else []
    for what, names in (("lacks", needed.keys() - found.keys()),
                        ("holds unknown", found.keys() - needed.keys() - set(left_over)),
                        ("has another shape of", [n for n in needed if n in found and needed[n].shape != found[n].shape])):
        if names:
            raise BadInput(f"{path} is not this network: it {what} {len(names)} weights, {sorted(names)[0]} among them: "
                           f"check its width and depth, and that it is the right file")
    model.load_state_dict({name: found[name] for name in needed})
    return f"{path}: all {len(needed)} weights used, {len(left_over)} left over" + (" (beyond stage 3)" if left_over else "")


def fill_backbone(backbone, content, path):
    """HRNet's published weights, ImageNet's or a pose network's, into our HRNet; returns a line on what was used."""
    return fill(backbone, state_dict(content), path, BEYOND_STAGE_3)


def is_teacher(content):
    """Is this a checkpoint of TokenPose's or DistilPose's, rather than one of ours?"""
    return any(re.match(r"(transformer|keypoint_head\.tokenpose)\.", name) for name in state_dict(content))


def published_teacher(content, path):
    """-> (our teacher with TokenPose's or DistilPose's weights, a line on what was used)."""
    found = state_dict(content)
    if any(name.startswith("keypoint_head.tokenpose.") for name in found):
        found = {rename(name, DISTILPOSE): tensor for name, tensor in found.items()}
    if any(name.startswith("transformer.transformer1.") for name in found):
        raise BadInput(f"{path} is a TokenPose-L, which stacks three transformers: the teacher's layout is that of "
                       f"TokenPose-B with HRNet-W48 and 12 layers")
    teacher = build_teacher("paper", head="tokenpose")
    found = {rename(name, TOKENPOSE): tensor for name, tensor in found.items()}
    position = teacher.encoder.position
    if "encoder.position" in found and found["encoder.position"].numel() == position.numel():
        found["encoder.position"] = found["encoder.position"].view(position.shape)
    return teacher, fill(teacher, found, path)
