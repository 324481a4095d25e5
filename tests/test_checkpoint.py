"""Checkpoints in half precision, and the shipped ones."""

import hashlib
from pathlib import Path

import pytest
import torch

import checkpoint
from common import BadInput
from models import build_student

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"


@pytest.fixture
def saved(tmp_path):
    model = build_student("reg", "gs", preset="tiny")
    checkpoint.save(tmp_path / "last.pt", model, {"epoch": 3}, training={"progress": {"epoch": 3}})
    return tmp_path / "last.pt"


def test_half_is_for_use(saved, tmp_path):
    checkpoint.half([saved], tmp_path / "half.pt")
    content = checkpoint.read(tmp_path / "half.pt")
    assert content["training"] is None and (tmp_path / "half.pt").stat().st_size < 0.7 * saved.stat().st_size
    assert content["model"]["head.layers.1.weight"].dtype == torch.float16
    with pytest.raises(BadInput, match="last.pt is there already"):
        checkpoint.half([saved], saved)
    whole, _ = checkpoint.load(saved)
    model, metadata = checkpoint.load(tmp_path / "half.pt")
    assert metadata["epoch"] == 3
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(model.state_dict().values(),
                                                                         whole.state_dict().values()))


def test_the_mean_of_three_networks(tmp_path):
    files, models = [tmp_path / f"{n}.pt" for n in range(3)], []
    for n, file in enumerate(files):
        torch.manual_seed(n)
        models.append(build_student("cc", "gd", preset="tiny"))
        checkpoint.save(file, models[n], {"data": "drawn/train", "seed": n})
    checkpoint.half(files, tmp_path / "mean.pt")
    mean, metadata = checkpoint.load(tmp_path / "mean.pt")
    assert metadata == {"data": "drawn/train"}
    for name, weight in mean.state_dict().items():
        expected = torch.stack([model.state_dict()[name].double() for model in models]).mean(0)
        torch.testing.assert_close(weight.double(), expected, atol=1e-3, rtol=1e-3)
    checkpoint.save(tmp_path / "other.pt", build_student("cc", "gs", preset="tiny"), {})
    with pytest.raises(BadInput, match="other.pt is cc gs none tiny, .*0.pt cc gd none tiny: only"):
        checkpoint.half([files[0], tmp_path / "other.pt"], tmp_path / "no.pt")
    for scored in True, False:                           # whether the head's scores have been trained
        model = build_student("reg", "gs", preset="tiny")
        model.head.scored = scored
        checkpoint.save(tmp_path / f"{scored}.pt", model, {})
    with pytest.raises(BadInput, match="only networks that are alike have a mean"):
        checkpoint.half([tmp_path / "True.pt", tmp_path / "False.pt"], tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_the_shipped_weights_have_the_checksums_that_are_stated():
    lines = (WEIGHTS / "README.md").read_text().partition("sha256:")[2].split("\n")
    stated = dict(reversed(line.split()) for line in lines if line)
    assert stated == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in WEIGHTS.glob("*.pt")
    }


@pytest.mark.parametrize("error,words", [
    (RuntimeError("PytorchStreamReader failed"), "torch.save did not write it, or it is truncated"),
    (KeyError(105), "torch.save did not write it"),
    (IsADirectoryError(21, "Is a directory"), "Is a directory"),
    (RuntimeError("Attempted to read a file with version 11, but the maximum supported version is 10"),
     "maximum supported version is 10")])
def test_what_a_file_is_that_torch_cannot_read(error, words, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    (tmp_path / "a.pt").write_text("i am no network")
    with pytest.raises(BadInput, match=words):
        checkpoint.read_safely(tmp_path / "a.pt")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_full_is_no_fault_of_the_file(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    (tmp_path / "a.pt").write_text("")
    with pytest.raises(type(error)):
        checkpoint.read_safely(tmp_path / "a.pt")
