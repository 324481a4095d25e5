"""Networks on disk: what built them, their weights, and how good they were.

A checkpoint is a dictionary saved by torch.save: 'config' (the arguments of build_student or build_teacher), 'facts'
(data set, PCKh, command ...: whatever a reader should know), 'model' (the weights), and in a run's last.pt
'training' (optimiser, epoch, best score so far). Loading executes nothing: weights_only=True.
"""

import os
from pathlib import Path

import torch

from inputs import BadInput
from models import RegressionHead, build_student, build_teacher

FORMAT = 1


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
        raise BadInput(f"{path} is not a checkpoint that can be read safely ({str(error).splitlines()[0]:.100})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
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
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{path} does not fit the network it names, {content['config']}: {reason:.200}") from error
    if isinstance(model.head, RegressionHead):
        model.head.scored = content["facts"]["scored"]
    return model.to(device).eval(), content["facts"]


def describe(config):
    """One line for people: 'cc gd none tiny' or 'teacher tiny'."""
    return " ".join(config.values())
