"""Peak memory of inference on a CPU: the plain form of each student against the optimised one.

    python studies/memory.py                  # half a minute

Each form runs in a process of its own and reports by how much the process grew while it computed, beside its
weights. Freed memory goes back to the system at once (MALLOC_MMAP_THRESHOLD_): by default glibc keeps a part
of it, which would be counted.
"""

import os
import resource
import sys
from multiprocessing import get_context
from pathlib import Path

import torch

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")          # for the processes that are started below
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, main_with_clear_errors
from models import FILTERS, build_student
from speed import PRECISIONS, build_form, precisions

BATCH = 16               # crops at once


def peak():
    """The most memory that this process ever held, MB."""
    unit = 1e6 if sys.platform == "darwin" else 1e3              # macOS counts in bytes, Linux in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@torch.inference_mode()
def growth(filter, form, precision):
    """MB that this process grows by in three forward passes of a reg student."""
    model = build_student("reg", filter, "none", "paper").eval()
    network, context = build_form(model, form, PRECISIONS[precision])
    images = torch.rand(BATCH, 3, model.size, model.size)
    before = peak()
    with context():
        for _ in range(3):
            network(images)
    return peak() - before


def main():
    CommandLine(__doc__).parse_args()
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for filter in FILTERS:
            for precision in precisions("cpu"):
                plain, optimised = (pool.apply(growth, (filter, form, precision))
                                    for form in ("plain", "optimised"))
                print(f"{filter:10}{precision:10}batch {BATCH}: plain {plain:6.0f} MB, "
                      f"optimised {optimised:6.0f} MB", flush=True)


if __name__ == "__main__":
    main_with_clear_errors(main)
