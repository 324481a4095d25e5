"""Sizes against the paper's tables, names against the published weights, layout and decoding by hand."""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from common import fast_bfloat16
from distill import coordinate_labels, gaussian_heatmaps
from costs import PAPER, count_multiply_adds, count_parameters
from hrnet import HRNet
from models import (BACKBONES, FILTERS, STUDENTS, Attention, CoordinateHead, Encoder, HeatmapHead, Regression,
                    RegressionHead, build_student, build_teacher, decode_heatmaps, sine_position_embedding)


@pytest.mark.parametrize("row", PAPER, ids=lambda row: "-".join(row[:3]))
def test_parameters_and_multiply_adds_of_the_tables(row):
    student, filter, backbone, _, _, params, gflops, _ = row
    with torch.device("meta"):
        model = build_student(student, filter, backbone)
    millions, decimals = count_parameters(model) / 1e6, 1 if params in (20.3, 21.4, 20.4, 21.5) else 2
    cut = math.floor(millions * 10 ** decimals) / 10 ** decimals            # the tables cut off or round
    assert params in (cut, round(millions, decimals))
    assert count_multiply_adds(model) / 1e9 == pytest.approx(gflops, rel=0.025)


def test_multiply_adds_of_a_transform_by_hand():
    """A static layer's FFT pair: 2 x 5/2 N log2 N operations a channel, half of that in multiply-adds."""
    with torch.device("meta"):
        attention, gs = (build_student("cc", filter, "none", "tiny") for filter in ("attention", "gs"))
    D, N, depth = 96, 80, 4
    products = 4 * D * D * N + 2 * N * N * D  # qkv and output projections; the two products of attention
    assert count_multiply_adds(attention) - count_multiply_adds(gs) == pytest.approx(
        depth * (products - 2.5 * N * math.log2(N) * D), rel=1e-6)


@pytest.mark.parametrize("width,name", [(48, "tokenpose_b"), (32, "pose_hrnet_w32"), (48, "pose_hrnet_w48")])
def test_hrnet_has_the_published_names_and_shapes(real_data, width, name):
    lists = json.loads((real_data / "official_keys.json").read_text())
    published = next(keys for title, keys in lists.items() if title.startswith(name))
    published = {key.removeprefix("pre_feature."): shape for key, shape in published.items()}
    ours = {key: list(value.shape) for key, value in HRNet(width).state_dict().items()}
    assert all(published[key] == shape for key, shape in ours.items())
    if name == "tokenpose_b":  # its backbone ends where ours does: not one key more
        theirs = [key for key in next(k for t, k in lists.items() if t.startswith(name))
                  if key.startswith("pre_feature.")]
        assert len(theirs) == len(ours)


def test_hrnet_map_is_a_quarter_of_the_picture():
    assert HRNet(16).eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 16, 16, 24)


def hrnet_by_names(weights, x):
    """HRNet's forward pass from its published parameter names alone, in functional calls."""
    def conv_bn(x, conv, bn, stride=1):
        kernel = weights[conv + ".weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        mean, var = weights[bn + ".running_mean"], weights[bn + ".running_var"]
        return F.batch_norm(x, mean, var, weights[bn + ".weight"], weights[bn + ".bias"], eps=1e-5)

    def block(x, name, convs):
        out = x
        for n in range(1, convs + 1):
            out = conv_bn(out, f"{name}.conv{n}", f"{name}.bn{n}")
            out = out.relu() if n < convs else out
        if f"{name}.downsample.0.weight" in weights:
            x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1")
        return (x + out).relu()

    def module(xs, name):
        xs = [functools.reduce(lambda x, n: block(x, f"{name}.branches.{b}.{n}", 2), range(4), x)
              for b, x in enumerate(xs)]
        fused = []
        for i in range(len(xs)):
            if f"{name}.fuse_layers.{i}.{1 if i == 0 else 0}.0.weight" not in weights and \
                    f"{name}.fuse_layers.{i}.0.0.0.weight" not in weights:
                break
            total = xs[i]
            for j, x in enumerate(xs):
                path = f"{name}.fuse_layers.{i}.{j}"
                if j > i:
                    times = 2 ** (j - i)
                    x = conv_bn(x, path + ".0", path + ".1")
                    total = total + x.repeat_interleave(times, 2).repeat_interleave(times, 3)
                for step in range(i - j):
                    x = conv_bn(x, f"{path}.{step}.0", f"{path}.{step}.1", stride=2)
                    x = x.relu() if step < i - j - 1 else x
                total = total + x if j < i else total
            fused.append(total.relu())
        return fused

    x = conv_bn(x, "conv1", "bn1", 2).relu()
    x = conv_bn(x, "conv2", "bn2", 2).relu()
    for n in range(4):
        x = block(x, f"layer1.{n}", 3)
    xs = module([conv_bn(x, "transition1.0.0", "transition1.0.1").relu(),
                 conv_bn(x, "transition1.1.0.0", "transition1.1.0.1", 2).relu()], "stage2.0")
    xs.append(conv_bn(xs[-1], "transition2.2.0.0", "transition2.2.0.1", 2).relu())
    for n in range(4):
        xs = module(xs, f"stage3.{n}")
    return xs[0]


def test_hrnet_does_what_its_names_say():
    torch.manual_seed(0)
    model = HRNet(8).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1), module.running_var.uniform_(0.2, 0.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    x = torch.rand(2, 3, 64, 96)
    expected = hrnet_by_names(model.state_dict(), x)
    assert expected.std() > 0.1 and (expected == 0).float().mean() < 0.9  # a map of zeros would prove nothing
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    layer, x = Attention(24, heads=4), torch.randn(2, 3, 5, 24)
    q, k, v = layer.qkv(x.view(2, 15, 24)).split(24, dim=-1)
    heads = []
    for h in range(4):
        part = slice(6 * h, 6 * h + 6)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(6)).softmax(-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(layer(x), layer.out(torch.cat(heads, -1)).view_as(x))


class Spy(torch.nn.Module):
    def forward(self, x):
        self.seen = x
        return torch.zeros_like(x)


@pytest.mark.parametrize("rows,joints,columns", [(16, 16, 1), (8, 16, 2), (5, 15, 3)])
def test_keypoint_tokens_stand_in_columns_beside_the_picture(rows, joints, columns):
    encoder = Encoder((rows, 7), 8, depth=1, heads=2, filter="gs", joints=joints)
    spy = encoder.blocks[0] = Spy()
    visual = torch.randn(2, rows * 7, 8)
    encoder(visual)
    grid = spy.seen
    assert grid.shape == (2, rows, 7 + columns, 8)
    torch.testing.assert_close(grid[:, :, :7], visual.view(2, rows, 7, 8) + encoder.position)
    for k in range(columns * rows):
        token = grid[0, k % rows, 7 + k // rows]
        torch.testing.assert_close(token, encoder.keypoint_tokens[0, k])


@pytest.mark.parametrize("filter", FILTERS)
def test_encoder_returns_tokens_where_they_were(filter):
    """With blocks that do nothing, tokens come out as they went in (plus the position, once a block)."""
    encoder = Encoder((6, 7), 8, depth=2, heads=2, filter=filter, joints=12)
    encoder.blocks = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    visual = torch.randn(3, 42, 8)
    keypoint, out = encoder(visual)
    torch.testing.assert_close(keypoint, encoder.keypoint_tokens.expand(3, -1, -1))
    torch.testing.assert_close(out, visual + 2 * encoder.position.flatten(0, 1))


def test_keypoint_tokens_fill_whole_columns():
    with pytest.raises(ValueError, match="16 keypoint tokens do not fill whole columns of 3 rows"):
        Encoder((3, 4), 8, depth=1, heads=2, filter="gs")


def test_position_embedding_tells_rows_and_columns():
    position = sine_position_embedding(4, 6, 16)
    assert position.shape == (4, 6, 16) and position.abs().max() <= 1
    torch.testing.assert_close(position[1, 0, :8], position[1, 5, :8])  # the row half is constant along a row
    torch.testing.assert_close(position[0, 2, 8:], position[3, 2, 8:])       # the column half along a column
    assert torch.cdist(position.view(24, 16), position.view(24, 16)).add(torch.eye(24)).min() > 0.1
    angle = 2 * math.pi * 3 / 4                                              # row 2 of 4, lowest frequency
    torch.testing.assert_close(position[2, 0, :2], torch.tensor([math.sin(angle), math.cos(angle)]))


# ------------------------------------------------------------------------------- decoding

PLACES = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.031, 0.96], [0.9, 0.2]]])      # (1, 4, 2)


def test_decoding_undoes_the_heatmap_label():
    found, peak = decode_heatmaps(gaussian_heatmaps(PLACES, 2.0, 64))
    assert (found - PLACES).abs().max() <= 0.3 / 64           # a quarter of a cell and rounding
    assert (peak > 0.85).all()


def test_teachers_heatmap_of_a_perfect_answer_is_the_label():
    """The head's output is the label itself, between 0 and 1 with a peak near 1, when the network is right.
    """
    head = HeatmapHead(8, 64, sigma=2.0)
    inner = torch.tensor([[[0.5, 0.4], [0.3, 0.6]]])
    label = gaussian_heatmaps(inner, 2.0, 64)
    torch.testing.assert_close(head.heatmaps(label.log().clamp(min=-60)), label, atol=2e-3, rtol=0)


@pytest.mark.parametrize("sigma", [2.0, 1.5, 1.0])
def test_a_teacher_sharper_than_its_label_is_decoded_as_well(sigma):
    """Its clamped heatmap has several cells at 1; where the highest of them lies must not depend on their
    order.
    """
    head = HeatmapHead(8, 64, sigma=2.0)
    places = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    found, confidence = head.decode(gaussian_heatmaps(places, sigma, 64).clamp(min=1e-30).log())
    off = 64 * (found - places)
    assert off.abs().max() <= 0.26 and off.mean().abs() < 0.03 and confidence.max() <= 1


def test_decoding_undoes_the_coordinate_label():
    head = CoordinateHead(8, bins=128, sigma=3.0)
    x, y = coordinate_labels(PLACES, 3.0, 128)
    found, confidence = head.decode((x.clamp(min=1e-30).log(), y.clamp(min=1e-30).log()))
    assert (found - PLACES).abs().max() <= 0.5 / 128
    assert (confidence > 0.9).all()             # of the label itself: two deviations each way, 0.954 ** 2


def test_confidence_is_the_probability_of_being_near():
    """Of 100 bins 0.05 are 5: an even distribution holds 0.06 about its first bin, 0.11 about one inside."""
    head = CoordinateHead(8, bins=100, sigma=3.0)
    even, peak = torch.zeros(1, 1, 100), torch.full((1, 1, 100), -40.0)
    peak[..., [20, 25]], peak[..., 26] = math.log(0.3), math.log(0.4)          # near 26: 0.3 + 0.4, 20 is far
    assert head.confidence((even, even)).item() == pytest.approx(0.06 ** 2)
    even[..., 50] = 1e-4
    assert head.confidence((even, even)).item() == pytest.approx(0.11 ** 2, rel=1e-3)
    assert head.confidence((even, peak)).item() == pytest.approx(0.11 * 0.7, rel=1e-3)


def test_score_reaches_the_result_only_where_it_was_trained():
    head = RegressionHead(8)
    prediction = Regression(PLACES, torch.full((1, 4), 0.3), torch.ones(1, 4, 2))
    assert head.decode(prediction)[1].tolist() == [[pytest.approx(0.3)] * 4]
    head.scored = False
    assert head.decode(prediction)[1].tolist() == [[1] * 4]


def test_decoded_pixels_count_from_the_first_ones_centre():
    model = build_student("reg", "gs", "none", "tiny")
    output = model(torch.rand(1, 3, 64, 64))._replace(prediction=Regression(PLACES, PLACES[..., 0], PLACES))
    joints, _ = model.decode(output)
    torch.testing.assert_close(joints, PLACES * 64 - 0.5)


# ------------------------------------------------------------------------------- whole networks

@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_every_student_learns_in_every_part(student, filter, backbone):
    """One backward pass at the tiny preset gives each trainable parameter that its loss can reach a finite
    gradient.
    """
    torch.manual_seed(0)
    model = build_student(student, filter, backbone, "tiny")
    output = model(torch.rand(2, 3, 64, 64))
    assert output.keypoint_tokens.shape == (2, 16, 96) and output.visual_tokens.shape == (2, 64, 96)
    (sum(part.square().sum() for part in output.prediction) + output.visual_tokens.square().sum()).backward()
    for name, parameter in model.named_parameters():
        if name == "encoder.position":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.skipif(not fast_bfloat16("cpu"), reason="this CPU has no native bfloat16")
@pytest.mark.parametrize("filter", FILTERS)
def test_channels_last_and_bfloat16_on_a_whole_model(filter):
    torch.manual_seed(0)
    model = build_student("cc", filter, "w32", "tiny").eval()
    images = torch.rand(2, 3, 64, 64)
    expected = model(images).prediction[0]
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images).prediction[0], expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images).prediction[0]
    assert (low - expected).abs().max() < 0.1 * expected.abs().max()      # bfloat16 keeps 8 bits a layer


@pytest.mark.parametrize("student", STUDENTS)
def test_heads_stay_in_float32_within_autocast(student):
    torch.manual_seed(0)
    model = build_student(student, "gs", preset="tiny").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):     # small enough for every CPU
        output = model(torch.rand(4, 3, 64, 64))
    with torch.no_grad():
        expected = model.head(output.keypoint_tokens.float())
    for found, wanted in zip(output.prediction, expected):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)        # in bfloat16: off by 1e-2
        assert found.dtype == torch.float32


def test_unknown_names_are_refused():
    for arguments in (("regression", "gs"), ("reg", "fft"), ("reg", "gs", "w18"),
                      ("reg", "gs", "none", "huge")):
        with pytest.raises(ValueError, match="is not one of"):
            build_student(*arguments)


@pytest.mark.parametrize("preset,size,D", [("tiny", 64, 96), ("paper", 256, 192)])
def test_teacher_shapes(preset, size, D):
    with torch.device("meta"):
        model = build_teacher(preset)
        output = model(torch.rand(2, 3, size, size))
    assert output.prediction.shape == (2, 16, 64, 64) and output.keypoint_tokens.shape == (2, 16, D)


def test_the_small_preset_keeps_its_budget():
    """The photo student: at most 3.5 M parameters and 0.6 G multiply-adds; a teacher of at most 5 M."""
    student, teacher = build_student("cc", "gd", "w24", "small").eval(), build_teacher("small").eval()
    assert count_parameters(student) < 3.5e6 and count_multiply_adds(student) < 0.6e9
    assert count_parameters(teacher) < 5e6 and count_multiply_adds(teacher) < 0.6e9
    for network in (student, teacher):
        output = network(torch.rand(1, 3, 128, 128))
        assert output.visual_tokens.shape == (1, 256, 128) and output.keypoint_tokens.shape == (1, 16, 128)
        assert output.backbone_heatmaps is None                                # in training alone
        assert network.train()(torch.rand(2, 3, 128, 128)).backbone_heatmaps.shape == (2, 16, 32, 32)
