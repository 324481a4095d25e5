"""Train a student, distilled from a teacher or not, or train the teacher.

    python train.py --student cc --filter gd                       # drawn people, tiny networks: minutes on two cores
    python train.py --student cc --filter gd --no-distill          # the same without a teacher
    python train.py --train-teacher                                # the teacher of the two lines above
    python train.py --train-teacher --data MPII --preset paper --device cuda --amp          # at the paper's size
    python train.py --student cc --filter gd --backbone w32 --data MPII --preset paper \\
                    --teacher runs/teacher-paper-MPII/best.pt --device cuda --amp

Every run has a folder (--out): log.jsonl with one line an epoch, best.pt, last.pt, and, when it is through, result.json
(arguments, scores by joint, the log) and predictions.png.
"""

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from crops import PHOTOS, TOKENPOSE, UPRIGHT, make_batch, store, transform
from data_mpii import load_people
from distill import TERMS, WEIGHTS, Lessons, distillation_loss, task_loss, total
from draw import WHITE, contact_sheet
from evaluate import evaluate, mean_pose_score, predict, print_score, validation_people
from inputs import BadInput, check_device, default_device, main_with_clear_errors
from models import BACKBONES, FILTERS, PRESETS, STUDENTS, build_student, build_teacher
from synthetic import drawn_people

# 'paper': DistilPose's recipe (Adam, 300 epochs, a tenth of the rate at 200 and at 260, 500 steps of warm-up) and
# TokenPose's batch on MPII (16 on each of 4 GPUs): borrowed, as the paper's own is not known.
RECIPES = {"paper": dict(epochs=300, batch_size=64, lr=1e-3, optimiser="adam"),
           "tiny": dict(epochs=16, batch_size=32, lr=1e-3, optimiser="muon")}
SCORE_EVERY = {"paper": 5, "tiny": 2}    # epochs; and after the last
MUON_RATE = 20           # Muon's learning rate over Adam's
VIEWS = {"drawn": 2, "photos": 4}        # tiny preset: in how many ways a student is shown a person (ever new ones else)
DECAY_AT = (2 / 3, 13 / 15)              # shares of the training after which the rate is divided by ten
WARM_UP = 500                            # steps, at most a tenth of the training
DRAWINGS = {"student": 4000, "teacher": 40000}
TINY_TEACHER = Path(__file__).parent / "weights" / "teacher-tiny-drawn.pt"
AVERAGING = 0.998                        # the weights that are scored and kept: a running mean over some 500 steps
MEASURED = 256                           # people on whom the mean and deviation of the teacher's tokens are measured
SHOWN = 24                               # people in predictions.png


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    what.add_argument("--terms", nargs="+", choices=TERMS, default=list(TERMS), metavar="TERM",
                      help=f"which of the loss's four terms to learn from: {', '.join(TERMS)} (default: all)")
    data = parser.add_argument_group("from what")
    data.add_argument("--data", default="drawn", help="folder in MPII's layout, or 'drawn': people drawn by synthetic.py "
                                                      "(default: drawn)")
    data.add_argument("--drawings", type=int, help=f"labelled drawings to learn from (default: {DRAWINGS['student']} for a "
                                                   f"student, {DRAWINGS['teacher']} for the teacher)")
    data.add_argument("--cache", type=Path, default=Path("runs/crops"), help="folder for cut crops (default: runs/crops)")
    how = parser.add_argument_group("how")
    how.add_argument("--epochs", type=int, help="passes over the people (default: 16 tiny, 300 paper)")
    how.add_argument("--batch-size", type=int, help="people a step (default: 32 tiny, 64 paper)")
    how.add_argument("--lr", type=float, help=f"highest learning rate of Adam (default: 1e-3); Muon's is {MUON_RATE} times that")
    how.add_argument("--optimiser", choices=("adam", "muon"), help="adam, or muon for the matrices of the encoder and adam "
                                                                   "for all else (default: muon tiny, adam paper)")
    how.add_argument("--seed", type=int, default=0, help="of initial weights, order and augmentation (default: 0)")
    how.add_argument("--device", default=default_device(),
                     help="where to run: cpu, cuda or cuda:N (default: cuda where there is one)")
    how.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe (default: float32)")
    how.add_argument("--out", type=Path, help="folder of the run (default: runs/STUDENT-FILTER-BACKBONE-...)")
    how.add_argument("--resume", action="store_true", help="go on from last.pt of the run's folder")
    return check_arguments(parser.parse_args())


def check_arguments(args):
    """Refuse what does not go together, fill in what depends on something else."""
    if args.train_teacher and (args.teacher or args.student or args.filter or args.backbone or args.no_distill):
        raise BadInput("--train-teacher takes no --student, --filter, --backbone, --teacher or --no-distill: "
                       "the teacher is one network and learns from labels")
    if args.no_distill and args.teacher:
        raise BadInput("--no-distill and --teacher contradict each other: leave one out")
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
    if args.drawings is None:
        args.drawings = DRAWINGS["teacher" if args.train_teacher else "student"]
    for name in ("epochs", "batch_size", "lr", "drawings"):
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    if not 0 <= args.seed < 2 ** 31:
        raise BadInput(f"--seed {args.seed} must be 0 or above, and below 2^31")
    if args.out is None:
        what = "teacher" if args.train_teacher else f"{args.student}-{args.filter}-{args.backbone}"
        data = "drawn" if args.data == "drawn" else Path(args.data).resolve().name
        args.out = Path("runs") / f"{what}-{args.preset}-{data}{'-no-distill' if args.no_distill else ''}"
    if args.out.exists() and not args.out.is_dir():
        raise BadInput(f"--out {args.out} is a file: name a folder")
    return args


# What a run that goes on must have in common with the one that was stopped, or it would be neither. Epochs may be
# added or taken off: the rate's decay then follows the new number.
SETTINGS = ("data", "drawings", "distill", "terms", "batch_size", "lr", "optimiser", "seed", "amp")


def resume(args, model, averaged, optimisers):
    """Put the state of the run's last.pt into model, average and optimisers -> (next epoch, best PCKh so far)."""
    file = args.out / "last.pt"
    content = checkpoint.read(file)
    training = content["training"]
    if training is None:
        raise BadInput(f"{file} holds weights but no state of training: --resume needs the last.pt that train.py wrote")
    if content["config"] != model.config:
        raise BadInput(f"{file} is {checkpoint.describe(content['config'])}, not {checkpoint.describe(model.config)}: "
                       f"give the flags of the run that is to go on")
    for name, value in training["settings"].items():
        if getattr(args, name) != value:
            raise BadInput(f"{file} was trained with {name} {value}, now it is {getattr(args, name)}: "
                           f"give the flags of the run that is to go on")
    model.load_state_dict(content["model"])
    averaged.load_state_dict(training["averaged"])
    for optimiser, state in zip(optimisers, training["optimisers"]):
        optimiser.load_state_dict(state)
    log = args.out / "log.jsonl"                 # a kill may have come between the log's line and the checkpoint
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:training["epoch"]]))
    return training["epoch"], training["best"]


def generator(*numbers):
    """A random generator of its own for each tuple of numbers: the same however a run came to it."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def build_optimisers(model, name, lr):
    """Adam for every weight that learns, or Muon for the matrices of the encoder's blocks and Adam for all else."""
    learning = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    if name == "adam":
        return [torch.optim.Adam(learning.values(), lr=lr, fused=True)]
    matrices = [key for key, weight in learning.items() if ".blocks." in key and weight.ndim == 2]
    others = [key for key in learning if key not in matrices]
    return [torch.optim.Muon([learning[key] for key in matrices], lr=MUON_RATE * lr, weight_decay=0),
            torch.optim.Adam([learning[key] for key in others], lr=lr, fused=True)]


def rate_share(step, steps):
    """Learning rate over its highest: linear warm-up, then 1, divided by ten at each of DECAY_AT."""
    warm = min(1, (step + 1) / min(WARM_UP, max(1, steps // 10)))
    return warm * 0.1 ** sum(step >= share * steps for share in DECAY_AT)


@torch.no_grad()
def average(averaged, model, step):
    """averaged <- averaged + w (model - averaged), w = max(1 / (step + 1), 1 - AVERAGING): a plain mean at first."""
    pairs = [(mean, now) for mean, now in zip(averaged.state_dict().values(), model.state_dict().values())
             if mean.is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*pairs)), max(1 / (step + 1), 1 - AVERAGING))


def load_data(args, size):
    """-> training people, validation people, and the stored crops of both."""
    if args.data == "drawn":
        print(f"the embedded data set: drawing {args.drawings:,} people to learn from (--data names real photos)")
        train = drawn_people("teacher" if args.train_teacher else "train", args.drawings, size)
    else:
        train = load_people(args.data, "train")
    valid = validation_people(args.data, size)
    cache = None if args.data == "drawn" else args.cache
    print(f"{train.name}: {len(train):,} people to learn from; {valid.name}: {len(valid):,} to be scored on"
          + (f"; {valid.note}" if valid.note else ""))
    return train, valid, store(train, size, cache), store(valid, size, cache)


def load_teacher(args, train, valid, stored):
    """The frozen teacher, scored before anything is learned from it; BadInput if a guess is as good."""
    teacher, _ = checkpoint.load(args.teacher, args.device)
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


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    model = build_teacher(args.preset) if args.train_teacher else \
        build_student(args.student, args.filter, args.backbone, args.preset)
    if args.student == "reg" and not args.train_teacher:
        model.head.scored = args.distill
    if args.backbone_weights:
        print(checkpoint.load_backbone(model.backbone, args.backbone_weights))
    if args.init:
        print(checkpoint.start_from(model, args.init))
    model.to(args.device, memory_format=torch.channels_last)      # what convolutions like best, filters do not mind
    averaged = copy.deepcopy(model).requires_grad_(False)
    optimisers = build_optimisers(model, args.optimiser, args.lr)
    highest = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    first, best = resume(args, model, averaged, optimisers) if args.resume else (0, -1.0)

    train, valid, train_crops, valid_crops = load_data(args, model.size)
    drawn = args.data == "drawn"
    few = args.preset == "tiny" and not args.train_teacher        # the same with a teacher and without
    views = VIEWS["drawn" if drawn else "photos"] if few else None
    teacher = load_teacher(args, train, valid, valid_crops) if args.distill else None
    if teacher:
        measured = make_batch(train, train_crops, range(min(MEASURED, len(train))), model.size, args.device)
        lessons = Lessons(teacher, measured.images, views or 0, len(train))
    augmentation = UPRIGHT if drawn else TOKENPOSE if args.preset == "paper" else PHOTOS
    per_epoch = max(1, len(train) // args.batch_size)             # steps; what is left over comes in another epoch
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.jsonl").open("a" if args.resume else "w")
    print(f"{checkpoint.describe(model.config)} on {args.device}: {args.epochs} epochs of {per_epoch} steps, "
          f"{args.batch_size} people each, into {args.out}/")

    for epoch in range(first, args.epochs):
        began, sums = time.perf_counter(), {}
        view = epoch % views if views else epoch
        variation = augmentation.draw(len(train), generator(args.seed, 1, view))
        order = torch.randperm(len(train), generator=generator(args.seed, 2, epoch))
        model.train()
        bar = tqdm(total=per_epoch * args.batch_size, desc=f"epoch {epoch + 1}/{args.epochs}", unit=" images",
                   leave=False, disable=None)
        for i in range(per_epoch):
            share = rate_share(epoch * per_epoch + i, args.epochs * per_epoch)
            for optimiser, rate in zip(optimisers, highest):
                optimiser.param_groups[0]["lr"] = rate * share
            rows = order[i * args.batch_size:(i + 1) * args.batch_size].sort().values
            batch = make_batch(train, train_crops, rows, model.size, args.device, variation)

            with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.amp):
                output = model(batch.images)
                if teacher:
                    lesson = lessons(batch.images, view, rows)
            if teacher:
                terms = distillation_loss(model.head, output, lesson, batch.xy, batch.visible)
                loss = total(terms, {name: WEIGHTS[args.student][name] for name in args.terms})
            else:
                terms = {"task": task_loss(model.head, output.prediction, batch.xy, batch.visible)}
                loss = terms["task"]
            terms = {name: term.item() for name, term in {**terms, "loss": loss}.items()}
            if not math.isfinite(terms["loss"]):
                raise BadInput(f"the loss is not finite at epoch {epoch + 1}, step {i + 1} ({terms}): lower --lr")
            for optimiser in optimisers:
                optimiser.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
            average(averaged, model, epoch * per_epoch + i)

            sums = {name: sums.get(name, 0) + term for name, term in terms.items()}
            bar.set_postfix({name: f"{value / (i + 1):.3g}" for name, value in sums.items()}, refresh=False)
            bar.update(len(rows))
        bar.close()

        seconds = time.perf_counter() - began
        line = {"epoch": epoch + 1, "lr": args.lr * share, **{name: value / per_epoch for name, value in sums.items()},
                "images_per_second": per_epoch * args.batch_size / seconds}
        facts = dict(data=train.name, people=len(train), epoch=epoch + 1, seed=args.seed)
        if (epoch + 1) % SCORE_EVERY[args.preset] == 0 or epoch + 1 == args.epochs:
            scores = {name: values["mean"] for name, values in evaluate(averaged, valid, valid_crops, args.device).items()}
            line |= scores
            if scores["pckh@0.5"] > best:
                best = scores["pckh@0.5"]
                checkpoint.save(args.out / "best.pt", averaged, facts | scores)
        print("  ".join(f"{name} {value:.4g}" for name, value in line.items()), flush=True)
        print(json.dumps(line), file=log, flush=True)
        settings = {name: getattr(args, name) for name in SETTINGS}
        checkpoint.save(args.out / "last.pt", model, facts, training=dict(
            averaged=averaged.state_dict(), optimisers=[each.state_dict() for each in optimisers], epoch=epoch + 1, best=best, settings=settings))

    model, facts = checkpoint.load(args.out / "best.pt", args.device)
    print(f"best epoch: {facts['epoch']}; PCKh on {len(valid):,} people of {valid.name}")
    scores = evaluate(model, valid, valid_crops, args.device)
    print_score(scores)
    result = dict(arguments={name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
                  network=checkpoint.describe(model.config), facts=facts, scores=scores, torch=torch.__version__,
                  log=[json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()])
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    save_predictions(args.out / "predictions.png", model, valid, valid_crops, args.device)
    print(f"drawn: {args.out / 'predictions.png'}\nnext: python evaluate.py --checkpoint {args.out / 'best.pt'}"
          + ("" if args.data == "drawn" else f" --data {args.data}"))


if __name__ == "__main__":
    main_with_clear_errors(main)
