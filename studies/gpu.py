"""The paper's size on a GPU: half an hour, in pieces of minutes, on any machine, without a network.

    python studies/pack.py --data LSPET everyday LSP --out runs/packs    # before: people as files
    python studies/gpu.py --plan                                # what is done, in which order, minutes
    python studies/gpu.py --minutes 9 --back OUT                # there; again, as often as there is time
    python studies/gpu.py --save h100 --out OUT                 # after: into results/speed.json
    python studies/gpu.py --rehearse --device cpu               # the same, tiny and a few steps of each

Packs of people (--packs) are unpacked into the folder --out, those of later calls over those before. It holds
gpu.json, too, with all that was found: {item: figures}. An item that is done is not done again. A training
goes on where it stopped; where people have joined it begins anew, the teacher from its weights. What failed
is told, left, and tried again once it is removed from gpu.json. A call ends after --minutes; one that is
killed loses the item, or the epoch, that was under way.

What is to be kept is copied into --back as soon as it is there: gpu.json, and networks in float16, in
parts of 16 MB (cat NAME.pt.* > NAME.pt), as long as these are at most 8 files of 60 MB together.
"""

import time

BEGAN = time.monotonic()             # imports count

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import traceback
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
import speed
import speed_parts
from common import (BadInput, CommandLine, check_device, check_writable, default_device,
                    main_with_clear_errors, refuse)
from costs import take_turns
from evaluate import write_json
from results import add, rounded
from speed import FORMS
from sweep import ROOT, command_line

LAST = 0.6                           # minutes for the last epoch of a training, and its end
UNKNOWN = 500                        # images a second of a training whose step could not be timed
USED = 0.8                           # part of a training's minutes that its epochs are planned to take
LONGEST = 1e4                        # minutes; threads and train.py take no infinity
FILES, FILE_BYTES, BYTES = 8, 16 * 10 ** 6, 60 * 10 ** 6                # of --back
COPIED = {"cpu": 10 ** 8, "cuda": 4 * 10 ** 9}                          # bytes, for the rate of memory
HEAVY = "cc-gs-w48", "cc-gd-w32", "cc-attention-w48"                    # steps for memory and hours
SHIPPED = {path.stem: path for path in sorted((ROOT / "weights").glob("*.pt"))}


class Size(NamedTuple):
    """How much is done of each item."""
    preset: str              # of networks
    forms: tuple             # of speed.FORMS
    rows: tuple              # of speed.ROWS
    batches: tuple           # crops a forward pass; the first for all rows, then the others
    seconds: float           # to time one row at one batch, a layer's forms, a training step
    students: tuple          # that are trained; those that end in -alone from labels
    batch: dict = {}         # of a training step that is timed, where it is not train.py's
    epochs: int = 0          # of a training; 0: what its minutes allow
    teacher: Path | None = None          # what it starts from
    rest: bool = True        # compiled networks, heavy ones, those of photos


FULL = Size(
    "paper", FORMS[:3], ("cc-none", "reg-none", "cc-w32", "reg-w32", "cc-w48", "reg-w48"), (64, 256, 1), 8,
    ("cc-gs-none", "cc-gd-none", "cc-attention-none", "reg-gs-none-alone", "reg-gs-none"))
REHEARSAL = Size(
    "tiny", FORMS[:2], ("cc-none",), (2, 1), 0.5, ("cc-gd-none", "reg-gs-none-alone"),
    batch={"batch": 4}, epochs=1, teacher=SHIPPED["teacher-tiny-drawn"], rest=False)


class Visit:
    """One call: what is known so far, and the time that is left."""

    def __init__(self, args):
        self.args, self.size, self.file = args, REHEARSAL if args.rehearse else FULL, args.out / "gpu.json"
        self.found = json.loads(self.file.read_text()) if self.file.exists() else {}

    def left(self):
        """Minutes."""
        return self.args.minutes - (time.monotonic() - BEGAN) / 60

    def note(self, item, **figures):
        """Add figures to an item, in the folder and in --back."""
        self.found.setdefault(item, {}).update(rounded(figures))
        write_json(self.file, self.found)
        if self.args.back:
            shutil.copy(self.file, self.args.back)

    def unpack(self):
        """Unpack what is not there yet, in the order of the packs."""
        there = self.found.get("packs", {}).get("names", []) if self.folders() else []
        new = [path for path in self.args.packs if path.name not in there]
        for path in sorted(new, key=lambda path: (len(path.name), path.name)):               # 10 is after 9
            refuse((path.name != (next := f"people-{len(there) + 1}.zip"),
                    f"{path} is unpacked over what is before it: name {next} first, with --packs"))
            try:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(self.args.out / "people")
            except zipfile.BadZipFile as error:
                raise BadInput(f"{path} is no pack of people ({error}): pack.py writes them") from error
            there = [*there, path.name]
            self.note("packs", names=there, people={**self.found.get("packs", {}).get("people", {}),
                                                    str(len(there)): self.people()})

    def folders(self):
        return sorted(path.parent for path in (self.args.out / "people").glob("*/annot"))

    def people(self):
        """Number of those to learn from."""
        return sum(len(json.loads((folder / "annot/train.json").read_text())) for folder in self.folders())

    def speed(self, name):
        """Images a second of the step that was timed."""
        return self.found.get(f"step {name}", {}).get("step", UNKNOWN)

    def runs(self, name):
        """Folders of a training, the newest first: one for each number of packs."""
        packs = len(self.found["packs"]["names"])
        return [self.args.out / f"{name}-{number}" for number in range(packs, 0, -1)]

    def take_home(self, name, path):
        """Copy a network in float16 into --back, if it fits."""
        back, half = self.args.back, self.args.out / f"{name}.pt"
        if not back or not path.exists():
            return
        for old in [half, *back.glob(f"{name}.pt*")]:
            old.unlink(missing_ok=True)
        checkpoint.half([path], half)
        content, there = half.read_bytes(), [file.stat().st_size for file in back.iterdir()]
        parts = [content[start:start + FILE_BYTES] for start in range(0, len(content), FILE_BYTES)]
        if len(there) + len(parts) > FILES or sum(there) + len(content) > BYTES:
            print(f"{half} stays here: {back} is full")
            return
        for number, part in enumerate(parts, 1):
            (back / (half.name if len(parts) == 1 else f"{half.name}.{number}")).write_bytes(part)


# ------------------------------------------------------------------------------- speed

def card(visit):
    """What the machine is, its rates of products and of copies."""
    device, kind = visit.args.device, torch.device(visit.args.device).type
    source, target = torch.randint(256, (2, COPIED[kind]), dtype=torch.uint8, device=device)
    matrices = list(speed.products(device, kind))
    works = [(matrix.run, matrix.context) for matrix in matrices] + [lambda: target.copy_(source)]
    *times, copies = (statistics.median(seconds) for seconds in take_turns(works, kind, visit.size.seconds))
    rates = {matrix.precision: matrix.operations / seconds for matrix, seconds in zip(matrices, times)}
    return dict(torch=torch.__version__, rates=rates, machine=speed.machine_line(device, rates),
                bytes_per_second=2 * COPIED[kind] / copies)                            # read and written


def layers(visit):
    """One layer of each mixer; fraction: of the rate of copies, as it must read and write its tokens once."""
    rate = visit.found["card"]["bytes_per_second"]
    return dict(layers=[figures | dict(fraction=figures["bytes"] / figures["seconds"] / rate) for figures in
                        speed_parts.measure_layers(visit.args.device, visit.size.seconds, visit.size.forms)])


def networks(row, batch, visit, **how):
    """Frames a second of one row of networks."""
    seconds, how = visit.size.seconds, dict(forms=visit.size.forms, budget=visit.size.seconds) | how
    timings, _ = speed.measure_speed([row], visit.args.device, fewest=seconds, batches=(batch,),
                                     preset=visit.size.preset, **how)
    return dict(timings=[timing._asdict() for timing in timings])


def step(row, visit, **how):
    """A training step: images a second, fraction of the card's rate, memory."""
    how, taught = visit.size.batch | how, row != "teacher" and not row.endswith("-alone")
    return speed.training_speed(visit.found["card"]["rates"], visit.args.device, visit.size.preset,
                                visit.size.seconds, row=row.removesuffix("-alone"), taught=taught, **how)


# ------------------------------------------------------------------------------- trainings

def call_train(visit, flags, heard=lambda: None):
    """Run train.py on the people that are there. heard: called after every line that it prints."""
    if visit.args.device != "cpu":
        torch.cuda.empty_cache()
    flags = {"data": visit.folders(), "device": visit.args.device, "amp": True,
             "cache": visit.args.out / "crops", "stop-after": max(visit.left() - LAST, 0.01), **flags}
    child = subprocess.Popen([sys.executable, ROOT / "train.py", *command_line(flags)], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    timer, lines = threading.Timer(60 * max(visit.left() - 0.1, 0), child.terminate), []
    timer.start()
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
            heard()
        status = child.wait()
    finally:
        timer.cancel()
        child.poll() is None and child.terminate()
    refuse((status not in (0, 143, -15), f"train.py ended with {status}: {''.join(lines[-9:]).strip()}"))


def read_log(folder):
    file = folder / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def planned(visit, minutes, rate):
    """How many epochs fit into the minutes, at `rate` images a second."""
    return visit.size.epochs or max(1, int(USED * 60 * minutes * rate / visit.people()))


def training(name, visit, **flags):
    """A training, until it is done or time is up."""
    out = visit.runs(name)[0]
    resume = {"resume": True} if any((out / state).exists() for state in ("last.pt", "previous.pt")) else {}
    flags = {"preset": visit.size.preset, "out": out, **flags, **resume}
    call_train(visit, flags, lambda: visit.note(name, tries=0, log=read_log(out)))
    visit.take_home(name, out / "best.pt")
    log, made, timed = read_log(out), out / "result.json", visit.found.get(f"step {name}", {})
    found = dict(done=made.exists(), people=visit.people(), folder=out.name, epochs=flags["epochs"], log=log)
    if log:
        found["images_per_second"] = statistics.median(line["images_per_second"] for line in log)
    if log and "step" in timed:                  # in proportion to the step that was timed
        found["fraction"] = found["images_per_second"] * timed["fraction"] / timed["step"]
    if made.exists():
        result = json.loads(made.read_text())
        found |= {key: result[key] for key in ("scores", "flip_test")}
    return found


def people_of(folder, visit):
    """How many people a training has learned from in each epoch."""
    packs = folder.name.rpartition("-")[2]
    return visit.found["packs"].get("people", {}).get(packs, visit.people())


def teacher(minutes, visit):
    """From what it was with fewer people, or --init, or a random start; minutes: of all calls."""
    runs = visit.runs("teacher")
    lines = [line for folder in runs for line in read_log(folder)]
    rate = lines[0]["images_per_second"] if lines else visit.speed("teacher")
    spent = sum(people_of(folder, visit) / line["images_per_second"]
                for folder in runs for line in read_log(folder)) / 60
    epochs = len(read_log(runs[0])) + planned(visit, minutes - spent, rate)
    before = [folder / file for folder in runs[1:] for file in ("best.pt", "last.pt")]
    start = [path for path in [*before, visit.args.init, visit.size.teacher] if path and path.exists()]
    flags = {"train-teacher": True} | ({"init": start[0]} if start else {})
    return training("teacher", visit, epochs=visit.size.epochs or epochs, **flags)


def student(name, minutes, visit):
    """By the newest teacher, or from labels alone; all for the same number of epochs."""
    teachers = [folder / "best.pt" for folder in visit.runs("teacher") if (folder / "best.pt").exists()]
    alone = name.endswith("-alone")
    if not (alone or teachers):
        return dict(done=False, tries=0, waits="for a teacher")
    learns = {"no-distill": True} if alone else {"teacher": teachers[0]}
    if "epochs" not in visit.found:
        slowest = min(map(visit.speed, visit.size.students))
        visit.note("epochs", students=planned(visit, minutes, slowest))
    row = dict(zip(("student", "filter", "backbone"), name.split("-")))
    return training(name, visit, epochs=visit.found["epochs"]["students"], **row, **learns)


def of_photos(name, visit):
    """A shipped network of photos, continued."""
    kind = {"train-teacher": True} if name.startswith("teacher") else {
        "student": "cc", "filter": "gd", "teacher": SHIPPED["teacher-small-photos"]}
    return training(name, visit, preset="small", init=SHIPPED[name], epochs=12, **kind)


def resumed(visit):
    """Two epochs at once, and one and one: are the weights the same, to the bit?"""
    weights, flags = [], {"preset": visit.size.preset, "student": "cc", "filter": "gd", "no-distill": True}
    for folder, calls in (("straight", [{}]), ("stopped", [{"stop-after": 1e-3}, {"resume": True}])):
        out = visit.args.out / folder
        shutil.rmtree(out, ignore_errors=True)
        for more in calls:
            call_train(visit, {**flags, "epochs": 2, "out": out, **more})
        if len(read_log(out)) < 2:
            return dict(done=False, tries=0)                 # time was up
        weights.append(checkpoint.read(out / "last.pt")["model"])
    pairs = [(straight, weights[1][name]) for name, straight in weights[0].items()]
    return dict(same=all(torch.equal(*pair) for pair in pairs),
                off=max(float((a.double() - b.double()).abs().max()) for a, b in pairs))


# ------------------------------------------------------------------------------- what is done, and when

class Item(NamedTuple):
    """One thing to find out."""
    name: str
    minutes: float           # that it takes, guessed; of a training, that its epochs are planned for
    run: Callable            # Visit -> figures; done=False among them: it goes on in the next call
    trains: bool = False     # it needs people; a minute must be left to begin it or to go on


def items(size):
    """{stage: items}, the most valuable first."""
    bare = [row for row in size.rows if row.endswith("none")]
    others = [row for row in size.rows if row not in bare]

    def timed(rows, batches, words="", minutes=0, **how):
        return [Item(f"speed {row} {batch}{words}", minutes or (0.25 if row in bare else 0.45),
                     partial(networks, row, batch, **how)) for batch in batches for row in rows]

    def steps(*rows):
        return [Item(f"step {row}", 0.3, partial(step, row)) for row in rows]

    compiled = dict(words=" compiled", minutes=1.5, forms=("compiled",), budget=100)
    stages = {
        "speed": [Item("card", 0.2, card), Item("layers", 0.6, layers),
                  *timed(size.rows, size.batches[:1]), *timed(bare, size.batches[1:])],
        "people": [*steps("teacher"), Item("teacher", 8, partial(teacher, 8), True), *steps(*size.students),
                   *(Item(name, 2, partial(student, name, 2), True) for name in size.students)],
        "rest": [Item("resumed", 2, resumed, True)]}
    if size.rest:
        stages["speed"] += timed(["cc-none"], (64,), only=("bfloat16",), **compiled)
        stages["rest"] += [
            Item("step cc-gs-none compiled", 1.5, partial(step, "cc-gs-none", compiled=True)), *steps(*HEAVY),
            *(Item(name, 2, partial(of_photos, name), True)
              for name in ("teacher-small-photos", "student-small-photos")),
            *timed(others, size.batches[1:]), *timed(["reg-none"], (64,), **compiled)]
    return stages


ASSUMED = """Guessed: 7 s to build a row's networks, 20 with a backbone, and 8 s to time them; half a minute a
compilation; 8 s for a step, and as much to make it. A training plans as many epochs as its steps would make
in 80% of its minutes, as train.py loads people, scores and saves besides."""


def go_on(visit):
    """Do what is not done, as long as there is time."""
    for item in sum(items(visit.size).values(), []):
        known = visit.found.get(item.name, {})
        if known.get("done") or "error" in known or known.get("tries", 0) > 1:     # it was killed twice
            continue
        late = visit.left() < (1 if item.trains else item.minutes)
        if late or item.trains and not visit.folders():
            print(f"{item.name} is left out: " + ("no time" if late else "no people, --packs names them"))
            continue
        print(f"{item.name}, with {visit.left():.1f} minutes left", flush=True)
        visit.note(item.name, tries=known.get("tries", 0) + 1)
        try:
            visit.note(item.name, **dict(done=True) | item.run(visit))
        except Exception as error:
            visit.note(item.name, error=traceback.format_exc()[-3000:])
            print(f"error: {item.name}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
            # go on in a new process: what failed may have left this one's GPU unusable
            os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", str(max(visit.left(), 0.01))])


def print_plan(size):
    total = 0
    print(f"{ASSUMED}\n\n minutes in all  item")
    for stage, parts in items(size).items():
        print(stage)
        for item in parts:
            total += item.minutes
            print(f"{item.minutes:8.2f} {total:6.1f}  {item.name}")


def save(machine, found):
    """What was found of speed, as an entry of results/speed.json."""
    refuse(("rates" not in found.get("card", {}), "nothing was found yet: --out names gpu.json's folder"))
    timings = [timing for figures in found.values() for timing in figures.get("timings", ())]
    steps = [figures for name, figures in found.items() if name.startswith("step ") and "step" in figures]
    add(f"speed-{machine}", dict(machine=found["card"]["machine"], rates=found["card"]["rates"],
                                 training=steps, timings=timings))


def main():
    parser = CommandLine(__doc__)
    argument = parser.add_argument
    argument("--packs", type=Path, nargs="*", default=sorted(Path("runs/packs").glob("people-*.zip")),
             metavar="FILE", help="of pack.py (default: those in runs/packs)")
    argument("--minutes", type=float, default=LONGEST, help="of this call (default: as many as it takes)")
    argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    argument("--back", type=Path, help="folder for copies of what is to be kept")
    argument("--init", type=Path, help="checkpoint that the teacher starts from (default: a random start)")
    argument("--device", default=default_device(), help="cpu or cuda (default: cuda where there is one)")
    argument("--rehearse", action="store_true", help="tiny networks, a few steps of each item")
    argument("--plan", action="store_true", help="print what is done and how long it takes, and end")
    argument("--save", metavar="MACHINE", help="add the speeds in gpu.json to results/speed.json, and end")
    args = parser.parse_args()
    if args.plan:
        return print_plan(REHEARSAL if args.rehearse else FULL)
    files = [*args.packs, *([args.init] if args.init else [])]
    refuse((not 0 < args.minutes <= LONGEST, f"--minutes {args.minutes:g} must be above 0, at most 10,000"),
           *((not path.is_file(), f"there is no file {path}") for path in files))
    visit = Visit(args)
    if args.save:
        return save(args.save, visit.found)
    check_device(args.device)
    for folder, flag in ((args.out, "--out "), (args.back or args.out, "--back ")):
        check_writable(folder, flag)
        folder.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        speed.MATRIX["cpu"], speed_parts.GRIDS["cpu"] = 256, 2
    visit.unpack()
    go_on(visit)
    failed = [name for name, figures in visit.found.items() if "error" in figures]
    print(f"{visit.file} has what was found" + (f"; failed: {', '.join(failed)}" if failed else ""))


if __name__ == "__main__":
    main_with_clear_errors(main)
