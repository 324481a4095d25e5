"""Train a student, with or without a teacher, or train the teacher.

    python train.py --student cc --filter gd               # synthetic people, tiny networks, two cores
    python train.py --student cc --filter gd --no-distill  # the same without a teacher
    python train.py --train-teacher                        # a teacher for it, over two hours; see --teacher
    python train.py --student cc --filter gd --preset small --data MPII COCO --select MPII       # photos
    python train.py --train-teacher --data MPII --preset paper --amp --init hrnet_w48.pth        # full size
    python train.py --student cc --filter gs --backbone w48 --data MPII --preset paper --amp \\
                    --init hrnet_w48.pth --teacher runs/teacher-paper-MPII/best.pt

    torchrun --nproc-per-node 4 train.py ...                # the same experiment and batch on four GPUs

A run writes into one folder (--out): config.json, log.jsonl with one line per epoch, best.pt, last.pt and
previous.pt (to resume from), and at the end result.json (arguments, scores, the log) and predictions.png.
It is saved after every epoch: Ctrl-C, SIGTERM or a kill loses the epoch that was under way. The same command
with --resume goes on and ends with the same weights, to the bit, as a run that was never stopped (on a GPU as
far as PyTorch's kernels repeat: docs/mpii.md).
"""

import copy
import math
import os
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from common import (BadInput, CommandLine, check_device, check_writable, cores, default_device, fast_bfloat16,
                    init_distributed, lock, main_with_clear_errors, refuse)
from crops import AUGMENTATIONS, CROPS, make_batch, on_device, store
from data_mpii import find_labels, load_joined
from distill import WEIGHTS, load_teacher, loss_terms, prepare_targets
from evaluate import (THRESHOLDS, evaluate, names_of, predict, prediction_sheet,
                      print_score, validation_samples, write_json)
from models import BACKBONES, FILTERS, PRESETS, STUDENTS, build_student, build_teacher
from optim import build_optimisers, rate_factor, update_ema
from synthetic import drawn_people

# A preset's defaults. photos: augmentation of photos; drawings are 'upright'. views: number of fixed
# augmentations, of which epoch e has number e % views; with 0, and for a teacher, every epoch has a new one.
# 'paper' is DistilPose's schedule and TokenPose's batch and augmentation, as the paper states none.
RECIPES = {
    "paper": dict(epochs=300, batch_size=64, optimiser="adam", backbone="none", views=0, photos="tokenpose"),
    "small": dict(epochs=100, batch_size=32, optimiser="muon", backbone="w24", views=0, photos="parts"),
    "small-64": dict(epochs=100, batch_size=32, optimiser="muon", backbone="w24", views=0, photos="upright"),
    "tiny": dict(epochs=16, batch_size=32, optimiser="muon", backbone="none", views=2, photos="upright"),
}
RATE = 1e-3              # Adam's highest
LOW_RATE = 5e-4          # the same beside Muon in a teacher, with attention or a backbone (docs/lab.md)
SCORE_EVERY = 4          # epochs; the last epoch is always scored
DRAWINGS = {"student": 4000, "teacher": 40000}
TEACHERS = {("tiny", "drawn"): "teacher-tiny-drawn.pt", ("small", "photos"): "teacher-small-photos.pt"}
SHIPPED = Path(__file__).parent / "weights"
SHOWN = 24               # samples in predictions.png
BEGAN = time.monotonic()     # --stop-after counts from the start of the process
# Arguments that must not change on --resume; nor may --select, the network, the samples, the teacher and the
# number of processes. --epochs may (the decay of the rate follows the new number), and --lr may be lowered.
SETTINGS = "distill", "augmentation", "views", "batch_size", "accumulate", "optimiser", "seed", "amp"


# ------------------------------------------------------------------------------- the training loop

@dataclass
class Run:
    """Everything that changes during training, and what a resumed run is compared with."""
    model: torch.nn.Module                       # the network that learns
    ema: torch.nn.Module                         # average of its weights: what is scored and kept
    optimisers: list
    settings: dict                               # must be equal when resuming
    metadata: dict                               # data, samples, seed: goes into every checkpoint
    epoch: int = 0                               # finished epochs
    best: float = -1                             # highest PCKh@0.5 so far
    log: list = field(default_factory=list)      # a dictionary a finished epoch: losses, rate, scores


def fit(args, distributed, run, train, valid, teacher=None):
    """Train until the last epoch, or until --stop-after: True where all epochs are done.

    train: a pair of Samples and their stored crops (N, wide, wide, 3). valid: such pairs by the name of their
    set. teacher: TeacherTargets or None. Order and augmentation depend only on (seed, epoch), and the loop
    draws no other random number: what Run holds is the whole state.
    """
    (samples, crops), model, device = train, run.model, distributed.device
    crops, network = on_device(crops, device), distributed.wrap(model)       # network: averages gradients
    steps = len(samples) // args.batch_size      # per epoch; samples that are left over come in another epoch
    weights = WEIGHTS[args.student] if teacher else {}
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16,
                       enabled=args.amp and fast_bfloat16(device))
    for epoch in range(run.epoch, args.epochs):
        view = epoch % args.views if args.views else epoch
        # 1, 2: streams of random numbers of their own
        params = AUGMENTATIONS[args.augmentation].draw(samples, generator(args.seed, 1, view))
        order = torch.randperm(len(samples), generator=generator(args.seed, 2, epoch))
        batch_of = partial(make_batch, samples, crops, size=model.size, device=device, params=params)
        if teacher:
            teacher.prepare(view, batch_of)
        model.train()
        began, sums = time.monotonic(), Counter()
        for step in tqdm(range(steps), f"epoch {epoch + 1}/{args.epochs}", leave=False,
                         disable=None if distributed.is_main else True):
            done = epoch * steps + step                          # steps before this one
            means = Counter()                                    # update() adds to what is there
            factor = rate_factor(done, args.epochs * steps)
            for optimiser in run.optimisers:
                optimiser.param_groups[0]["lr"] = optimiser.defaults["lr"] * factor
                optimiser.zero_grad()
            rows = order[step * args.batch_size:(step + 1) * args.batch_size]
            for part in parts_of(rows, args.accumulate, distributed):
                # ---- batch: images (B, 3, size, size), xy (B, K, 2), visible (B, K), empty (B,)
                batch = batch_of(part)
                # ---- forward
                with autocast():
                    output = network(batch.images)
                targets = teacher(batch.images, view, part) if teacher else None
                # ---- loss
                terms = loss_terms(model.head, output, batch, targets, weights)
                # ---- backward
                (terms["loss"] / args.accumulate).backward()
                means.update({name: term.detach() / args.accumulate for name, term in terms.items()})
            # ---- update
            means = distributed.mean(means)                                    # over processes, as numbers
            refuse_non_finite(run, step, rows, means)                          # before the weights change
            for optimiser in run.optimisers:
                optimiser.step()
            update_ema(run.ema, model, done, args.epochs * steps)
            sums.update(means)

        # ---- log and save
        line = {"epoch": epoch + 1, "lr": args.lr * factor,                    # Adam's; Muon's is higher
                **{name: value / steps for name, value in sums.items()},
                "images_per_second": round(steps * args.batch_size / (time.monotonic() - began), 2)}
        if (epoch + 1) % SCORE_EVERY == 0 or epoch + 1 == args.epochs:
            line |= score_average(args, distributed, run, valid, epoch + 1)
        run.epoch = epoch + 1
        run.log.append(line)
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
        if distributed.is_main:
            checkpoint.save_run(args.out, run, args)
        late = time.monotonic() > BEGAN + 60 * (args.stop_after or math.inf)
        if distributed.any(late) and run.epoch < args.epochs:
            return False
    return True


# ------------------------------------------------------------------------------- steps of the loop

def generator(*numbers):
    """A torch.Generator seeded with a tuple of integers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def parts_of(rows, parts, distributed):
    """The samples of one step, rows (batch,), that this process takes: `parts` tensors, one after the other.

    rows is cut into parts, and each part into one piece for every process, whose crops are read in order.
    """
    return rows.view(parts, distributed.world_size, -1)[:, distributed.rank].sort().values


def refuse_non_finite(run, step, rows, means):
    """Raise BadInput, before weights change, if a term or the gradient is not finite."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    wrong = [name for name, value in {**means, "gradient": norm.item()}.items() if not math.isfinite(value)]
    if wrong:
        raise BadInput(f"not finite at epoch {run.epoch + 1}, step {step + 1}: {', '.join(wrong)}. The "
                       f"weights were not changed: look at samples {str(rows.tolist())[1:-1]}, or lower --lr"
                       + (" and continue with --resume" if run.epoch else ""))


def score_average(args, distributed, run, valid, epoch):
    """Score the weight average and keep it if it is the best -> {'pckh@0.5': mean, 'pckh@0.1': mean}.

    With several validation sets these are means over those in --select, and 'NAME@0.5' is added for each set.
    Results are reported on the same samples: there is no third split. The main process scores; others wait
    for it.
    """
    if not distributed.is_main:
        return {}
    by_set = {name: evaluate(run.ema, *pair, distributed.device) for name, pair in valid.items()}
    scores = {f"pckh@{t}": float(np.mean([by_set[name][f"pckh@{t}"]["mean"] for name in args.select]))
              for t in THRESHOLDS}
    if len(by_set) > 1:
        scores |= {f"{name}@0.5": values["pckh@0.5"]["mean"] for name, values in by_set.items()}
    if math.isnan(scores["pckh@0.5"]) or scores["pckh@0.5"] > run.best:         # NaN: no labels
        run.best = scores["pckh@0.5"]
        checkpoint.save(args.out / "best.pt", run.ema, {**run.metadata, "epoch": epoch, **scores})
    return scores


# ---------------------------------------------------------------------------- one run: data, teacher, results

def build_model(args):
    """The network to train, on its device, with its initial weights."""
    if args.train_teacher:
        model = build_teacher(args.preset)
    else:
        model = build_student(args.student, args.filter, args.backbone, args.preset)
        if args.student == "reg":
            # only the confidence term trains the score (models.RegressionHead)
            model.head.scored = args.distill and WEIGHTS["reg"]["confidence"] > 0
    if args.init and not args.resume:                                  # else last.pt has the weights
        print(checkpoint.start_from(model, args.init))
    return model.to(args.device, memory_format=torch.channels_last)      # the fastest layout for convolutions


def load_data(args, size):
    """-> (Samples, stored crops) to train on, and {name: (Samples, stored crops)} to validate on."""
    if args.data == ["drawn"]:
        print(f"drawing {args.drawings:,} synthetic people to train on (--data names real photos)")
        split = "teacher" if args.train_teacher else "train"
        train = drawn_people(split, args.drawings, size, cores())
    else:
        train = load_joined(args.data)
    valid = {name: validation_samples(data, size) for name, data in zip(names_of(args.data), args.data)}
    counts = f" ({train.note})" if train.note else ""
    print("; ".join([f"{train.name}: {len(train):,} samples to train on{counts}",
                     *(f"{samples.name}: {len(samples):,} to score on" for samples in valid.values()),
                     *(samples.note for samples in valid.values() if samples.note)]))
    if args.batch_size > len(train):
        raise BadInput(f"--batch-size {args.batch_size:,} is more than the {len(train):,} samples there are: "
                       f"lower it")
    cache = None if args.data == ["drawn"] else args.cache
    return (train, store(train, size, cache)), {name: (samples, store(samples, size, cache))
                                                for name, samples in valid.items()}


def start(args, distributed, model, samples, valid, teacher=None):
    """The Run before its first step. samples: to train on; valid: as in `fit`."""
    settings = {name: getattr(args, name) for name in SETTINGS} | dict(
        select=sorted(args.select), processes=distributed.world_size,
        teacher=teacher and checkpoint.checksum(teacher.state_dict())[:16],
        changes=getattr(args, "changes", []))                                  # of studies/changed.py
    settings |= checkpoint.fingerprints("training", samples)
    for name, (scored, _) in valid.items():
        settings |= checkpoint.fingerprints(f"validation ({name})", scored)
    return Run(model, copy.deepcopy(model).requires_grad_(False).eval(),
               build_optimisers(model, args.optimiser, args.lr), settings,
               dict(data=samples.name, samples=len(samples), seed=args.seed))


def train_model(args, distributed):
    """Prepare a run, train, and write its results."""
    torch.manual_seed(args.seed)
    if args.device != "cpu":                             # a CPU's kernels are reproducible as they are
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")       # cuBLAS: sums in one order
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False       # filling with NaN only takes time
    model = build_model(args)
    teacher = load_teacher(args) if args.distill else None
    train, valid = load_data(args, model.size)
    run = start(args, distributed, model, train[0], valid, teacher)
    if distributed.is_main:
        args.out.mkdir(parents=True, exist_ok=True)
        lock(args.out, f"another process trains into {args.out}: wait until it finishes, or name another "
                       f"folder with --out")
    if args.resume:
        file = checkpoint.resume(args.out, run, args)
        print(f"resuming from {file}, epoch {run.epoch + 1}" if run.epoch < args.epochs else
              f"{file} is at the end of epoch {run.epoch}, the last: raise --epochs to go on")
    teacher = teacher and prepare_targets(args, teacher, train, valid)           # slow, so after all checks
    if distributed.is_main:
        write_json(args.out / "config.json", vars(args))
        (args.out / "result.json").unlink(missing_ok=True)                   # outdated
    print(f"{checkpoint.describe(model.config)} on {args.device}: epochs {args.epochs}, steps "
          f"{len(train[0]) // args.batch_size}, batch size {args.batch_size}, into {args.out}/")
    if not fit(args, distributed, run, train, valid, teacher):
        print(f"stopped after epoch {run.epoch}: the same command with --resume continues it")
    elif distributed.is_main:
        if "pckh@0.5" not in run.log[-1] or not (args.out / "best.pt").exists():       # resumed at the end
            run.log[-1] |= score_average(args, distributed, run, valid, run.epoch)
            checkpoint.save_run(args.out, run, args)         # with the score
        checkpoint.save_log(args.out, run.log)               # a kill after last.pt leaves it a line short
        write_result(args, valid, run.log)
    distributed.end()


def write_result(args, valid, log):
    """Score the best epoch by joint, with and without flip test; write result.json and predictions.png."""
    model, metadata = checkpoint.load(args.out / "best.pt", args.device)
    scores, flipped = {}, {}
    for name, (samples, crops) in valid.items():
        print(f"best epoch: {metadata['epoch']}; PCKh on {len(samples):,} samples of {samples.name}")
        scores[name] = evaluate(model, samples, crops, args.device)
        print_score(scores[name])
        flipped[name] = evaluate(model, samples, crops, args.device, flip_test=True)
        print("flip test: " + ", ".join(f"{t} {values['mean']:.2f}" for t, values in flipped[name].items()))
    if len(valid) == 1:
        (scores,), (flipped,) = scores.values(), flipped.values()
    write_json(args.out / "result.json", dict(
        arguments=vars(args), network=checkpoint.describe(model.config), metadata=metadata, scores=scores,
        flip_test=flipped, torch=torch.__version__, log=log))
    samples, crops = valid[args.select[0]]
    samples = samples.first(SHOWN)
    joints, _ = predict(model, samples, crops, args.device)
    sheet = prediction_sheet(samples, crops, np.arange(len(samples)), joints, model.size)
    sheet.save(args.out / "predictions.png")
    data = dict(zip(names_of(args.data), args.data))[args.select[0]]
    where = "" if data == "drawn" else f" --data {shlex.quote(str(data))}"
    print(f"drawn: {args.out / 'predictions.png'}\n"
          f"next: python evaluate.py --checkpoint {shlex.quote(str(args.out / 'best.pt'))}{where}")


# ------------------------------------------------------------------------------- command line

def parse_arguments():
    rows = "\n".join(f"    {name:9}" + "  ".join(f"{key} {value}" for key, value in recipe.items())
                     for name, recipe in RECIPES.items())
    parser = CommandLine(f"{__doc__}\nWhat a preset trains with:\n\n{rows}\n")
    add = parser.add_argument_group("network").add_argument
    add("--student", choices=STUDENTS, help="regression or coordinate classification (default: cc)")
    add("--filter", choices=FILTERS, help="static or dynamic global filter, or attention (default: gd)")
    add("--backbone", choices=tuple(BACKBONES), help="HRNet's width (default: the preset's)")
    add("--preset", choices=tuple(PRESETS), default="tiny",
        help="sizes for crops of 64 x 64 pixels (tiny, small-64), 128 (small), 256 (paper) (default: tiny)")
    add("--init", type=Path, help="weights to start from: the same network's; a teacher's with the student's "
                                  "backbone (all but mixers and head); HRNet's published ones")
    add("--train-teacher", action="store_true", help="train the heatmap teacher instead of a student")
    add("--teacher", type=Path, help="the teacher's checkpoint (default: one shipped for preset and data, "
                                     "see weights/README.md)")
    add("--no-distill", action="store_true", help="learn from labels alone")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["drawn"], metavar="FOLDER",
        help="folders of photos, whose people are joined (default: drawn, synthetic people)")
    add("--select", nargs="+", metavar="NAME", help="folders whose validation people choose the best epoch, "
                                                    "by the mean of their PCKh (default: all)")
    add("--drawings", type=int, help="number of synthetic people (default: "
                                     f"{', '.join(f'{n} for a {who}' for who, n in DRAWINGS.items())})")
    add("--cache", type=Path, default=CROPS, help="folder for cut crops (default: runs/crops)")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, help="passes over the samples (default: the preset's)")
    add("--batch-size", type=int, help="samples of a step, all processes and parts (default: the preset's)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="compute each step in N parts, to save memory; only batch norms notice")
    add("--lr", type=float, help=f"highest rate of Adam; Muon's is 20 times that (default: {RATE:g}, or "
                                 f"{LOW_RATE:g} with muon and attention or a backbone)")
    add("--seed", type=int, default=0, help="of initial weights, order and augmentation (default: 0)")
    add("--device", default=default_device(), help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--amp", action="store_true", help="bfloat16 where it is native; last head, losses, scores: float32")
    add("--out", type=Path, help="folder of the run (default: runs/STUDENT-FILTER-BACKBONE-...)")
    add("--stop-after", type=float, metavar="MINUTES", help="end after the epoch in which this time passes")
    add("--resume", action="store_true", help="continue from last.pt of the run's folder (--out)")
    return check_arguments(parser.parse_args())


def check_arguments(args):
    """Fill in defaults that depend on other arguments. BadInput where arguments contradict each other."""
    drawn, names = args.data == ["drawn"], names_of(args.data)
    args.select = args.select or names
    shipped = TEACHERS.get((args.preset, "drawn" if drawn else "photos"))
    args.distill = not (args.train_teacher or args.no_distill)
    refuse(
        (args.train_teacher
         and any((args.teacher, args.student, args.filter, args.backbone, args.no_distill)),
         "--train-teacher takes no --student, --filter, --backbone, --teacher or --no-distill"),
        (args.no_distill and args.teacher, "--no-distill and --teacher contradict each other: leave one out"),
        *((not drawn and not Path(data).is_dir(),
           f"--data {data} is not a folder: name one of photos, or leave it out for drawings")
          for data in args.data),
        *((name not in names, f"--select {name} is not one of the sets {', '.join(names)}: name folders of "
                              f"--data, without their path") for name in args.select),
        (not drawn and args.drawings is not None,
         "--drawings is the number of synthetic people: leave it out where --data names a folder"))
    if args.distill and not (args.teacher or shipped):
        if not drawn:
            find_labels(args.data[0], "train")       # a wrong folder is reported before a missing teacher
        raise BadInput(f"no teacher of preset {args.preset} for {'synthetic people' if drawn else 'photos'} "
                       f"is shipped: train one with --train-teacher and name it with --teacher, or learn "
                       f"without one with --no-distill")
    check_device(args.device)
    recipe = dict(RECIPES[args.preset])
    photos = recipe.pop("photos")
    defaults = dict(                                 # student and filter mean nothing with --train-teacher
        student="cc", filter="gd", teacher=SHIPPED / shipped if args.distill and shipped else None,
        drawings=DRAWINGS["teacher" if args.train_teacher else "student"], **recipe)
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.augmentation = "upright" if drawn else photos
    args.views = 0 if args.train_teacher else args.views
    if args.lr is None:
        low = args.train_teacher or args.filter == "attention" or args.backbone != "none"
        args.lr = LOW_RATE if low and args.optimiser == "muon" else RATE
    if args.out is None:
        what = "teacher" if args.train_teacher else f"{args.student}-{args.filter}-{args.backbone}"
        ending = "-no-distill" if args.no_distill else ""
        args.out = Path("runs") / f"{what}-{args.preset}-{'+'.join(names)}{ending}"
    positive = ("epochs", "batch_size", "accumulate", "lr", "drawings", "stop_after")     # or None
    resumable = any((args.out / name).exists() for name in ("last.pt", "previous.pt"))
    finished = any((args.out / name).exists() for name in ("best.pt", "result.json"))
    refuse(
        *((not 0 < value < math.inf, f"--{name.replace('_', '-')} {value} must be a finite number above 0")
          for name, value in vars(args).items() if name in positive and value is not None),
        (not 0 <= args.seed < 2 ** 31, f"--seed {args.seed} must be 0 or above, and below 2^31"),
        (args.out.exists() and not args.out.is_dir(), f"--out {args.out} is a file: name a folder"),
        (args.resume and not resumable, f"--resume: there is no {args.out / 'last.pt'} to resume from"),
        (not args.resume and (resumable or finished),
         f"{args.out} holds a run: {'--resume continues it, ' if resumable else ''}--out names another "
         f"folder, or remove it"))
    check_writable(args.out, "--out ")
    return args


def main():
    args = parse_arguments()
    distributed = init_distributed(args.device)
    args.device = distributed.device
    pieces = distributed.world_size * args.accumulate
    refuse((args.batch_size % pieces,
            f"--batch-size {args.batch_size} does not divide into {distributed.world_size} processes x "
            f"{args.accumulate} accumulated parts: make it a multiple of {pieces}"),
           (args.filter == "gd" and not args.train_teacher and args.batch_size == pieces,
            f"--batch-size {args.batch_size} gives a dynamic filter one sample at a time, which has no "
            f"statistics: make it at least {2 * pieces}"))
    if args.amp and not fast_bfloat16(args.device):
        print(f"--amp: {args.device} has no native bfloat16, computing in float32")
    train_model(args, distributed)


if __name__ == "__main__":
    main_with_clear_errors(main)
