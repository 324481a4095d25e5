"""A student as one file for other machines: ONNX, or a program of torch.export.

    python export.py student.onnx              # the shipped student for photos, checked, with its speed
    python export.py student.onnx --data DATA  # checked on photos, not on drawings
    python export.py student.onnx --checkpoint runs/cc-gd-none-tiny-drawn/best.pt
    python export.py student.pt2               # torch.export.load(...).module() runs it

The graph holds everything but the cutting: crops go in as a camera has them, joints come out.

    crops        uint8 (B, size, size, 3), RGB, any B        around one person each (see people.box_matrix)
    joints       float32 (B, 16, 2), x and y in pixels of the crop, the centre of the first pixel at 0
    confidence   float32 (B, 16), 0 to 1

No FFT and no complex numbers are in it: the filters are products with DFT matrices (gfl.GlobalFilter). ONNX
needs the packages of requirements-extra.txt.
"""

import copy
import io
import logging
import os
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import checkpoint
from common import BadInput, CommandLine, check_folder, fast_bfloat16, main_with_clear_errors, optional
from crops import make_batch, store
from data_mpii import BOX_ENLARGEMENT, JOINTS
from costs import count_parameters, take_turns
from evaluate import validation_samples
from models import CoordinateHead

COMPILE = {"cpu": {}, "cuda": dict(mode="reduce-overhead")}
SHIPPED_STUDENT = Path(__file__).parent / "weights" / "student-small-photos.pt"
OPSET = 18
CHECKED = 64                 # samples on which both are compared
SECONDS = 20                 # for comparing their speed
CLOSE = 0.05                 # pixels between a joint of PyTorch's and one of the exported graph
TIE = 1e-3                   # difference of two highest bins' logits, of which rounding decides


# ------------------------------------------------------------------------------- inference-optimised networks

# The same outputs in less time:

#     batch norm     y = g (conv(x) - m) / sqrt(v + eps) + b is folded into one convolution with a bias
#     channels last  the memory layout that convolutions are fastest in
#     bfloat16       backbone and encoder in half the bytes; the head stays in float32, as bfloat16 has 8 bits
#                    and a crop 256 pixels
#     compiled       element-wise operations fused (on a GPU: CUDA graphs): half a minute on the first batch
#                    of each size. On a CPU the weights of a backbone are frozen, 10.2 instead of 13.8 ms a
#                    crop of the small student; without a backbone that costs time (docs/speed.md).

def fold_batch_norms(model):
    """Fold every batch norm into the convolution registered right before it (hrnet.py), in place."""
    for module in list(model.modules()):
        children = list(module.named_children())
        for (first, conv), (second, norm) in zip(children, children[1:]):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())


def for_inference(model, dtype=torch.float32, compiled=False):
    """A copy of a PoseNet that can only be used, not trained: run it within torch.inference_mode().

    dtype: torch.bfloat16 for backbone and encoder in half precision, on devices that have it natively (others
    compute in float32, with a warning). compiled: by torch.compile, which needs a C++ compiler.
    Takes and returns what the network does: crops float32 (B, 3, size, size) -> Output, whose prediction is
    float32.
    """
    if dtype == torch.bfloat16 and not fast_bfloat16(model.mean.device):
        warnings.warn("this device has no native bfloat16, computing in float32", stacklevel=2)
        dtype = torch.float32
    model = copy.deepcopy(model).eval().requires_grad_(False)
    fold_batch_norms(model)
    for part in (model.backbone, model.embed, model.encoder):
        part.to(dtype=dtype, memory_format=torch.channels_last)
    if compiled:
        kind = model.mean.device.type
        model.forward = torch.compile(model.forward, dynamic=False, **COMPILE[kind])
        if kind == "cpu" and not isinstance(model.backbone, nn.Identity):
            # as one of torch.compile's options it would come too late for weights to become constants
            model.forward = torch._inductor.config.patch(freezing=True)(model.forward)
    return model


# ------------------------------------------------------------------------------- one file for other machines

class CropsToJoints(nn.Module):
    """A PoseNet with its input and output side: uint8 crops (B, size, size, 3) to joints and confidences."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval()

    def forward(self, crops):
        return self.model.decode(self.model(crops.permute(0, 3, 1, 2).float() / 255))


def ties(model, crops):
    """(B, K): which joints of crops (B, size, size, 3) have two highest bins within TIE on an axis. SimCC."""
    if not isinstance(model.head, CoordinateHead):
        return torch.zeros(len(crops), len(JOINTS), dtype=torch.bool)
    prediction = model(crops.permute(0, 3, 1, 2).float() / 255).prediction
    first, second = torch.stack(prediction).topk(2).values.unbind(-1)                      # (2, B, K) each
    return (first - second < TIE).any(0)


def program(model):
    """The torch.export program of a network, for any batch."""
    example = torch.zeros(2, model.size, model.size, 3, dtype=torch.uint8)
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch")},)
        return torch.export.export(CropsToJoints(model), (example,), dynamic_shapes=shapes)


def export_onnx(model, path, source):
    """Write the network as ONNX and check it with ONNX; metadata names joints, input size and source."""
    onnx, _ = optional("onnx"), optional("onnxscript")           # which torch.onnx translates with
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)      # torchvision is missing, and not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)           # of PyTorch, about itself
        exported = torch.onnx.export(program(model), dynamo=True, opset_version=OPSET, verbose=False,
                                     input_names=["crops"], output_names=["joints", "confidence"],
                                     dynamic_shapes=({0: "batch"},))        # the name of that dimension
    exported.model.metadata_props.update({"joints": ", ".join(JOINTS), "input_size": str(model.size),
                                          "network": checkpoint.describe(model.config), "source": source,
                                          "parameters": str(count_parameters(model)),
                                          "box_enlargement": str(BOX_ENLARGEMENT)})
    exported.save(path)
    onnx.checker.check_model(Path(path).read_bytes(), full_check=True)      # a name may not be UTF-8


def runner(path):
    """The written file as a function: crops (B, size, size, 3) uint8 NumPy -> joints, confidence."""
    content = Path(path).read_bytes()
    if Path(path).suffix == ".pt2":
        module = torch.export.load(io.BytesIO(content)).module()
        return lambda crops: tuple(part.detach().numpy() for part in module(torch.from_numpy(crops)))
    onnxruntime = optional("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda crops: session.run(None, {"crops": crops})


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("out", type=Path, help="file to write: .onnx or .pt2")
    parser.add_argument("--checkpoint", type=Path, default=SHIPPED_STUDENT,
                        help=f"network (default: {SHIPPED_STUDENT.parent.name}/{SHIPPED_STUDENT.name})")
    parser.add_argument("--data", default="drawn", help="folder of photos to compare on")
    args = parser.parse_args()
    if args.out.suffix not in (".onnx", ".pt2"):
        raise BadInput(f"{args.out}: name a file that ends in .onnx or .pt2")
    check_folder(args.out)
    if args.out.suffix == ".onnx":
        [optional(package) for package in ("onnx", "onnxscript", "onnxruntime")]       # before the work
    target = args.out.resolve()                    # a link stays one
    model, metadata = checkpoint.load(args.checkpoint)
    samples = validation_samples(args.data, model.size, CHECKED)
    images = make_batch(samples, store(samples, model.size), np.arange(len(samples)), model.size).images
    crops = (255 * images.permute(0, 2, 3, 1)).round().byte().numpy()
    partial = target.with_name(f"partial-{target.name}")               # the file at --out has been checked
    try:
        if args.out.suffix == ".onnx":
            export_onnx(model, partial, f"{args.checkpoint.name}, learned from {metadata.get('data')}")
        else:
            content = io.BytesIO()                 # PyTorch's own writer aborts where the disk is full
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)     # of weights on other devices
                torch.export.save(program(model), content)
            partial.write_bytes(content.getvalue())
        whole, written = CropsToJoints(model), runner(partial)
        with torch.inference_mode():
            joints, confidence = (part.numpy() for part in whole(torch.from_numpy(crops)))
            exported_joints, exported_confidence = written(crops)
            off = np.abs(exported_joints - joints).max(-1)                                 # (N, 16) pixels
            unlike = np.abs(exported_confidence - confidence)
            same = (off < CLOSE) & (unlike < 0.01)
            wrong = ~(same | ties(model, torch.from_numpy(crops)).numpy() & np.isfinite(off))
            if wrong.any():
                raise BadInput(f"the export differs from PyTorch by {off[wrong].max():.3f} pixels and "
                               f"{unlike[wrong].max():.3f} of confidence on {samples.name}: {args.out} is "
                               "not written")
            here, there = (len(crops) / statistics.median(times) for times in take_turns(
                [lambda: whole(torch.from_numpy(crops)), lambda: written(crops)], budget=SECONDS))
        os.replace(partial, target)
    except OSError as error:
        raise BadInput(f"{args.out} could not be written ({error.strerror}): make room there, or name "
                       f"another place") from error
    finally:
        partial.unlink(missing_ok=True)
    threads = torch.get_num_threads()
    print(f"{args.out}: {checkpoint.describe(model.config)}, {args.out.stat().st_size / 1e6:.1f} MB, joints "
          f"within {off[same].max():.5f} pixels of PyTorch's on {len(samples)} samples of {samples.name}"
          f"{f', but for {(~same).sum()} of {same.size} with two equal bins' if not same.all() else ''}\n"
          f"crops a second, batch {len(samples)}, {threads} thread{'s' * (threads > 1)}: "
          f"PyTorch {here:.0f}, this file {there:.0f}\n"
          f"next: cut crops as people.box_matrix and crops.cut do, and feed them to it")


if __name__ == "__main__":
    main_with_clear_errors(main)
