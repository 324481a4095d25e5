"""Checkpoints in halves and in parts."""

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


def test_parts_are_small_and_make_the_same_file(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "PART", 100_000)
    checkpoint.split(saved, tmp_path / "parts")
    parts = list((tmp_path / "parts").iterdir())
    assert len(parts) > 9 and all(part.stat().st_size <= 100_000 for part in parts)          # 10 sorts before 2
    checkpoint.join(tmp_path / "parts", tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == saved.read_bytes()
    for overwrites in (lambda: checkpoint.join(tmp_path / "parts", saved), lambda: checkpoint.half(saved, saved)):
        with pytest.raises(BadInput, match="last.pt is there already"):
            overwrites()
    assert f"in {len(parts)} parts" in capsys.readouterr().out


def test_what_is_missing_mixed_or_damaged_is_told(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART", 400_000)
    parts, target = tmp_path / "parts", tmp_path / "again.pt"
    checkpoint.split(saved, parts)
    first, second = sorted(parts.iterdir())[:2]
    content = second.read_bytes()
    second.write_bytes(content[:1000] + bytes([content[1000] ^ 255]) + content[1001:])
    with pytest.raises(BadInput, match="the parts in .* do not make a checkpoint"):
        checkpoint.join(parts, target)
    second.unlink()
    with pytest.raises(BadInput, match="lacks part 2 of"):
        checkpoint.join(parts, target)
    (parts / "other.pt.part-1-of-1").touch()
    with pytest.raises(BadInput, match="parts of 2 checkpoints"):
        checkpoint.join(parts, target)
    with pytest.raises(BadInput, match="parts of 0 checkpoints"):
        checkpoint.join(tmp_path, target)
    with pytest.raises(BadInput, match="there is no folder"):
        checkpoint.join(tmp_path / "nowhere", target)
    checkpoint.split(saved, parts)                           # anew: old parts go
    monkeypatch.setattr(checkpoint, "PART", 700_000)
    checkpoint.split(saved, parts)
    (parts / "other.pt.part-1-of-1").unlink()
    checkpoint.join(parts, tmp_path / "whole.pt")
    assert not target.exists() and not list(tmp_path.glob("*.partial"))


def test_half_is_for_use(saved, tmp_path):
    checkpoint.half(saved, tmp_path / "half.pt")
    content = checkpoint.read(tmp_path / "half.pt")
    assert content["training"] is None and (tmp_path / "half.pt").stat().st_size < 0.7 * saved.stat().st_size
    assert content["model"]["head.layers.1.weight"].dtype == torch.float16
    whole, _ = checkpoint.load(saved)
    model, metadata = checkpoint.load(tmp_path / "half.pt")
    assert metadata["epoch"] == 3
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-3) for a, b in zip(model.state_dict().values(),
                                                                         whole.state_dict().values()))


def test_the_shipped_weights_have_the_checksums_that_are_stated():
    lines = (WEIGHTS / "README.md").read_text().partition("sha256:")[2].split("\n")
    stated = dict(reversed(line.split()) for line in lines if line)
    assert stated == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in WEIGHTS.glob("*.pt")}
