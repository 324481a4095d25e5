"""Networks on disk: what built them, their weights, and how good they were.

    python checkpoint.py runs/teacher-tiny-drawn/best.pt weights/teacher-tiny-drawn.pt      # a copy in float16, half the size

A checkpoint is a dictionary saved by torch.save: 'config' (the arguments of build_student or build_teacher), 'facts'
(data set, epoch, seed, PCKh), 'model' (the weights), and in a run's last.pt 'training' (optimiser, epoch, best score so
far, settings). Loading executes nothing: weights_only=True.
"""

import argparse
import hashlib
import os
import re
from pathlib import Path

import torch

from inputs import BadInput, main_with_clear_errors
from models import RegressionHead, build_student, build_teacher
from official import fill_backbone, is_teacher, published_teacher

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


def read_safely(path):
    """What torch.save wrote, tensors and plain values alone; BadInput for anything else. Nothing in the file is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"there is no checkpoint {path}: train.py writes one, or give another path") from error
    except Exception as error:          # torch raises a dozen kinds on damaged files
        if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise BadInput(f"{path} cannot be read safely: it holds more than tensors ({wanted[1]}), and loading such objects "
                           f"can run any command. Where you trust the file, save its tensors alone: "
                           f"torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)") from error
        raise BadInput(f"{path} is not a checkpoint that can be read ({one_line(error)})") from error


def read(path):
    """The dictionary of a checkpoint of ours; BadInput where the file is none."""
    content = read_safely(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("facts"), dict):
        raise BadInput(f"{path} is not a checkpoint of this project (format {FORMAT}): train.py writes those")
    return content


def build(config):
    """The network that a checkpoint's config describes, untrained."""
    if config["student"] == "teacher":
        return build_teacher(**{name: value for name, value in config.items() if name != "student"})
    return build_student(**config)


def load(path, device="cpu"):
    """-> (network in evaluation mode, facts). Every weight must fit: a name or shape that does not is BadInput.

    Published teachers are taken, too (official.py); their facts say what was used.
    """
    content = read_safely(path)
    if is_teacher(content):
        model, used = published_teacher(content, path)
        return model.to(device).eval(), dict(data="as published", used=used)
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


def load_backbone(backbone, path):
    """Published HRNet weights into a network's backbone; returns a line on what was used."""
    return fill_backbone(backbone, read_safely(path), path)


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
