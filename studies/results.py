"""The files in results/: one a study, in it one entry a run, {name: entry}.

The word in front of a name's first hyphen is the study: drawn-cc-gs-alone-0 stands in results/drawn.json. An
entry of a run of train.py, one line each:

    flags               names of the flags that were given, where sweep.py made the run
    arguments           those of train.py with its defaults filled in, so that they stay true when a default
                        changes; without what was off or depends on the machine
    scores, flip_test   PCKh by threshold and joint: {"pckh@0.5": {"head": 88.8, ..., "mean": 62.786}, ...};
                        where there are several validation sets, {set: such scores}
    images_per_second   in training, the median over the epochs
    log                 the scored epochs as columns: {"epoch": [4, 8], "loss": [...], "pckh@0.5": [...]}
    confidence          of changed.py: how good the confidences are
    dynamic             of changed.py: what M of the dynamic filter does over images

Entries are in the order of their names: a run that is added is a few lines of a diff.
"""

import json
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import locked

RESULTS = Path(__file__).resolve().parents[1] / "results"
PATHS = "data", "init", "teacher"          # arguments that are kept without their folders
OF_MACHINE = "out", "cache", "device", "stop_after", "resume"  # arguments that are not kept
DERIVED = "distill", "select"                                  # nor these: no_distill and data say it
DIGITS = 8           # of floats; with 7, a cell of a table is 0.38 instead of 0.37


def read(study):
    """{name: entry} of one study; empty where it has no file."""
    file = RESULTS / f"{study}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def result(name):
    """The entry of one run; None where there is none."""
    return read(name.partition("-")[0]).get(name)


def add(name, entry):
    """Write an entry into its study's file, whole or not at all. Processes that do so at once take turns."""
    RESULTS.mkdir(exist_ok=True)
    study = name.partition("-")[0]
    file, partial = RESULTS / f"{study}.json", RESULTS / f"{study}.partial"
    with locked(RESULTS):
        partial.write_text(as_text(read(study) | {name: entry}))
        os.replace(partial, file)


def entry_of(made):
    """What is kept of the content of a result.json."""
    entry = {key: made[key] for key in ("scores", "flip_test", "dynamic") if key in made}
    if "confidence" in made:
        entry["confidence"] = {key: made["confidence"][key] for key in ("ece", "auroc")}
    entry["images_per_second"] = statistics.median(line["images_per_second"] for line in made["log"])
    scored = [line for line in made["log"] if "pckh@0.5" in line]
    columns = ["epoch", "loss", *(key for key in scored[0] if "@" in key)]
    entry["log"] = {column: [line[column] for line in scored] for column in columns}
    return dict(arguments=kept_arguments(made["arguments"]), **rounded(entry))


def kept_arguments(arguments):
    """What is kept of the arguments of a run, those of its config.json and result.json."""
    return {name: kept(name, value) for name, value in arguments.items()
            if name not in (*OF_MACHINE, *DERIVED) and value is not None and value is not False}


def kept(argument, value):
    """The value of an argument; of paths their names, '/home/me/MPII' -> 'MPII', of several a list."""
    if argument not in PATHS or value is True:
        return value
    names = [Path(path).resolve().name for path in (value if isinstance(value, (list, tuple)) else [value])]
    return names if len(names) > 1 else names[0]


def pckh(entry, threshold=0.5, joint="mean", scores="scores", data=None):
    """One score of a run, in percent: that of the validation set `data`, or the mean of its sets."""
    values = by_set(entry, scores)
    return statistics.mean(values[name][f"pckh@{threshold}"][joint] for name in ([data] if data else values))


def by_set(entry, scores="scores"):
    """{validation set: its scores} of a run, also where it has one set alone."""
    values = entry[scores]
    return {entry["arguments"].get("data"): values} if any("pckh@" in name for name in values) else values


def rounded(value):
    """The same with floats of DIGITS digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def as_text(entries):
    """JSON with a line for each field of an entry; a field that is a list of objects has a line for each."""
    def field(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "]"
        return json.dumps(value)

    def lines(entry):
        return ",\n ".join(f"{json.dumps(key)}: {field(value)}" for key, value in entry.items())

    return "{\n" + ",\n".join(f"{json.dumps(name)}: {{\n {lines(entries[name])}}}"
                              for name in sorted(entries)) + "\n}\n"
