"""Between a command and its surroundings: bad input ends it with one clear line and exit status 2 (a bug keeps its traceback),
devices are there, and what only one process may do is locked."""

import argparse
import ctypes
import os
import signal
import sys

import torch


class BadInput(Exception):
    """What is wrong, where, and what to do about it, in one line for the person at the keyboard."""


class CommandLine(argparse.ArgumentParser):
    """argparse, whose --help begins with a module's docstring as it is, and whose complaints are BadInput, too."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise BadInput(f"{message}: {self.prog} --help says what there is")


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """'cpu', 'cuda' or 'cuda:N' of a GPU that is there; else BadInput."""
    kind, _, index = name.partition(":")
    if kind == "cpu" and not index:
        return
    if kind != "cuda" or not (index.isdigit() or name == "cuda"):
        raise BadInput(f"--device {name}: choose cpu, cuda or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use; "
                       f"--device cpu always works")
    torch.cuda.set_device(name if index else 0)          # clocks and memory counters then mean this one


def fast_bfloat16(device):
    """Does this device multiply bfloat16 matrices natively? Elsewhere a product in bfloat16 takes a hundred times as long as one
    in float32, so that every choice of precision asks here.

    CPUs with AVX512_BF16 or AMX do, unless ONEDNN_MAX_CPU_ISA keeps oneDNN from using them; of other CPUs (Arm) it is not assumed.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    limited = allowed not in ("ALL", "DEFAULT") and not any(unit in allowed for unit in ("BF16", "FP16", "AMX", "AVX10"))
    return (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()) and not limited


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3          # of glibc's mallopt (malloc.h)


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors for the next ones.

    glibc gives blocks of this size back to the system, and takes them anew, page by page, for every tensor: one filter layer
    (16 grids of 16 x 17 x 192) took 5.5 ms so and 2.2 ms with this, a training step of the default command 96 and 87 ms.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):     # another C library than glibc
        return
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        mallopt(threshold, 2 ** 30)


def has_room(device, size):
    """Would `size` bytes leave half of what is free on a GPU? Nobody asks how much memory a CPU has."""
    if torch.device(device).type == "cpu":
        return True
    torch.cuda.empty_cache()                             # what PyTorch keeps for later is free, too
    return size < torch.cuda.mem_get_info(device)[0] / 2


def lock(file, wait):
    """Keep others from locking this open file or folder descriptor until it is closed -> False where another has it already.

    wait: until the other lets go. Where the system knows no locks, everybody gets them.
    """
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):       # Windows; file systems without locks
        pass
    return True


def terminate(number, frame):
    """SIGTERM as Ctrl-C: files and workers are let go."""
    print("terminated", file=sys.stderr)
    raise SystemExit(128 + number)


def main_with_clear_errors(main):
    """Run a command's main(); BadInput and files that cannot be written become one line on stderr and exit status 2."""
    signal.signal(signal.SIGTERM, terminate)
    keep_freed_memory()
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
