"""Losses: labels, and distillation from a teacher's tokens, heatmaps and confidence.

    python train.py --student cc --filter gd        # logs these terms but L_bb

    L = L_task + a1 L_kt + a2 L_vt + a3 L_hm + a4 L_cs  (+ L_bb)

    L_task   labels: SmoothL1 (regression), KL to a Gaussian label (coordinate classification, and the teacher
             over its heatmap). Label widths: models.Preset
    L_kt     mean squared error between keypoint tokens of student and teacher
    L_vt     mean squared error between visual tokens of student and teacher
    L_hm     the teacher's heatmap against a Gaussian at the prediction (regression), or its marginals against
             the distributions over x and y (coordinate classification)
    L_cs     |student's confidence - teacher's heatmap at the student's prediction|

    L_bb     ours, for every backbone in presets small and small-64, student or teacher: heatmaps read from
             its features, KL to a Gaussian label

Tokens are those after the last block. The teacher's are standardised (TokenScale), the student's compared as
they are. They agree in number and width (a teacher of another preset is refused): none is projected.

The terms are those of the BMVC 2024 paper's poster. For the regression student they are DistilPose's
("DistilPose: Tokenized Pose Regression with Heatmap Distillation", CVPR 2023); for coordinate classification
the heatmap is compared through its marginals. `visible` is False for joints that are unlabelled or outside
the crop: they are masked in every term but L_vt, which is not per joint. Crops that show nobody have no
visible joint: labels of cc's L_task and of L_bb are flat there, L_cs' target is 0, L_vt is as ever. (PCKh, in
evaluate.py, counts labelled joints that are occluded or outside the crop, too, but not pelvis and thorax.)

Shapes: B images, K = 16 joints, D channels, N visual tokens, S x S heatmap cells, `bins` SimCC bins per axis.
Coordinates xy are fractions of the crop, visible is bool. Each loss is a tensor of shape ().
"""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
from common import BadInput, fast_bfloat16
from crops import make_batch
from evaluate import evaluate, mean_pose_score
from export import for_inference
from models import CoordinateHead, Regression

# a1 .. a4, for standardised tokens (TeacherTargets), chosen on drawings (docs/lab.md). cc's L_task is twenty
# times reg's. a3 and a4 are DistilPose's; its a1 and a2, 5e-4, are for tokens that are not standardised.
WEIGHTS = {"cc": dict(keypoint_tokens=3.0, visual_tokens=1.0, heatmap=1.0, confidence=0.01),
           "reg": dict(keypoint_tokens=0.3, visual_tokens=0.1, heatmap=1.0, confidence=0.01)}
BACKBONE_SIGMA = 1 / 32      # of L_bb's label, fraction of the crop: as wide as the teacher's (2 of 64 cells)
SMOOTH_L1_BETA = 1 / 64      # beta of SmoothL1, fraction of the crop: one heatmap cell
CALIBRATION = 256            # first training samples, unaugmented, that give the teacher's token statistics


# ------------------------------------------------------------------------------- Gaussians and divergences

def gaussian(position, sigma, size):
    """Gaussians of height 1 along an axis of `size` cells: position (...) in fractions -> (..., size).

    sigma: in cells, a number or a tensor of the shape of position. Cell i has its centre at (i + 0.5) / size.
    """
    cells = torch.arange(size, device=position.device) + 0.5                   # (size,)
    sigma = torch.as_tensor(sigma, device=position.device)[..., None]
    return torch.exp(-0.5 * ((cells - size * position[..., None]) / sigma) ** 2)


def gaussian_heatmaps(xy, sigma, size):
    """Heatmaps (B, K, size, size) of joints (B, K, 2), height 1. sigma: cells, a number or (B, K, 2)."""
    along_x, along_y = gaussian(xy, sigma, size).unbind(2)                     # (B, K, size) each
    return along_y[..., :, None] * along_x[..., None, :]                       # rows are y


def coordinate_labels(xy, sigma, bins):
    """SimCC's labels: two distributions (B, K, bins), for x and y, that sum to 1. sigma in bins."""
    return normalise(gaussian(xy, sigma, bins)).unbind(2)                      # of (B, K, 2, bins)


def normalise(values):
    """Values (..., bins), 0 or above, divided by their sum; zeros stay zeros."""
    return values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


def masked_mean(values, visible):
    """Sum of values (B, K) over visible joints (B, K), divided by all B * K joints, as in HRNet's loss.

    The loss of a batch is then the mean of the losses of its equal parts, so gradients can be accumulated and
    averaged over processes. The term scales with the fraction of visible joints: 0.93 in MPII, 1 for
    synthetic people. Values of invisible joints may be anything finite.
    """
    return torch.where(visible, values, 0).mean()


def kl_divergence(target, logits):
    """KL(target || softmax(logits)) of distributions (B, K, bins), summed over the bins: (B, K).

    Summed, as a mean over bins would depend on their number.
    """
    return (torch.xlogy(target, target) - target * logits.log_softmax(-1)).sum(-1)


def mean_kl(targets, logits, visible):
    """Mean of the divergences over x and over y. targets, logits: a pair of (B, K, bins) each."""
    over_x, over_y = map(kl_divergence, targets, logits)                                   # (B, K) each
    return masked_mean((over_x + over_y) / 2, visible)


# ------------------------------------------------------------------------------- labels

def regression_task(prediction, xy, visible):
    """L_task = SmoothL1(xy_student, xy_label), in fractions of the crop, per joint and axis."""
    loss = F.smooth_l1_loss(prediction.xy, xy, reduction="none", beta=SMOOTH_L1_BETA)      # (B, K, 2)
    return masked_mean(loss.mean(-1), visible)


def flat_where_empty(labels, empty):
    """Labels (B, K, cells), uniform distributions in crops where nobody is: low peaks, low confidence."""
    return torch.where(empty[:, None, None], 1 / labels.shape[-1], labels)


def coordinate_task(prediction, xy, visible, empty, sigma):
    """L_task = KL(Gaussian label || student), mean of both axes (SimCC). sigma in bins."""
    labels = coordinate_labels(xy, sigma, prediction[0].shape[-1])
    return mean_kl([flat_where_empty(label, empty) for label in labels], prediction,
                   visible | empty[:, None])


def heatmap_task(logits, xy, visible, empty, sigma):
    """L_task of the teacher: KL(Gaussian label || softmax(logits)) over positions. logits (B, K, S, S)."""
    label = normalise(gaussian_heatmaps(xy, sigma, logits.shape[-1]).flatten(-2))         # (B, K, S * S)
    return masked_mean(kl_divergence(flat_where_empty(label, empty), logits.flatten(-2)),
                       visible | empty[:, None])


def backbone_task(logits, xy, visible, empty):
    """L_bb: heatmap_task of the heatmaps that are read from the backbone."""
    return heatmap_task(logits, xy, visible, empty, BACKBONE_SIGMA * logits.shape[-1])


def task_loss(head, prediction, xy, visible, empty):
    """L_task of the head that made the prediction. xy (B, K, 2) fractions of the crop, visible (B, K),
    empty (B,): crops without a person, whose labels are flat distributions; regression has none.
    """
    if isinstance(prediction, Regression):
        return regression_task(prediction, xy, visible)
    if isinstance(head, CoordinateHead):
        return coordinate_task(prediction, xy, visible, empty, head.sigma)
    return heatmap_task(prediction, xy, visible, empty, head.sigma)


# ------------------------------------------------------------------------------- distillation

def keypoint_token_loss(student, teacher, visible):
    """L_kt = ||k_student - k_teacher||^2 / D of keypoint tokens (B, K, D)."""
    return masked_mean((student - teacher).square().mean(-1), visible)


def visual_token_loss(student, teacher):
    """L_vt = ||V_student - V_teacher||^2 / (N D), visual tokens (B, N, D)."""
    return F.mse_loss(student, teacher)


def heatmap_loss_regression(prediction, teacher, visible):
    """L_hm = ||H_student - H_teacher||^2 / S^2, H_student a Gaussian of height 1 at the predicted (x, y).

    Its width is the predicted sigma (at least 0.5 cells, along each axis), which no other term trains.
    """
    simulated = gaussian_heatmaps(prediction.xy, prediction.sigma, teacher.shape[-1])      # (B, K, S, S)
    return masked_mean((simulated - teacher).square().mean((-2, -1)), visible)


def marginals(teacher, bins):
    """Heatmaps (B, K, S, S) -> two distributions (B, K, bins), over x and y: sum, resample, normalise."""
    for axis in (-2, -1):                                                             # sum over rows leaves x
        yield normalise(F.interpolate(teacher.sum(axis), size=bins, mode="linear", align_corners=False))


def heatmap_loss_coordinates(prediction, teacher, visible):
    """L_hm = KL(marginal of H_teacher || student), mean of both axes."""
    return mean_kl(marginals(teacher, prediction[0].shape[-1]), prediction, visible)


def confidence_loss(confidence, xy, teacher, visible, empty):
    """L_cs = |c_student - H_teacher(x_student, y_student)|, the heatmap's value at the student's prediction.

    confidence (B, K), xy (B, K, 2) in fractions (no gradient passes through xy), teacher (B, K, S, S). In
    crops where nobody is, empty (B,), the target is 0.
    """
    B, K, S, _ = teacher.shape
    grid = (2 * xy.detach() - 1).view(B * K, 1, 1, 2)                                  # [-1, 1], edge to edge
    value = F.grid_sample(teacher.reshape(B * K, 1, S, S), grid, padding_mode="border", align_corners=False)
    target = value.view(B, K).where(~empty[:, None], 0)
    return masked_mean((confidence - target).abs(), visible | empty[:, None])


# ------------------------------------------------------------------------------- the whole loss

def loss_terms(head, output, batch, targets=None, weights=None):
    """Every term of the loss, unweighted, by name, and their weighted sum: {'task': L_task, ..., 'loss': L}.

        L = L_task + a1 L_kt + a2 L_vt + a3 L_hm + a4 L_cs  (+ L_bb, where the backbone has heatmaps)

    head, output: the network's head and Output. batch: crops.Batch with the labels. targets: the teacher's
    Targets and weights: a1 .. a4 by name (WEIGHTS); without them labels are all there is to learn from.
    """
    prediction, xy, visible, empty = output.prediction, batch.xy, batch.visible, batch.empty
    terms = {"task": task_loss(head, prediction, xy, visible, empty)}
    loss = terms["task"]
    if output.backbone_heatmaps is not None:
        terms["backbone"] = backbone_task(output.backbone_heatmaps, xy, visible, empty)
        loss = loss + terms["backbone"]
    if targets is not None:
        heatmap_loss = (heatmap_loss_regression if isinstance(prediction, Regression)
                        else heatmap_loss_coordinates)
        decoded, confidence = head.decode(prediction)
        terms["keypoint_tokens"] = keypoint_token_loss(output.keypoint_tokens, targets.keypoint_tokens,
                                                       visible)
        terms["visual_tokens"] = visual_token_loss(output.visual_tokens, targets.visual_tokens)
        terms["heatmap"] = heatmap_loss(prediction, targets.heatmaps, visible)
        terms["confidence"] = confidence_loss(confidence, decoded, targets.heatmaps, visible, empty)
        loss = loss + sum(weight * terms[name] for name, weight in weights.items())
    return terms | {"loss": loss}


# ------------------------------------------------------------------------------- the teacher and its targets

class Targets(NamedTuple):
    """What a teacher predicts for a batch of images: the student's targets."""
    keypoint_tokens: torch.Tensor      # (B, K, D)
    visual_tokens: torch.Tensor        # (B, N, D)
    heatmaps: torch.Tensor             # (B, K, S, S) in [0, 1]


@torch.no_grad()
def teacher_targets(teacher, images):
    """The Targets of images (B, 3, size, size), tokens as they are (see TokenScale). No gradient."""
    output = teacher(images)
    return Targets(output.keypoint_tokens.float(), output.visual_tokens.float(),
                   teacher.head.heatmaps(output.prediction).clamp(0, 1))


class TokenScale(NamedTuple):
    """Standardise tokens (B, N, D): z = difference / its RMS by channel, difference = token - mean."""
    mean: torch.Tensor                 # (N, D), over images
    deviation: torch.Tensor            # (D,), RMS of token - mean over images, tokens

    @classmethod
    def measure(cls, tokens):
        mean = tokens.mean(0)
        return cls(mean, (tokens - mean).square().mean((0, 1)).sqrt().clamp(min=1e-6))

    def __call__(self, tokens):
        return (tokens - self.mean) / self.deviation


class TeacherTargets:
    """Targets of a teacher with standardised tokens, computed at every call or once per augmented view.

    Two thirds of the variance of the tiny teacher's visual tokens come from their position, not from the
    image, and the scale of tokens is arbitrary. Standardised, they carry what differs between images, and one
    pair a1, a2 suits every teacher.

    teacher: network in evaluation mode. images: (B, 3, size, size), crops without augmentation, from which
    mean and standard deviation are measured.
    views, samples: with views > 0, every process computes the targets of all samples once for each view and
    keeps them in CPU memory (tokens in float16, heatmaps in 255 steps), because the teacher's forward pass
    takes longer than a step of a tiny student. With views = 0 they are computed at every step.
    """

    def __init__(self, teacher, images, views=0, samples=0):
        self.teacher, self.views, self.samples = teacher, views, samples
        parts = [teacher_targets(teacher, part) for part in images.split(32)]
        keypoint, visual, _ = zip(*parts)
        self.scales = [TokenScale.measure(torch.cat(tokens)) for tokens in (keypoint, visual)]
        self.kept = [torch.empty(views, samples, *part.shape[1:], dtype=dtype)
                     for part, dtype in zip(parts[0], (torch.float16, torch.float16, torch.uint8))]
        self.computed = set()            # views whose targets are kept

    def compute(self, images):
        """The Targets of images (B, 3, size, size), tokens standardised."""
        keypoint, visual, heatmaps = teacher_targets(self.teacher, images)
        return Targets(self.scales[0](keypoint), self.scales[1](visual), heatmaps)

    def prepare(self, view, batch_of):
        """Compute and keep the targets of all samples in a view, unless that was done.

        In order and in batches of 64, so that a target does not depend on the batch it is used in, nor on
        whether the run was resumed. batch_of: rows (B,) -> Batch.
        """
        if not self.views or view in self.computed:
            return
        batches = torch.arange(self.samples).split(64)
        for rows in tqdm(batches, desc="teacher targets", leave=False, disable=None):
            keypoint, visual, heatmaps = self.compute(batch_of(rows).images)
            for kept, part in zip(self.kept, (keypoint, visual, (255 * heatmaps).round())):
                kept[view, rows] = part.to(kept.dtype).cpu()
        self.computed.add(view)

    def __call__(self, images, view, rows):
        """The Targets of images (B, 3, size, size), which show samples `rows` (B,) in this view."""
        if not self.views:
            return self.compute(images)
        keypoint, visual, heatmaps = (kept[view, rows].to(images.device).float() for kept in self.kept)
        return Targets(keypoint, visual, heatmaps / 255)


def load_teacher(args):
    """The network that --teacher names. BadInput if it is none of this preset's teachers."""
    teacher, metadata = checkpoint.load(args.teacher, args.device)
    if "used" in metadata:
        print(metadata["used"])
    if teacher.config["student"] != "teacher":
        raise BadInput(f"{args.teacher} is a student ({checkpoint.describe(teacher.config)}): --teacher "
                       f"needs a teacher")
    if teacher.config["preset"] != args.preset:
        raise BadInput(f"{args.teacher} is a teacher of preset {teacher.config['preset']}, the student's is "
                       f"{args.preset}: tokens and crops must be of the same size")
    return teacher


def prepare_targets(args, teacher, train, valid):
    """The teacher, frozen, as TeacherTargets. BadInput if it predicts no better than a mean pose.

    train, valid: as in `train.fit`. The tokens' mean and deviation are those of the first CALIBRATION
    samples, in joined sets of the first set.
    """
    for samples, crops in valid.values():
        score = evaluate(teacher, samples, crops, args.device)["pckh@0.5"]["mean"]
        chance = mean_pose_score(train[0], samples)["pckh@0.5"]["mean"]
        print(f"teacher {os.path.relpath(args.teacher)}: PCKh@0.5 {score:.2f} "
              + (f"on {samples.name} " if len(valid) > 1 else "")
              + f"(a mean pose that ignores the image: {chance:.2f})")
        if not score > chance:
            raise BadInput(f"{args.teacher} scores {score:.2f} on {samples.name}, no better than a mean pose "
                           f"({chance:.2f}): train it longer, or check that it was trained on this data")
    teacher.requires_grad_(False).to(memory_format=torch.channels_last)
    half = args.amp and fast_bfloat16(args.device)
    fast = for_inference(teacher, torch.bfloat16 if half else torch.float32)
    images = make_batch(*train, range(min(CALIBRATION, len(train[0]))), teacher.size, args.device).images
    targets = TeacherTargets(fast, images, args.views, len(train[0]))
    if args.views:
        print(f"teacher targets are computed once for each of {args.views} views: "
              f"{sum(part.nbytes for part in targets.kept) / 1e9:.1f} GB of memory")
    return targets
