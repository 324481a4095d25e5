"""Between a command and its surroundings: bad input ends it with one clear line and exit status 2 (a bug keeps its traceback),
devices are there, and what only one process may do is locked."""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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


# ------------------------------------------------------------------------------- several processes

# `torchrun --nproc-per-node N train.py ...`: every process holds the whole network and the whole data set and takes
# its part of each step's samples. Gradients are ema by PyTorch's DistributedDataParallel. The first process alone
# writes files and prints.

@dataclass(frozen=True)
class Distributed:
    """rank: this process's number. world_size: how many there are. device: where it computes."""
    rank: int
    world_size: int
    device: str

    @property
    def is_main(self):
        return self.rank == 0

    def wrap(self, model):
        """The network whose gradients are the mean over all processes; batch norms see all processes' pictures on GPUs."""
        if self.world_size == 1:
            return model
        if self.device != "cpu":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=None if self.device == "cpu" else [self.device])

    def no_sync(self, model, unless):
        """A context in which backward() keeps its gradients to itself: for all but the last part of an accumulated step."""
        return contextlib.nullcontext() if unless or self.world_size == 1 else model.no_sync()

    def mean(self, values):
        """Mean of a tensor over the processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def broadcast_buffers(self, model):
        """The first process's running means of batch norms for all."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def any(self, flag):
        """Does any process say so?"""
        if self.world_size == 1:
            return flag
        said = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(said)
        return bool(said > 0)

    def gather(self, part):
        """Rows rank, rank + world_size, ... of an array from every process -> the whole array, in order, in every process."""
        if self.world_size == 1:
            return part
        parts = [None] * self.world_size
        dist.all_gather_object(parts, part)
        whole = np.empty((sum(map(len, parts)), *part.shape[1:]), part.dtype)
        for rank, rows in enumerate(parts):
            whole[rank::self.world_size] = rows
        return whole

    def barrier(self):
        """Until every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def init_distributed(device):
    """The Distributed that torchrun's environment describes, or a distributed of one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Distributed(0, 1, device)
    if "RANK" not in os.environ:
        raise BadInput("WORLD_SIZE is set but RANK is not: start several processes with torchrun, or unset WORLD_SIZE")
    rank = int(os.environ["RANK"])
    if device.startswith("cuda"):
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local + 1} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                           f"start as many processes as GPUs")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # long enough for the first process to cut the crops of a whole data set while the others wait
    dist.init_process_group("nccl" if device != "cpu" else "gloo", timeout=timedelta(hours=2))
    if rank:
        sys.stdout = open(os.devnull, "w")                       # one voice
    return Distributed(rank, world, device)
