"""The commands as tests call them, with a hundred drawings to score on instead of a thousand.

`start` and `run` make processes: where starting, stopping, memory or exit status is what is tested. `call`
runs the same main() in this process, in a tenth of the time: where it is what a command says and writes. As a
script, what a process starts with:

    python tests/commands.py train.py --epochs 1
"""

import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 100
POOL = "POSE_TESTS_POOL"         # in the environment: a pool of workers draws, however few the drawings
WITHOUT = "POSE_TESTS_WITHOUT"   # in the environment: packages that are not there


class Done(NamedTuple):
    """What is left of a command; also what subprocess.run returns has these."""
    returncode: int
    stdout: str
    stderr: str


def start(script, *arguments, launcher=(), held_out=HELD_OUT, pool=False, without=(), **how):
    """A process that runs a script of the repository. launcher: what stands before the script. held_out=None:
    as users run it.
    """
    begin = [ROOT / "tests/commands.py", script] if held_out else [ROOT / script]
    environment = {**how.pop("env", os.environ), WITHOUT: " ".join(without), **({POOL: "1"} if pool else {})}
    return subprocess.Popen([sys.executable, *map(str, (*launcher, *begin, *arguments))], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **how)


def run(script, *arguments, **how):
    """A process, seen to its end -> Done."""
    process = start(script, *arguments, **how)
    said, errors = process.communicate(timeout=600)
    return Done(process.returncode, said, errors)


def call(script, *arguments, cwd):
    """The same command in this process, which it leaves as it was -> Done."""
    import pytest

    import common
    import evaluate
    import train
    module = importlib.import_module(Path(script).stem)
    said, errors, status, held = io.StringIO(), io.StringIO(), 0, []

    def hold(folder, busy):
        held.append(common.lock(folder, busy))

    handler = signal.getsignal(signal.SIGTERM)
    with (pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(errors),
          warnings.catch_warnings()):
        warnings.resetwarnings()                 # a process shows all kinds but these, on stderr
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = lambda *what: errors.write(warnings.formatwarning(*what[:4]))
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(evaluate, "HELD_OUT", HELD_OUT)
        patch.setattr(train, "lock", hold)
        try:
            common.main_with_clear_errors(module.main)
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
            for folder in held:                  # a process lets go of its run's folder when it ends
                os.close(folder)
    return Done(status, said.getvalue(), errors.getvalue())


def refused(done, *parts):
    """Exit status 2 and one line on stderr with these parts."""
    assert done.returncode == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "studies")]
    sys.modules.update(dict.fromkeys(os.environ[WITHOUT].split()))  # what is None cannot be imported
    import synthetic
    drawn = synthetic.drawn_people
    synthetic.drawn_people = lambda split, count, *how: drawn(
        split, min(count, HELD_OUT) if split == "valid" else count, *how)
    if POOL in os.environ:
        synthetic.POOL_FROM = 1
    sys.argv = [str(ROOT / sys.argv[1]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
