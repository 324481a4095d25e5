"""The experiments behind the README's tables: run, stopped, continued.

    python studies/experiments.py drawn                          # 36 students of drawn people, and the loss taken apart: hours
    python studies/experiments.py drawn --seeds 0 --jobs 2       # a third of it, two at a time
    python studies/experiments.py photos --data DATA             # tiny teacher and students on photos in MPII's layout
    python studies/experiments.py paper --data MPII --backbone-weights hrnet_w32.pth hrnet_w48.pth     # the paper's rows: GPU-days
    # ... --stop-after 60: one more hour of them; ... -- --batch-size 128: flags behind -- go to every train.py

A run that is done has a file in results/ (arguments, scores by joint, the log of its epochs) and is skipped; one that was
stopped (Ctrl-C, SIGTERM, --stop-after) goes on from its last checkpoint. tables.py makes the tables.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import BadInput, CommandLine, main_with_clear_errors
from crops import AUGMENTATIONS
from distill import TERMS
from evaluate import PAPER
from models import STUDENTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"           # in the repository
RUNS = Path("runs") / "experiments"
SEEDS = (0, 1, 2)
TAKEN_APART = ("cc", "gs")           # the student on which choices are measured one by one
PHOTO_STUDENTS = (("cc", "gd"), ("reg", "gs"))
PHOTO_EPOCHS = {"teacher": 30, "student": 16, "long": 64}

# arguments in which a result that is there must agree with the flags that ask for it
COMPARED = "epochs", "batch_size", "views", "augmentation", "lr"

stopping = threading.Event()         # somebody asked for an end
children = set()                     # processes under way


# ------------------------------------------------------------------------------- what to run: name -> flags of train.py

def name_of(student, filter, distill, seed):
    return f"{student}-{filter}-{'distilled' if distill else 'alone'}-{seed}"


def drawn_runs(seeds):
    """The tiny students on the embedded data: both sides see the same pictures in the same order for the same steps."""
    runs = {}

    def add(name, student, filter, seed, *flags):
        runs[f"drawn-{name}"] = ["--student", student, "--filter", filter, "--seed", seed, *flags]

    for filters in (("gs", "gd"), ("attention",)):                # the filters' three seeds first
        for seed, filter, student, distill in product(seeds, filters, STUDENTS, (True, False)):
            add(name_of(student, filter, distill, seed), student, filter, seed, *["--no-distill"] * (not distill))
    student, filter = TAKEN_APART
    for seed in seeds:                                            # what labels alone give where every view is new
        add(f"{student}-{filter}-new-views-{seed}", student, filter, seed, "--no-distill", "--views", 0)
    for seed, term in product(seeds, TERMS):
        add(f"{student}-{filter}-{term}-{seed}", student, filter, seed, "--terms", term)
    return runs


def photo_runs(data, init):
    """The same networks on photos: the teacher first, then its students."""
    teacher = ["--teacher", RUNS / "photos-teacher" / "best.pt"]
    runs = {"photos-teacher": ["--data", data, "--train-teacher", "--amp", "--init", init,
                               "--epochs", PHOTO_EPOCHS["teacher"]]}

    def add(name, student, filter, *flags):
        runs[f"photos-{name}"] = ["--data", data, "--student", student, "--filter", filter,
                                  "--epochs", PHOTO_EPOCHS["student"], *flags]

    for (student, filter), distill in product(PHOTO_STUDENTS, (True, False)):
        add(name_of(student, filter, distill, 0), student, filter, *(teacher if distill else ["--no-distill"]))
    student, filter = PHOTO_STUDENTS[0]
    name, init = name_of(student, filter, True, 0), ["--init", ROOT / "weights" / f"student-{student}-{filter}-drawn.pt"]
    add(f"{name}-pretrained", student, filter, *teacher, *init)
    add(f"{name}-long", student, filter, *teacher, *init, "--views", 16, "--epochs", PHOTO_EPOCHS["long"])
    for augmentation in AUGMENTATIONS:
        add(f"{'-'.join(TAKEN_APART)}-{augmentation}", *TAKEN_APART, *teacher, "--augmentation", augmentation)
    return runs


def paper_runs(data, weights):
    """The paper's 16 students, each alone and distilled, at its size, in order of what one learns from them: the teacher, the
    students without a backbone, cc gs with HRNet-W32, the rest. weights: published files of HRNet-W32 and -W48, or nothing."""
    prefix = data.resolve().name.lower()
    start = {backbone: ["--backbone-weights", file] for backbone, file in zip(("w32", "w48"), weights)} | {"none": []}
    common = ["--data", data, "--preset", "paper", "--amp"]
    runs = {f"{prefix}-teacher": [*common, "--train-teacher", *start.get("w48", [])]}
    teacher = ["--teacher", RUNS / f"{prefix}-teacher" / "best.pt"]
    worth = {("cc", "gs", "none"): 0, ("cc", "gs", "w32"): 2}
    rows = sorted((row[:3] for row in PAPER), key=lambda row: worth.get(row, 1 if row[2] == "none" else 3))
    for (student, filter, backbone), distill in product(rows, (True, False)):
        runs[f"{prefix}-{student}-{filter}-{backbone}-{'distilled' if distill else 'alone'}"] = [
            *common, "--student", student, "--filter", filter, "--backbone", backbone, *start.get(backbone, []),
            *(teacher if distill else ["--no-distill"])]
    return runs


# ------------------------------------------------------------------------------- one process a run

def result(name):
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def stop(number, frame):
    """Asked to end: so are the runs, which save; runs have sessions of their own, so that a Ctrl-C reaches them just once."""
    stopping.set()
    for child in tuple(children):
        child.terminate()


def run(name, flags, threads, until=math.inf):
    """One run of train.py in a process of its own, up to a time (time.monotonic); when done its result is in results/."""
    kept, out = RESULTS / f"{name}.json", RUNS / name
    began = time.monotonic()
    if kept.exists():
        told, asked = result(name).get("arguments", {}), dict(zip(flags, flags[1:]))
        for key in COMPARED:
            flag = f"--{key.replace('_', '-')}"
            if flag in asked and key in told and str(asked[flag]) != str(told[key]):
                raise BadInput(f"{kept} was made with {flag} {told[key]}, now it is {asked[flag]}: move that file and {out} "
                               f"away, or give the same flags")
        return
    if stopping.is_set() or began >= until:
        return
    resume = ["--resume"] * any((out / state).exists() for state in ("last.pt", "previous.pt"))
    ending = ["--stop-after", (until - began) / 60] * (until < math.inf)
    command = [sys.executable, ROOT / "train.py", *flags, *resume, *ending, "--out", out]
    out.mkdir(parents=True, exist_ok=True)
    print(f"{name}: begins, or goes on: {out / 'said.txt'} says how it fares", flush=True)
    with open(out / "said.txt", "a") as said:
        child = subprocess.Popen([str(part) for part in command], stdout=said, stderr=subprocess.STDOUT,
                                 start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        children.add(child)
        if stopping.is_set():        # while it started
            child.terminate()
        status = child.wait()
        children.remove(child)
    if stopping.is_set():
        return
    if status:
        raise BadInput(f"{name} ended with status {status}: {out / 'said.txt'} says why")
    if not (out / "result.json").exists():
        return print(f"{name}: stopped, to be continued", flush=True)
    found = json.loads((out / "result.json").read_text())
    for path in ("data", "init", "teacher", "out", "cache", "backbone_weights"):            # names, not somebody's folders
        if found["arguments"].get(path):
            found["arguments"][path] = Path(found["arguments"][path]).name
    RESULTS.mkdir(exist_ok=True)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(partial, kept)
    print(f"{name}: PCKh@0.5 {found['scores']['pckh@0.5']['mean']:.2f} "
          f"({(time.monotonic() - began) / 60:.1f} minutes)", flush=True)


def run_all(runs, jobs, until):
    """Teachers first: the others learn from them. A run that fails is told, and the others go on."""
    failed = []

    def attempt(item):
        try:
            run(*item, threads, until)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed.append(item[0])

    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // jobs)
    teachers = {name: flags for name, flags in runs.items() if "--train-teacher" in flags}
    for batch in (teachers, {name: flags for name, flags in runs.items() if name not in teachers}):
        with ThreadPoolExecutor(jobs) as pool:               # threads that wait for processes
            list(pool.map(attempt, batch.items()))
        if failed:
            raise BadInput(f"{len(failed)} of {len(batch)} runs failed: {', '.join(failed)}")
        if any(not result(name) for name in batch):
            missing = [name for name in runs if not result(name)]
            print(f"{len(missing)} of {len(runs)} are still to be run, {missing[0]} the first: the same command goes on")
            raise SystemExit(130 if stopping.is_set() else 0)


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("what", choices=("drawn", "photos", "paper"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of the drawn runs (default: 0 1 2)")
    parser.add_argument("--data", type=Path, help="folder of photos in MPII's layout; the paper's table takes those of MPII/")
    parser.add_argument("--init", type=Path, default=ROOT / "weights" / "teacher-tiny-drawn.pt",
                        help="what the photos' teacher starts from (default: the shipped teacher of drawn people)")
    parser.add_argument("--backbone-weights", type=Path, nargs=2, default=(), metavar=("W32", "W48"),
                        help="published HRNet weights that the paper's backbones start from (default: random)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES", help="save and leave after this time")
    ours, theirs = sys.argv[1:], []
    if "--" in ours:
        ours, theirs = ours[:ours.index("--")], ours[ours.index("--") + 1:]
    args = parser.parse_args(ours)
    if args.jobs < 1 or not args.stop_after > 0:
        raise BadInput(f"--jobs {args.jobs} and --stop-after {args.stop_after:g} must be above 0")
    if args.what != "drawn" and not args.data:
        raise BadInput(f"{args.what} needs --data, a folder in MPII's layout")
    runs = {"drawn": lambda: drawn_runs(args.seeds), "photos": lambda: photo_runs(args.data, args.init),
            "paper": lambda: paper_runs(args.data, args.backbone_weights)}[args.what]()
    runs = {name: [*flags, *theirs] for name, flags in runs.items()}
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):      # a terminal that closes, too
        signal.signal(number, stop)
    run_all(runs, args.jobs, time.monotonic() + 60 * args.stop_after)
    print("next: python studies/tables.py")


if __name__ == "__main__":
    main_with_clear_errors(main)
