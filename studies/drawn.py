"""The runs behind the table `drawn`: the six tiny students of drawings, alone and distilled.

    python studies/drawn.py             # 36 runs, five minutes each on two cores
    python studies/drawn.py --seeds 0 --jobs 2  # a third of it, two at a time
    python studies/drawn.py --stop-after 60  # one more hour of them

sweep.py says how runs are skipped, stopped and resumed. What stands behind -- goes to every train.py.
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import main_with_clear_errors
from models import STUDENTS
from sweep import SEEDS, main, name_of


def drawn_runs(seeds=SEEDS):
    """{name: flags of train.py}; both sides of a pair see the same images in the same order, as often."""
    runs = {}
    for filters in (("gs", "gd"), ("attention",)):                # the filters' seeds first
        for seed, filter, student, distill in product(seeds, filters, STUDENTS, (True, False)):
            flags = {} if distill else {"no-distill": True}
            name = f"drawn-{name_of(student, filter, distill, seed)}"
            runs[name] = {"student": student, "filter": filter, "seed": seed, **flags}
    return runs


if __name__ == "__main__":
    main_with_clear_errors(lambda: main(
        __doc__, lambda args: drawn_runs(args.seeds),
        ("--seeds", dict(type=int, nargs="+", default=SEEDS, help="seeds of the runs (default: 0 1 2)"))))
