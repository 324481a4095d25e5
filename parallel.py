"""Several processes, one training: what `torchrun --nproc-per-node N train.py ...` needs, and what one process needs of it.

Every process holds the whole network and the whole data set; of each step's people it takes its part. Gradients are averaged
by PyTorch's DistributedDataParallel. The first process alone writes files and says what it does.
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from inputs import BadInput


@dataclass(frozen=True)
class Team:
    """rank: this process's number. world: how many there are. device: where it computes."""
    rank: int
    world: int
    device: str

    @property
    def leads(self):
        return self.rank == 0

    def wrap(self, model):
        """The network whose gradients are the mean over all processes; batch norms see all processes' pictures on GPUs."""
        if self.world == 1:
            return model
        if self.device != "cpu":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, device_ids=None if self.device == "cpu" else [self.device])

    def silent(self, model, unless):
        """A context in which backward() keeps its gradients to itself: for all but the last part of an accumulated step."""
        return contextlib.nullcontext() if unless or self.world == 1 else model.no_sync()

    def mean(self, values):
        """Mean of a tensor over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values = values / self.world
        return values

    def share_buffers(self, model):
        """The first process's running means of batch norms for all."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def any(self, flag):
        """Does any process say so?"""
        if self.world == 1:
            return flag
        said = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(said)
        return bool(said > 0)

    def gather(self, part):
        """Rows rank, rank + world, ... of an array from every process -> the whole array, in order, in every process."""
        if self.world == 1:
            return part
        parts = [None] * self.world
        dist.all_gather_object(parts, part)
        whole = np.empty((sum(map(len, parts)), *part.shape[1:]), part.dtype)
        for rank, rows in enumerate(parts):
            whole[rank::self.world] = rows
        return whole

    def wait(self):
        """Until every process has come here."""
        if self.world > 1:
            dist.barrier()


def join(device):
    """The Team that torchrun's environment describes, or a team of one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Team(0, 1, device)
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
    return Team(rank, world, device)
