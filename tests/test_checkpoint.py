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
    checkpoint.half(saved, tmp_path / "half.pt")
    content = checkpoint.read(tmp_path / "half.pt")
    assert content["training"] is None and (tmp_path / "half.pt").stat().st_size < 0.7 * saved.stat().st_size
    assert content["model"]["head.layers.1.weight"].dtype == torch.float16
    with pytest.raises(BadInput, match="last.pt is there already"):
        checkpoint.half(saved, saved)
    whole, _ = checkpoint.load(saved)
    model, metadata = checkpoint.load(tmp_path / "half.pt")
    assert metadata["epoch"] == 3
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(model.state_dict().values(),
                                                                         whole.state_dict().values()))


def test_the_shipped_weights_have_the_checksums_that_are_stated():
    lines = (WEIGHTS / "README.md").read_text().partition("sha256:")[2].split("\n")
    stated = dict(reversed(line.split()) for line in lines if line)
    assert stated == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in WEIGHTS.glob("*.pt")
    }
