"""HRNet up to stage 3: the backbone that keeps a high-resolution map from end to end.

    python -m pytest tests/test_models.py -k hrnet

Two strided convolutions and a few bottlenecks reduce the image to a quarter of its size. From there, parallel
branches at 1/4, 1/8 and 1/16 exchange their features after every module. The output is the 1/4 branch. Its
width C is the number of its channels; the others have 2C and 4C.

Sun et al., "Deep High-Resolution Representation Learning for Human Pose Estimation", CVPR 2019. Modules have
the names of the published weights (`stage3.3.fuse_layers.0.1.0.weight`), so that these load. Stage 4, which
the token models do not use, is left out.
"""

from typing import NamedTuple

from torch import nn

from common import BadInput


class Depths(NamedTuple):
    """Sizes of an HRNet beside its width. The defaults are those of the published networks."""
    stem: int = 64               # channels of the two strided convolutions
    bottlenecks: int = 4         # of layer1
    bottleneck: int = 64         # their inner channels; they put out four times as many
    blocks: int = 4              # residual blocks of a branch within a module
    modules: int = 4             # of stage 3; stage 2 has one


def conv_bn(inputs, outputs, kernel, stride=1, relu=True):
    """Convolution without bias, batch norm, ReLU: (B, inputs, H, W) -> (B, outputs, H/stride, W/stride)."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
              nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions: x + f(x), (B, C, H, W) in and out."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(out))).relu()


class Bottleneck(nn.Module):
    """ResNet's 1x1, 3x3, 1x1 block, (B, inputs, H, W) -> (B, 4 * channels, H, W)."""

    def __init__(self, inputs, channels):
        super().__init__()
        outputs = 4 * channels
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = conv_bn(inputs, outputs, 1, relu=False) if inputs != outputs else nn.Identity()

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        return (self.downsample(x) + self.bn3(self.conv3(out))).relu()


def fuse_path(source, target, widths):
    """What branch `source` sends to branch `target`: resampled to the target's resolution and channels."""
    if source == target:
        return nn.Identity()
    if source > target:          # from a coarser branch: match the channels, then enlarge by repetition
        enlarge = nn.Upsample(scale_factor=2 ** (source - target), mode="nearest")
        return nn.Sequential(*conv_bn(widths[source], widths[target], 1, relu=False), enlarge)
    steps = target - source     # from a finer branch: strided convolutions; the last one changes the channels
    halve = [conv_bn(widths[source], widths[source], 3, stride=2) for _ in range(steps - 1)]
    return nn.Sequential(*halve, conv_bn(widths[source], widths[target], 3, stride=2, relu=False))


class HighResolutionModule(nn.Module):
    """Parallel branches of residual blocks, then each kept branch becomes a sum over all branches.

    widths: channels of the branches, finest first. keep: how many branches leave, finest first.
    """

    def __init__(self, widths, keep, blocks):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*[BasicBlock(width) for _ in range(blocks)]) for width in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(fuse_path(source, target, widths) for source in range(len(widths)))
            for target in range(keep))

    def forward(self, xs):
        xs = [branch(x) for branch, x in zip(self.branches, xs)]
        return [sum(path(x) for path, x in zip(paths, xs)).relu() for paths in self.fuse_layers]


class HRNet(nn.Module):
    """Stem and stages 1 to 3: RGB (B, 3, H, W) -> high-resolution map (B, width, H / 4, W / 4).

    width: C, 32 or 48 in the published networks. H and W are multiples of 16. depths: of a lighter one.
    """

    def __init__(self, width, depths=Depths()):
        super().__init__()
        C, stem, inner = width, depths.stem, depths.bottleneck
        self.conv1 = nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = nn.Conv2d(stem, stem, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem)
        self.layer1 = nn.Sequential(Bottleneck(stem, inner),
                                    *[Bottleneck(4 * inner, inner) for _ in range(depths.bottlenecks - 1)])
        # Each stage opens one more branch at half the resolution of the coarsest so far. nn.Identity and an
        # nn.Sequential in another only give weights their published names, such as transition2.2.0.0.weight.
        self.transition1 = nn.ModuleList(
            [conv_bn(4 * inner, C, 3), nn.Sequential(conv_bn(4 * inner, 2 * C, 3, stride=2))])
        self.stage2 = nn.Sequential(HighResolutionModule([C, 2 * C], keep=2, blocks=depths.blocks))
        self.transition2 = nn.ModuleList(
            [nn.Identity(), nn.Identity(), nn.Sequential(conv_bn(2 * C, 4 * C, 3, stride=2))])
        keeps = [3] * (depths.modules - 1) + [1]                                # branches that leave a module
        self.stage3 = nn.Sequential(
            *[HighResolutionModule([C, 2 * C, 4 * C], keep, depths.blocks) for keep in keeps])

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()                                     # (B, stem, H/2, W/2)
        x = self.bn2(self.conv2(x)).relu()                                     # (B, stem, H/4, W/4)
        x = self.layer1(x)                                                     # (B, 4 inner, H/4, W/4)
        xs = self.stage2([transition(x) for transition in self.transition1])   # C at 1/4, 2C at 1/8
        xs = self.stage3([*xs, self.transition2[2](xs[-1])])                   # C at 1/4 is all that leaves
        return xs[0]                                                           # (B, C, H/4, W/4)


# ------------------------------------------------------------------------------- published weights

# Stage 3's way to its coarser branches, which do not leave our backbone.
COARSER = "stage3.3.fuse_layers.1.", "stage3.3.fuse_layers.2."
KNOWN_BY = "stage2.0.branches.0.0.conv1.weight"      # a weight that HRNet alone has


def published_tensors(content):
    """The tensors of a published file, at the top or under 'state_dict', without DataParallel's prefix."""
    tensors = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = tensors if isinstance(tensors, dict) else {}
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()
            if isinstance(name, str) and hasattr(tensor, "shape")}


def fill(model, tensors, path, beyond=()):
    """Load tensors with our names into the model -> a line on what was used. BadInput for any mismatch.

    beyond: how names of tensors begin that are left over. Counters of batch norms may be missing, as in files
    of early PyTorch: nothing here reads them.
    """
    needed = model.state_dict()
    counters = {name: count for name, count in needed.items() if name.endswith(".num_batches_tracked")}
    tensors = counters | tensors
    left_over = [name for name in tensors if name.startswith(beyond)]
    for what, names in (("lacks", needed.keys() - tensors.keys()),
                        ("holds unknown", tensors.keys() - needed.keys() - set(left_over)),
                        ("has another shape of", [name for name in needed if name in tensors
                                                  and needed[name].shape != tensors[name].shape])):
        if names:
            raise BadInput(f"{path} is not this network: it {what} {len(names)} weights, {sorted(names)[0]} "
                           f"among them: check its width and depth, and that it is the right file")
    model.load_state_dict({name: tensors[name] for name in needed})
    parts = sorted({name.partition(".")[0] for name in left_over})
    return (f"{path}: all {len(needed)} weights used, {len(left_over)} left over"
            + (f" ({', '.join(parts)})" if parts else ""))


def is_published_backbone(content):
    """Does this hold HRNet's published weights, of ImageNet or a pose network?"""
    tensors = backbone_tensors(content)
    ours = any(name.startswith("encoder.") for name in tensors)                # a network of this project
    return KNOWN_BY in tensors and not ours


def backbone_tensors(content):
    """The tensors of a published file by HRNet's names, which mmpose's files have behind 'backbone.'."""
    tensors = published_tensors(content)
    prefix = "" if KNOWN_BY in tensors else "backbone."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def load_published(backbone, content, path):
    """Load HRNet's published weights, the content of a file -> a line on what was used.

    Parts are known by the first word of their names. Left over are the fourth stage and heads: final_layer,
    incre_modules, classifier, head (the pose repository's ImageNet files) or keypoint_head (mmpose's).
    """
    tensors = backbone_tensors(content)
    parts = {name.partition(".")[0] for name in backbone.state_dict()}
    others = {f"{part}." for name in tensors if (part := name.partition(".")[0]) not in parts}
    return fill(backbone, tensors, path, (*COARSER, *others))
