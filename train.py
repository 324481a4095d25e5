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
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
from augmentation import AUGMENTATIONS
from crops import make_batch, store, transform
from data_mpii import load_people
from distill import TERMS, Lessons
from draw import WHITE, contact_sheet
from evaluate import evaluate, mean_pose_score, predict, print_score, validation_people
from inference import for_inference
from inputs import BadInput, CommandLine, check_device, default_device, lock, main_with_clear_errors
from loop import Stopped, Training
from models import BACKBONES, FILTERS, PRESETS, STUDENTS, build_student, build_teacher
from parallel import join
from recipe import DRAWINGS, MUON_RATE, RECIPES, VIEWS
from synthetic import drawn_people

TINY_TEACHER = Path(__file__).parent / "weights" / "teacher-tiny-drawn.pt"
MEASURED = 256           # people on whom the mean and deviation of the teacher's tokens are measured
SHOWN = 24               # people in predictions.png
RUN = "last.pt", "previous.pt"         # what a folder holds that no other run may overwrite
LOST = "Connection closed", "Connection reset", "Broken pipe", "NCCL", "timed out"     # how PyTorch says that a process is gone


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


def load_data(args, size, team):
    """-> training people, validation people, and the stored crops of both."""
    if args.data == "drawn":
        print(f"the embedded data set: drawing {args.drawings:,} people to learn from (--data names real photos)")
        train = drawn_people("teacher" if args.train_teacher else "train", args.drawings, size)
    else:
        train = load_people(args.data, "train", skip_bad=args.skip_bad_data)
        if train.skipped:
            print(f"{len(train.skipped):,} entries left out, listed in {args.out / 'skipped.txt'}")
    valid = validation_people(args.data, size)
    cache = None if args.data == "drawn" else args.cache
    print(f"{train.name}: {len(train):,} people to learn from; {valid.name}: {len(valid):,} to be scored on"
          + (f"; {valid.note}" if valid.note else ""))
    step = args.batch_size * args.accumulate * team.world
    if step > len(train):
        raise BadInput(f"a step takes {step:,} people and there are {len(train):,}: lower --batch-size or --accumulate")
    if not team.leads:
        team.wait()                      # the first process cuts the crops, the others find them
    crops = store(train, size, cache), store(valid, size, cache)
    if team.leads:
        team.wait()
    return train, valid, *crops


def load_teacher(args, train, valid, stored):
    """The frozen teacher, scored before anything is learned from it; BadInput if a guess is as good."""
    teacher, facts = checkpoint.load(args.teacher, args.device)
    if "used" in facts:
        print(facts["used"])
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


def make_lessons(args, people, crops, teacher, size):
    measured = make_batch(people, crops, range(min(MEASURED, len(people))), size, args.device)
    ready = for_inference(teacher, torch.bfloat16 if args.amp else torch.float32)
    lessons = Lessons(ready, measured.images, args.views, len(people), checkpoint.checksum(teacher.state_dict())[:16])
    if args.views:
        print(f"the teacher is asked once about each person in {args.views} views: {lessons.bytes() / 1e9:.1f} GB of "
              + ("memory" if lessons.device.type == "cpu" else "the GPU's memory"))
    return lessons


def plain(args):
    """Arguments as json can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def finish(args, valid, valid_crops):
    """Score the best epoch once more, joint by joint, and write it down."""
    model, facts = checkpoint.load(args.out / "best.pt", args.device)
    print(f"best epoch: {facts['epoch']}; PCKh on {len(valid):,} people of {valid.name}")
    scores = evaluate(model, valid, valid_crops, args.device)
    print_score(scores)
    mirrored = evaluate(model, valid, valid_crops, args.device, flip_test=True)
    print("flip test: " + ", ".join(f"{name} {values['mean']:.2f}" for name, values in mirrored.items()))
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    result = dict(arguments=plain(args), network=checkpoint.describe(model.config), facts=facts, scores=scores,
                  flip_test=mirrored, torch=torch.__version__, log=log)
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    save_predictions(args.out / "predictions.png", model, valid, valid_crops, args.device)
    print(f"drawn: {args.out / 'predictions.png'}\nnext: python evaluate.py --checkpoint {args.out / 'best.pt'}"
          + ("" if args.data == "drawn" else f" --data {args.data}"))


def main():
    args = parse_arguments()
    team = join(args.device)
    args.device = team.device
    try:
        train(args, team)
    except torch.OutOfMemoryError as error:
        raise BadInput(f"the GPU's memory is full ({str(error).splitlines()[0][:120]}): lower --batch-size and add "
                       f"--accumulate") from error
    except RuntimeError as error:
        if team.world == 1 or not any(sign in str(error) for sign in LOST):
            raise                        # a bug keeps its traceback
        print(f"error: process {team.rank} lost the others ({str(error).splitlines()[0][:120]}): the run has ended; "
              f"the same command with --resume goes on from {args.out}/last.pt", file=sys.stderr)
        os._exit(2)                      # what is left of a team waits for nobody


def hold(folder):
    """Nobody else trains into this folder as long as this process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "O_DIRECTORY") and not lock(os.open(folder, os.O_RDONLY), wait=False):
        raise BadInput(f"another process trains into {folder}: wait for its end, or name another folder with --out")


def train(args, team):
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
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        model.compile(dynamic=False)

    people, valid, crops, valid_crops = load_data(args, model.size, team)
    lessons = None
    if args.distill:
        teacher = load_teacher(args, people, valid, valid_crops)
        lessons = make_lessons(args, people, crops, teacher, model.size)
    if team.leads:
        hold(args.out)
    training = Training(args, team, model, averaged, people, crops, valid, valid_crops, lessons)
    if args.resume:
        file = training.resume()
        print(f"going on from {file}, epoch {training.progress.epoch + 1}, step {training.progress.step + 1}"
              if training.progress.epoch < args.epochs else f"{file} has had its {args.epochs} epochs: --epochs N for more")
    if team.leads:
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
    if team.leads:
        finish(args, valid, valid_crops)
    team.wait()
    if team.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main_with_clear_errors(main)
