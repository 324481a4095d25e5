"""One filter layer of the paper's size alone: the definition through FFTs against products with DFT matrices.

    python studies/mixer.py                   # a minute on two cores

16 grids of 16 x 17, 192 channels. Medians in milliseconds; 'times' is the speed over the definition in
float32. Only precisions that the device computes natively are measured.
"""

import statistics
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import CommandLine, check_device, default_device, main_with_clear_errors
from evaluate import describe_device, take_turns
from export import COMPILE
from gfl import GlobalDynamicFilter, StaticFilter, by_definition
from speed import precisions

BATCH, GRID, DIM = 16, (16, 17), 192
FORMS = {"definition": by_definition, "products": nullcontext, "compiled": nullcontext}
SECONDS = 30             # for the forms of one filter, which take turns


@torch.inference_mode()
def main():
    parser = CommandLine(__doc__)
    parser.add_argument("--device", default=default_device(), help="cpu, cuda or cuda:N")
    args = parser.parse_args()
    check_device(args.device)
    kind = torch.device(args.device).type
    print(describe_device(args.device))
    for name, build in (("GS", StaticFilter), ("GD", GlobalDynamicFilter)):
        torch.manual_seed(0)
        layer = build(GRID, DIM).to(args.device).requires_grad_(False)
        x = torch.randn(BATCH, *GRID, DIM, device=args.device)
        with by_definition(layer):
            truth = layer(x)
        labels, works = [], []
        for (precision, dtype), (form, context) in product(precisions(args.device).items(), FORMS.items()):
            mixer, tokens = build(GRID, DIM).to(args.device, dtype).requires_grad_(False), x.to(dtype)
            mixer.load_state_dict(layer.state_dict())
            run = torch.compile(mixer, dynamic=False, **COMPILE[kind]) if form == "compiled" else mixer
            with context(mixer):
                off = (run(tokens).float() - truth).abs().max() / truth.abs().max()
            labels.append((precision, form, off))
            works.append((partial(run, tokens), partial(context, mixer)))
        times = [statistics.median(found) for found in take_turns(works, kind, SECONDS) if found]
        for (precision, form, off), took in zip(labels, times):
            print(f"{name}  {precision:9} {form:10} {1e3 * took:7.2f} ms  {times[0] / took:5.2f} times  "
                  f"off by {off:.0e} of the largest", flush=True)


if __name__ == "__main__":
    main_with_clear_errors(main)
