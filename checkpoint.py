"""Networks on disk: what built them, their weights, and how good they were.

    python checkpoint.py runs/teacher-tiny-drawn/best.pt weights/teacher-tiny-drawn.pt      # a copy in float16, half the size

A checkpoint is a dictionary saved by torch.save: 'config' (the arguments of build_student or build_teacher), 'facts'
(data set, epoch, seed, PCKh), 'model' (the weights), and in a run's last.pt 'training' (optimiser, epoch, best score so
far, settings). Loading executes nothing: weights_only=True.
"""

import argparse
import hashlib
import os
from pathlib import Path

import torch

from inputs import BadInput, main_with_clear_errors
from models import RegressionHead, build_student, build_teacher

FORMAT = 1


def one_line(error):
    """The beginning of an error that may run over many lines."""
    return " ".join(repr(error).split())[:200]


def save(path, model, facts, training=None, half=False):
    """Write a checkpoint whole or not at all. half: weights in float16, for a network that will only be evaluated."""
    path = Path(path)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if half:
        weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    if isinstance(model.head, RegressionHead):
        facts = dict(facts, scored=model.head.scored)
    temporary = path.with_suffix(".partial")
    with open(temporary, "wb") as file:
        torch.save(dict(format=FORMAT, config=model.config, facts=facts, model=weights, training=training), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path):
    """The dictionary of a checkpoint; BadInput where the file is none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"there is no checkpoint {path}: train.py writes one, or give another path") from error
    except Exception as error:          # torch raises a dozen kinds on damaged files
        raise BadInput(f"{path} is not a checkpoint that can be read safely ({one_line(error)})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("facts"), dict):
        raise BadInput(f"{path} is not a checkpoint of this project (format {FORMAT}): train.py writes those")
    return content


def build(config):
    """The network that a checkpoint's config describes, untrained."""
    if config["student"] == "teacher":
        return build_teacher(config["preset"])
    return build_student(**config)


def load(path, device="cpu"):
    """-> (network in evaluation mode, facts). Every weight must fit: a name or shape that does not is BadInput."""
    content = read(path)
    try:
        model = build(content["config"])
        model.load_state_dict(content["model"])
        if isinstance(model.head, RegressionHead):
            model.head.scored = content["facts"]["scored"]
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{path} does not fit the network it names, {content.get('config')}: {one_line(error)}") from error
    return model.to(device).eval(), content["facts"]


def start_from(model, path):
    """Weights of another run of the same network into model, as a start; returns a line on what was used.

    The position embedding, which is not learned and differs between input sizes, stays the model's own.
    """
    content = read(path)
    here, there = (dict(config, preset="") for config in (model.config, content["config"]))
    weights = {name: tensor for name, tensor in content["model"].items() if name != "encoder.position"}
    own = model.state_dict()
    misfits = [name for name in own if name not in ("encoder.position", *weights)]
    misfits += [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    if here != there or misfits:
        raise BadInput(f"{path} is {describe(content['config'])} and cannot start {describe(model.config)}"
                       + (f": {misfits[0]} has another shape" if misfits and here == there else ""))
    model.load_state_dict(weights, strict=False)
    return f"starting from {path}: {describe(content['config'])}, {content['facts'].get('data')}"


# What published HRNet checkpoints hold beyond the map that leaves here: stage 3's way to its coarser branches, the fourth
# stage, and heads for joints or for ImageNet's classes.
BEYOND_STAGE_3 = ("stage3.3.fuse_layers.1.", "stage3.3.fuse_layers.2.", "transition3.", "stage4.", "final_layer.",
                  "incre_modules.", "downsamp_modules.", "classifier.")


def load_backbone(backbone, path):
    """Published HRNet weights, ImageNet's or a pose network's, into HRNet; returns a line on what was used.

    Every weight of the backbone must be there in its shape, and every weight of the file must be known; else BadInput.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = {name.removeprefix("module."): tensor for name, tensor in found.get("state_dict", found).items()}
    except Exception as error:
        raise BadInput(f"{path} cannot be read safely as weights ({one_line(error)})") from error
    needed = backbone.state_dict()
    beyond = [name for name in found if name.startswith(BEYOND_STAGE_3)]
    for what, names in (("lacks", needed.keys() - found.keys()),
                        ("holds unknown", found.keys() - needed.keys() - set(beyond)),
                        ("has another shape of", [n for n in needed if n in found and needed[n].shape != found[n].shape])):
        if names:
            raise BadInput(f"{path} is not this HRNet: it {what} {len(names)} weights, {sorted(names)[0]} among them: "
                           f"check the width (w32 or w48) and that it is HRNet's file")
    backbone.load_state_dict({name: found[name] for name in needed})
    return f"{path}: all {len(needed)} weights of the backbone used, {len(beyond)} beyond stage 3 left over"


def describe(config):
    """One line for people: 'cc gd none tiny' or 'teacher tiny'."""
    return " ".join(config.values())


def main():
    parser = argparse.ArgumentParser(description="Copy a checkpoint with its weights in float16, for evaluation.")
    parser.add_argument("source", type=Path, help="checkpoint of train.py")
    parser.add_argument("target", type=Path, help="file to write")
    args = parser.parse_args()
    model, facts = load(args.source)
    save(args.target, model, facts, half=True)
    print(f"{args.target}: {describe(model.config)}, {args.target.stat().st_size / 1e6:.1f} MB, "
          f"sha256 {hashlib.sha256(args.target.read_bytes()).hexdigest()}\n{facts}")


if __name__ == "__main__":
    main_with_clear_errors(main)
