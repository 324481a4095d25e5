"""train.py with something changed: the rivals of what the repository does, for parts.py.

    python studies/changed.py in-series -- --student cc --filter gd --epochs 8
    python studies/changed.py train.MUON_RATE=10 distill.WEIGHTS.cc.heatmap=3 -- --student cc --filter gs

In front of --: names of CHANGES, and NAME=VALUE of constants in a module. Behind it: flags of train.py. When
the run is done, its result.json also says how good the confidences are and, for gd, what M does over images.
"""

import json
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
import train
from common import BadInput, main_with_clear_errors
from confidence import calibration
from dynamic import liveliness_and_loss
from evaluate import predict

CHANGES = {}


def change(function):
    """Register a change under the function's name."""
    CHANGES[function.__name__.replace("_", "-")] = function
    return function


# ------------------------------------------------------------------------------- the dynamic filter

def mixture_of(statistic):
    """Replace what M sees; statistic: (x (B, H, W, D), z (B, D) standardised mean) -> (B, D)."""
    def mixture(self, x):
        logits = self.M2(self.M1(statistic(x, self.norm(x.mean(dim=(1, 2))))).relu().square())
        return logits.unflatten(-1, (gfl.BASIS_FILTERS, -1)).softmax(dim=1)
    gfl.DynamicFilter.mixture = mixture


CHANGES |= {
    "constant": lambda: mixture_of(lambda x, z: torch.ones_like(z)),       # the static control
    "plain-mean": lambda: mixture_of(lambda x, z: x.mean(dim=(1, 2))),     # as in DFFormer
    "half": lambda: mixture_of(lambda x, z: 0.5 + z),                      # instead of 1 + z
    "z-alone": lambda: mixture_of(lambda x, z: z)}


def learn_apart(chosen, factor=1):
    """Adam learns what chosen(name, weight) accepts, at this multiple of the rate of its other weights."""
    def build(model, name, lr):
        apart = [weight for key, weight in model.named_parameters() if chosen(key, weight)]
        for weight in apart:
            weight.requires_grad_(False)
        optimisers = build_optimisers(model, name, lr)
        for weight in apart:
            weight.requires_grad_(True)
        return [*optimisers, torch.optim.Adam(apart, lr=factor * lr)]
    build_optimisers, train.build_optimisers = train.build_optimisers, build


def of_M(key, weight):
    return key.endswith((".M1.weight", ".M2.weight"))


CHANGES |= {"triple-rate": lambda: learn_apart(of_M, 3), "slow-M": lambda: learn_apart(of_M, 0.5),
            "slower-M": lambda: learn_apart(of_M, 0.2)}


@change
def in_series():
    """The dynamic filter behind the static one, instead of beside it."""
    gfl.GlobalDynamicFilter.forward = lambda self, x: self.dynamic(self.static(x))


# ------------------------------------------------------------------------------- attention

class SeparateMatrices(nn.Module):
    """Three matrices for q, k and v: Muon makes each orthogonal by itself."""

    def __init__(self, dim):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], dim=-1)


@change
def separate_qkv():
    """Muon sees q, k and v as three matrices."""
    def build(*args, **kwargs):
        model = build_student(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, models.Attention):
                module.qkv = SeparateMatrices(module.out.in_features)
        return model
    build_student = train.build_student
    train.build_student = checkpoint.build_student = build


@change
def adam_attention():
    """Adam for the matrices of attention, Muon for those of the MLP."""
    train.ADAM_ALONE += (".qkv.weight", ".out.weight")


def heads(count):
    """Attention heads of the student."""
    def build(student, filter, backbone, preset):
        before = models.PRESETS[preset]
        models.PRESETS[preset] = replace(before, heads=count)
        model = build_student(student, filter, backbone, preset)
        models.PRESETS[preset] = before
        return model
    build_student = train.build_student
    train.build_student = checkpoint.build_student = build


CHANGES |= {"two-heads": lambda: heads(2), "eight-heads": lambda: heads(8)}


@change
def weight_decay():
    """Muon's matrices shrink by rate * 0.1 a step."""
    class Decaying(train.Muon):
        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for W in group["params"]:
                    W.mul_(1 - 0.1 * group["lr"])
            super().step()
    train.Muon = Decaying


@change
def long_warm_up():
    """Warm-up over three tenths of the training instead of one."""
    train.rate_factor = lambda step, steps: (
        min(1, (step + 1) / (0.3 * steps)) * 0.1 ** sum(step >= part * steps for part in train.DECAY_AT))


# ------------------------------------------------------------------------------- the backbone

CHANGES["adam-convolutions"] = lambda: learn_apart(lambda key, weight: weight.ndim == 4)


@change
def no_backbone_heatmaps():
    """The backbone learns from the encoder's gradient alone."""
    for name, preset in models.PRESETS.items():
        models.PRESETS[name] = replace(preset, backbone_heatmaps=False)


# ------------------------------------------------------------------------------- the loss

@change
def raw_tokens():
    """The teacher's tokens as they are, not standardised (DistilPose)."""
    distill.TokenScale.__call__ = lambda self, tokens: tokens


@change
def sharp_heatmaps():
    """The teacher's heatmaps squared."""
    before = distill.teacher_targets
    def targets(teacher, images):
        found = before(teacher, images)
        return found._replace(heatmaps=found.heatmaps.square())
    distill.teacher_targets = targets


def teacher_loss(of_cells):
    """Another loss of the teacher, of_cells(logits, heatmaps of labels): all (B, K, S, S)."""
    def heatmap_task(logits, xy, visible, sigma):
        values = of_cells(logits, crops.heatmaps(xy, sigma, logits.shape[-1]))
        return distill.masked_mean(values.mean((-2, -1)), visible)
    distill.heatmap_task = heatmap_task


CHANGES |= {
    # the output is the heatmap itself (HRNet, TokenPose); every cell is a probability of its own
    "mean-squared-error": lambda: teacher_loss(lambda logits, target: (logits - target).square()),
    "binary-cross-entropy": lambda: teacher_loss(
        partial(nn.functional.binary_cross_entropy_with_logits, reduction="none"))}


# ------------------------------------------------------------------------------- the command

def assign(word):
    """'train.MUON_RATE=10', 'distill.WEIGHTS.cc.heatmap=3': set a constant of a module."""
    path, _, value = word.partition("=")
    module, *names, last = path.split(".")
    try:
        holder = vars(import_module(module))
        for name in names:
            holder = holder[name]
        holder[last] = type(holder[last])(json.loads(value))
    except (ImportError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{word}: no such constant, or not a value for it ({error!r:.80})") from error


def measure(out, valid):
    """What result.json says beside the scores: calibration; for gd M's liveliness, and PCKh with M frozen."""
    model, _ = checkpoint.load(out / "best.pt")
    found = dict(confidence=calibration(*predict(model, *valid), valid[0]))
    if model.config.get("filter") == "gd":
        found["dynamic"] = liveliness_and_loss(model, *valid)
    return found


def main():
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    for word in words[:end]:
        if "=" in word:
            assign(word)
        elif word in CHANGES:
            CHANGES[word]()
        else:
            raise BadInput(f"{word} is neither NAME=VALUE nor one of {', '.join(CHANGES)}")
    write_result, write_json = train.write_result, train.write_json

    def measure_and_write(args, valid):
        def write_more(path, result):
            result["arguments"]["changes"] = words[:end]
            write_json(path, result | found)

        found = measure(args.out, valid)
        train.write_json = write_more
        write_result(args, valid)

    train.write_result = measure_and_write
    sys.argv[1:] = words[end + 1:]
    train.main()


if __name__ == "__main__":
    main_with_clear_errors(main)
