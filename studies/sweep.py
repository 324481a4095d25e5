"""Several runs of train.py, one after another or side by side.

drawn.py, parts.py, photos.py and paper.py say which, and share this.

A run is a name and the flags of train.py, {"student": "cc", "epochs": 16, "amp": True}; `changes` among them
are those of changed.py. When it is done, its entry is added to the file of its study in results/ (results.py
says what is kept), and from then on it is skipped. A run that was stopped (Ctrl-C, SIGTERM, --stop-after) is
resumed from its last checkpoint. A student waits for the teacher that it names. tables.py makes the tables.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import results
from common import BadInput, CommandLine, cores, terminate

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs") / "experiments"
SEEDS = (0, 1, 2)
POLL = 0.5                           # seconds between two looks at the processes


def name_of(student, filter, distill, seed):
    return f"{student}-{filter}-{'distilled' if distill else 'alone'}-{seed}"


def folder(name, flags):
    """The folder of a run: its flag `out`, or runs/experiments/NAME."""
    return Path(flags.get("out", RUNS / name))


def collect(name, flags, ours=False):
    """Add the entry of a finished run to results/ -> is there one?

    Raises BadInput where it, or what is there of an unfinished run, was made with other flags than these, or
    other values of theirs. ours: it was made by this call, so these are all the flags it had.
    """
    made, begun = (folder(name, flags) / file for file in ("result.json", "config.json"))
    entry = results.result(name)
    if entry is None and made.exists():
        entry = results.entry_of(json.loads(made.read_text()))
        check_flags(name, flags, entry)
        results.add(name, {"flags": named(flags), **entry} if ours else entry)
        print(f"{name}: PCKh@0.5 {results.pckh(entry):.2f}", flush=True)
    elif entry:
        check_flags(name, flags, entry)
    elif begun.exists():
        check_flags(name, flags, dict(arguments=results.kept_arguments(json.loads(begun.read_text()))))
    return bool(entry)


def check_flags(name, flags, entry):
    """BadInput where an entry of results/, or a run that is not in it, was made with other flags."""
    is_result, out = results.result(name) is not None, folder(name, flags)
    was_made = f"{name} in {results.RESULTS if is_result else out} was made with"
    again = f"remove {f'that entry and {out}' if is_result else 'that folder'}, or give the same flags"
    made_with = entry.get("flags", named(flags))                     # unknown of some entries
    if others := set(made_with) ^ set(named(flags)):
        raise BadInput(f"{was_made}{'' if min(others) in made_with else 'out'} --{min(others)}: {again}")
    begun_so = {"init": None, "changes": None}       # a run without them is another than one with them
    for flag, value in (begun_so | flags).items():
        argument, off = flag.replace("-", "_"), False if value is True else None     # what is off is not kept
        was = entry["arguments"].get(argument, off)
        now = None if value is None else results.kept(argument, value)
        was, now = (None if part == [] else part for part in (was, now))       # no changes
        if (was is not None or flag in begun_so) and comparable(was) != comparable(now):
            raise BadInput(f"{was_made} --{flag} {was}, now it is {now}: {again}")


def named(flags):
    """Names of those flags that do not depend on the machine."""
    return sorted(flag for flag in flags if flag.replace("-", "_") not in results.OF_MACHINE)


def comparable(value):
    """A flag's value: numbers alike however they are written, 1e-3 and 0.001."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def command_line(flags):
    """{"amp": True, "epochs": 2, "data": ["a", "b"]} -> ["--amp", "--epochs", "2", "--data", "a", "b"]."""
    words = []
    for key, value in flags.items():
        values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{key}", *values]
    return list(map(str, words))


def read_flags(words):
    """The inverse of `command_line`, with strings for numbers."""
    flags = {}
    for word in words:
        if word.startswith("--"):
            key, is_set, value = word[2:].partition("=")
            flags[key] = [value] if is_set else []
        elif flags:
            flags[key].append(word)
        else:
            raise BadInput(f"what follows -- are flags of train.py, not {word}")
    return {key: values[0] if len(values) == 1 else values or True for key, values in flags.items()}


def start(name, flags, slot, jobs, until):
    """Start one run on GPU number `slot`, or on its part of the cores, or resume it -> the process."""
    out, env = folder(name, flags), dict(os.environ)
    out.mkdir(parents=True, exist_ok=True)
    ending = {"stop-after": (until - time.monotonic()) / 60} if until < math.inf else {}
    resume = {"resume": True} if any((out / state).exists() for state in ("last.pt", "previous.pt")) else {}
    env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    if gpus := torch.cuda.device_count():
        visible = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = visible[slot % len(visible)]
    print(f"{name}: {'resumed' if resume else 'started'}, its output is in {out / 'output.txt'}", flush=True)
    script, flags = [ROOT / "train.py"], dict(flags)
    if "changes" in flags:
        script = [ROOT / "studies" / "changed.py", *flags.pop("changes"), "--"]
    command = [sys.executable, *script, *command_line({**flags, **resume, **ending, "out": out})]
    with open(out / "output.txt", "a") as output:      # a session of its own: `sweep` passes a Ctrl-C on
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env,
                                start_new_session=True)


def sweep(runs, jobs=1, stop_after=math.inf):
    """Run what has no result, in order, `jobs` at a time, for stop_after minutes; runs: {name: flags}.

    A run that fails is reported and the others go on; BadInput at the end.
    """
    until = time.monotonic() + 60 * stop_after
    waiting = {name: flags for name, flags in runs.items() if not collect(name, flags)}
    running, slots, failed = {}, list(range(jobs)), []

    def is_ready(flags):             # its teacher is not among the runs, or is done
        teacher = str(flags.get("teacher"))
        return all(results.result(name) for name in runs
                   if str(folder(name, runs[name]) / "best.pt") == teacher)

    try:
        while True:
            for name in [name for name, flags in waiting.items() if is_ready(flags)]:
                if slots and time.monotonic() < until:
                    slot = slots.pop(0)
                    running[start(name, waiting.pop(name), slot, jobs, until)] = name, slot
            if not running:
                break
            time.sleep(POLL)
            for child in [child for child in running if child.poll() is not None]:
                name, slot = running.pop(child)
                slots.append(slot)
                if child.returncode:
                    failed.append(name)
                    print(f"error: {name} ended with status {child.returncode}: "
                          f"{folder(name, runs[name]) / 'output.txt'} says why", file=sys.stderr, flush=True)
                elif not collect(name, runs[name], ours=True):
                    print(f"{name}: stopped, to be resumed", flush=True)
    finally:
        for child in running:
            child.terminate()        # train.py saves and ends
        for child in running:
            child.wait()
        if missing := [name for name in runs if not results.result(name)]:
            print(f"{len(missing)} of {len(runs)} runs are missing, {missing[0]} the first: "
                  f"the same command resumes them")
    if failed:
        raise BadInput(f"{len(failed)} runs failed: {', '.join(failed)}")
    if not missing:
        print("next: python studies/tables.py")


def main(description, make_runs, *arguments):
    """The command of a script: make_runs(args) -> runs; arguments: (flag, options) for the parser.

    Words behind -- are flags that go to every train.py.
    """
    parser = CommandLine(description)
    for flag, options in arguments:
        parser.add_argument(flag, **options)
    gpus = torch.cuda.device_count()
    parser.add_argument("--jobs", type=int, default=max(1, gpus),
                        help="runs at a time, each on a GPU or a part of the cores (default: GPUs, or 1)")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="MINUTES",
                        help="save and end after this time")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    if args.jobs < 1 or not args.stop_after > 0:
        raise BadInput(f"--jobs {args.jobs} and --stop-after {args.stop_after:g} must be above 0")
    signal.signal(getattr(signal, "SIGHUP", signal.SIGTERM), terminate)               # a terminal that closes
    extra = read_flags(words[end + 1:])
    runs = {name: {**flags, **extra} for name, flags in make_runs(args).items()}
    sweep(runs, args.jobs, args.stop_after)
