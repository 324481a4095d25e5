"""Teacher and students: images to tokens, tokens through an encoder, keypoint tokens to joints.

    python evaluate.py --costs              # parameters, multiply-adds and speed of the paper's networks

All networks share one design: an image becomes 16 x 16 visual tokens (8 x 8 for 64 pixels); one learned
token per joint is added; an encoder of identical blocks mixes all of them; a head reads each joint from its
token.

      image (B, 3, size, size)      the token grid, H x (W + 1)
            |                        . . . . . . . k       . visual token   (B, 256, D)
      patches, or HRNet + patches    . . . . . . . k       k keypoint token (B, 16, D): one more column,
            |                        . . . . . . . k         as 16 joints fill 16 rows (two columns in a
      encoder: depth x block         . . . . . . . k         grid of 8 rows)
            |
      head: regression (x, y, score, sigma), coordinate classification (SimCC), or heatmap (the teacher)

A filter is circular: keypoint tokens touch the image's right and its left edge, the top row the bottom row.

What differs between the 16 students of the paper's Tables A and B is the block's mixer (attention, GS or GD
of gfl.py), the backbone (none, HRNet-W32, HRNet-W48) and the head. Sizes are inferred from the tables'
parameter counts. Positions inside the networks are fractions of the crop, 0 at its left or top edge and 1 at
its right or bottom edge; `PoseNet.decode` alone gives pixels.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from crops import FLIP
from gfl import GlobalDynamicFilter, StaticFilter
from hrnet import Depths, HRNet

KEYPOINTS = 16                            # K, MPII's joints
MLP_RATIO = 3                             # TokenPose
IMAGENET_MEAN = (0.485, 0.456, 0.406)     # what published backbones expect, RGB in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
NEAR = 0.05                     # fraction of the crop, about half a head: what a confidence of cc speaks of
MIN_SIGMA = 0.5                 # heatmap cells; a narrower Gaussian can lie between cells and get no gradient


# ----------------------------------------------------------------------- the encoder: one block, three mixers

class Attention(nn.Module):
    """Multi-head self-attention on the token grid, the mixer of the teacher and of the paper's baselines.

        softmax(q k^T / sqrt(D / heads)) v, qkv without bias, output projection with bias

    Input and output (B, H, W, D).
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))     # (B, N, 3, heads, d), N = H W
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                   # (B, heads, N, d) each
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2)).view(x.shape)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)): across tokens, then channels. (B, H, W, D) in and out."""

    def __init__(self, dim, mixer):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sine_position_embedding(rows, columns, dim):
    """Fixed 2-D sine embedding (rows, columns, dim), as in DETR: half the channels encode the row."""
    frequency = 1e4 ** -(torch.arange(0, dim // 2, 2) / (dim // 2))                        # (dim / 4,)

    def encode(count):                                                                     # (count, dim / 2)
        angle = 2 * math.pi * torch.arange(1, count + 1)[:, None] / count * frequency
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    by_row, by_column = torch.broadcast_tensors(encode(rows)[:, None], encode(columns)[None])
    return torch.cat([by_row, by_column], dim=-1)                                       # (rows, columns, dim)


class Encoder(nn.Module):
    """Visual tokens (B, H * W, D) -> keypoint tokens (B, K, D), visual tokens (B, H * W, D) after all blocks.

    grid: (H, W) of the visual tokens. filter: 'attention', 'gs' or 'gd'. Keypoint tokens fill K / H more
    columns on the right, top to bottom: K must be a multiple of H. The mixers' W is W + K / H.
    """

    def __init__(self, grid, dim, depth, heads, filter, joints=KEYPOINTS):
        super().__init__()
        H, W = self.grid = grid
        self.columns = joints // H
        if self.columns * H != joints:
            raise ValueError(f"{joints} keypoint tokens do not fill whole columns of {H} rows")
        full = (H, W + self.columns)
        mixer = {"attention": lambda: Attention(dim, heads), "gs": lambda: StaticFilter(full, dim),
                 "gd": lambda: GlobalDynamicFilter(full, dim)}[filter]
        self.keypoint_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, joints, dim), std=0.02))
        # A parameter that is not trained, as the paper's counts include it.
        self.position = nn.Parameter(sine_position_embedding(H, W, dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, mixer()) for _ in range(depth))

    def forward(self, visual):
        H, W = self.grid
        B, _, D = visual.shape
        keypoint = self.keypoint_tokens.expand(B, -1, -1).to(visual.dtype)                 # (B, K, D)
        columns = keypoint.view(B, self.columns, H, D).transpose(1, 2)                    # (B, H, columns, D)
        x = torch.cat([visual.view(B, H, W, D), columns], dim=2)                           # the token grid
        position = F.pad(self.position, (0, 0, 0, self.columns))                    # zero for keypoint tokens
        for block in self.blocks:
            x = block(x + position)          # before every block, TokenPose's 'sine-full'
        keypoint = x[:, :, W:].transpose(1, 2).flatten(1, 2)                               # (B, K, D)
        return keypoint, x[:, :, :W].flatten(1, 2)                                         # (B, H * W, D)


# ------------------------------------------------------------------------------- three heads

# A head turns a joint's token into a prediction, and that into its coordinates:
#
#     decode        prediction -> coordinates (B, K, 2) in fractions of the crop, and confidences (B, K)
#     with_mirror   predictions of a crop and of its mirror image -> their mean. Distributions are averaged
#                   bin by bin: the mean of two decoded peaks could be a point that neither supports.
#                   Regression has no distributions: its coordinates are averaged. HRNet's code shifts by a
#                   cell first; here cell i has its centre at (i + 0.5) / n, so mirroring is exact without.

class Regression(NamedTuple):
    """Prediction of the regression head."""
    xy: torch.Tensor          # (B, K, 2) fraction of the crop, in (0, 1)
    score: torch.Tensor       # (B, K) confidence in (0, 1)
    sigma: torch.Tensor       # (B, K, 2) spread in heatmap cells, > MIN_SIGMA


class RegressionHead(nn.Module):
    """LayerNorm, Linear D -> 2D, LayerNorm, Linear 2D -> 5: x, y, score, sigma_x, sigma_y."""

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim),
                                    nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 5))
        # Only the confidence term trains the score. Without that term train.py sets this to False, and decode
        # returns confidences of 1.
        self.scored = True

    def forward(self, tokens):
        out = self.layers(tokens).float()                                                 # (B, K, 5)
        return Regression(out[..., :2].sigmoid(), out[..., 2].sigmoid(), MIN_SIGMA + F.softplus(out[..., 3:]))

    def decode(self, prediction):
        xy, score, _ = prediction
        return xy, score if self.scored else torch.ones_like(score)

    def with_mirror(self, prediction, mirrored):
        """Mean of positions, (xy + mirror(xy')) / 2, and of scores."""
        x, y = mirrored.xy[:, FLIP].unbind(-1)                                            # (B, K) each
        return prediction._replace(xy=(prediction.xy + torch.stack([1 - x, y], -1)) / 2,
                                   score=(prediction.score + mirrored.score[:, FLIP]) / 2)


class CoordinateHead(nn.Module):
    """SimCC: a joint's x and y as two classifications over bins (B, K, bins), logits of both in a pair.

    LayerNorm, then Linear D -> bins for x and another for y, shared by all joints. sigma: standard
    deviation of the Gaussian label, bins. Li et al., "SimCC: a Simple Coordinate Classification Perspective
    for Human Pose Estimation", ECCV 2022.
    """

    def __init__(self, dim, bins, sigma):
        super().__init__()
        self.sigma = sigma
        self.norm = nn.LayerNorm(dim)
        self.x = nn.Linear(dim, bins)
        self.y = nn.Linear(dim, bins)

    def forward(self, tokens):
        tokens = self.norm(tokens)
        return self.x(tokens).float(), self.y(tokens).float()

    def confidence(self, prediction):
        """(B, K) in [0, 1]: the probability, by both distributions, that the joint is near the decoded place.

        c = P(|x - x_peak| <= NEAR) P(|y - y_peak| <= NEAR)
        """
        masses = []
        for logits in prediction:                                                         # (B, K, bins)
            count = logits.shape[-1]
            away = torch.arange(count, device=logits.device) - logits.argmax(-1, keepdim=True)
            masses.append((logits.softmax(-1) * (away.abs() <= NEAR * count)).sum(-1))     # (B, K)
        return masses[0] * masses[1]

    def decode(self, prediction):
        bins = torch.stack([logits.argmax(-1) for logits in prediction], dim=-1)          # (B, K, 2)
        return (bins + 0.5) / prediction[0].shape[-1], self.confidence(prediction)

    def with_mirror(self, prediction, mirrored):
        """Mean of distributions: log((p + mirror(p')) / 2), for x, whose bins are mirrored, and for y."""
        x, y = prediction                                                                 # (B, K, bins) each
        other_x, other_y = (logits[:, FLIP] for logits in mirrored)
        pairs = (x, other_x.flip(-1)), (y, other_y)
        # log: what follows takes logits
        return tuple(((one.softmax(-1) + other.softmax(-1)) / 2).log() for one, other in pairs)


class HeatmapHead(nn.Module):
    """TokenPose's head: LayerNorm, Linear D -> width, LayerNorm, Linear -> S * S: heatmaps (B, K, S, S).

    The output is logits over positions. published: TokenPose's own, 512 wide, puts out the heatmap itself.
    """

    def __init__(self, dim, size, sigma, published=False):
        super().__init__()
        self.size, self.sigma, self.published = size, sigma, published
        width = 512 if published else 2 * dim
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width),
                                    nn.LayerNorm(width), nn.Linear(width, size * size))

    def forward(self, tokens):
        return self.layers(tokens).float().unflatten(-1, (self.size, self.size))

    def heatmaps(self, prediction):
        """Prediction -> heatmaps on a scale on which a label's peak is 1; they can exceed 1."""
        if self.published:
            return prediction
        label_peak = 1 / (2 * math.pi * self.sigma ** 2)
        return prediction.flatten(-2).softmax(-1).view_as(prediction) / label_peak

    def decode(self, prediction):
        xy, peak = decode_heatmaps(self.heatmaps(prediction))
        return xy, peak.clamp(0, 1)          # not before: clamping can make several cells equal to 1

    def with_mirror(self, prediction, mirrored):
        """Mean of heatmaps, or of distributions over positions: log((p + mirror(p')) / 2)."""
        mirrored = mirrored[:, FLIP].flip(-1)                                             # (B, K, S, S)
        if self.published:
            return (prediction + mirrored) / 2
        one, other = (logits.flatten(-2).softmax(-1) for logits in (prediction, mirrored))
        return ((one + other) / 2).log().view_as(prediction)


def decode_heatmaps(heatmaps):
    """Heatmaps (B, K, S, S) -> (B, K, 2) fractions of the crop and (B, K) peak values.

    The highest cell, moved 1/4 cell to the higher neighbour (HRNet's decoding); at a border, outward.
    """
    S = heatmaps.shape[-1]
    peak, index = heatmaps.flatten(-2).max(-1)                                            # (B, K)
    y, x = index // S, index % S
    padded = F.pad(heatmaps, (1, 1, 1, 1), mode="replicate").flatten(-2)                  # (B, K, (S + 2)^2)

    def at(dy, dx):
        return padded.gather(-1, ((y + 1 + dy) * (S + 2) + x + 1 + dx)[..., None])[..., 0]

    shift = torch.stack([(at(0, 1) - at(0, -1)).sign(), (at(1, 0) - at(-1, 0)).sign()], dim=-1)
    return (torch.stack([x, y], dim=-1) + 0.5 + 0.25 * shift) / S, peak


# ------------------------------------------------------------------------------- the whole network

class Output(NamedTuple):
    """Output of a network: the tokens that distillation compares, and the head's prediction."""
    keypoint_tokens: torch.Tensor         # (B, K, D)
    visual_tokens: torch.Tensor           # (B, H * W, D)
    prediction: Any                       # what the head returns: Regression, (x, y) logits, or heatmaps
    backbone_heatmaps: torch.Tensor | None = None    # (B, K, size / 4, size / 4) logits, only in training


class PatchEmbedding(nn.Module):
    """Cut a map (B, C, H, W) into patches, flatten and project each: tokens (B, rows * columns, dim)."""

    def __init__(self, channels, patch, dim):
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(channels * patch * patch, dim)

    def forward(self, x):
        p = self.patch
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))                        # (B, C, rows, p, columns, p)
        return self.project(x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))   # (B, rows * columns, dim)


class PoseNet(nn.Module):
    """RGB crops (B, 3, size, size) in [0, 1] -> Output. Built by `build_student` and `build_teacher`.

    config: the arguments that build the same network again (what a checkpoint stores).
    """

    def __init__(self, preset, filter, width, head, config):
        super().__init__()
        self.size, self.config = preset.size, config
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.backbone = HRNet(width, preset.hrnet) if width else nn.Identity()
        supervise = width and preset.supervise_backbone
        self.backbone_heatmaps = nn.Conv2d(width, KEYPOINTS, 1) if supervise else None
        channels, side = (width, preset.size // 4) if width else (3, preset.size)
        self.embed = PatchEmbedding(channels, side // preset.grid, preset.dim)
        self.encoder = Encoder((preset.grid, preset.grid), preset.dim, preset.depth, preset.heads, filter)
        self.head = head

    def forward(self, images):
        normalised = (images - self.mean).div_(self.std).to(self.embed.project.weight.dtype)
        features = self.backbone(normalised)       # (B, width, size / 4, size / 4), or the images themselves
        maps = self.backbone_heatmaps(features).float() if self.training and self.backbone_heatmaps else None
        keypoint, visual = self.encoder(self.embed(features))
        kind = "cpu" if images.is_meta else images.device.type
        # the head computes in float32: bfloat16's 8 significant bits tell only 256 positions apart
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            # for_inference may make the encoder bfloat16; `mean` stays float32, as the head does
            return Output(keypoint, visual, self.head(keypoint.to(self.mean.dtype)), maps)

    def decode(self, output):
        """Output -> joints (B, K, 2), (0, 0) is the top left pixel's centre, and confidences (B, K)."""
        xy, confidence = self.head.decode(output.prediction)
        return xy * self.size - 0.5, confidence


# ------------------------------------------------------------------------------- the registry of sizes

@dataclass(frozen=True)
class Preset:
    """Sizes of one family of networks. 'paper' has the paper's; sigmas and the split ratio are borrowed."""
    size: int                 # side of the square input, pixels
    dim: int                  # D, channels of a token
    depth: int                # blocks of the encoder, the student's and the teacher's
    heads: int                # attention heads
    teacher_width: int        # HRNet's C in the teacher
    simcc_sigma: float        # standard deviation of SimCC's label, bins
    hrnet: Depths = Depths()  # depths of the HRNets
    grid: int = 16            # rows and columns of visual tokens
    bins_per_pixel: int = 2   # SimCC's split ratio
    heatmap: int = 64         # side of the teacher's heatmaps, cells
    heatmap_sigma: float = 2  # standard deviation of the heatmap's label, cells (TokenPose)
    supervise_backbone: bool = False     # whether heatmaps are read from the backbone, too, in training


# 'small' is ours, for photos and CPUs: a light HRNet.
PRESETS = {
    "paper": Preset(size=256, dim=192, depth=12, heads=8, teacher_width=48, simcc_sigma=6),
    "tiny": Preset(size=64, dim=96, depth=4, heads=4, teacher_width=16, simcc_sigma=3, grid=8),
    "small": Preset(size=128, dim=128, depth=4, heads=4, teacher_width=24, simcc_sigma=2,
                    hrnet=Depths(stem=32, bottlenecks=2, bottleneck=32, blocks=2, modules=2),
                    supervise_backbone=True),
}
# The same networks on crops of half the size: where a teacher's long training begins (train.py --init).
PRESETS["small-64"] = replace(PRESETS["small"], size=64, grid=8)
STUDENTS = ("reg", "cc")
FILTERS = ("gs", "gd", "attention")
BACKBONES = {"none": 0, "w16": 16, "w24": 24, "w32": 32, "w48": 48}


def build_student(student, filter, backbone="none", preset="paper"):
    """A PoseNet. student: one of STUDENTS, filter of FILTERS, backbone of BACKBONES, preset of PRESETS.

    ValueError, with the choices, for anything else.
    """
    for name, value, choices in (("student", student, STUDENTS), ("filter", filter, FILTERS),
                                 ("backbone", backbone, BACKBONES), ("preset", preset, PRESETS)):
        if value not in choices:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}")
    sizes = PRESETS[preset]
    config = dict(student=student, filter=filter, backbone=backbone, preset=preset)
    head = (RegressionHead(sizes.dim) if student == "reg" else
            CoordinateHead(sizes.dim, sizes.bins_per_pixel * sizes.size, sizes.simcc_sigma))
    return PoseNet(sizes, filter, BACKBONES[backbone], head, config)


def build_teacher(preset="paper", head="ours"):
    """The heatmap teacher: HRNet (W48 at paper size), attention blocks, heatmap head.

    head: 'ours', or 'tokenpose', that of published weights (checkpoint.published_teacher).
    """
    sizes, published = PRESETS[preset], head == "tokenpose"
    config = dict(student="teacher", preset=preset) | (dict(head=head) if published else {})
    head = HeatmapHead(sizes.dim, sizes.heatmap, sizes.heatmap_sigma, published)
    return PoseNet(sizes, "attention", sizes.teacher_width, head, config)
