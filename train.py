"""Train a student, with or without a teacher, or train the teacher.

    python train.py --student cc --filter gd               # synthetic people, tiny networks, two cores
    python train.py --student cc --filter gd --no-distill  # the same without a teacher
    python train.py --train-teacher                        # the teacher of the first line
    python train.py --train-teacher --data MPII --preset paper --amp      # at the paper's size, on a GPU
    python train.py --student cc --filter gd --backbone w32 --data MPII --preset paper \\
                    --teacher runs/teacher-paper-MPII/best.pt --amp

    torchrun --nproc-per-node 4 train.py ...                # the same experiment and batch on four GPUs

A run writes into one folder (--out): config.json, log.jsonl with one line per epoch, best.pt, last.pt and
previous.pt (to resume from), and at the end result.json (arguments, scores, the log) and predictions.png.
Ctrl-C, SIGTERM and --stop-after save and stop a run. The same command with --resume continues it and ends
with the same weights, to the bit, as a run that was never stopped (on a GPU: with --deterministic).
"""

import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from common import (BadInput, CommandLine, check_device, check_writable, default_device, fast_bfloat16,
                    init_distributed, lock, main_with_clear_errors, refuse)
from crops import AUGMENTATIONS, CROPS, make_batch, store
from data_mpii import find_labels, load_samples
from distill import TERMS, WEIGHTS, TeacherTargets, backbone_task, distillation_loss, task_loss, total
from evaluate import evaluate, mean_pose_score, predict, print_score, validation_samples, write_json
from export import for_inference
from models import BACKBONES, FILTERS, PRESETS, STUDENTS, build_student, build_teacher
from predict import prediction_sheet
from synthetic import drawn_people

# 'paper': DistilPose's recipe (Adam, 300 epochs, a tenth of the rate at 200 and at 260, 500 steps of warm-up)
# and TokenPose's batch on MPII (16 on each of 4 GPUs). Borrowed, as the paper does not state its own.
# 'tiny': measured on synthetic people, cc gs student, 1,000 steps of 32, PCKh@0.5: Adam 34.7, Muon 41.5.
RECIPES = {"paper": dict(epochs=300, batch_size=64, optimiser="adam"),
           "small": dict(epochs=100, batch_size=32, optimiser="muon", backbone="w24"),     # the teacher's
           "tiny": dict(epochs=16, batch_size=32, optimiser="muon")}
RECIPES["small-64"] = RECIPES["small"]
RATE = 1e-3              # peak learning rate of Adam
MUON_RATE = 20           # Muon's rate divided by Adam's; Muon's 41.5 above is at --lr 1e-3, 2e-3 gave 36.5
# Rate of networks with attention or a backbone where the optimiser is muon. PCKh@0.5 of tiny students from
# labels alone, 1,000 steps, at 2e-3, 1e-3, 5e-4, 2.5e-4: cc attention 18.4, 22.7, 37.7, 37.0; cc gs at 1e-3,
# 5e-4, 2.5e-4: 32.0, 30.7, 29.2. The small-64 teacher, 3 epochs of photos, at 1e-3, 5e-4, 2.5e-4: 12.1, 13.5,
# 13.1.
LOW_RATE = 5e-4
# block matrices, backbone kernels left to Adam: M of dynamic filters, first convolution
ADAM_ALONE = (".M1.weight", ".M2.weight", "backbone.conv1.weight")
DECAY_AT = (2 / 3, 13 / 15)              # fractions of the training after which the rate is divided by ten
WARM_UP = 500                            # steps, at most a tenth of the training
EMA_FRACTION = 0.02                      # window of the weight average, as a fraction of all steps
VIEWS = {"drawn": 2, "photos": 4}       # augmented views of each sample, tiny students; others: unlimited
SCORE_EVERY = 4          # epochs; the last epoch is always scored
DRAWINGS = {"student": 4000, "teacher": 40000}
TEACHERS = {("tiny", "drawn"): "teacher-tiny-drawn.pt", ("small", "photos"): "teacher-small-photos.pt"}
SHIPPED = Path(__file__).parent / "weights"
CALIBRATION = 256        # first training samples, unaugmented, that give the teacher's token statistics
SHOWN = 24               # samples in predictions.png
SAVE_EVERY = 300         # seconds between two checkpoints within an epoch
CHUNK = 1024             # crops copied to a GPU at once
BEGAN = time.monotonic() # --stop-after counts from the start of the process
STATES = "last.pt", "previous.pt"        # a folder that holds one of these holds a run
# found in a process's error when another has ended
LOST = "Connection closed", "Connection reset", "Broken pipe", "NCCL", "timed out"

# Arguments that must not change on --resume; neither may the network, the samples to train and to validate on,
# their images (names and sizes), the teacher or the number of processes. --epochs may (the decay of the rate
# follows the new number), and --lr may be lowered. Nothing else is compared: --device, --cache and folders may
# change (that of --data keeps its name).
SETTINGS = ("distill", "terms", "augmentation", "views", "batch_size", "accumulate", "optimiser", "seed",
            "amp", "compile", "deterministic")


# ------------------------------------------------------------------------------- the training loop

@dataclass
class Progress:
    epoch: int = 0                               # finished epochs
    step: int = 0                                # finished steps of the current epoch
    sums: dict = field(default_factory=dict)     # sums of the loss terms over these steps
    seconds: float = 0                           # duration of these steps
    best: float = -1                             # highest PCKh@0.5 so far
    log: list = field(default_factory=list)      # of finished epochs: losses, rate and scores by name


@dataclass
class State:
    """Everything that changes during training, and what a resumed run is compared with."""
    model: torch.nn.Module                       # the network that learns
    ema: torch.nn.Module                         # average of its weights: what is scored and kept
    optimisers: list
    settings: dict                               # must be equal when resuming
    metadata: dict                               # data, samples, seed: goes into every checkpoint
    progress: Progress = field(default_factory=Progress)
    saved_at: float = field(default_factory=time.monotonic)


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


def fit(args, distributed, state, train, valid, teacher=None, stop=lambda between_steps=False: False):
    """Train until the last epoch. Raises Stopped, with the state saved, where stop() returns True.

    train, valid: pairs of Samples and their stored crops (N, wide, wide, 3). teacher: TeacherTargets or None.
    Order and augmentation depend only on (seed, epoch), and the loop draws no other random number: weights,
    their average, optimisers and progress are all of the state.
    """
    model, ema, optimisers, progress = state.model, state.ema, state.optimisers, state.progress
    (samples, crops), device = train, distributed.device
    crops, network = on_device(crops, device), distributed.wrap(model)
    steps = len(samples) // args.batch_size      # per epoch; samples that are left over come in another epoch
    weights = {name: WEIGHTS[args.student][name] for name in args.terms} if teacher else {}
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16,
                       enabled=use_bfloat16(args, device))
    save_or_stop = partial(save_or_raise_stopped, args, distributed, state, stop)

    while progress.epoch < args.epochs:
        view = progress.epoch % args.views if args.views else progress.epoch
        params = AUGMENTATIONS[args.augmentation].draw(len(samples), generator(args.seed, 1, view))
        order = torch.randperm(len(samples), generator=generator(args.seed, 2, progress.epoch))
        batch_of = partial(make_batch, samples, crops, size=model.size, device=device, params=params)
        if teacher:
            teacher.prepare(view, batch_of, save_or_stop)
        model.train()
        began = time.monotonic() - progress.seconds
        bar = tqdm(range(progress.step, steps), f"epoch {progress.epoch + 1}/{args.epochs}", steps, False,
                   initial=progress.step, disable=None if distributed.is_main else True)
        for step in bar:
            number, all_steps = progress.epoch * steps + step, args.epochs * steps
            rows = order[step * args.batch_size:(step + 1) * args.batch_size].sort().values  # file order
            parts = rows.view(args.accumulate, distributed.world_size, -1)[:, distributed.rank]    # ours
            for optimiser in optimisers:
                optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * rate_factor(number, all_steps)
                optimiser.zero_grad()
            values = 0
            for i, part in enumerate(parts, 1):
                batch = batch_of(part)                                      # images (B, 3, S, S), xy, visible
                with distributed.no_sync(network, unless=i == args.accumulate):
                    with autocast():
                        output = network(batch.images)
                    if teacher:
                        targets = teacher(batch.images, view, part)
                        terms = distillation_loss(model.head, output, targets, batch.xy, batch.visible)
                    else:
                        terms = {"task": task_loss(model.head, output.prediction, batch.xy, batch.visible)}
                    if output.backbone_heatmaps is not None:
                        terms["backbone"] = backbone_task(output.backbone_heatmaps, batch.xy, batch.visible)
                    terms["loss"] = total(terms, weights)
                    (terms["loss"] / args.accumulate).backward()
                values = values + torch.stack([term.detach() for term in terms.values()]) / args.accumulate
            *values, norm = torch.cat([distributed.mean(values), gradient_norm(model)[None]]).tolist()
            terms = dict(zip(terms, values))
            refuse_non_finite(args, distributed, state, terms, norm, rows)                # before the step
            for optimiser in optimisers:
                optimiser.step()
            update_ema(ema, model, number, all_steps)
            progress.sums = {name: progress.sums.get(name, 0) + term for name, term in terms.items()}
            progress.step, progress.seconds = step + 1, time.monotonic() - began
            means = {name: f"{value / (step + 1):.3g}" for name, value in progress.sums.items()}
            bar.set_postfix(means, refresh=False)
            save_or_stop(between_steps=True)

        line = {"epoch": progress.epoch + 1, "lr": optimisers[-1].param_groups[0]["lr"],
                **{name: value / steps for name, value in progress.sums.items()},
                "images_per_second": round(steps * args.batch_size / progress.seconds, 2)}
        if (progress.epoch + 1) % SCORE_EVERY == 0 or progress.epoch + 1 == args.epochs:
            line |= score_average(args, distributed, state, valid, save_or_stop)
        progress.log.append(line)
        print("  ".join(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}"
                        for name, value in line.items()), flush=True)
        progress.epoch, progress.step, progress.sums, progress.seconds = progress.epoch + 1, 0, {}, 0
        save(args, distributed, state)
    if not (args.out / "best.pt").exists():              # resumed with no epoch left and no best.pt
        score_average(args, distributed, state, valid, save_or_stop)


# ------------------------------------------------------------------------------- steps of the loop

def use_bfloat16(args, device):
    """Whether to compute in bfloat16: with --amp, on a device that multiplies bfloat16 matrices natively.

    bfloat16: products of backbone and encoder (in filters T, T^-1 and K^; the static K stays in float32),
    the teacher but for its head, and the heatmaps read from the backbone. float32: the student's weights and
    their average, residual sums, layer norms, head, loss, Adam, scores. Muon's iterations are in bfloat16 on
    every GPU that has it, with or without --amp (`orthogonal`).
    """
    return args.amp and fast_bfloat16(device)


def on_device(crops, device):
    """Stored crops, on the GPU if they fit into half of its free memory, so that no step waits for a copy."""
    if device == "cpu":
        return crops
    torch.cuda.empty_cache()                             # PyTorch's cache is free memory, too
    if crops.nbytes >= torch.cuda.mem_get_info(device)[0] / 2:
        return crops
    moved = torch.empty(crops.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(crops), CHUNK):
        # a mapped file is read-only
        moved[start:start + CHUNK] = torch.from_numpy(crops[start:start + CHUNK].copy())
    return moved


def generator(*numbers):
    """A torch.Generator seeded with a tuple of integers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def gradient_norm(model):
    """L2 norm of all gradients, a tensor ()."""
    return torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])).norm()


def refuse_non_finite(args, distributed, state, terms, norm, rows):
    """Raise BadInput, before weights change, if a term or the gradient is not finite.

    The weights and the batch's sample numbers are saved in not-finite.pt.
    """
    if all(map(math.isfinite, (*terms.values(), norm))):
        return
    file, progress = args.out / "not-finite.pt", state.progress
    names = [name for name, value in terms.items() if not math.isfinite(value)] or ["gradient"]
    if distributed.is_main:
        torch.save(dict(rows=rows, epoch=progress.epoch, step=progress.step, terms=terms, gradient=norm,
                        settings=state.settings, model=state.model.state_dict()), file)
    resume = " and continue with --resume" if (args.out / "last.pt").exists() else ""
    raise BadInput(f"not finite at epoch {progress.epoch + 1}, step {progress.step + 1}: {', '.join(names)} "
                   f"({file} holds the weights and the sample numbers of this batch). The weights were not "
                   f"changed: look at these samples, or lower --lr{resume}")


@torch.no_grad()
def update_ema(ema, model, step, steps):
    """Move the weight average towards the model's weights.

        ema <- ema + w (model - ema),    w = max(1 / (step + 1), min(1, 1 / (EMA_FRACTION * steps)))

    It starts as a plain mean. With a window of a quarter of the steps, which begins before the last decay of
    the rate, the tiny cc gs student scored 2.2 PCKh@0.5 less.
    """
    pairs = [(mean, now) for mean, now in zip(ema.state_dict().values(), model.state_dict().values())
             if mean.is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*pairs)), max(1 / (step + 1), min(1, 1 / (EMA_FRACTION * steps))))


def score_average(args, distributed, state, valid, between):
    """Score the weight average and keep it if it is the best -> {'pckh@0.5': mean, 'pckh@0.1': mean}.

    Results are reported on the same samples: there is no third split. The main process scores; others wait
    for it at their next step.
    """
    if not distributed.is_main:
        return {}
    alone = distributed.world_size == 1                  # `between` is called by all processes or by none
    found = evaluate(state.ema, *valid, distributed.device, between=between if alone else lambda: None)
    scores = {name: values["mean"] for name, values in found.items()}
    if not scores["pckh@0.5"] <= state.progress.best:             # true for NaN, too (no labels)
        state.progress.best = scores["pckh@0.5"]
        epoch = min(state.progress.epoch + 1, args.epochs)
        checkpoint.save(args.out / "best.pt", state.ema, {**state.metadata, "epoch": epoch, **scores})
    return scores


# ------------------------------------------------------------------------------- stop, save, resume

class StopRequest:
    """Whether the run should stop: after SIGINT or SIGTERM, or when the time of --stop-after is over.

    The time is looked at only between steps, so at least one is made. The same signal again ends the process
    at once.
    """

    def __init__(self, minutes):
        self.deadline, self.signal = BEGAN + 60 * (math.inf if minutes is None else minutes), None

    def __enter__(self):
        self.before = {each: signal.signal(each, self.receive) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def __call__(self, between_steps=False):
        return self.signal is not None or (between_steps and time.monotonic() > self.deadline)


def save_or_raise_stopped(args, distributed, state, stop, between_steps=False):
    """Save and raise Stopped if any process was asked to stop; otherwise save every SAVE_EVERY seconds."""
    if distributed.any(stop(between_steps)):
        save(args, distributed, state)
        raise Stopped
    if time.monotonic() - state.saved_at > SAVE_EVERY:
        save(args, distributed, state)


def save(args, distributed, state):
    """Write last.pt, from which a run resumes to the bit, and log.jsonl. The old last.pt becomes previous.pt.

    Order, augmentation, the teacher's token statistics and targets are computed again, not saved.
    """
    state.saved_at = time.monotonic()
    if distributed.is_main:
        training = dict(progress=asdict(state.progress), epochs=args.epochs, lr=args.lr,
                        settings=state.settings, ema=state.ema.state_dict(),
                        optimisers=[each.state_dict() for each in state.optimisers])
        metadata = {**state.metadata, "epoch": state.progress.epoch}
        checkpoint.save(args.out / "last.pt", state.model, metadata, training, keep=args.out / "previous.pt")
        (args.out / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in state.progress.log))


def resume(args, state):
    """Load last.pt, or previous.pt if that is damaged, into the state -> its path.

    BadInput if the file does not belong to the same run.
    """
    file, content = checkpoint.read_last(args.out)
    training = content["training"]
    here, there = (checkpoint.describe(config) for config in (state.model.config, content["config"]))
    if (training or {}).get("progress", {}).keys() != asdict(Progress()).keys():
        raise BadInput(f"{file} holds weights but no state of training: --resume needs a last.pt of this "
                       f"version")
    if content["config"] != state.model.config:
        raise BadInput(f"{file} is {there}, not {here}: give the flags of the run to be resumed")
    for name, value in training["settings"].items():
        if (now := state.settings.get(name)) != value:
            is_print = name.endswith(("samples", "images")) and now          # see `fingerprint`
            alike = is_print and value.rsplit(", ", 1)[0] == now.rsplit(", ", 1)[0]
            changed = "the labels have changed" if name.endswith("samples") else "the images have changed"
            raise BadInput(f"{file} was trained with {name} {value}, now it is {now}: "
                           + (f"{changed}: bring the old ones back, or start anew with another --out" if alike
                              else "give the flags of the run to be resumed"))
    if args.lr > training["lr"]:
        raise BadInput(f"{file} was trained with --lr {training['lr']}, now it is {args.lr}: it may be "
                       f"lowered, not raised")
    if training["epochs"] != args.epochs:
        print(f"{file} was planned for {training['epochs']} epochs, now {args.epochs}: the rate decays at "
              f"other steps")
    state.model.load_state_dict(content["model"])
    state.ema.load_state_dict(training["ema"])
    for optimiser, saved in zip(state.optimisers, training["optimisers"]):
        optimiser.load_state_dict(saved)
    state.progress = Progress(**training["progress"])
    if not (args.out / "best.pt").exists():          # a copy without best.pt: the next score is the best
        state.progress.best = -1
    return file


# ------------------------------------------------------------------------------- optimisers and the rate

def rate_factor(step, steps):
    """Learning rate divided by its maximum: linear warm-up, then 1, divided by ten at each of DECAY_AT.

    Compared on the tiny cc gs student, 1,000 steps, an early version, PCKh@0.5: step decay 29.8, linear decay
    to zero 29.0. No weight decay, no gradient clipping, no dropout.
    """
    warm = min(1, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    return warm * 0.1 ** sum(step >= fraction * steps for fraction in DECAY_AT)


def build_optimisers(model, name, lr):
    """'adam': Adam for all weights. 'muon': Muon for matrices of the encoder's blocks and for the backbone's
    convolutions but the first, Adam for the rest.

    Convolutions with Muon and with Adam, the tiny teacher after 600 steps of drawings, PCKh@0.5: 58.0, 43.3.
    M of the dynamic filters learns with Adam: Muon's steps have one size whatever the gradient and saturate
    its softmax.
    """
    learning = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    if name == "adam":
        return [torch.optim.Adam(learning.values(), lr=lr, fused=True)]
    matrices = [key for key, weight in learning.items()
                if (".blocks." in key and weight.ndim == 2 or "backbone." in key and weight.ndim == 4)
                and not key.endswith(ADAM_ALONE)]
    others = [key for key in learning if key not in matrices]
    return [Muon([learning[key] for key in matrices], lr=MUON_RATE * lr),
            torch.optim.Adam([learning[key] for key in others], lr=lr, fused=True)]


MOMENTUM, ITERATIONS = 0.95, 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315    # of the quintic polynomial that pulls all singular values towards 1


def orthogonal(X):
    """Matrices (n, rows, columns), rows <= columns -> matrices with the same singular vectors, values near 1.

    Newton-Schulz iterations, each X <- a X + (b A + c A^2) X with A = X X^T.
    """
    a, b, c = COEFFICIENTS
    if X.is_cuda and fast_bfloat16(X.device):
        X = X.to(torch.bfloat16)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.float()


class Muon(torch.optim.Optimizer):
    """Muon: momentum descent for matrices, with every update orthogonalised.

    A convolution's kernel (outputs, inputs, h, w) counts as a matrix of outputs x (inputs h w).

        m <- m + (1 - momentum) (g - m)
        W <- W - rate * sqrt(max(1, rows / columns)) * orthogonal(g + momentum (m - g))

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. torch.optim.Muon takes the
    same steps, but no convolutions, and always iterates in bfloat16: on a CPU without native bfloat16 that
    took 235 of the 400 ms of a training step. Here CPUs use float32, on batches of matrices of one shape: 7
    of 90 ms.
    """

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}                             # by shape; transposed where rows > columns
            for W in (W for W in group["params"] if W.grad is not None):
                if "momentum" not in self.state[W]:
                    self.state[W]["momentum"] = torch.zeros_like(W)
                m = self.state[W]["momentum"]
                m.lerp_(W.grad, 1 - MOMENTUM)
                update = W.grad.lerp(m, MOMENTUM).flatten(1)
                update = update if update.shape[0] <= update.shape[1] else update.mT
                batches.setdefault(update.shape, []).append((W, update))
            for batch in batches.values():
                updates = orthogonal(torch.stack([update for _, update in batch]))
                for (W, _), update in zip(batch, updates):
                    rows, columns = len(W), W[0].numel()
                    update = update if rows <= columns else update.mT
                    W.add_(update.reshape(W.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


# ---------------------------------------------------------------------------- one run: data, teacher, results

def build_model(args):
    """The network to train, on its device, with its initial weights."""
    if args.train_teacher:
        model = build_teacher(args.preset)
    else:
        model = build_student(args.student, args.filter, args.backbone, args.preset)
        if args.student == "reg":
            model.head.scored = args.distill and "confidence" in args.terms
    if args.backbone_weights:
        print(checkpoint.load_backbone(model.backbone, args.backbone_weights))
    if args.init:
        print(checkpoint.start_from(model, args.init))
    return model.to(args.device, memory_format=torch.channels_last)      # the fastest layout for convolutions


def load_data(args, size, distributed):
    """-> (Samples, stored crops) to train on, and the same to validate on."""
    if args.data == "drawn":
        print(f"drawing {args.drawings:,} synthetic people to train on (--data names real photos)")
        split = "teacher" if args.train_teacher else "train"
        train = drawn_people(split, args.drawings, size, os.cpu_count())
    else:
        train = load_samples(args.data, "train", skip_bad=args.skip_bad_data)
        if train.skipped:
            print(f"{len(train.skipped):,} entries left out, listed in {args.out / 'skipped.txt'}")
    valid = validation_samples(args.data, size)
    cache = None if args.data == "drawn" else args.cache
    print(f"{train.name}: {len(train):,} samples to train on; {valid.name}: {len(valid):,} to score on"
          + (f"; {valid.note}" if valid.note else ""))
    if args.batch_size > len(train):
        raise BadInput(f"--batch-size {args.batch_size:,} is more than the {len(train):,} samples there are: "
                       f"lower it")
    if not distributed.is_main:
        distributed.barrier()                    # the main process cuts the crops, the others then find them
    data = (train, store(train, size, cache)), (valid, store(valid, size, cache))
    if distributed.is_main:
        distributed.barrier()
    return data


def load_teacher(args, train, valid, size):
    """The frozen teacher as TeacherTargets. BadInput if it predicts no better than a mean pose."""
    teacher, metadata = checkpoint.load(args.teacher, args.device)
    if "used" in metadata:
        print(metadata["used"])
    if teacher.config["student"] != "teacher":
        raise BadInput(f"{args.teacher} is a student ({checkpoint.describe(teacher.config)}): --teacher "
                       f"needs a teacher")
    if teacher.config["preset"] != args.preset:
        raise BadInput(f"{args.teacher} is a teacher of preset {teacher.config['preset']}, the student's is "
                       f"{args.preset}: tokens and crops must be of the same size")
    found = evaluate(teacher, *valid, args.device)["pckh@0.5"]["mean"]
    chance = mean_pose_score(train[0], valid[0])["pckh@0.5"]["mean"]
    print(f"teacher {os.path.relpath(args.teacher)}: PCKh@0.5 {found:.2f} "
          f"(a mean pose that ignores the image: {chance:.2f})")
    if not found > chance:
        raise BadInput(f"{args.teacher} scores {found:.2f} on {valid[0].name}, no better than a mean pose "
                       f"({chance:.2f}): train it longer, or check that it was trained on this data")
    teacher.requires_grad_(False).to(memory_format=torch.channels_last)
    source = checkpoint.checksum(teacher.state_dict())[:16]
    fast = for_inference(teacher, torch.bfloat16 if use_bfloat16(args, args.device) else torch.float32)
    images = make_batch(*train, range(min(CALIBRATION, len(train[0]))), size, args.device).images
    targets = TeacherTargets(fast, images, args.views, len(train[0]), source)
    if args.views:
        print(f"teacher targets are computed once for each of {args.views} views: "
              f"{sum(part.nbytes for part in targets.kept) / 1e9:.1f} GB of memory")
    return targets


def fingerprint(samples):
    """Number, name and checksum of samples; the same of their images. Wherever the files are."""
    labels = [torch.from_numpy(of) for of in (samples.joints, samples.visible, samples.center, samples.side)]
    images = [(path.name, path.stat().st_size) for path in samples.files]
    marks = (checkpoint.checksum(part)[:16] for part in (labels, images))
    return [f"{len(samples)} of {samples.name}, {mark}" for mark in marks]


def initial_state(args, distributed, model, samples, teacher=None, valid=None):
    """The State before the first step. samples, valid: to train and to validate on."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {
        "processes": distributed.world_size, "teacher": teacher and teacher.source}
    settings["samples"], settings["images"] = fingerprint(samples)
    if valid:
        settings["validation samples"], settings["validation images"] = fingerprint(valid)
    return State(model, copy.deepcopy(model).requires_grad_(False).eval(),
                 build_optimisers(model, args.optimiser, args.lr), settings,
                 dict(data=samples.name, samples=len(samples), seed=args.seed))


def train(args, distributed):
    """Prepare a run, train, and write its results."""
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.deterministic)
    model = build_model(args)
    train, valid = load_data(args, model.size, distributed)
    teacher = load_teacher(args, train, valid, model.size) if args.distill else None
    state = initial_state(args, distributed, model, train[0], teacher, valid[0])
    if distributed.is_main:
        args.out.mkdir(parents=True, exist_ok=True)
        lock(args.out, f"another process trains into {args.out}: wait until it finishes, or name another "
                       f"folder with --out")
    if args.resume:
        file = resume(args, state)
        print(f"resuming from {file}, epoch {state.progress.epoch + 1}, step {state.progress.step + 1}"
              if state.progress.epoch < args.epochs else f"{file} has finished its {args.epochs} epochs: "
                                                         f"raise --epochs to go on")
    if distributed.is_main:
        write_json(args.out / "config.json", vars(args))
        if train[0].skipped:
            lines = "".join(f"{line}\n" for line in train[0].skipped)
            (args.out / "skipped.txt").write_text(lines, encoding="utf-8", errors="backslashreplace")
        (args.out / "result.json").unlink(missing_ok=True)                   # outdated
    if args.compile:
        model.compile(dynamic=False)
    print(f"{checkpoint.describe(model.config)} on {args.device}: {args.epochs} epochs of "
          f"{len(train[0]) // args.batch_size} steps, {args.batch_size} samples each, into {args.out}/")
    with StopRequest(args.stop_after) as stop:
        try:
            fit(args, distributed, state, train, valid, teacher, stop)
        except Stopped:
            print(f"stopped at epoch {state.progress.epoch + 1}, step {state.progress.step}; saved: "
                  f"the same command with --resume continues it")
            raise SystemExit(128 + stop.signal if stop.signal else 0) from None
    if distributed.is_main:
        write_result(args, valid)
    distributed.barrier()
    if distributed.world_size > 1:
        dist.destroy_process_group()


def write_result(args, valid):
    """Score the best epoch by joint, with and without flip test; write result.json and predictions.png."""
    model, metadata = checkpoint.load(args.out / "best.pt", args.device)
    print(f"best epoch: {metadata['epoch']}; PCKh on {len(valid[0]):,} samples of {valid[0].name}")
    scores = evaluate(model, *valid, args.device)
    print_score(scores)
    flipped = evaluate(model, *valid, args.device, flip_test=True)
    print("flip test: " + ", ".join(f"{name} {values['mean']:.2f}" for name, values in flipped.items()))
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    write_json(args.out / "result.json", dict(
        arguments=vars(args), network=checkpoint.describe(model.config), metadata=metadata, scores=scores,
        flip_test=flipped, torch=torch.__version__, log=log))
    samples = valid[0].first(SHOWN)
    joints, _ = predict(model, samples, valid[1], args.device)
    sheet = prediction_sheet(samples, valid[1], np.arange(len(samples)), joints, model.size)
    sheet.save(args.out / "predictions.png")
    print(f"drawn: {args.out / 'predictions.png'}\nnext: python evaluate.py --checkpoint "
          f"{args.out / 'best.pt'}"
          + ("" if args.data == "drawn" else f" --data {args.data}"))


# ------------------------------------------------------------------------------- command line

def parse_arguments():
    parser = CommandLine(__doc__)
    add = parser.add_argument_group("network").add_argument
    add("--student", choices=STUDENTS, help="regression or coordinate classification (default: cc)")
    add("--filter", choices=FILTERS, help="static or dynamic global filter, or attention (default: gd)")
    add("--backbone", choices=tuple(BACKBONES), help="HRNet's width (default: none; small, small-64: w24)")
    add("--preset", choices=tuple(PRESETS), default="tiny",
        help="sizes for crops of 64 x 64 pixels (tiny, small-64), 128 (small), 256 (paper) (default: tiny)")
    add("--backbone-weights", type=Path, help="published HRNet weights to start from (default: random)")
    add("--init", type=Path,
        help="checkpoint to start from: the same network (any preset with equal shapes) or, for a student, "
             "a teacher, whose mixers and head are not taken (default: random)")
    add("--train-teacher", action="store_true", help="train the heatmap teacher instead of a student")
    add("--teacher", type=Path, help="the teacher's checkpoint (default: one shipped for preset and data)")
    add("--no-distill", action="store_true", help="learn from labels alone")
    add("--terms", nargs="+", choices=TERMS, metavar="TERM", help=f"distil {', '.join(TERMS)} (default: all)")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="drawn", help="folder in MPII's layout (default: drawn, synthetic people)")
    add("--drawings", type=int, help=f"number of synthetic people (default: {DRAWINGS['student']} for a "
                                     f"student, {DRAWINGS['teacher']} for the teacher)")
    add("--skip-bad-data", action="store_true",
        help="list up to 5%% unusable training entries in skipped.txt and leave them out")
    add("--cache", type=Path, default=CROPS, help="folder for cut crops (default: runs/crops)")
    add("--augmentation", choices=tuple(AUGMENTATIONS),
        help="upright: small rotation and zoom; tokenpose: up to 60 degrees, 0.75 to 1.25 times; colour: "
             "also brightness and colours; occlusion: also a rectangle on top (default: upright for "
             "synthetic people, tiny students and small-64, colour for tiny teachers, else tokenpose)")
    add("--views", type=int,
        help="augmented views of each sample, one an epoch in turn, teacher targets kept; 0: always new "
             f"(default: tiny students {VIEWS['drawn']} on drawings, {VIEWS['photos']} on photos, else 0)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="passes over the samples (default: 16 tiny, 100 small, 300 paper)")
    add("--batch-size", type=int, help="samples of a step, all processes and parts (default: 32; paper 64)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="compute each step in N parts, with the same gradients but for batch norms: less memory")
    add("--lr", type=float, help=f"highest learning rate of Adam (default: 1e-3; {LOW_RATE:g} with muon "
                                 f"and attention or a backbone); Muon's is {MUON_RATE} times that")
    add("--optimiser", choices=("adam", "muon"),
        help="muon: for the encoder's matrices and the backbone's convolutions (default: muon; paper adam)")
    add("--seed", type=int, default=0, help="of initial weights, order and augmentation (default: 0)")
    add("--device", default=default_device(), help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--amp", action="store_true",
        help="bfloat16 on devices that have it natively; heads, losses and scores stay in float32")
    add("--compile", action="store_true", help="torch.compile: takes a minute or two and a C++ compiler")
    add("--deterministic", action="store_true",
        help="reproducible weights on a GPU, by slower kernels (on a CPU they always are)")
    add("--out", type=Path, help="folder of the run (default: runs/STUDENT-FILTER-BACKBONE-...)")
    add("--stop-after", type=float, metavar="MINUTES", help="save and stop after this time")
    add("--resume", action="store_true", help="continue from last.pt of the run's folder (--out)")
    return check_arguments(parser.parse_args())


def check_arguments(args):
    """Fill in defaults that depend on other arguments. BadInput where arguments contradict each other."""
    drawn, tiny = args.data == "drawn", args.preset == "tiny"
    kind = "drawn" if drawn else "photos"
    shipped = TEACHERS.get((args.preset, kind))
    args.distill = not (args.train_teacher or args.no_distill)
    refuse(
        (args.train_teacher
         and any((args.teacher, args.student, args.filter, args.backbone, args.no_distill)),
         "--train-teacher takes no --student, --filter, --backbone, --teacher or --no-distill: the teacher "
         "is one network and learns from labels"),
        (args.no_distill and args.teacher, "--no-distill and --teacher contradict each other: leave one out"),
        (args.terms and not args.distill, "--terms are what a student learns from a teacher: remove --terms, "
                                          "or remove --no-distill or --train-teacher"),
        (not drawn and not Path(args.data).is_dir(),
         f"--data {args.data} is not a folder: name one in MPII's layout, or leave it out for drawings"),
        (not drawn and args.drawings is not None,
         "--drawings is the number of synthetic people: leave it out where --data names a folder"))
    if args.distill and not (drawn or args.teacher or shipped):
        find_labels(args.data, "train")              # a wrong folder is reported before a missing teacher
    refuse(
        (args.backbone_weights and args.backbone in (None, "none") and not args.train_teacher,
         "--backbone-weights needs a full-size HRNet backbone: add --backbone w32 or w48"),
        (args.distill and not args.teacher and not shipped,
         f"no teacher of preset {args.preset} for {'synthetic people' if drawn else 'photos'} is shipped: "
         f"train one with --train-teacher and name it with --teacher, or learn without one with "
         f"--no-distill"))
    check_device(args.device)
    # upright for tiny students of photos and for small-64: measured in short trainings
    short = args.preset == "small-64" or tiny and not args.train_teacher
    for_photos = "upright" if short else "colour" if tiny else "tokenpose"
    defaults = dict(
        student="cc", filter="gd", backbone="none", terms=list(TERMS),
        augmentation="upright" if drawn else for_photos,
        teacher=SHIPPED / shipped if args.distill and shipped else None,
        drawings=DRAWINGS["teacher" if args.train_teacher else "student"],
        views=VIEWS[kind] if tiny and not args.train_teacher else 0) | RECIPES[args.preset]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.lr is None:
        low = args.train_teacher or args.filter == "attention" or args.backbone != "none"
        args.lr = LOW_RATE if low and args.optimiser == "muon" else RATE
    if args.out is None:
        what = "teacher" if args.train_teacher else f"{args.student}-{args.filter}-{args.backbone}"
        data = "drawn" if drawn else Path(args.data).resolve().name
        args.out = Path("runs") / f"{what}-{args.preset}-{data}{'-no-distill' if args.no_distill else ''}"
    positive = ("epochs", "batch_size", "accumulate", "lr", "drawings", "stop_after")     # or None
    holds_run = any((args.out / name).exists() for name in STATES)
    refuse(
        *((not 0 < value < math.inf, f"--{name.replace('_', '-')} {value} must be above 0")
          for name, value in vars(args).items() if name in positive and value is not None),
        (args.views < 0, f"--views {args.views} must be 0 or above"),
        (not 0 <= args.seed < 2 ** 31, f"--seed {args.seed} must be 0 or above, and below 2^31"),
        (args.out.exists() and not args.out.is_dir(), f"--out {args.out} is a file: name a folder"),
        (args.resume and not holds_run, f"--resume: there is no {args.out / 'last.pt'} to resume from"),
        (not args.resume and holds_run, f"{args.out} holds a run: --resume continues it, --out names another "
                                        f"folder, or remove it"))
    check_writable(args.out, "--out ")
    return args


def main():
    args = parse_arguments()
    distributed = init_distributed(args.device)
    args.device = distributed.device
    parts = distributed.world_size * args.accumulate
    if args.batch_size % parts:
        raise BadInput(f"--batch-size {args.batch_size} does not divide into {distributed.world_size} "
                       f"processes x {args.accumulate} accumulated parts: make it a multiple of {parts}")
    if args.amp and not fast_bfloat16(args.device):
        print(f"--amp: this {'CPU' if args.device == 'cpu' else 'GPU'} has no native bfloat16, computing in "
              f"float32")
    try:
        train(args, distributed)
    except torch.OutOfMemoryError as error:
        raise BadInput(f"the GPU's memory is full ({str(error).splitlines()[0][:120]}): raise --accumulate, "
                       f"or lower --batch-size") from error
    except RuntimeError as error:
        if distributed.world_size == 1 or not any(sign in str(error) for sign in LOST):
            raise                                    # a bug keeps its traceback
        print(f"error: process {distributed.rank} lost the others ({str(error).splitlines()[0][:120]}): the "
              f"run has ended; the same command with --resume continues from what is saved in {args.out}",
              file=sys.stderr)
        os._exit(2)                                  # a normal exit would wait for the lost process


if __name__ == "__main__":
    main_with_clear_errors(main)
