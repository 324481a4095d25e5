"""train.py with something changed: the rivals of what the repository does, for parts.py.

    python studies/changed.py in-series -- --student cc --filter gd --epochs 8
    python studies/changed.py optim.MUON_RATE=10 distill.WEIGHTS.cc.heatmap=3 -- --student cc --filter gs

In front of --: names of CHANGES, and NAME=VALUE of constants in a module. Behind it: flags of train.py. When
the run is done, its result.json also says how good the confidences are and, for gd, what M does over images.
"""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
import crops
import distill
import gfl
import models
import optim
import train
from common import BadInput, CommandLine, main_with_clear_errors
from confidence import calibration
from dynamic import liveliness_and_loss
from evaluate import predict
from models import build_student
from optim import build_optimisers

# ------------------------------------------------------------------------------- the rivals

def one_plus_z(self, x):
    return 1 + self.norm(x.mean(dim=(1, 2)))


def mixture_of(see=one_plus_z, activation=lambda x: x.relu().square()):
    """DynamicFilter.mixture where M sees see(self, x (B, H, W, D)) -> (B, D)."""
    def mixture(self, x):
        logits = self.M2(activation(self.M1(see(self, x))))
        return logits.unflatten(-1, (gfl.BASIS_FILTERS, -1)).softmax(dim=1)
    return gfl.DynamicFilter, "mixture", mixture


def build_with_sharp_M(*args, **kwargs):
    """Logits of M times three: a softmax at a third of the temperature."""
    model = build_student(*args, **kwargs)
    for module in model.modules():
        if isinstance(module, gfl.DynamicFilter):
            module.M2.register_forward_hook(lambda layer, seen, logits: 3 * logits)
    return model


def block_that_shows(self, x):
    """Block.forward where M sees the tokens before the layer norm."""
    if isinstance(self.mixer, gfl.GlobalDynamicFilter):
        self.mixer.dynamic.before = x.mean(dim=(1, 2))
    x = x + self.mixer(self.norm1(x))
    return x + self.mlp(self.norm2(x))


def build_with_large_basis(*args, **kwargs):
    """Basis filters that begin ten times as large, so that they differ by more."""
    model = build_student(*args, **kwargs)
    for module in model.modules():
        if isinstance(module, gfl.DynamicFilter):
            module.K_real.data.mul_(10)
            module.K_imag.data.mul_(10)
    return model


def learn_apart(chosen, factor=1):
    """build_optimisers where Adam learns what chosen(name, weight) accepts, at a multiple of its rate."""
    def build(model, name, lr):
        apart = [weight for key, weight in model.named_parameters() if chosen(key, weight)]
        for weight in apart:
            weight.requires_grad_(False)
        optimisers = build_optimisers(model, name, lr)
        for weight in apart:
            weight.requires_grad_(True)
        return [*optimisers, torch.optim.Adam(apart, lr=factor * lr)]
    return train, "build_optimisers", build


def of_M(key, weight):
    return key.endswith((".M1.weight", ".M2.weight"))


class SeparateMatrices(nn.Module):
    """Three matrices for q, k and v: Muon makes each orthogonal by itself."""

    def __init__(self, dim):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], dim=-1)


def build_separate_qkv(*args, **kwargs):
    model = build_student(*args, **kwargs)
    for module in model.modules():
        if isinstance(module, models.Attention):
            module.qkv = SeparateMatrices(module.out.in_features)
    return model


def build_with_heads(student, filter, backbone, preset, count):
    before = models.PRESETS[preset]
    models.PRESETS[preset] = replace(before, heads=count)
    model = build_student(student, filter, backbone, preset)
    models.PRESETS[preset] = before
    return model


class DecayingMuon(optim.Muon):
    """Matrices shrink by rate * 0.1 a step."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for W in group["params"]:
                W.mul_(1 - 0.1 * group["lr"])
        super().step()


def long_warm_up(step, steps):
    """rate_factor that rises over three tenths of the training instead of one."""
    return min(1, (step + 1) / (0.3 * steps)) * 0.1 ** sum(step >= part * steps for part in optim.DECAY_AT)


def heatmaps_to_the(power):
    def teacher_targets(teacher, images, original=distill.teacher_targets):
        targets = original(teacher, images)
        return targets._replace(heatmaps=targets.heatmaps ** power)
    return distill, "teacher_targets", teacher_targets


def mirrored_heatmaps(teacher, images, original=distill.teacher_targets):
    targets, mirrored = original(teacher, images), original(teacher, images.flip(-1)).heatmaps
    return targets._replace(heatmaps=(targets.heatmaps + mirrored.flip(-1)[:, crops.FLIP]) / 2)


def normed_targets(teacher, images, original=distill.teacher_targets):
    keypoint, visual, heatmaps = original(teacher, images)
    return distill.Targets(layer_norm(keypoint), layer_norm(visual), heatmaps)


def layer_norm(tokens):
    return nn.functional.layer_norm(tokens, tokens.shape[-1:])


def normed_loss_terms(head, output, batch, targets=None, weights=None, original=distill.loss_terms):
    """loss_terms that compares the student's tokens behind a layer norm without weights."""
    normed = output._replace(keypoint_tokens=layer_norm(output.keypoint_tokens),
                             visual_tokens=layer_norm(output.visual_tokens))
    return original(head, normed, batch, targets, weights)


def quiet_loss_terms(head, output, batch, targets=None, weights=None, original=distill.loss_terms):
    """loss_terms without L_bb."""
    return original(head, output._replace(backbone_heatmaps=None), batch, targets, weights)


class TermsUntil:
    """loss_terms without the teacher's from this fraction of the training on.

    rate_factor, which the loop asks before every step, tells how far it is.
    """

    def __init__(self, end):
        self.end, self.done = end, 0

    def rate_factor(self, step, steps, original=optim.rate_factor):
        self.done = step / steps
        return original(step, steps)

    def loss_terms(self, head, output, batch, targets=None, weights=None, original=distill.loss_terms):
        if targets is not None and self.done >= self.end:
            weights = dict.fromkeys(weights, 0)
        return original(head, output, batch, targets, weights)


def teacher_loss(of_cells):
    """heatmap_task as a mean of of_cells(logits, heatmaps of labels), all (B, K, S, S)."""
    def heatmap_task(logits, xy, visible, empty, sigma):
        values = of_cells(logits, distill.gaussian_heatmaps(xy, sigma, logits.shape[-1]))
        return distill.masked_mean(values.mean((-2, -1)), visible)
    return distill, "heatmap_task", heatmap_task


def presets(change):
    """PRESETS with change(preset) -> {field: value} in each."""
    return models, "PRESETS", {name: replace(preset, **change(preset))
                               for name, preset in models.PRESETS.items()}


def builder(build):
    return [(module, "build_student", build) for module in (train, checkpoint)]


TWO_THIRDS = TermsUntil(2 / 3)
# name -> where something else stands: (module or class, name there, what stands there)
CHANGES = {
    # the dynamic filter: M sees ones (the static control with the same parameters), the mean of the tokens
    # (DFFormer), or something else instead of 1 + z (on a square image, keypoint tokens are the columns from
    # number H on); another temperature, activation or start; another rate for M; the filters in series
    "constant": [mixture_of(lambda self, x: torch.ones_like(x[:, 0, 0]))],
    "plain-mean": [mixture_of(lambda self, x: x.mean(dim=(1, 2)))],
    "half": [mixture_of(lambda self, x: one_plus_z(self, x) - 0.5)],
    "z-alone": [mixture_of(lambda self, x: one_plus_z(self, x) - 1)],
    "visual-mean": [mixture_of(lambda self, x: one_plus_z(self, x[:, :, :x.shape[1]]))],
    "keypoint-mean": [mixture_of(lambda self, x: one_plus_z(self, x[:, :, x.shape[1]:]))],
    "mean-before-norm": [(models.Block, "forward", block_that_shows),
                         mixture_of(lambda self, x: 1 + self.norm(self.before))],
    "sharp-M": builder(build_with_sharp_M),
    "gelu-M": [mixture_of(activation=nn.functional.gelu)],
    "triple-rate": [learn_apart(of_M, 3)],
    "slow-M": [learn_apart(of_M, 0.5)],
    "slower-M": [learn_apart(of_M, 0.2)],
    "large-basis": builder(build_with_large_basis),
    "in-series": [(gfl.GlobalDynamicFilter, "forward", lambda self, x: self.dynamic(self.static(x)))],
    # attention
    "separate-qkv": builder(build_separate_qkv),
    "adam-attention": [(optim, "ADAM_ALONE", (*optim.ADAM_ALONE, ".qkv.weight", ".out.weight"))],
    "two-heads": builder(partial(build_with_heads, count=2)),
    "eight-heads": builder(partial(build_with_heads, count=8)),
    "weight-decay": [(optim, "Muon", DecayingMuon)],
    "long-warm-up": [(train, "rate_factor", long_warm_up)],
    # the teacher: Adam for convolutions; no heatmaps of the backbone; its output is the heatmap (HRNet),
    # or a probability for each cell
    "adam-convolutions": [learn_apart(lambda key, weight: weight.ndim == 4)],
    "no-backbone-heatmaps": [presets(lambda preset: dict(supervise_backbone=False))],
    "mean-squared-error": [teacher_loss(lambda logits, target: (logits - target).square())],
    "binary-cross-entropy": [teacher_loss(
        partial(nn.functional.binary_cross_entropy_with_logits, reduction="none"))],
    # what a student is told: tokens as they are (DistilPose); heatmaps of 0.7 and 1.4 times the width, or
    # averaged with those of the mirrored crop; tokens behind a layer norm; the terms for two thirds of the
    # steps; no loss of the backbone's heatmaps; SimCC labels of half and twice the width
    "raw-tokens": [(distill.TokenScale, "__call__", lambda self, tokens: tokens)],
    "sharp-heatmaps": [heatmaps_to_the(2)],
    "soft-heatmaps": [heatmaps_to_the(0.5)],
    "mirrored-heatmaps": [(distill, "teacher_targets", mirrored_heatmaps)],
    "normed-tokens": [(distill, "teacher_targets", normed_targets), (train, "loss_terms", normed_loss_terms)],
    "two-thirds": [(train, name, getattr(TWO_THIRDS, name)) for name in ("rate_factor", "loss_terms")],
    "quiet-backbone": [(train, "loss_terms", quiet_loss_terms)],
    **{f"labels-{bins}": [presets(lambda _, bins=bins: dict(simcc_sigma=bins))] for bins in (2, 4, 8)},
}


# ------------------------------------------------------------------------------- the command

def assign(word):
    """'optim.MUON_RATE=10', 'distill.WEIGHTS.cc.heatmap=3': set a constant of a module."""
    path, _, value = word.partition("=")
    try:
        module, *names, last = path.split(".")
        holder = vars(import_module(module))
        for name in names:
            holder = holder[name]
        value = json.loads(value)
        changed = type(holder[last])(value)
        if isinstance(value, float) and (changed != value or not math.isfinite(value)):
            raise ValueError(f"{holder[last]} is a whole or a finite number")
        holder[last] = changed
    except (ImportError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise BadInput(f"{word}: no such constant, or not a value for it ({error!r:.80})") from error


def measure(args, valid):
    """What result.json says beside the scores: calibration; for gd M's liveliness, and PCKh with M frozen.

    Of several validation sets on the first that chooses the best epoch.
    """
    model, _ = checkpoint.load(args.out / "best.pt")
    samples, crops = valid[args.select[0]]
    measured = dict(confidence=calibration(*predict(model, samples, crops), samples))
    if model.config.get("filter") == "gd":
        measured["dynamic"] = liveliness_and_loss(model, samples, crops)
    return measured


def main():
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = CommandLine(__doc__)
    parser.add_argument("changes", nargs="*", help=f"NAME=VALUE, {', '.join(CHANGES)}; then -- FLAGS")
    parser.parse_args(words[:end])
    changed = {}                     # (module or class, name) -> the change that replaced it
    for word in words[:end]:
        if "=" in word:
            assign(word)
        elif word in CHANGES:
            for holder, name, stands in CHANGES[word]:
                if (holder, name) in changed:
                    raise BadInput(f"{word} replaces {name}, as {changed[holder, name]} does: leave one out")
                changed[holder, name] = word
                setattr(holder, name, stands)
        else:
            raise BadInput(f"{word} is neither NAME=VALUE nor one of {', '.join(CHANGES)}")
    write_result, parse_arguments, write_json = train.write_result, train.parse_arguments, train.write_json

    def parse_more():
        args = parse_arguments()
        args.changes = words[:end]
        return args

    def write_more(args, valid, log):
        measured = measure(args, valid)                                      # slow, so before that is written
        train.write_json = lambda file, content: write_json(file, content | measured)
        write_result(args, valid, log)

    train.write_result, train.parse_arguments = write_more, parse_more
    sys.argv[1:] = words[end + 1:]
    train.main()


if __name__ == "__main__":
    main_with_clear_errors(main)
