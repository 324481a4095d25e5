"""What a device computes fast, asked in one place; how a command ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from optim import orthogonal


@pytest.mark.parametrize(
    "units, limit, fast",
    [
        (False, None, False),
        (True, None, True),
        (True, "AVX2", False),
        (True, "AVX512_CORE", False),
        (True, "AVX512_CORE_BF16", True),
        (True, "default", True),
        (True, "not a name", True),                      # oneDNN ignores it
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_native_bfloat16(monkeypatch, units, limit, fast, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units, "amx_bf16": False})
    for each in common.ONEDNN_LIMIT:
        monkeypatch.delenv(each, raising=False)
    if limit:
        monkeypatch.setenv(name, limit)
    assert common.fast_bfloat16("cpu") is fast


def test_muon_multiplies_in_float32_on_a_cpu():
    seen = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.update(part.dtype for part in args if isinstance(part, torch.Tensor))
            return function(*args, **(kwargs or {}))

    with Watch():
        orthogonal(torch.randn(2, 8, 16))
    assert seen == {torch.float32}


FULL = ("error: memory is full (can't allocate memory: you tried to allocate 4000000000000000 bytes. Error "
        "code 12 (Cannot allocate memory))\n")


@pytest.mark.parametrize("ends, status, said", [
    ("print('done')", 0, ("done\n", "")), ("refuse((True, 'no'))", 2, ("", "error: no\n")),
    ("torch.empty(10 ** 15)", 2, ("", FULL))])
def test_signals_change_nothing_when_a_command_is_over(ends, status, said):
    """SIGTERM and Ctrl-C while the interpreter is on its way out: no traceback, the command's own status."""
    code = ("import atexit, os, signal, torch\n"
            "from common import main_with_clear_errors, refuse\n"
            "for number in (signal.SIGTERM, signal.SIGINT):\n"
            "    atexit.register(os.kill, os.getpid(), number)\n"
            f"main_with_clear_errors(lambda: {ends})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(common.__file__).parent)
    assert (done.returncode, (done.stdout, done.stderr)) == (status, said)
