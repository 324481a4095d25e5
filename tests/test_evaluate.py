"""PCKh by hand and against published figures."""

import json

import numpy as np
import pytest
import torch
from commands import call

import costs
from crops import FLIP, make_batch, store
from distill import coordinate_labels, gaussian_heatmaps
from costs import count_multiply_adds
from evaluate import GROUPS, evaluate, mean_pose_score, newest_checkpoint, pckh, predict, score
from models import CoordinateHead, HeatmapHead, Output, PoseNet, Regression, RegressionHead, build_student
from synthetic import drawn_people


def test_pckh_by_hand():
    """Two people, head size 10: the limit at 0.5 is 5 pixels, a hit at exactly 5."""
    truth = np.zeros((2, 16, 2))
    joints, visible, head = truth.copy(), np.ones((2, 16), bool), np.array([10.0, 20.0])
    joints[0, 0] = 3, 4                     # 5 pixels off: hit
    joints[0, 5] = 3, 4.1                   # a little more: miss
    joints[1, 5] = 3, 4.1                   # the same for a head twice as large: hit
    joints[:, 9] = 100, 0                   # both heads missed
    visible[1, 9] = False                   # one of them without a label
    joints[:, 6:8] = 1000, 1000             # pelvis and thorax count nowhere
    result = pckh(joints, truth, visible, head, 0.5)
    assert result["head"] == 0 and result["ankle"] == 75 and result["wrist"] == 100
    assert result["mean"] == pytest.approx(100 * (27 - 2) / 27)
    assert result["mean_unweighted"] == pytest.approx((12 * 100 + 50 + 0) / 14)


def test_a_joint_nobody_labelled_is_left_out():
    visible = np.ones((1, 16), bool)
    visible[0, [0, 5]] = False
    result = pckh(np.zeros((1, 16, 2)), np.zeros((1, 16, 2)), visible, np.ones(1), 0.5)
    assert np.isnan(result["ankle"]) and result["mean"] == result["mean_unweighted"] == 100


PUBLISHED = {"head": 95.80, "shoulder": 94.57, "elbow": 88.12, "wrist": 83.31, "hip": 86.24, "knee": 80.88,
             "ankle": 77.44, "mean_unweighted": 86.76}  # hg_s2_b1 of bearpaw/pytorch-pose, MPII validation


def test_published_predictions_give_their_published_pckh(real_data, tmp_path):
    file = real_data / "mpii_annot" / "preds" / "bearpaw-hg_s2_b1.mat"
    done = call("evaluate.py", "--predictions", file, "--data", real_data / "mpii_annot", "--json",
                "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())["pckh@0.5"]
    for name, value in PUBLISHED.items():
        assert figures[name] == pytest.approx(value, abs=0.01), name
    assert set(figures) == {*GROUPS, "mean", "mean_unweighted"}


# Count-weighted mean at 0.5 and at 0.10 of other published files, computed with HRNet's own evaluate().
@pytest.mark.parametrize("name,half,tenth", [("newell", 88.426, 21.590), ("tompson", 82.337, 28.975)])
def test_weighted_mean_is_hrnets(real_data, tmp_path, name, half, tenth):
    done = call("evaluate.py", "--predictions", real_data / "mpii_annot" / "preds" / f"{name}.mat", "--data",
                real_data / "mpii_annot", "--json", "figures.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["pckh@0.5"]["mean"] == pytest.approx(half, abs=0.001)
    assert figures["pckh@0.1"]["mean"] == pytest.approx(tenth, abs=0.001)


# Multiply-adds counted while the networks computed on a CPU.
@pytest.mark.parametrize("row,expected", [
    (("reg", "gs", "none"), 773574468), (("cc", "gd", "w32"), 7522235852),
    (("cc", "attention", "none"), 1585053696)])
def test_operations_are_counted_without_computing(row, expected):
    model, devices = build_student(*row, preset="paper"), set()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: devices.update(
        tensor.device.type for tensor in inputs if isinstance(tensor, torch.Tensor)))
    assert count_multiply_adds(model) == expected and devices == {"meta"}
    hook.remove()
    assert next(model.parameters()).device.type == "cpu"


def test_rows_out_of_budget_are_blank(monkeypatch):
    monkeypatch.setattr(costs, "build_student", lambda *row, preset: build_student(*row, "tiny"))
    monkeypatch.setattr(costs, "PAPER", [row for row in costs.PAPER if row[2] == "none"])
    rows = costs.measure_costs(budget=0)
    assert len(rows) == 6 and not any(row["fps"] for row in rows)
    *_, line, last = costs.cost_table(rows).splitlines()
    assert line.split()[-1] == "1831" and len(line.split()) == 8
    assert last.startswith("networks not timed") and last.endswith(": 6")
    rows[0]["fps"] = 12.34
    table = costs.cost_table(rows)
    assert "12.3     3325" in table and table.endswith("were over: 5")


@pytest.fixture(scope="module")
def people():
    return drawn_people("valid", 40, 64)


class Oracle(torch.nn.Module):
    """Stands in for a network of a given head: it knows where each joint is in a crop, and in its mirror
    image.
    """
    size = 64

    def __init__(self, people, stored, head):
        super().__init__()
        self.batch = make_batch(people, stored, np.arange(len(people)), 64)
        self.head = head

    def forward(self, images):
        xy, score = self.batch.xy, torch.linspace(0, 1, 16).expand(len(images), 16)
        if not torch.allclose(images, self.batch.images):
            xy = torch.cat([1 - xy[..., :1], xy[..., 1:]], -1)[:, FLIP]
        if isinstance(self.head, RegressionHead):
            prediction = Regression(xy, score, torch.ones_like(xy))
        elif isinstance(self.head, CoordinateHead):
            prediction = tuple(label.log() for label in coordinate_labels(xy, self.head.sigma, 128))
        else:
            label = gaussian_heatmaps(xy, self.head.sigma, 64)
            prediction = label if self.head.published else label.log()
        return Output(None, None, prediction)

    decode = PoseNet.decode


# how far off a decoding may be, in pixels of the image: half a bin or half a cell (a person's box is two to
# three crops wide)
@pytest.mark.parametrize("flip_test", [False, True])
@pytest.mark.parametrize("head,off", [(RegressionHead(8), 1e-3), (CoordinateHead(8, 128, 3), 2),
                                      (HeatmapHead(8, 64, 2), 2), (HeatmapHead(8, 64, 2, published=True), 2)])
def test_perfect_predictions_are_found_with_and_without_flip_test(people, head, off, flip_test):
    stored = store(people, 64)
    joints, confidence = predict(Oracle(people, stored, head), people, stored, flip_test=flip_test)
    assert np.abs(joints - people.joints)[people.visible].max() < off
    if isinstance(head, RegressionHead):
        assert score(joints, people.joints, people.visible, people.head_size)["pckh@0.1"]["mean"] == 100
        if flip_test:       # scores swap sides as the joints do: right wrist's mean is of 10/15 and of 15/15
            assert confidence[0, 10] == confidence[0, 15] == pytest.approx(12.5 / 15)


def test_flip_test_takes_the_better_peak_and_not_the_middle():
    """Of two peaks that disagree the surer one wins; a mean of their positions would lie where nobody saw a
    joint.
    """
    head = CoordinateHead(8, 128, 3)
    sure, unsure = (torch.full((1, 16, 2), at) for at in (0.25, 0.75))
    said = coordinate_labels(sure, 3, 128)
    said = tuple((0.9 * a + 0.1 * b).log() for a, b in zip(said, coordinate_labels(unsure, 3, 128)))
    mirrored = tuple((0.4 * a + 0.6 * b).log() for a, b in zip(
        coordinate_labels(torch.cat([1 - sure[..., :1], sure[..., 1:]], -1), 3, 128),
        coordinate_labels(torch.cat([1 - unsure[..., :1], unsure[..., 1:]], -1), 3, 128)))
    found, _ = head.decode(head.with_mirror(said, mirrored))
    assert (found - 0.25).abs().max() <= 0.5 / 128


def test_mean_pose_floor_on_real_photos(real_data):
    """The mean training pose scores 6.8 on these photos (figure stated with the data)."""
    from data_mpii import load_samples
    train, valid = (load_samples(real_data / "lspet", split) for split in ("train", "valid"))
    assert mean_pose_score(train, valid)["pckh@0.5"]["mean"] == pytest.approx(6.8, abs=0.1)


def test_untrained_network_is_no_better_than_chance(people):
    torch.manual_seed(0)
    model = build_student("cc", "gs", "none", "tiny")
    assert evaluate(model, people, store(people, 64))["pckh@0.5"]["mean"] < 20


def test_a_damaged_newest_checkpoint_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/cc-gd-none-tiny-drawn").mkdir(parents=True)
    (tmp_path / "runs/cc-gd-none-tiny-drawn/best.pt").write_bytes(b"damaged")
    assert newest_checkpoint().name == "student-cc-gd-drawn.pt" and "left out: " in capsys.readouterr().out
