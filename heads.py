"""What stands behind the last block: a joint's token to its place, three ways, each with its own decoding.

    regression                  x, y, score, sigma: five numbers a joint
    coordinate classification   two distributions over the bins of x and of y (SimCC)
    heatmap                     one distribution over the cells of a grid: the teacher's

    decode        prediction -> places (B, K, 2) in fractions of the crop, and confidences (B, K)
    with_mirror   prediction of a crop and of its mirror image -> the mean of both, as a prediction of the crop. Distributions
                  are averaged bin by bin: the middle of two peaks is where neither saw the joint. Regression has places alone,
                  and averages these
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from crops import FLIP

MIN_SIGMA = 0.5                           # heatmap cells: below, a simulated heatmap misses every cell and learns nothing


class Regression(NamedTuple):
    """What the regression head says of each joint."""
    xy: torch.Tensor          # (B, K, 2) fraction of the crop, in (0, 1)
    score: torch.Tensor       # (B, K) confidence in (0, 1)
    sigma: torch.Tensor       # (B, K, 2) spread in heatmap cells, > MIN_SIGMA


class RegressionHead(nn.Module):
    """LayerNorm, Linear D -> 2D, LayerNorm, Linear 2D -> 5: x, y, score, sigma_x, sigma_y."""

    def __init__(self, dim):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.Linear(2 * dim, 5))
        # The score is learned from the teacher alone (the confidence term). Trained without one it stays noise,
        # so it must not reach the decoded result; train.py says which case this is.
        self.scored = True

    def forward(self, tokens):
        out = self.layers(tokens).float()                                                 # (B, K, 5)
        return Regression(out[..., :2].sigmoid(), out[..., 2].sigmoid(), MIN_SIGMA + F.softplus(out[..., 3:]))

    def decode(self, prediction):
        xy, score, _ = prediction
        return xy, score if self.scored else torch.ones_like(score)

    def with_mirror(self, said, mirrored):
        """Mean of positions: (xy + mirror(xy')) / 2."""
        x, y = mirrored.xy[:, FLIP].unbind(-1)                                            # (B, K) each
        return said._replace(xy=(said.xy + torch.stack([1 - x, y], -1)) / 2, score=(said.score + mirrored.score[:, FLIP]) / 2)


class CoordinateHead(nn.Module):
    """SimCC: a joint's x and y as two classifications over bins (B, K, bins), logits of both in a pair.

    LayerNorm, then Linear D -> bins for x and another for y, shared by all joints. sigma: of the Gaussian label, in
    bins. Li et al., "SimCC: a Simple Coordinate Classification Perspective for Human Pose Estimation", ECCV 2022.
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
        """(B, K) in [0, 1]: the height of the two peaks (geometric mean) over that of a label: 1 is as sure as a label."""
        label_peak = 1 / (self.sigma * math.sqrt(2 * math.pi))
        x, y = (logits.softmax(-1).amax(-1) for logits in prediction)
        return ((x * y).sqrt() / label_peak).clamp(max=1)

    def decode(self, prediction):
        bins = torch.stack([logits.argmax(-1) for logits in prediction], dim=-1)          # (B, K, 2)
        return (bins + 0.5) / prediction[0].shape[-1], self.confidence(prediction)

    def with_mirror(self, said, mirrored):
        """Mean of distributions: log((p + mirror(p')) / 2), for x, whose bins are mirrored, and for y."""
        (x, y), (other_x, other_y) = said, (logits[:, FLIP] for logits in mirrored)       # (B, K, bins) each
        return tuple(((one.softmax(-1) + other.softmax(-1)) / 2).log() for one, other in ((x, other_x.flip(-1)), (y, other_y)))


class HeatmapHead(nn.Module):
    """TokenPose's head: LayerNorm, Linear D -> width, LayerNorm, Linear width -> size * size: heatmaps (B, K, size, size).

    Ours puts out logits of a distribution over positions; values=True is for published weights, whose output is the heatmap.
    """

    def __init__(self, dim, size, sigma, width=None, values=False):
        super().__init__()
        self.size, self.sigma, self.values = size, sigma, values
        width = width or 2 * dim
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width),
                                    nn.LayerNorm(width), nn.Linear(width, size * size))

    def forward(self, tokens):
        return self.layers(tokens).float().unflatten(-1, (self.size, self.size))

    def relative(self, output):
        """Output -> heatmaps in units of the height that a perfect label has: above 1 if sharper."""
        if self.values:
            return output
        label_peak = 1 / (2 * math.pi * self.sigma ** 2)
        return output.flatten(-2).softmax(-1).view_as(output) / label_peak

    def heatmaps(self, output):
        """Output -> heatmaps in [0, 1] with a peak near 1, as the label has it."""
        return self.relative(output).clamp(0, 1)

    def decode(self, output):
        # not of the clamped heatmaps: where several cells stand at 1, their order is lost
        xy, peak = decode_heatmaps(self.relative(output))
        return xy, peak.clamp(0, 1)

    def with_mirror(self, said, mirrored):
        """Mean of heatmaps, or of distributions over positions: log((p + mirror(p')) / 2)."""
        mirrored = mirrored[:, FLIP].flip(-1)                                             # (B, K, S, S)
        if self.values:
            return (said + mirrored) / 2
        one, other = (logits.flatten(-2).softmax(-1) for logits in (said, mirrored))
        return ((one + other) / 2).log().view_as(said)


def decode_heatmaps(heatmaps):
    """Heatmaps (B, K, S, S) -> (B, K, 2) fractions of the crop and (B, K) peak values.

    The highest cell, moved a quarter of a cell towards the higher neighbour (the decoding of HRNet).
    """
    S = heatmaps.shape[-1]
    peak, index = heatmaps.flatten(-2).max(-1)                                            # (B, K)
    y, x = index // S, index % S
    padded = F.pad(heatmaps, (1, 1, 1, 1), mode="replicate").flatten(-2)                  # (B, K, (S + 2)^2)

    def at(dy, dx):
        return padded.gather(-1, ((y + 1 + dy) * (S + 2) + x + 1 + dx)[..., None])[..., 0]

    shift = torch.stack([(at(0, 1) - at(0, -1)).sign(), (at(1, 0) - at(-1, 0)).sign()], dim=-1)
    return (torch.stack([x, y], dim=-1) + 0.5 + 0.25 * shift) / S, peak
