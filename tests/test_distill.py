"""Each term of the loss by hand: zero at perfect agreement, a known value at a known offset, and who gets a
gradient.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from distill import (WEIGHTS, TeacherTargets, backbone_task, confidence_loss, coordinate_labels,
                     coordinate_task, gaussian_heatmaps, heatmap_loss_coordinates,
                     heatmap_loss_regression, heatmap_task, keypoint_token_loss,
                     kl_divergence, loss_terms, marginals, regression_task,
                     teacher_targets, visual_token_loss)
from models import Regression, build_student, build_teacher

XY = torch.tensor([[[0.5, 0.4], [0.3, 0.6]]])                        # (1, 2, 2)
ALL, FIRST = torch.tensor([[True, True]]), torch.tensor([[True, False]])
SOMEBODY, NOBODY = torch.tensor([False]), torch.tensor([True])       # of `empty`


def regression(xy, sigma=2.0):
    return Regression(xy, torch.ones(xy.shape[:2]), torch.full_like(xy, sigma))


def logits(labels):
    return tuple(label.clamp(min=1e-38).log() for label in labels)


def test_tokens_by_hand():
    student = torch.zeros(1, 2, 4)
    teacher = torch.tensor([[[1.0, 1, 1, 1], [3.0, 3, 3, 3]]])
    assert keypoint_token_loss(student, teacher, ALL).item() == 5  # (1 + 9) / 2
    assert keypoint_token_loss(student, teacher, FIRST).item() == 0.5  # divided by all joints
    assert keypoint_token_loss(teacher, teacher, ALL).item() == 0
    assert visual_token_loss(student, teacher).item() == 5


def test_regression_task_by_hand():
    """Beyond the knee of 1/64, SmoothL1 is |d| - 1/128: an offset of (0.1, 0) costs that, halved over x and
    y.
    """
    off = XY + torch.tensor([0.1, 0.0])
    assert regression_task(regression(off), XY, ALL).item() == pytest.approx((0.1 - 1 / 128) / 2, rel=1e-5)
    assert regression_task(regression(XY), XY, ALL).item() == 0
    off[0, 1] += 0.3
    assert regression_task(regression(off), XY, FIRST).item() == pytest.approx((0.1 - 1 / 128) / 4, rel=1e-5)


def test_coordinate_task_by_hand():
    """KL between two Gaussians of deviation s, d apart, is d^2 / 2 s^2; here d in x alone, halved over x and
    y.
    """
    off = XY + torch.tensor([8 / 512, 0.0])
    cost = lambda xy: coordinate_task(logits(coordinate_labels(xy, 6.0, 512)), XY, ALL, SOMEBODY, 6.0).item()
    assert cost(off) == pytest.approx(8**2 / (2 * 6**2) / 2, rel=1e-3)
    assert cost(XY) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("bins", [64, 128, 512, 1024])
def test_loss_does_not_depend_on_the_number_of_bins(bins):
    """The same offset and width in fractions of the crop cost the same, however finely they are cut."""
    sigma, off = bins / 64, XY + torch.tensor([2 / 64, 0.0])
    narrow, wide = (logits(coordinate_labels(off, width, bins)) for width in (sigma, 2 * sigma))
    assert coordinate_task(narrow, XY, ALL, SOMEBODY, sigma).item() == pytest.approx(1, rel=2e-3)
    cost = heatmap_loss_coordinates(wide, gaussian_heatmaps(XY, 2.0, 64), ALL)
    assert cost.item() == pytest.approx(0.25, rel=0.02)    # d = sigma: 1/2, halved; resampling widens a bit


def test_kl_ignores_bins_that_the_target_excludes():
    target, far = torch.tensor([0.0, 1.0]), torch.tensor([-40.0, 0.0])
    assert kl_divergence(target, far).item() == pytest.approx(0, abs=1e-6)
    even = kl_divergence(target, torch.zeros(2)).item()
    assert even == pytest.approx(math.log(2))


def test_heatmap_task_is_zero_at_the_label():
    cost = lambda logits: heatmap_task(logits, XY, ALL, SOMEBODY, 2.0).item()
    assert cost(logits([gaussian_heatmaps(XY, 2.0, 64)])[0]) == pytest.approx(0, abs=1e-5)
    entropy = math.log(2 * math.pi * 4 * math.e)                                 # of the label
    assert cost(torch.zeros(1, 2, 64, 64)) == pytest.approx(math.log(4096) - entropy, rel=1e-2)


def test_heatmap_of_the_regression_student_by_hand():
    teacher = gaussian_heatmaps(XY, 2.0, 64)
    assert heatmap_loss_regression(regression(XY), teacher, ALL).item() == 0
    empty = heatmap_loss_regression(regression(XY), torch.zeros_like(teacher), ALL).item()
    assert empty == pytest.approx(math.pi * 2**2 / 64**2,
                                  rel=1e-3)  # integral of a squared Gaussian: pi sigma^2
    wrong = XY.clone()
    wrong[0, 1] = 0.9
    assert heatmap_loss_regression(regression(wrong), teacher, FIRST).item() == 0
    assert heatmap_loss_regression(regression(wrong), teacher, ALL).item() > 1e-4


def test_marginals_are_distributions_in_the_right_place():
    x, y = marginals(gaussian_heatmaps(XY, 2.0, 64), 512)
    torch.testing.assert_close(x.sum(-1), torch.ones(1, 2))
    centres = (torch.arange(512) + 0.5) / 512
    torch.testing.assert_close((x * centres).sum(-1), XY[..., 0], atol=1e-4, rtol=0)
    torch.testing.assert_close((y * centres).sum(-1), XY[..., 1], atol=1e-4, rtol=0)


def test_confidence_by_hand():
    """The teacher's peak lies one deviation (2 cells of 64) from the student's answer: e^-1/2 there."""
    cell_centres = torch.tensor([[[32.5 / 64, 20.5 / 64], [10.5 / 64, 40.5 / 64]]])
    teacher = gaussian_heatmaps(cell_centres, 2.0, 64)
    off, confidence = cell_centres + torch.tensor([2 / 64, 0.0]), torch.tensor([[0.0, 1.0]])
    cost = lambda confidence, xy, visible: confidence_loss(confidence, xy, teacher, visible, SOMEBODY).item()
    assert cost(confidence, off, ALL) == pytest.approx((math.exp(-0.5) + 1 - math.exp(-0.5)) / 2, rel=1e-5)
    assert cost(confidence, off, FIRST) == pytest.approx(math.exp(-0.5) / 2, rel=1e-5)
    assert cost(torch.ones(1, 2), cell_centres, ALL) == pytest.approx(0, abs=1e-6)
    off.requires_grad_(), confidence.requires_grad_()
    confidence_loss(confidence, off, teacher, ALL, SOMEBODY).backward()
    assert off.grad is None and confidence.grad.abs().sum() > 0                  # it does not move the joints


# ------------------------------------------------------------------------------- crops without a person

def test_where_nobody_is_the_label_is_flat():
    """KL of (1/2, 1/2) and (1/4, 3/4) is log(4/3) / 2, along x; along y the prediction is flat, too: halved.

    Of four cells of a heatmap one has a half, the others a sixth: log(1/4) - (log(1/2) + 3 log(1/6)) / 4.
    """
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    prediction = torch.tensor([0, math.log(3)]).expand(1, 2, 2), torch.zeros(1, 2, 2)
    cost = coordinate_task(prediction, XY, nothing, NOBODY, 1.0).item()
    assert cost == pytest.approx(math.log(4 / 3) / 2 / 2)
    heatmap = torch.tensor([[math.log(3), 0], [0, 0]]).expand(1, 2, 2, 2)
    expected = math.log(1 / 4) - (math.log(1 / 2) + 3 * math.log(1 / 6)) / 4
    assert heatmap_task(heatmap, XY, nothing, NOBODY, 1.0).item() == pytest.approx(expected)
    assert backbone_task(heatmap, XY, nothing, NOBODY).item() == pytest.approx(expected)
    flat = torch.zeros(1, 2, 64)
    assert heatmap_task(flat.view(1, 2, 8, 8), XY, nothing, NOBODY, 2.0).item() == pytest.approx(0, abs=1e-5)
    assert coordinate_task((flat, flat), XY, nothing, NOBODY, 2.0).item() == pytest.approx(0, abs=1e-5)


def test_where_nobody_is_the_confidence_should_be_none():
    """Whatever the teacher sees there. In a batch with somebody, the mean over both crops."""
    teacher, nothing = gaussian_heatmaps(XY, 2.0, 64), torch.zeros(1, 2, dtype=torch.bool)
    confidence = torch.tensor([[0.2, 0.6]])
    assert confidence_loss(confidence, XY, teacher, nothing, NOBODY).item() == pytest.approx(0.4)
    assert confidence_loss(0 * confidence, XY, teacher, nothing, NOBODY).item() == 0
    somebody = confidence_loss(confidence, XY, teacher, ALL, SOMEBODY).item()
    both = confidence_loss(*(torch.cat([a, a]) for a in (confidence, XY, teacher)), torch.cat([ALL, nothing]),
                           torch.cat([SOMEBODY, NOBODY])).item()
    assert both == pytest.approx((somebody + 0.4) / 2) and abs(somebody - 0.4) > 0.01


@pytest.mark.parametrize("student, taught", [("cc", {"task", "confidence", "visual_tokens", "loss"}),
                                             ("reg", {"confidence", "visual_tokens", "loss"})])
def test_what_a_crop_without_a_person_teaches(student, taught, teacher):
    """Low confidence, flat distributions where there are any, and L_vt; no joint has a label."""
    torch.manual_seed(1)
    model = build_student(student, "gs", preset="tiny").eval()
    images = torch.rand(2, 3, 64, 64)
    terms = loss_terms(model.head, model(images), batch(torch.rand(2, 16, 2), torch.zeros(2, 16), empty=True),
                       teacher_targets(teacher, images), WEIGHTS[student])
    assert {name for name, term in terms.items() if term > 0} == taught


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return build_teacher("tiny").eval()


def batch(xy, visible, empty=False):
    return SimpleNamespace(xy=xy, visible=visible.bool(), empty=torch.full((len(xy),), empty))


@pytest.mark.parametrize("student", ["reg", "cc"])
def test_no_gradient_reaches_the_teacher_and_invisible_joints_are_silent(student, teacher):
    torch.manual_seed(1)
    model = build_student(student, "gs", "none", "tiny").eval()
    images, xy = torch.rand(2, 3, 64, 64), torch.rand(2, 16, 2)
    visible = torch.arange(16).expand(2, 16) < 9
    output, targets = model(images), teacher_targets(teacher, images)     # with gradients on, on purpose
    weights = dict.fromkeys(WEIGHTS[student], 1.0)
    terms = loss_terms(model.head, output, batch(xy, visible), targets, weights)
    assert set(terms) == {"task", *weights, "loss"}
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.encoder.keypoint_tokens.grad.abs().sum() > 0

    shifted = torch.where(visible[..., None], xy, torch.rand(2, 16, 2))
    tokens = torch.where(visible[..., None], output.keypoint_tokens, torch.rand_like(output.keypoint_tokens))
    part = lambda p: torch.where(visible.view(2, 16, *[1] * (p.dim() - 2)), p, torch.rand_like(p))
    changed = map(part, output.prediction)
    changed = Regression(*changed) if student == "reg" else tuple(changed)
    again = loss_terms(model.head, output._replace(keypoint_tokens=tokens, prediction=changed),
                       batch(shifted, visible), targets, weights)
    for name in terms:
        torch.testing.assert_close(again[name], terms[name], msg=name)


def test_tokens_are_standardised_on_the_pictures_they_were_measured_on(teacher):
    """Each channel: mean 0 in every token, mean square 1 over pictures and tokens; heatmaps are left as they
    are.
    """
    images = torch.rand(40, 3, 64, 64)
    targets, raw = TeacherTargets(teacher, images).compute(images), teacher_targets(teacher, images)
    for tokens, own in zip(targets[:2], raw[:2]):
        torch.testing.assert_close(tokens.mean(0), torch.zeros_like(tokens[0]), atol=1e-3, rtol=0)
        torch.testing.assert_close(tokens.square().mean((0, 1)), torch.ones(tokens.shape[-1]), atol=1e-2,
                                   rtol=0)
        ratio = (tokens[0] - tokens[1]) / (own[0] - own[1])  # one factor a channel, the same for all tokens
        torch.testing.assert_close(ratio[1], ratio[0], rtol=1e-2, atol=0)
    assert torch.equal(targets.heatmaps, raw.heatmaps)


def test_kept_targets_are_the_teachers_own(teacher):
    people, measured = torch.rand(5, 3, 64, 64), torch.rand(8, 3, 64, 64)
    rows = torch.tensor([4, 0, 2])
    fresh = TeacherTargets(teacher, measured)(people[rows], 1, rows)
    cached = TeacherTargets(teacher, measured, views=2, samples=5)
    cached.prepare(1, lambda rows: SimpleNamespace(images=people[rows]))
    cached.prepare(1, None)                                                      # once is enough
    for kept, own, step in zip(cached(torch.zeros(3, 3, 64, 64), 1, rows), fresh, (2e-3, 2e-3, 0.5 / 255)):
        torch.testing.assert_close(kept, own, atol=step, rtol=1e-3)
    cached.prepare(0, lambda rows: SimpleNamespace(images=people[rows].flip(-1)))         # another view
    assert not torch.allclose(cached(people[rows], 0, rows).keypoint_tokens, fresh.keypoint_tokens)


def test_the_mean_over_parts_is_the_whole():
    """Halves of a batch with 1 and 2 visible joints of 2: each term is divided by all joints, so their mean
    is exact.
    """
    student, tokens = torch.rand(2, 2, 4), torch.rand(2, 2, 4)
    visible = torch.tensor([[True, False], [True, True]])
    whole = keypoint_token_loss(student, tokens, visible)
    parts = [keypoint_token_loss(student[i:i + 1], tokens[i:i + 1], visible[i:i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)
    torch.testing.assert_close(whole, (student - tokens).square().mean(-1)[visible].sum() / 4)


def test_nobody_visible_costs_nothing():
    nobody = torch.zeros(1, 2, dtype=torch.bool)
    assert regression_task(regression(XY + 0.1), XY, nobody).item() == 0


@pytest.mark.parametrize("backbone", ["none", "w16"])
def test_the_loss_weighs_its_terms(teacher, backbone):
    """L = L_task + a1 L_kt + a2 L_vt + a3 L_hm + a4 L_cs (+ L_bb), without a teacher first and last."""
    torch.manual_seed(0)
    model, images = build_student("cc", "gs", backbone, "small-64").train(), torch.rand(2, 3, 64, 64)
    output, labels = model(images), batch(torch.rand(2, 16, 2), torch.ones(2, 16))
    targets = teacher_targets(build_teacher("small-64").eval(), images)
    weights = dict(keypoint_tokens=2.0, visual_tokens=3.0, heatmap=5.0, confidence=7.0)
    terms = loss_terms(model.head, output, labels, targets, weights)
    terms = {name: term.item() for name, term in terms.items()}
    labels_alone = terms["task"] + (terms["backbone"] if backbone != "none" else 0)
    distilled = sum(weight * terms[name] for name, weight in weights.items())
    assert terms["loss"] == pytest.approx(labels_alone + distilled)
    alone = loss_terms(model.head, output, labels)
    assert alone["loss"].item() == pytest.approx(labels_alone)
    assert set(alone) == {"task", "loss"} | ({"backbone"} if backbone != "none" else set())
    assert set(terms) == set(alone) | set(weights)


def test_the_backbone_learns_the_teachers_labels():
    """On 64 x 64 cells L_bb is the teacher's L_task: sigma is 2 cells there."""
    logits, xy, visible = torch.randn(1, 2, 64, 64), torch.rand(1, 2, 2), ALL
    assert backbone_task(logits, xy, visible, SOMEBODY) == heatmap_task(logits, xy, visible, SOMEBODY, 2)
