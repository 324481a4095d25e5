"""As ONNX: checked, run by ONNX Runtime, and compared with PyTorch on pictures.

    LONG_TESTS=1 python -m pytest tests/test_export.py      # all 16 networks of the paper, whole, not four
    made shallow
"""

import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import refused, run

from data_mpii import BOX_ENLARGEMENT
from export import CLOSE, CropsToJoints, export_onnx, program, runner, ties
from hrnet import Depths
from models import BACKBONES, FILTERS, PRESETS, STUDENTS, build_student

WEIGHTS = Path(__file__).resolve().parents[1] / "weights/student-cc-gd-drawn.pt"
LONG = bool(os.environ.get("LONG_TESTS"))
# the paper's 16, and w16 and w24
ROWS = [row for row in product(STUDENTS, FILTERS, BACKBONES) if row[1:] != ("gd", "w48")]
SHORT = [("reg", "gs", "none"), ("cc", "gd", "none"), ("reg", "attention", "none"), ("cc", "gd", "w32")]


def compare(model, run, crops):
    with torch.inference_mode():
        joints, confidence = CropsToJoints(model)(torch.from_numpy(crops))
    found, sure = run(crops)
    assert np.abs(found - joints.numpy()).max() < CLOSE
    assert np.abs(sure - confidence.numpy()).max() < 0.01


def test_ties_are_of_the_two_highest_bins():
    torch.manual_seed(0)
    model = build_student("cc", "gs", preset="tiny").eval()
    crops = torch.from_numpy(random_crops(2, 64))
    with torch.inference_mode():
        assert not ties(model, crops).all()
        model.head.y.weight.zero_()
        model.head.y.bias.zero_()
        assert ties(model, crops).all()                          # all bins of y are as high
        assert not ties(build_student("reg", "gs", preset="tiny").eval(), crops).any()


def random_crops(batch, size):
    """Blurred noise: neighbouring pixels resemble each other, as in photos."""
    rough = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    crops = torch.nn.functional.interpolate(rough, size=size, mode="bicubic").clamp(0, 1)
    return (255 * crops.permute(0, 2, 3, 1)).byte().numpy().copy()


@pytest.mark.parametrize(
    "row", [row if row in SHORT else pytest.param(row, marks=pytest.mark.long) for row in ROWS], ids="-".join
)
def test_onnx(row, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (requirements-extra.txt)")
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    if not LONG:                                             # fewer of what is alike
        shallow = replace(PRESETS["paper"], depth=3, hrnet=Depths(blocks=1, modules=1))
        monkeypatch.setitem(PRESETS, "paper", shallow)
    torch.manual_seed(0)
    model = build_student(*row, preset="paper").eval()
    file = tmp_path / (os.fsdecode(b"d\xe9.onnx") if sys.platform == "linux" else "d.onnx")  # not UTF-8
    export_onnx(model, file, "a test")
    run = runner(file)
    for batch in (1, 3):                                     # the graph was traced with 2
        compare(model, run, random_crops(batch, 256))
    graph = onnx.load_from_string(file.read_bytes())
    known = {item.key: item.value for item in graph.metadata_props}
    assert (
        known["input_size"] == "256"
        and known["source"] == "a test"
        and known["joints"].startswith("r-ankle, r-knee")
    )
    assert int(known["parameters"]) == sum(weights.numel() for weights in model.parameters())
    assert float(known["box_enlargement"]) == BOX_ENLARGEMENT
    assert {domain.domain for domain in graph.opset_import} <= {"", "ai.onnx"}, "standard operators only"
    assert not any("DFT" in node.op_type for node in graph.graph.node)
    for value in (*graph.graph.input, *graph.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch", value.name


def test_torch_export(tmp_path):
    torch.manual_seed(0)
    model = build_student("reg", "gd", preset="tiny").eval()
    torch.export.save(program(model), tmp_path / "x.pt2")
    file = tmp_path / (os.fsdecode(b"d\xe9.pt2") if sys.platform == "linux" else "d.pt2")  # not UTF-8
    (tmp_path / "x.pt2").rename(file)
    compare(model, runner(file), random_crops(5, 64))


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on files")
def test_a_full_disk_is_one_line(tmp_path):
    """Files may have 100 kB, and no more. PyTorch's own writer would abort the process."""
    import resource
    done = run("export.py", "x.pt2", "--checkpoint", WEIGHTS, cwd=tmp_path,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    refused(done, "x.pt2 could not be written (File too large): make room there")
    assert not list(tmp_path.iterdir())
