"""Train a student, distilled from a teacher or not, or train the teacher.

    python train.py --student cc --filter gd                       # drawn people, tiny networks: minutes on two cores
    python train.py --student cc --filter gd --no-distill          # the same without a teacher
    python train.py --train-teacher                                # the teacher of the two lines above
    python train.py --train-teacher --data MPII --preset paper --device cuda --amp          # at the paper's size
    python train.py --student cc --filter gd --backbone w32 --data MPII --preset paper \\
                    --teacher runs/teacher-paper-MPII/best.pt --device cuda --amp

    torchrun --nproc-per-node 4 train.py ...                       # the same on four GPUs

Every run has a folder (--out): config.json, log.jsonl with one line an epoch, best.pt, last.pt and previous.pt (to go on from),
and, when it is through, result.json (arguments, scores by joint, the log) and predictions.png. Ctrl-C, SIGTERM and --stop-after
save and leave; the same command with --resume goes on, and ends with the same weights as if nothing had happened.
"""

import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
from common import (BadInput, CommandLine, check_device, default_device, fast_bfloat16, has_room,
                    init_distributed, lock, main_with_clear_errors)
from crops import AUGMENTATIONS, crop_keypoints, make_batch, store, transform
from data_mpii import load_samples
from distill import TERMS, WEIGHTS, TeacherTargets, distillation_loss, of_a_part, task_loss, total
from evaluate import evaluate, mean_pose_score, predict, print_score, validation_samples
from export import for_inference
from models import BACKBONES, FILTERS, PRESETS, STUDENTS, build_student, build_teacher
from predict import WHITE, contact_sheet
from synthetic import drawn_people

# 'paper': DistilPose's recipe (Adam, 300 epochs, a tenth of the rate at 200 and at 260, 500 steps of warm-up) and
# TokenPose's batch on MPII (16 on each of 4 GPUs): borrowed, as the paper's own is not known.
# 'tiny': measured on drawn people with the cc gs student, 1,000 steps of 32, PCKh@0.5: Adam 34.7, Muon 41.5.
RECIPES = {"paper": dict(epochs=300, batch_size=64, lr=1e-3, optimiser="adam"),
           "tiny": dict(epochs=16, batch_size=32, lr=1e-3, optimiser="muon")}
MUON_RATE = 20           # Muon's learning rate over Adam's: 20 and 1e-3 gave those 41.5, 40 and 1e-3 (2e-3 for Adam) 36.5
DECAY_AT = (2 / 3, 13 / 15)              # shares of the training after which the rate is divided by ten
WARM_UP = 500                            # steps, at most a tenth of the training
EMA_FRACTION = 0.02                          # what is scored and kept: a running mean of the weights over this share of the steps
VIEWS = {"drawn": 2, "photos": 4}        # in how many ways a tiny student is shown a person (others: ever new ones)
SCORE_EVERY = {"paper": 5, "tiny": 4}    # epochs; and after the last
DRAWINGS = {"student": 4000, "teacher": 40000}

TINY_TEACHER = Path(__file__).parent / "weights" / "teacher-tiny-drawn.pt"
MEASURED = 256           # people on whom the mean and deviation of the teacher's tokens are measured
SHOWN = 24               # people in predictions.png
RUN = "last.pt", "previous.pt"         # what a folder holds that no other run may overwrite
LOST = "Connection closed", "Connection reset", "Broken pipe", "NCCL", "timed out"     # how PyTorch says that a process is gone

COEFFICIENTS = 3.4445, -4.7750, 2.0315       # of the quintic polynomial that pulls all singular values towards 1
ITERATIONS = 5
MOMENTUM = 0.95

SAVE_EVERY = 300         # seconds between two checkpoints within an epoch
CHUNK = 1024             # crops that go to a GPU at once
BEGAN = time.monotonic() # when this process did: --stop-after counts from here, not from the first step

# What a run that goes on must have in common with the one that was stopped, or it would be neither. Epochs may be added or
# taken off, the decay then follows the new number; the rate may be lowered, where it was too high.
SETTINGS = ("distill", "terms", "augmentation", "views", "batch_size", "accumulate", "optimiser", "seed", "amp", "compile",
            "deterministic")


# ------------------------------------------------------------------------------- command line

def parse_arguments():
    parser = CommandLine(__doc__)
    what = parser.add_argument_group("what to train")
    what.add_argument("--student", choices=STUDENTS, help="regression or coordinate classification (default: cc)")
    what.add_argument("--filter", choices=FILTERS, help="static or dynamic global filter, or attention (default: gd)")
    what.add_argument("--backbone", choices=tuple(BACKBONES), help="none, or HRNet's width (default: none)")
    what.add_argument("--preset", choices=tuple(PRESETS), default="tiny",
                      help="sizes of the networks: 64 x 64 crops for two cores, or the paper's 256 x 256 (default: tiny)")
    what.add_argument("--backbone-weights", type=Path,
                      help="published HRNet weights (ImageNet or pose) for the backbone to start from (default: random)")
    what.add_argument("--init", type=Path, help="checkpoint of the same network to start from, of any preset whose layers "
                                                "have the same shapes: pre-training (default: random weights)")
    what.add_argument("--train-teacher", action="store_true", help="train the heatmap teacher instead of a student")
    what.add_argument("--teacher", type=Path, help="teacher's checkpoint (default: the shipped tiny one, for drawn people)")
    what.add_argument("--no-distill", action="store_true", help="learn from labels alone")
    what.add_argument("--terms", nargs="+", choices=TERMS, metavar="TERM",
                      help=f"which of the loss's four terms to learn from: {', '.join(TERMS)} (default: all)")
    data = parser.add_argument_group("from what")
    data.add_argument("--data", default="drawn", help="folder in MPII's layout, or 'drawn': people drawn by synthetic.py "
                                                      "(default: drawn)")
    data.add_argument("--drawings", type=int, help=f"labelled drawings to learn from (default: {DRAWINGS['student']} for a "
                                                   f"student, {DRAWINGS['teacher']} for the teacher)")
    data.add_argument("--skip-bad-data", action="store_true",
                      help="leave out training entries that cannot be used, a twentieth at most, and list them in skipped.txt "
                           "(default: stop at the first)")
    data.add_argument("--cache", type=Path, default=Path("runs/crops"), help="folder for cut crops (default: runs/crops)")
    data.add_argument("--augmentation", choices=tuple(AUGMENTATIONS),
                      help="how people are shown: upright (turned and zoomed a little), tokenpose (up to 60 degrees, 0.75 to "
                           "1.25 times), colour (that, and light and colours), occlusion (that, and a part hidden) (default: "
                           "upright for drawn people and tiny students, colour for a tiny teacher of photos, tokenpose for the "
                           "paper's preset)")
    how = parser.add_argument_group("how")
    how.add_argument("--views", type=int,
                     help="in how many ways a person is shown, again and again: the teacher is asked once for each and its "
                          f"answers stay in memory; 0: ever new ones (default: {VIEWS['drawn']} of drawings, "
                          f"{VIEWS['photos']} of photos for tiny students; else 0)")
    how.add_argument("--epochs", type=int, help="passes over the people (default: 16 tiny, 300 paper)")
    how.add_argument("--batch-size", type=int, help="people a step (default: 32 tiny, 64 paper)")
    how.add_argument("--lr", type=float,
                     help=f"highest learning rate of Adam (default: 1e-3); Muon's is {MUON_RATE} times that")
    how.add_argument("--optimiser", choices=("adam", "muon"), help="adam, or muon for the matrices of the encoder and adam "
                                                                   "for all else (default: muon tiny, adam paper)")
    how.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation (default: 0)")
    how.add_argument("--device", default=default_device(),
                     help="where to run: cpu, cuda or cuda:N (default: cuda where there is one)")
    how.add_argument("--amp", action="store_true",
                     help="compute in bfloat16 where that is safe, and the whole teacher but its head (default: float32)")
    how.add_argument("--compile", action="store_true",
                     help="compile the network that learns, by torch.compile: a minute or two before the first step "
                          "(needs a C++ compiler; default: not)")
    how.add_argument("--out", type=Path, help="folder of the run (default: runs/STUDENT-FILTER-BACKBONE-...)")
    how.add_argument("--accumulate", type=int, default=1, metavar="N",
                     help="parts of --batch-size people that make one step: N times the batch in the same memory (default: 1)")
    how.add_argument("--deterministic", action="store_true",
                     help="same seed, same machine, same weights on a GPU, too, where it is slower (a CPU always is)")
    how.add_argument("--stop-after", type=float, metavar="MINUTES", help="save and leave after this time")
    how.add_argument("--resume", action="store_true", help="go on from last.pt of the run's folder (--out)")
    return check_arguments(parser.parse_args())


def check_arguments(args):
    """Refuse what does not go together, fill in what depends on something else."""
    if args.train_teacher and (args.teacher or args.student or args.filter or args.backbone or args.no_distill):
        raise BadInput("--train-teacher takes no --student, --filter, --backbone, --teacher or --no-distill: "
                       "the teacher is one network and learns from labels")
    if args.no_distill and args.teacher:
        raise BadInput("--no-distill and --teacher contradict each other: leave one out")
    if args.terms and (args.no_distill or args.train_teacher):
        raise BadInput("--terms are what a student learns from a teacher: leave them out, or --no-distill and --train-teacher")
    args.terms = args.terms or list(TERMS)
    if args.data != "drawn" and not Path(args.data).is_dir():
        raise BadInput(f"--data {args.data} is not a folder: name one in MPII's layout, or leave it out for drawn people")
    if args.drawings is not None and args.data != "drawn":
        raise BadInput("--drawings says how many people to draw: leave it out where --data names a folder")
    check_device(args.device)
    args.student, args.filter, args.backbone = args.student or "cc", args.filter or "gd", args.backbone or "none"
    if args.backbone_weights and args.backbone == "none" and not args.train_teacher:
        raise BadInput("--backbone-weights needs a backbone to go into: add --backbone w32 or w48")
    args.distill = not (args.train_teacher or args.no_distill)
    if args.distill and not args.teacher:
        if args.data != "drawn" or args.preset != "tiny":
            raise BadInput("the shipped teacher knows drawn people at the tiny preset alone: train one with "
                           "--train-teacher and name it with --teacher, or learn without one with --no-distill")
        args.teacher = TINY_TEACHER
    for name, value in RECIPES[args.preset].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.augmentation is None:
        # tiny students of photos: measured (README); the tiny teacher of photos: what it was trained with, others not tried
        args.augmentation = ("upright" if args.data == "drawn" else "tokenpose" if args.preset == "paper" else
                             "colour" if args.train_teacher else "upright")
    if args.views is None:
        few = args.preset == "tiny" and not args.train_teacher
        args.views = VIEWS["drawn" if args.data == "drawn" else "photos"] if few else 0
    if args.views < 0:
        raise BadInput(f"--views {args.views} must be 0 or above")
    if args.drawings is None:
        args.drawings = DRAWINGS["teacher" if args.train_teacher else "student"]
    for name in ("epochs", "batch_size", "accumulate", "lr", "drawings", "stop_after"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    if not 0 <= args.seed < 2 ** 31:
        raise BadInput(f"--seed {args.seed} must be 0 or above, and below 2^31")
    if args.out is None:
        what = "teacher" if args.train_teacher else f"{args.student}-{args.filter}-{args.backbone}"
        data = "drawn" if args.data == "drawn" else Path(args.data).resolve().name
        args.out = Path("runs") / f"{what}-{args.preset}-{data}{'-no-distill' if args.no_distill else ''}"
    if args.out.exists() and not args.out.is_dir():
        raise BadInput(f"--out {args.out} is a file: name a folder")
    if args.resume and not any((args.out / name).exists() for name in ("last.pt", "previous.pt")):
        raise BadInput(f"--resume: there is no {args.out / 'last.pt'} to go on from")
    if not args.resume and any((args.out / name).exists() for name in RUN):
        raise BadInput(f"{args.out} holds a run: --resume goes on with it, --out names another folder, or remove it")
    return args


# ------------------------------------------------------------------------------- Muon

# Muon: gradient descent for matrices, with every update made orthogonal.
#
#     python -m pytest tests/test_train.py      # the same steps as torch.optim.Muon
#
#     m <- m + (1 - momentum) (g - m)           a running mean of the gradient
#     W <- W - rate * sqrt(max(1, rows / columns)) * orthogonal(g + momentum (m - g))
#
# where orthogonal(U S V^T) is near U V^T: all directions of an update count alike, however small their gradients. Five
# Newton-Schulz iterations do without the decomposition. Jordan et al., "Muon: an optimizer for hidden layers in neural networks"
# (2024); momentum in Nesterov's form and coefficients as there.
#
# torch.optim.Muon does the same, but in bfloat16 always: on a CPU without native bfloat16 its iterations took 235 of the 400 ms of
# a training step. In float32, in batches of matrices of one shape, they take 7 of 90 on any of the two.

def orthogonal(X):
    """Matrices (n, rows, columns), rows <= columns, with singular values near 1."""
    a, b, c = COEFFICIENTS
    if X.is_cuda and fast_bfloat16(X.device):    # on a CPU float32, whatever it can: 7 instead of 5 of the step's 90 ms
        X = X.to(torch.bfloat16)
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)          # a X + (b A + c A^2) X
    return X.float()


class Muon(torch.optim.Optimizer):
    """For parameters of two dimensions alone."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            batches = {}                                         # by shape, lying: (short side, long side)
            for W in group["params"]:
                if W.grad is not None:
                    if "momentum" not in self.state[W]:
                        self.state[W]["momentum"] = torch.zeros_like(W)
                    m = self.state[W]["momentum"]
                    m.lerp_(W.grad, 1 - MOMENTUM)
                    update = W.grad.lerp(m, MOMENTUM)
                    lying = update if W.shape[0] <= W.shape[1] else update.mT
                    batches.setdefault(lying.shape, []).append((W, lying))
            for batch in batches.values():
                updates = orthogonal(torch.stack([lying for _, lying in batch]))
                for (W, _), update in zip(batch, updates):
                    rows, columns = W.shape
                    W.add_(update if rows <= columns else update.mT,
                           alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


# ------------------------------------------------------------------------------- how they learn

def build_optimisers(model, name, lr):
    """Adam for every weight that learns, or Muon for the matrices of the encoder's blocks and Adam for all else."""
    learning = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    if name == "adam":
        return [torch.optim.Adam(learning.values(), lr=lr, fused=True)]
    matrices = [key for key, weight in learning.items() if ".blocks." in key and weight.ndim == 2]
    others = [key for key in learning if key not in matrices]
    return [Muon([learning[key] for key in matrices], lr=MUON_RATE * lr),
            torch.optim.Adam([learning[key] for key in others], lr=lr, fused=True)]


def rate_fraction(step, steps):
    """Learning rate over its highest: linear warm-up, then 1, divided by ten at each of DECAY_AT.

    Measured beside it (tiny cc gs, 1,000 steps): steps 29.8, a linear way to zero 29.0 PCKh@0.5.
    """
    warm = min(1, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    return warm * 0.1 ** sum(step >= share * steps for share in DECAY_AT)


@torch.no_grad()
def update_ema(ema, model, step, steps):
    """ema <- ema + w (model - ema), w = max(1 / (step + 1), 1 / (EMA_FRACTION steps)): a plain mean at first.

    A window of 500 of 2,000 steps (a quarter) cost the tiny cc gs student 2.2 PCKh@0.5: it reaches back before the decay.
    """
    pairs = [(mean, now) for mean, now in zip(ema.state_dict().values(), model.state_dict().values())
             if mean.is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*pairs)), max(1 / (step + 1), min(1, 1 / (EMA_FRACTION * steps))))


def generator(*numbers):
    """A random generator of its own for each tuple of numbers: the same however a run came to it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


# ------------------------------------------------------------------------------- the loop

# The training loop: one step after another, and a state that can be put down at any step and taken up to the bit.
#
#     for every epoch:    the people in a new order, shown in one view (how each is turned, zoomed, mirrored, coloured)
#       for every step:   batch -> network, teacher -> terms of the loss -> gradients -> optimisers -> running mean
#       at times:         score the running mean on the validation people, keep the best
#
# Order and views are functions of (seed, epoch) alone, and nothing in the loop draws a random number: the state of a run is its
# weights, its optimisers and how far it has come.

@dataclass
class Progress:
    epoch: int = 0                               # epochs that are through
    step: int = 0                                # steps of the next one that are through
    sums: dict = field(default_factory=dict)     # of the terms of the loss, over these steps
    seconds: float = 0                           # that these steps took
    best: float = -1                             # PCKh@0.5


def resident(crops, device):
    """Stored crops, on the GPU where there is room for them: no step waits for the bus."""
    if device == "cpu" or not has_room(device, crops.nbytes):
        return crops
    there = torch.empty(crops.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(crops), CHUNK):
        there[start:start + CHUNK] = torch.from_numpy(crops[start:start + CHUNK].copy())    # what is mapped is read-only
    return there


def rounded(rate):
    """Pictures a second, as a log says them: 237, 7.31."""
    return round(rate) if rate >= 10 else round(rate, 2)


class Stopped(Exception):
    """Somebody asked the run to end: its state is saved."""


class Training:
    """A network on its way. people, crops: to learn from. teacher_targets: distill.TeacherTargets, or None without a teacher."""

    def __init__(self, args, distributed, model, ema, people, crops, valid, valid_crops, teacher_targets):
        self.args, self.distributed, self.model, self.ema = args, distributed, model, ema
        self.people, self.crops, self.valid, self.valid_crops = people, resident(crops, distributed.device), valid, valid_crops
        self.teacher_targets, self.augmentation = teacher_targets, AUGMENTATIONS[args.augmentation]
        self.parallel = distributed.wrap(model)
        self.optimisers = build_optimisers(model, args.optimiser, args.lr)
        self.highest = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]
        self.people_a_step = args.batch_size * args.accumulate * distributed.world_size
        self.per_epoch = max(1, len(people) // self.people_a_step)         # what is left over comes in another epoch
        self.progress = Progress()
        # who is learned from, wherever the files are
        labels = [torch.from_numpy(of) for of in (people.joints, people.visible, people.center, people.side)]
        self.who = f"{len(people)} of {people.name}, {checkpoint.checksum(labels)[:16]}"
        self.asked_to_stop = None
        self.saved_at = time.monotonic()

    # --------------------------------------------------------------------------- one step

    def loss(self, batch, view, rows, seen):
        """-> {term: value} of a part of a step, 'loss' the weighted sum.

        seen: visible joints of the step's average part; 0 where this part is the whole step.
        """
        with torch.autocast(torch.device(self.distributed.device).type, torch.bfloat16, enabled=self.args.amp):
            output = self.parallel(batch.images)
        targets = self.teacher_targets(batch.images, view, rows) if self.teacher_targets else None      # whose precision is its own affair
        if targets:
            terms = distillation_loss(self.model.head, output, targets, batch.xy, batch.visible)
            weights = {name: WEIGHTS[self.args.student][name] for name in self.args.terms}
        else:
            terms, weights = {"task": task_loss(self.model.head, output.prediction, batch.xy, batch.visible)}, {}
        terms = of_a_part(terms, batch.visible.sum() / seen if seen else 1)
        return {**terms, "loss": total(terms, weights)}

    def step(self, number, rows, view, params):
        """Learn from people `rows` -> {term: its mean over them}. number: of this step in the whole training."""
        distributed, parts = self.distributed, rows.view(self.args.accumulate, self.distributed.world_size, self.args.batch_size)
        for optimiser, rate in zip(self.optimisers, self.highest):
            optimiser.param_groups[0]["lr"] = rate * rate_fraction(number, self.args.epochs * self.per_epoch)
            optimiser.zero_grad()
        count, seen = parts[..., 0].numel(), 0
        if count > 1:
            seen = crop_keypoints(self.people, rows, self.model.size, params).visible.sum().item() / count
        values = 0
        for a, mine in enumerate(parts[:, distributed.rank]):
            batch = make_batch(self.people, self.crops, mine, self.model.size, distributed.device, params)
            with distributed.no_sync(self.parallel, unless=a + 1 == self.args.accumulate):
                terms = self.loss(batch, view, mine, seen)
                (terms["loss"] / self.args.accumulate).backward()
            values = values + torch.stack([term.detach() for term in terms.values()]) / self.args.accumulate
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        size = torch.stack(torch._foreach_norm(gradients)).norm()
        *values, size = torch.cat([distributed.mean(values), size[None]]).tolist()      # here a step waits for the device
        terms = dict(zip(terms, values))
        if not all(map(math.isfinite, (*values, size))):
            self.give_up(terms, size, rows)
        for optimiser in self.optimisers:
            optimiser.step()
        update_ema(self.ema, self.model, number, self.args.epochs * self.per_epoch)
        return terms

    def give_up(self, terms, size, rows):
        """A loss or gradient that is not finite ends the run before it spoils the weights; the batch is kept."""
        file, done = self.args.out / "not-finite.pt", self.progress
        named = [name for name, value in terms.items() if not math.isfinite(value)] or ["gradient"]
        if self.distributed.is_main:
            torch.save(dict(rows=rows, epoch=done.epoch, step=done.step, terms=terms, gradient=size, settings=self.settings(),
                            model=self.model.state_dict()), file)
        raise BadInput(f"not finite at epoch {done.epoch + 1}, step {done.step + 1}: {', '.join(named)} ({file} holds the "
                       f"weights and the people of this batch). Nothing was learned from it: look at these people, or lower "
                       "--lr" + (" and go on with --resume" if (self.args.out / "last.pt").exists() else ""))

    # --------------------------------------------------------------------------- one epoch

    def run(self):
        """Until the last epoch, or until Stopped."""
        handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with open(self.args.out / "log.jsonl", "a" if self.progress.epoch else "w") as log:
                while self.progress.epoch < self.args.epochs:
                    self.epoch(log)
            # no epoch of this run was one that is scored; the first process knows, the others may look before it has written
            if self.distributed.any(self.distributed.is_main and not (self.args.out / "best.pt").exists()):
                self.score()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.asked_to_stop = number
        signal.signal(number, signal.SIG_DFL)                # a second one ends at once

    def epoch(self, log):
        args, done, distributed = self.args, self.progress, self.distributed
        view = done.epoch % args.views if args.views else done.epoch
        params = self.augmentation.draw(len(self.people), generator(args.seed, 1, view))
        order = torch.randperm(len(self.people), generator=generator(args.seed, 2, done.epoch))
        if self.teacher_targets:
            self.teacher_targets.prepare(view, lambda rows: make_batch(self.people, self.crops, rows, self.model.size, distributed.device,
                                                               params).images, self.stop_or_save)
        input_rate = self.input_rate(order[:self.args.batch_size], params)
        self.model.train()
        began = time.monotonic() - done.seconds
        bar = tqdm(total=self.per_epoch * self.people_a_step, initial=done.step * self.people_a_step, unit=" images",
                   desc=f"epoch {done.epoch + 1}/{args.epochs}", leave=False, disable=None if distributed.is_main else True)
        with bar:
            while done.step < self.per_epoch:
                rows = order[done.step * self.people_a_step:(done.step + 1) * self.people_a_step].sort().values
                terms = self.step(done.epoch * self.per_epoch + done.step, rows, view, params)
                done.sums = {name: done.sums.get(name, 0) + term for name, term in terms.items()}
                done.step, done.seconds = done.step + 1, time.monotonic() - began
                bar.set_postfix({name: f"{value / done.step:.3g}" for name, value in done.sums.items()}, refresh=False)
                bar.update(len(rows))
                self.stop_or_save(between_steps=True)
        self.close_epoch(log, input_rate)

    def input_rate(self, rows, params):
        """Pictures a second of the input side alone, of one batch: what a training step cannot be faster than."""
        wait = (lambda: None) if self.distributed.device == "cpu" else torch.cuda.synchronize
        for _ in range(2):                               # the first warms up
            wait()
            began = time.monotonic()
            make_batch(self.people, self.crops, rows, self.model.size, self.distributed.device, params)
            wait()
        return self.distributed.world_size * len(rows) / (time.monotonic() - began)

    def close_epoch(self, log, input_rate):
        """Score, keep the best, log, save."""
        args, done = self.args, self.progress
        line = {"epoch": done.epoch + 1, "lr": self.optimisers[-1].param_groups[0]["lr"],
                **{name: value / self.per_epoch for name, value in done.sums.items()},
                "images_per_second": rounded(self.per_epoch * self.people_a_step / done.seconds),
                "input_alone": rounded(input_rate)}
        if (done.epoch + 1) % SCORE_EVERY[args.preset] == 0 or done.epoch + 1 == args.epochs:
            line |= self.score()
        print("  ".join(f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in line.items()),
              flush=True)
        if self.distributed.is_main:
            print(json.dumps(line), file=log, flush=True)
        self.progress = Progress(epoch=done.epoch + 1, best=done.best)
        self.save()

    def score(self):
        """Score the running mean, keep it where it is the best so far -> {'pckh@0.5': mean, 'pckh@0.1': mean}."""
        done = self.progress
        self.distributed.broadcast_buffers(self.ema)
        found = evaluate(self.ema, self.valid, self.valid_crops, self.distributed.device, distributed=self.distributed,
                         between=self.stop_or_save)
        scores = {name: values["mean"] for name, values in found.items()}
        if scores["pckh@0.5"] > done.best:
            done.best = scores["pckh@0.5"]
            if self.distributed.is_main:
                checkpoint.save(self.args.out / "best.pt", self.ema,
                                self.metadata(min(done.epoch + 1, self.args.epochs)) | scores)
        return scores

    # --------------------------------------------------------------------------- the state

    def settings(self):
        """SETTINGS, and what stands behind some of them: how many processes, which people, which teacher."""
        return {name: getattr(self.args, name) for name in SETTINGS} | {
            "processes": self.distributed.world_size, "people": self.who, "teacher": self.teacher_targets and self.teacher_targets.source}

    def metadata(self, epoch):
        return dict(data=self.people.name, people=len(self.people), epoch=epoch, seed=self.args.seed)

    def stop_or_save(self, between_steps=False):
        """Stop where somebody asked; between steps also where time is up: then every slice of a run makes one step at least."""
        now = time.monotonic()
        late = between_steps and self.args.stop_after is not None and now - BEGAN > 60 * self.args.stop_after
        if self.distributed.any(bool(self.asked_to_stop) or late):
            self.save()
            raise Stopped
        if now - self.saved_at > SAVE_EVERY and self.distributed.is_main:
            self.save()

    def save(self):
        """last.pt: all that a run needs to go on to the bit; the one before it becomes previous.pt."""
        self.saved_at = time.monotonic()
        if self.distributed.is_main:
            training = dict(progress=asdict(self.progress), epochs=self.args.epochs, lr=self.args.lr, settings=self.settings(),
                            ema=self.ema.state_dict(),
                            optimisers=[optimiser.state_dict() for optimiser in self.optimisers])
            checkpoint.save(self.args.out / "last.pt", self.model, self.metadata(self.progress.epoch), training,
                            keep=self.args.out / "previous.pt")

    def resume(self):
        """Put the state of last.pt (or of previous.pt, where that is damaged) into this run."""
        file, content = checkpoint.read_last(self.args.out)
        training = content["training"]
        if training is None:
            raise BadInput(f"{file} holds weights but no state of training: --resume needs the last.pt that train.py wrote")
        if content["config"] != self.model.config:
            raise BadInput(f"{file} is {checkpoint.describe(content['config'])}, not {checkpoint.describe(self.model.config)}: "
                           f"give the flags of the run that is to go on")
        present = self.settings()
        for name, value in training["settings"].items():
            if (now := present.get(name)) != value:
                raise BadInput(f"{file} was trained with {name} {value}, now it is {now}: "
                               f"give the flags of the run that is to go on")
        if self.args.lr > training.get("lr", self.args.lr):
            raise BadInput(f"{file} was trained with --lr {training['lr']}, now it is {self.args.lr}: it may be lowered, "
                           f"not raised")
        if (epochs := training.get("epochs", self.args.epochs)) != self.args.epochs:
            print(f"{file} was to have {epochs} epochs, now it is {self.args.epochs}: "
                  f"its rate falls at other steps than until now")
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(training["ema"])
        for optimiser, state in zip(self.optimisers, training["optimisers"]):
            optimiser.load_state_dict(state)
        self.progress = Progress(**training["progress"])
        if not (self.args.out / "best.pt").exists():     # left behind on another machine: what comes is the best there is
            self.progress.best = -1
        log = self.args.out / "log.jsonl"                # a kill may have come between the log's line and the checkpoint
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        if self.distributed.is_main and len(lines) > self.progress.epoch:
            shorter = log.with_suffix(".partial")
            shorter.write_text("".join(lines[:self.progress.epoch]))
            os.replace(shorter, log)
        return file


# ------------------------------------------------------------------------------- a run

def load_data(args, size, distributed):
    """-> training people, validation people, and the stored crops of both."""
    if args.data == "drawn":
        print(f"the embedded data set: drawing {args.drawings:,} people to learn from (--data names real photos)")
        train = drawn_people("teacher" if args.train_teacher else "train", args.drawings, size, os.cpu_count())
    else:
        train = load_samples(args.data, "train", skip_bad=args.skip_bad_data)
        if train.skipped:
            print(f"{len(train.skipped):,} entries left out, listed in {args.out / 'skipped.txt'}")
    valid = validation_samples(args.data, size, os.cpu_count())
    cache = None if args.data == "drawn" else args.cache
    print(f"{train.name}: {len(train):,} people to learn from; {valid.name}: {len(valid):,} to be scored on"
          + (f"; {valid.note}" if valid.note else ""))
    step = args.batch_size * args.accumulate * distributed.world_size
    if step > len(train):
        raise BadInput(f"a step takes {step:,} people and there are {len(train):,}: lower --batch-size or --accumulate")
    if not distributed.is_main:
        distributed.barrier()                      # the first process cuts the crops, the others find them
    crops = store(train, size, cache), store(valid, size, cache)
    if distributed.is_main:
        distributed.barrier()
    return train, valid, *crops


def load_teacher(args, train, valid, stored):
    """The frozen teacher, scored before anything is learned from it; BadInput if a guess is as good."""
    teacher, metadata = checkpoint.load(args.teacher, args.device)
    if "used" in metadata:
        print(metadata["used"])
    if teacher.config["student"] != "teacher":
        raise BadInput(f"{args.teacher} is a student ({checkpoint.describe(teacher.config)}): --teacher needs a teacher")
    if teacher.config["preset"] != args.preset:
        raise BadInput(f"{args.teacher} is a teacher of preset {teacher.config['preset']}, the student's is {args.preset}: "
                       f"tokens and crops must be of the same size")
    found = evaluate(teacher, valid, stored, args.device)["pckh@0.5"]["mean"]
    chance = mean_pose_score(train, valid)["pckh@0.5"]["mean"]
    print(f"teacher {os.path.relpath(args.teacher)}: PCKh@0.5 {found:.2f} (a mean pose that ignores the picture: {chance:.2f})")
    if not found > chance:
        raise BadInput(f"{args.teacher} scores {found:.2f} on {valid.name}, no better than a mean pose ({chance:.2f}): "
                       f"train it longer, or check that it was trained on these people")
    return teacher.requires_grad_(False).to(memory_format=torch.channels_last)


def save_predictions(path, model, people, stored, device):
    """Draw what the network says of the first people, in colour, over their labels, in white."""
    people, stored = people.first(SHOWN), stored[:SHOWN]
    joints, _ = predict(model, people, stored, device)
    batch = make_batch(people, stored, np.arange(len(people)), model.size)
    crops = (255 * batch.images.permute(0, 2, 3, 1)).round().byte().numpy()
    labels, found = (transform(batch.matrix, torch.from_numpy(where)) for where in (people.joints, joints))
    contact_sheet(crops, (labels, people.visible, WHITE), (found, np.ones_like(people.visible))).save(path)


def make_teacher_targets(args, people, crops, teacher, size):
    measured = make_batch(people, crops, range(min(MEASURED, len(people))), size, args.device)
    ready = for_inference(teacher, torch.bfloat16 if args.amp else torch.float32)
    teacher_targets = TeacherTargets(ready, measured.images, args.views, len(people), checkpoint.checksum(teacher.state_dict())[:16])
    if args.views:
        print(f"the teacher is asked once about each person in {args.views} views: {teacher_targets.bytes() / 1e9:.1f} GB of "
              + ("memory" if teacher_targets.device.type == "cpu" else "the GPU's memory"))
    return teacher_targets


def plain(args):
    """Arguments as json can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def finish(args, valid, valid_crops):
    """Score the best epoch once more, joint by joint, and write it down."""
    model, metadata = checkpoint.load(args.out / "best.pt", args.device)
    print(f"best epoch: {metadata['epoch']}; PCKh on {len(valid):,} people of {valid.name}")
    scores = evaluate(model, valid, valid_crops, args.device)
    print_score(scores)
    mirrored = evaluate(model, valid, valid_crops, args.device, flip_test=True)
    print("flip test: " + ", ".join(f"{name} {values['mean']:.2f}" for name, values in mirrored.items()))
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    result = dict(arguments=plain(args), network=checkpoint.describe(model.config), metadata=metadata, scores=scores,
                  flip_test=mirrored, torch=torch.__version__, log=log)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    save_predictions(args.out / "predictions.png", model, valid, valid_crops, args.device)
    print(f"drawn: {args.out / 'predictions.png'}\nnext: python evaluate.py --checkpoint {args.out / 'best.pt'}"
          + ("" if args.data == "drawn" else f" --data {args.data}"))


def main():
    args = parse_arguments()
    distributed = init_distributed(args.device)
    args.device = distributed.device
    try:
        train(args, distributed)
    except torch.OutOfMemoryError as error:
        raise BadInput(f"the GPU's memory is full ({str(error).splitlines()[0][:120]}): lower --batch-size and add "
                       f"--accumulate") from error
    except RuntimeError as error:
        if distributed.world_size == 1 or not any(sign in str(error) for sign in LOST):
            raise                        # a bug keeps its traceback
        print(f"error: process {distributed.rank} lost the others ({str(error).splitlines()[0][:120]}): the run has ended; "
              f"the same command with --resume goes on from {args.out}/last.pt", file=sys.stderr)
        os._exit(2)                      # what is left of a team waits for nobody


def hold(folder):
    """Nobody else trains into this folder as long as this process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "O_DIRECTORY") and not lock(os.open(folder, os.O_RDONLY), wait=False):
        raise BadInput(f"another process trains into {folder}: wait for its end, or name another folder with --out")


def train(args, distributed):
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(args.deterministic)
    model = build_teacher(args.preset) if args.train_teacher else \
        build_student(args.student, args.filter, args.backbone, args.preset)
    if args.student == "reg" and not args.train_teacher:
        model.head.scored = args.distill
    if args.backbone_weights:
        print(checkpoint.load_backbone(model.backbone, args.backbone_weights))
    if args.init:
        print(checkpoint.start_from(model, args.init))
    model.to(args.device, memory_format=torch.channels_last)      # what convolutions like best, filters do not mind
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        model.compile(dynamic=False)

    people, valid, crops, valid_crops = load_data(args, model.size, distributed)
    teacher_targets = None
    if args.distill:
        teacher = load_teacher(args, people, valid, valid_crops)
        teacher_targets = make_teacher_targets(args, people, crops, teacher, model.size)
    if distributed.is_main:
        hold(args.out)
    training = Training(args, distributed, model, ema, people, crops, valid, valid_crops, teacher_targets)
    if args.resume:
        file = training.resume()
        print(f"going on from {file}, epoch {training.progress.epoch + 1}, step {training.progress.step + 1}"
              if training.progress.epoch < args.epochs else f"{file} has had its {args.epochs} epochs: --epochs N for more")
    if distributed.is_main:
        (args.out / "config.json").write_text(json.dumps(plain(args), indent=1) + "\n")
        if people.skipped:
            (args.out / "skipped.txt").write_text("\n".join(people.skipped) + "\n")
        (args.out / "result.json").unlink(missing_ok=True)             # of fewer epochs
    print(f"{checkpoint.describe(model.config)} on {args.device}: {args.epochs} epochs of {training.per_epoch} steps, "
          f"{training.people_a_step} people each, into {args.out}/")
    try:
        training.run()
    except Stopped:
        done = training.progress
        print(f"stopped at epoch {done.epoch + 1}, step {done.step}; saved: the same command with --resume goes on")
        raise SystemExit(128 + training.asked_to_stop if training.asked_to_stop else 0) from None
    if distributed.is_main:
        finish(args, valid, valid_crops)
    distributed.barrier()
    if distributed.world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main_with_clear_errors(main)
