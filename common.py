"""What commands share: errors in one line, Matlab files, devices, --json, locks, distributed training."""

import argparse
import atexit
import contextlib
import ctypes
import importlib
import io
import os
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class BadInput(Exception):
    """An error of the user's input. Its message is one line: what is wrong, where, and what to do."""


class CommandLine(argparse.ArgumentParser):
    """An argument parser that keeps the docstring's layout in --help and raises BadInput on errors."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise BadInput(f"{message}: {self.prog} --help lists what there is")


def optional(name):
    """A package of requirements-extra.txt, imported; BadInput where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BadInput(f"{error.name or name} is not installed: "
                       f"python -m pip install -r requirements-extra.txt") from error


def refuse(*rules):
    """Raise BadInput with the message of the first (condition, message) whose condition holds."""
    for wrong, message in rules:
        if wrong:
            raise BadInput(message)


def check_all(file, check, count):
    """check(index) of `count` entries -> a list. BadInput names the first bad one and counts them all."""
    rows, faults = [], []
    for index in range(count):
        try:
            rows.append(check(index))
        except BadInput as error:
            faults.append(f"{file}, entry {index}: {error}: correct or remove this entry")
    if faults:
        raise BadInput(f"{faults[0]} ({len(faults):,} of {count:,} entries "
                       f"{'is' if len(faults) == 1 else 'are'} bad)")
    return rows


def read_mat(file, **options):
    """The variables of a Matlab file, as loadmat gives them; BadInput where it cannot be read.

    Arrays of version 7.3 are read where h5py is.
    """
    from scipy.io import loadmat         # here, as few commands need it and it takes a fifth of a second
    try:
        return loadmat(file, **options)
    except NotImplementedError as error:                             # version 7.3, which is HDF5
        with contextlib.suppress(Exception), importlib.import_module("h5py").File(file) as mat:
            if all(hasattr(value, "dtype") for value in mat.values()):       # arrays, without structures
                return {name: value[()].T for name, value in mat.items()}
        raise BadInput(f"{file} is a Matlab file of version 7.3: save it with -v7, or, where it holds arrays "
                       f"alone, install h5py") from error
    except Exception as error:          # scipy raises a dozen kinds on damaged files
        raise BadInput(f"{file} is not a Matlab file that can be read ({error!r:.80})") from error


def cores():
    """Number of cores that this process may use; torchrun's processes on one machine share them."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """'cpu', 'cuda' or 'cuda:N' of a GPU that is there; else BadInput."""
    kind, _, index = name.partition(":")
    if name == "cpu":
        return
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise BadInput(f"--device {name}: choose cpu, cuda or cuda:N")
    if int(index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can "
                       f"use; --device cpu always works")
    if os.environ.get("WORLD_SIZE", "1") == "1":         # else init_distributed chooses
        torch.cuda.set_device(name if index else 0)      # what events and memory counters refer to


STDOUT = "/dev/stdout"


def check_folder(path, flag=""):
    """BadInput where a file that is to be written has no folder. flag: what names it, such as "--json "."""
    if not path or str(path) == STDOUT:
        return
    if not path.resolve().parent.is_dir():
        raise BadInput(f"{flag}{path}: there is no folder {path.parent} to write into: make it first")
    if path.is_dir():
        raise BadInput(f"{flag}{path} is a folder: name a file")
    if path.is_file() or not path.exists():                      # not a device
        check_writable(path.resolve().parent, flag)


def check_writable(folder, flag=""):
    """BadInput where nothing can be written into a folder, or around one that is yet to be made."""
    there = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise BadInput(f"{there} cannot be written into ({error.strerror}): name another place"
                       + (f" with {flag.strip()}" if flag else "")) from error


def json_path(word):
    """The value of --json -> Path; "-" is standard output, as STDOUT is."""
    return Path(STDOUT if word in ("-", "/dev/fd/1", "/proc/self/fd/1") else word)


def place_of(path):
    """Where to write a file that replaces `path` when it is complete -> what to open, mode, what to replace.

    That is beside it. A link stays one. A device or a pipe is written into as it is: None is replaced.
    """
    if str(path) == STDOUT:
        return os.dup(1), "a", None
    is_stream = str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    if is_stream or path.exists() and not path.is_file():
        return path, "a", None
    path = path.resolve()
    return path.with_name(path.name + ".partial"), "w", path


def check_not_read(path, read):
    """BadInput where a file that is to be written, or is on its way, is one of those that are read."""
    written = [os.path.realpath(path) + end for end in ("", ".partial")] if path else []
    for file in read:
        refuse((os.path.realpath(file) in written,
                f"--json {path} would be written over {file}, which is read: name another file"))


def print_beside(path):
    """A context: where a json file goes to standard output, what is printed goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr) if str(path) == STDOUT else contextlib.nullcontext()


# oneDNN's variable for the newest instructions that it may use, today's name and an older one, and the values
# that leave out those for bfloat16 (oneDNN's documentation, "CPU dispatcher control"); it ignores others.
ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"
WITHOUT_BFLOAT16 = "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"


def fast_bfloat16(device):
    """Whether the device multiplies bfloat16 matrices natively. Every choice of precision asks this function.

    On other devices a product in bfloat16 can take a hundred times as long as in float32. Native are CPUs
    with AVX512_BF16 or AMX, unless oneDNN is told not to use these; for other CPUs (Arm) the answer is False.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    limit = next((os.environ[name] for name in ONEDNN_LIMIT if name in os.environ), "")
    units = torch.cpu.get_capabilities()
    return limit.upper() not in WITHOUT_BFLOAT16 and bool(units.get("avx512_bf16") or units.get("amx_bf16"))


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3          # of glibc's mallopt (malloc.h)


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones, instead of returning it to the system.

    One filter layer (16 grids of 16 x 17 x 192) takes 2.2 instead of 5.5 ms, a training step of the default
    command 87 instead of 96 ms.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):     # another C library than glibc
        return
    # older ones refuse the first, and without either the other would make each tensor a mapping of its own
    if mallopt(M_MMAP_THRESHOLD, 2 ** 30) or mallopt(M_MMAP_THRESHOLD, 2 ** 25):
        mallopt(M_TRIM_THRESHOLD, 2 ** 30)


def lock(folder, busy=""):
    """Lock a folder until the descriptor that is returned is closed, or the process ends.

    busy: the BadInput where another process has locked it; without, wait for that process. None, and no lock,
    where the system has none.
    """
    try:
        import fcntl
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        return descriptor
    except BlockingIOError:
        raise BadInput(busy) from None
    except (ImportError, OSError):       # Windows; file systems without locks
        return None


@contextlib.contextmanager
def locked(folder):
    """A context that one process at a time is in, for each folder; False where the system has no locks."""
    descriptor = lock(folder)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def separate_compiler_cache():
    """A cache of torch.compile's for each user and ATEN_CPU_CAPABILITY.

    Its own does not tell them apart: kernels for AVX-512 gave NaN in a process limited to AVX2.
    """
    user = getattr(os, "getuid", lambda: "")()                                 # Windows has none
    if limit := os.environ.get("ATEN_CPU_CAPABILITY"):
        folder = os.path.join(tempfile.gettempdir(), f"torchinductor-{user}-{limit}")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)


def terminate(number, frame):
    """Handle SIGTERM like Ctrl-C, so that files are closed and workers ended."""
    print("terminated", file=sys.stderr)
    raise SystemExit(128 + number)


FULL = "DefaultCPUAllocator: "                # in PyTorch's RuntimeError when memory is full
# found in a process's error when another has ended
LOST = "Connection closed", "Connection reset", "Broken pipe", "NCCL", "timed out"


def main_with_clear_errors(main):
    """Run main(). BadInput and OSError become one line on stderr and exit status 2; other errors are bugs.

    Warnings are one line, too. What the terminal's encoding lacks is printed escaped, such as parts of names.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    signal.signal(signal.SIGTERM, terminate)
    keep_freed_memory()
    separate_compiler_cache()
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except MemoryError as error:
        print(f"error: memory is full ({str(error)[:160]})", file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError as error:
        print(f"error: the GPU's memory is full ({str(error).splitlines()[0][:120]}): in train.py "
              f"raise --accumulate or lower --batch-size", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if FULL in str(error):
            print(f"error: memory is full ({str(error).partition(FULL)[2][:160]})", file=sys.stderr)
            raise SystemExit(2) from None
        if "RANK" not in os.environ or not any(sign in str(error) for sign in LOST):
            raise                                    # a bug keeps its traceback
        print(f"error: process {os.environ['RANK']} lost the others ({str(error).splitlines()[0][:120]}): "
              f"the run has ended; where it finished an epoch, --resume continues it", file=sys.stderr)
        os._exit(2)                                  # a normal exit would wait for the lost process
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:       # on its way out the interpreter would answer with a traceback or another exit status
        for number in (signal.SIGTERM, signal.SIGINT):
            atexit.register(signal.signal, number, signal.SIG_IGN)


# ------------------------------------------------------------------------------- several processes

# `torchrun --nproc-per-node N train.py ...`: every process holds the whole network and the whole data set and
# takes its part of each step's samples. Gradients are averaged by PyTorch's DistributedDataParallel. The
# first process alone writes the run's files and prints; whichever comes first cuts crops (crops.store).

@dataclass(frozen=True)
class Distributed:
    """Rank of this process, number of processes, and this process's device."""
    rank: int
    world_size: int
    device: str

    @property
    def is_main(self):
        return self.rank == 0

    def wrap(self, model):
        """The model with gradients, and on GPUs batch statistics, averaged over all processes."""
        if self.world_size == 1:
            return model
        if self.device != "cpu":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=None if self.device == "cpu" else [self.device])

    def mean(self, values):
        """Means of tensors () over the processes, as numbers: {name: tensor} -> {name: float}."""
        stacked = torch.stack([torch.as_tensor(value, device=self.device) for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(stacked)
            stacked = stacked / self.world_size
        return dict(zip(values, stacked.tolist()))

    def any(self, flag):
        """Whether `flag` is true in any process."""
        return self.mean({"flag": float(flag)})["flag"] > 0

    def end(self):
        """Wait until every process has come here, and part."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def init_distributed(device):
    """The Distributed that torchrun's environment describes, or that of one process."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Distributed(0, 1, device)
    if "RANK" not in os.environ:
        raise BadInput("WORLD_SIZE is set but RANK is not: start several processes with torchrun, or unset "
                       "WORLD_SIZE")
    rank = int(os.environ["RANK"])
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local + 1} of this machine has no GPU: there are "
                           f"{torch.cuda.device_count()}; start as many processes as GPUs")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # others wait at their first step while one scores
    dist.init_process_group("nccl" if device != "cpu" else "gloo", timeout=timedelta(hours=2))
    if rank:
        sys.stdout = open(os.devnull, "w", errors="replace")     # only the main process prints
    return Distributed(rank, world, device)
