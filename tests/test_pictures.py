"""Pictures are drawn from what is there, and what is missing is said in one line."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, run
from PIL import Image

from common import BadInput
from gfl import GlobalFilter
from pictures import PICTURES, response
from results import read

ROOT = Path(__file__).resolve().parents[1]
STUDENT = ROOT / "weights/student-cc-gd-drawn.pt"


def test_response_is_what_the_layer_does_to_an_impulse():
    H, W = 8, 9
    K = torch.randn(2, H, W // 2 + 1, 1, generator=torch.Generator().manual_seed(0))
    impulse = torch.zeros(1, H, W, 1)
    impulse[0, 0, 0] = 1
    gain = torch.fft.fft2(GlobalFilter((H, W))(impulse, *K)[0, ..., 0]).abs()
    torch.testing.assert_close(response(*K), torch.fft.fftshift(gain))


def test_response_is_that_of_the_whole_spectrum():
    """Mean magnitude of the full FFT of the kernel, frequency 0 in the middle."""
    torch.manual_seed(0)
    for H, W in ((8, 10), (5, 7)):
        kernel = np.random.default_rng(0).standard_normal((H, W, 3))
        half = np.fft.rfft2(kernel, axes=(0, 1))
        seen = response(torch.from_numpy(half.real), torch.from_numpy(half.imag)).numpy()
        whole = np.abs(np.fft.fft2(kernel, axes=(0, 1))).mean(-1)
        if W % 2 == 0:  # the highest frequency stands for both of its sides
            expected = np.fft.fftshift(whole, axes=0)
            expected = np.concatenate([expected[:, W // 2:], expected[:, :W // 2 + 1]], 1)
        else:
            expected = np.fft.fftshift(whole)
        np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_without_matplotlib_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call("studies/pictures.py", "curves", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("error: matplotlib is not installed: "
                           "python -m pip install -r requirements-extra.txt\n")


def test_predictions_need_no_matplotlib(tmp_path):
    """In a process, or what another test has imported would be there."""
    done = run("studies/pictures.py", "predictions", "--checkpoint", STUDENT, "--out", tmp_path, cwd=tmp_path,
               without=["matplotlib"])
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "predictions-drawn.jpg").size == (6 * 160, 3 * 160)


def test_filters(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements-extra.txt)")
    done = call("studies/pictures.py", "filters", "--checkpoint", STUDENT, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "filters.png").stat().st_size > 5000, done.stderr
    teacher = ROOT / "weights/teacher-tiny-drawn.pt"
    done = call("studies/pictures.py", "filters", "--checkpoint", teacher, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and "holds no filters to look at" in done.stderr


@pytest.mark.parametrize("what, runs", [("curves", "drawn-cc-gs-"), ("photo-curves", "photos-cc-gs-none-")])
def test_curves_are_those_of_results(what, runs):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements-extra.txt)")
    _, figure = PICTURES[what](None)
    logs = {name: run["log"] for name, run in read(runs.partition("-")[0]).items() if name.startswith(runs)}
    title = "cc gs" if what == "curves" else "cc gs none"
    panel = next(panel for panel in figure.axes if panel.get_title() == title)
    drawn = [[line.get_color(), *line.get_xdata(), *line.get_ydata()] for line in panel.lines]
    assert logs and sorted(drawn) == sorted(
        ["tab:orange" if "-alone-" in name else "tab:blue", *log["epoch"], *log["pckh@0.5"]]
        for name, log in logs.items())
    assert list(panel.get_xticks()) == next(iter(logs.values()))["epoch"]
    key = figure.axes[0].get_legend()
    assert {text.get_text(): line.get_color() for text, line in zip(key.get_texts(), key.get_lines())} == {
        "labels alone": "tab:orange", ("distilled" if what == "curves" else "labels, terms"): "tab:blue"}


def test_curves_without_runs_are_refused(monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements-extra.txt)")
    monkeypatch.setattr("pictures.result", lambda name: None)
    with pytest.raises(BadInput, match="has none of these runs"):
        PICTURES["photo-curves"](None)


def test_finding(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements-extra.txt)")
    done = call("studies/pictures.py", "finding", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "finding.jpg").stat().st_size > 5000, done.stderr


def test_the_strip_of_the_readme(tmp_path):
    done = call("studies/pictures.py", "strip", "--checkpoint", STUDENT, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    width, height = Image.open(tmp_path / "strip.jpg").size
    assert width > 2 * height > 0
