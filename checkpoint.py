"""Checkpoints: our own files, HRNet's published weights, and networks of TokenPose's code.

    python checkpoint.py half runs/teacher-tiny-drawn/best.pt small.pt      # a copy in float16, for inference
    python checkpoint.py half A/best.pt B/best.pt small.pt                  # the mean of two runs' weights

A checkpoint is a dictionary saved by torch.save: 'config' (the arguments of build_student or build_teacher),
'metadata' (data set, epoch, seed, PCKh), 'model' (the weights), in a run's last.pt 'training' (what train.py
needs to go on to the bit), and 'checksum', over all of it. Loading executes nothing: weights_only=True.
"""

import hashlib
import json
import os
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from common import FULL, BadInput, CommandLine, main_with_clear_errors
from hrnet import HRNet, fill, is_published_backbone, load_published, published_tensors
from models import RegressionHead, build_student, build_teacher

FORMAT = 1


def checksum(content):
    """sha256 over all names, numbers and tensors of nested dictionaries and lists, in their order.

    ValueError where a tensor claims more than is stored of it (one number, repeated 10^13 times, would fill
    the memory).
    """
    digest = hashlib.sha256()

    def add(part):
        if isinstance(part, dict):
            for name, value in part.items():
                digest.update(repr(name).encode())
                add(value)
        elif isinstance(part, (list, tuple)):
            for value in part:
                add(value)
        elif isinstance(part, torch.Tensor):
            if part.layout != torch.strided or part.nbytes > part.untyped_storage().nbytes():
                raise ValueError("a tensor is not stored as it is")
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            digest.update(repr(part).encode())

    add(content)
    return digest.hexdigest()


def save(path, model, metadata, training=None, half=False, keep=None):
    """Save a checkpoint atomically. BadInput, with the old file untouched, if it cannot be written.

    half: store weights in float16, for inference alone. keep: path to which the old file is renamed.
    """
    path = Path(path)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if half:
        weights = {name: weight.half() if weight.is_floating_point() else weight
                   for name, weight in weights.items()}
    if isinstance(model.head, RegressionHead):         # what it knows beside its weights
        metadata = metadata | dict(scored=model.head.scored)
    content = dict(format=FORMAT, config=model.config, metadata=metadata, model=weights, training=training)
    content["checksum"] = checksum(content)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):       # the latter is a full disk in torch's writer
            raise
        raise BadInput(f"{path} could not be written ({error!r:.200}); what was there before is "
                       f"untouched: make room there, or name another place") from error
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):                     # make the renaming durable
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_safely(path):
    """Load a file of torch.save with tensors and plain values alone, else BadInput. Executes nothing."""
    try:
        if zipfile.is_zipfile(path):     # torch.save does not compress: this may be a decompression bomb
            if any(info.compress_type != zipfile.ZIP_STORED for info in zipfile.ZipFile(path).infolist()):
                raise ValueError("a compressed archive, which torch.save does not write")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"there is no checkpoint {path}: train.py writes one, or give another path") from error
    except Exception as error:          # torch raises a dozen kinds on damaged files
        if isinstance(error, MemoryError) or FULL in str(error):
            raise
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise BadInput(f"{path} cannot be read safely: it holds more than tensors ({wanted[1]}), and "
                           f"loading such objects can run any command. Where you trust the file, save its "
                           f"tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], "
                           f"NEW)") from error
        # others are of torch's inner parts
        told = isinstance(error, (OSError, ValueError)) or "supported version" in str(error)
        why = f"{error!r:.200}" if told else "torch.save did not write it, or it is truncated"
        raise BadInput(f"{path} is not a checkpoint that can be read ({why})") from error


def read(path):
    """The dictionary of one of our checkpoints; BadInput for any other file."""
    return check_own(read_safely(path), path)


def check_own(content, path):
    """What `read_safely` gave for a file, if that is one of our checkpoints; else BadInput."""
    old = isinstance(content, dict) and "facts" in content               # the key of 'metadata' in old files
    if not isinstance(content, dict) or content.get("format") != FORMAT \
            or not isinstance(content.get("facts" if old else "metadata"), dict):
        raise BadInput(f"{path} is not a checkpoint of this project (format {FORMAT}): train.py writes those")
    stated = content.pop("checksum", None)
    try:
        computed = checksum(content)
    except (ValueError, RuntimeError) as error:          # RecursionError is one of the latter
        raise BadInput(f"{path} is not a checkpoint of this project ({error!r:.200}): train.py writes "
                       f"those") from error
    if stated != computed:
        raise BadInput(f"{path} is damaged: its checksum is not that of its content")
    if old:
        content["metadata"] = content.pop("facts")
    return content


def read_last(folder):
    """Read last.pt of a run, or previous.pt if that is damaged -> (path, content)."""
    last, previous = folder / "last.pt", folder / "previous.pt"
    try:
        return last, read(last)
    except BadInput as error:
        if not previous.exists():
            raise
        content = read(previous)
        print(f"{error}: resuming from {previous}")
        with suppress(FileNotFoundError):        # of torchrun's processes the first moves it
            os.replace(last, folder / "last.damaged")        # so that the next save keeps the good file
        return previous, content


def save_run(folder, run, args):
    """Write last.pt, from which a run of train.py resumes to the bit, and log.jsonl.

    The old last.pt becomes previous.pt. Order, augmentation and the teacher's targets are computed again.
    """
    training = dict(epoch=run.epoch, best=run.best, log=run.log, epochs=args.epochs, lr=args.lr,
                    settings=run.settings, ema=run.ema.state_dict(),
                    optimisers=[optimiser.state_dict() for optimiser in run.optimisers])
    metadata = {**run.metadata, "epoch": run.epoch}
    save(folder / "last.pt", run.model, metadata, training, keep=folder / "previous.pt")
    save_log(folder, run.log)


def save_log(folder, log):
    """Write log.jsonl, a line for each finished epoch."""
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))


def resume(folder, run, args):
    """Load last.pt, or previous.pt if that is damaged, into the run -> its path.

    BadInput if the file does not belong to the same run.
    """
    file, content = read_last(folder)
    training = content["training"] or {}
    if "log" not in training:
        raise BadInput(f"{file} holds weights but no state of training: --resume needs a last.pt of this "
                       f"version")
    if content["config"] != run.model.config:
        raise BadInput(f"{file} is {describe(content['config'])}, not {describe(run.model.config)}: give the "
                       f"flags of the run to be resumed")
    for name, value in training["settings"].items():
        if (now := run.settings.get(name)) != value:
            # "1,000 of set/train, CHECKSUM": where only the checksum differs, so do the files
            alike = isinstance(value, str) and value.rpartition(", ")[0] == str(now).rpartition(", ")[0] != ""
            raise BadInput(f"{file} was trained with {name} {value}, now it is {now}: "
                           + (f"the {name} have changed: bring the old ones back, or start anew with another "
                              f"--out" if alike else "give the flags of the run to be resumed"))
    if args.lr > training["lr"]:
        raise BadInput(f"{file} was trained with --lr {training['lr']}, now it is {args.lr}: it may be "
                       f"lowered, not raised")
    if args.epochs < training["epoch"]:
        raise BadInput(f"{file} is at the end of epoch {training['epoch']}: --epochs {args.epochs} is less")
    if training["epochs"] != args.epochs:
        print(f"{file} was planned with --epochs {training['epochs']}, now it is {args.epochs}: the rate "
              f"decays at other steps")
    run.model.load_state_dict(content["model"])
    run.ema.load_state_dict(training["ema"])
    for optimiser, state in zip(run.optimisers, training["optimisers"]):
        optimiser.load_state_dict(state)
    run.epoch, run.best, run.log = (training[name] for name in ("epoch", "best", "log"))
    if not (folder / "best.pt").exists():          # a copy without best.pt: the next score is the best
        run.best = -1
    return file


def fingerprints(name, samples):
    """What `resume` compares of Samples, wherever they are: number, name, checksums of labels and images."""
    labels = [torch.from_numpy(getattr(samples, part)) for part in ("joints", "visible", "center", "side")]
    images = [(path.name, path.stat().st_size) for path in samples.files]
    return {f"{name} {what}": f"{len(samples)} of {samples.name}, {checksum(content)[:16]}"
            for what, content in (("labels", labels), ("images", images))}


def build(config):
    """The network that a checkpoint's config describes, untrained."""
    if config["student"] == "teacher":
        return build_teacher(**{name: value for name, value in config.items() if name != "student"})
    return build_student(**config)


def load(path, device="cpu"):
    """-> (network in evaluation mode, metadata). BadInput if a weight's name or shape differs.

    Of a run's last.pt the average of weights is taken, which train.py scores. A teacher of TokenPose's
    code can be loaded, too; metadata['used'] lists what was used.
    """
    model, metadata = network_of(read_safely(path), path)
    return model.to(device).eval(), metadata


def network_of(content, path):
    """What `read_safely` gave for a file -> (network, metadata), as `load` says."""
    if is_published_teacher(content):
        model, used = published_teacher(content, path)
        return model, dict(data="as published", used=used)
    content = check_own(content, path)
    try:
        model = build(content["config"])
        model.load_state_dict((content["training"] or content).get("ema", content["model"]))
        if isinstance(model.head, RegressionHead):
            model.head.scored = content["metadata"]["scored"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{path} does not fit the network it names, {content.get('config')}: "
                       f"{error!r:.200}") from error
    return model, content["metadata"]


def start_from(model, path):
    """Initialise a model with the weights of another run, or its backbone with HRNet's published ones -> a
    line on what was used.

    Of the same network, all weights are taken. A student may start from a teacher with the same backbone,
    too: it takes what both have, that is all but the mixers and the head. The position embedding is not
    learned and depends on the input size: the model keeps its own.
    """
    content = read_safely(path)
    if is_published_backbone(content):
        if not isinstance(model.backbone, HRNet):
            raise BadInput(f"{path} holds an HRNet, and {describe(model.config)} has no backbone: add "
                           f"--backbone w32 or w48")
        return load_published(model.backbone, content, path)
    other, metadata = network_of(content, path)
    same = dict(other.config, preset="") == dict(model.config, preset="")
    from_teacher = other.config["student"] == "teacher" and model.config["student"] != "teacher"
    own, weights = model.state_dict(), other.state_dict()
    del weights["encoder.position"]
    if from_teacher:
        weights = {name: weight for name, weight in weights.items()
                   if not name.startswith("head.") and ".mixer." not in name}
    mismatches = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    fits = same or from_teacher
    if not fits or mismatches:
        raise BadInput(f"{path} is {describe(other.config)} and cannot start {describe(model.config)}"
                       + (f": {mismatches[0]} is missing or has another shape" if fits else ""))
    model.load_state_dict(weights, strict=False)
    return (f"starting from {path}: {describe(other.config)}, {metadata.get('data')}, {len(weights)} of "
            f"{len(own)} tensors")


# --------------------------------------------------- others' weights: HRNet's backbones, TokenPose's teachers

#     python train.py --student cc --filter gs --backbone w32 --init hrnet_w32_imagenet.pth ...
#     python evaluate.py --checkpoint my_tokenpose_b.pth --data MPII         # score such a teacher first
#     python train.py --student cc --filter gs --teacher my_tokenpose_b.pth --data MPII --preset paper
#
# TokenPose-B at 256 x 256, with HRNet-W48, 12 layers and patches of 4 x 4, is the layout of our teacher but
# for its head: 512 wide (ours 384, as in the paper's tables), and what it puts out is the heatmap itself, as
# it learned with mean squared error. We know of no published file: this is for networks that TokenPose's code
# has trained. Every weight that a network needs must be in the file, in its shape, and no other weights in a
# TokenPose; of HRNet's files, whose heads have many names, `hrnet.load_published` says what is left over.

# Our name for each of TokenPose's, whose HRNet has our names behind 'pre_feature.'.
TOKENPOSE_NAMES = (
    (r"pre_feature\.", "backbone."),
    (r"transformer\.keypoint_token$", "encoder.keypoint_tokens"),
    (r"transformer\.pos_embedding$", "encoder.position"),                      # (1, 256, D), ours (16, 16, D)
    (r"transformer\.patch_to_embedding\.", "embed.project."),
    (r"transformer\.transformer\.layers\.(\d+)\.0\.fn\.norm\.", r"encoder.blocks.\1.norm1."),
    (r"transformer\.transformer\.layers\.(\d+)\.0\.fn\.fn\.to_qkv\.", r"encoder.blocks.\1.mixer.qkv."),
    (r"transformer\.transformer\.layers\.(\d+)\.0\.fn\.fn\.to_out\.0\.", r"encoder.blocks.\1.mixer.out."),
    (r"transformer\.transformer\.layers\.(\d+)\.1\.fn\.norm\.", r"encoder.blocks.\1.norm2."),
    (r"transformer\.transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.0\.", r"encoder.blocks.\1.mlp.0."),
    (r"transformer\.transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.3\.", r"encoder.blocks.\1.mlp.2."),
    (r"transformer\.mlp_head\.", "head.layers."),
)

def our_name(name):
    for pattern, replacement in TOKENPOSE_NAMES:
        name = re.sub("^" + pattern, replacement, name)
    return name


def is_published_teacher(content):
    """Is this a checkpoint of TokenPose's, rather than one of ours?"""
    return any(name.startswith("transformer.") for name in published_tensors(content))


def published_teacher(content, path):
    """-> (our teacher with TokenPose's weights, a line on what was used)."""
    tensors = {our_name(name): tensor for name, tensor in published_tensors(content).items()}
    if any(name.startswith("transformer.transformer1.") for name in tensors):
        raise BadInput(f"{path} is a TokenPose-L, which stacks three transformers: the teacher's layout is "
                       f"that of TokenPose-B with HRNet-W48 and 12 layers")
    teacher = build_teacher("paper", head="tokenpose")
    position = teacher.encoder.position
    if "encoder.position" in tensors and tensors["encoder.position"].numel() == position.numel():
        tensors["encoder.position"] = tensors["encoder.position"].view(position.shape)
    return teacher, fill(teacher, tensors, path)


# ------------------------------------------------------------------------------- command line

def describe(config):
    """A network in one line: 'cc gd none tiny' or 'teacher tiny'."""
    return " ".join(config.values())


def half(sources, target):
    """A copy with weights in float16 and without the state of training.

    Of several files, the mean of their weights and of the statistics of batch norms, with what their metadata
    have in common: of runs of which one began from the other, or both from the same weights (Wortsman et al.,
    "Model soups", ICML 2022).
    """
    if target.exists():
        raise BadInput(f"{target} is there already: name another file")
    model, metadata = load(sources[0])
    for count, source in enumerate(sources[1:], 2):
        other, other_metadata = load(source)
        kinds = [(net.config, getattr(net.head, "scored", None)) for net in (model, other)]
        if kinds[0] != kinds[1]:
            raise BadInput(f"{source} is {describe(other.config)}, {sources[0]} {describe(model.config)}: "
                           f"only networks that are alike have a mean")
        for mean, weight in zip(model.state_dict().values(), other.state_dict().values()):
            if mean.is_floating_point():
                mean.lerp_(weight, 1 / count)
        metadata = {name: value for name, value in metadata.items() if other_metadata.get(name) == value}
    save(target, model, metadata, half=True)
    print(f"{target}: {describe(model.config)}, {target.stat().st_size / 1e6:.1f} MB, "
          f"sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}\n{metadata}")


def main():
    parser = CommandLine(__doc__)
    parser.add_argument("what", choices=("half",))
    parser.add_argument("sources", type=Path, nargs="+", help="checkpoint, or several of one kind of network")
    parser.add_argument("target", type=Path, help="file to write")
    args = parser.parse_args()
    half(args.sources, args.target)


if __name__ == "__main__":
    main_with_clear_errors(main)
