"""The one affine map, by hand and there and back; pixels and points move together; targets by hand."""

import errno
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import crops as crops_module
from common import BadInput
from crops import (AUGMENTATIONS, FLIP, HIDDEN, LOOSE_OFFSET, LOOSE_ZOOM, TOKENPOSE, Augmentation, compose,
                   crop_keypoints, crop_matrix, cut, cut_people, end_pictures, hide, invert, make_batch,
                   on_device, store, stored_size, transform, warp)
from distill import coordinate_labels, gaussian, gaussian_heatmaps
from data_mpii import Samples
from synthetic import drawn_people


def test_by_hand():
    """A box of 100 pixels around (60, 40) into 50: half size, middle to middle."""
    matrix = crop_matrix([[60.0, 40.0]], [100.0], 50)
    points = transform(matrix, torch.tensor([[[60.0, 40.0], [10.0, -10.0], [110.0, 40.0]]]))
    expected = torch.tensor([[[24.5, 24.5], [-0.5, -0.5], [49.5, 24.5]]], dtype=torch.float64)
    torch.testing.assert_close(points, expected)


def test_quarter_turn_and_mirror_by_hand():
    """Turned counter-clockwise by 90 degrees, what was to the right is above; mirrored, what was right is
    left.
    """
    right = torch.tensor([[[70.0, 40.0]]])
    turned = transform(crop_matrix([[60.0, 40.0]], [100.0], 100, rotation=90.0), right)
    torch.testing.assert_close(turned, torch.tensor([[[49.5, 39.5]]], dtype=torch.float64))
    mirrored = transform(crop_matrix([[60.0, 40.0]], [100.0], 100, flip=True), right)
    torch.testing.assert_close(mirrored, torch.tensor([[[39.5, 49.5]]], dtype=torch.float64))


def random_matrix(count=50):
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    return crop_matrix(1000 * rand(count, 2), 20 + 900 * rand(count), 256, 360 * rand(count),
                       rand(count) < 0.5)


def test_there_and_back():
    matrix = random_matrix()
    points = 1000 * torch.rand(50, 16, 2, dtype=torch.float64)
    torch.testing.assert_close(transform(invert(matrix), transform(matrix, points)), points, atol=1e-9,
                               rtol=0)
    torch.testing.assert_close(transform(compose(invert(matrix), matrix), points), points, atol=1e-9, rtol=0)


def picture_of(points, side=200, deviation=3.0):
    """A black picture with a soft white spot at each point."""
    ys, xs = np.mgrid[:side, :side]
    spots = [np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * deviation ** 2)) for x, y in points]
    return Image.fromarray((255 * np.max(spots, 0)).astype(np.uint8)).convert("RGB")


def centre_of_mass(pixels):
    pixels = np.asarray(pixels, np.float64)
    ys, xs = np.mgrid[:pixels.shape[0], :pixels.shape[1]]
    return np.array([(pixels * xs).sum(), (pixels * ys).sum()]) / pixels.sum()


@pytest.mark.parametrize("side", [60.0, 130.0, 300.0, 700.0])  # enlarged, as it is, and shrunk with averaging
@pytest.mark.parametrize("rotation,flip", [(0.0, False), (30.0, False), (-50.0, True)])
def test_pixels_go_where_points_go(side, rotation, flip):
    point = np.array([90.0, 105.0])
    matrix = crop_matrix([[96.0, 99.0]], [side], 128, rotation, flip)[0]
    expected = transform(matrix, torch.from_numpy(point[None]))[0].numpy()
    spot = picture_of([point], deviation=max(3, 2 * side / 128))          # two pixels wide in the crop, too
    crop = cut(spot, matrix, 128)[..., 0]
    assert np.abs(centre_of_mass(crop) - expected).max() < 0.05
    pixels = torch.from_numpy(np.array(spot)).permute(2, 0, 1)[None].float()
    warped = warp(pixels, matrix[None], 128)[0, 0].numpy()
    assert np.abs(centre_of_mass(warped) - expected).max() < 0.05


def test_outside_the_picture_is_black():
    white = Image.new("RGB", (40, 40), "white")
    crop = cut(white, crop_matrix([[0.0, 0.0]], [40.0], 40)[0], 40)
    assert crop[:19, :].max() == 0 and crop[:, :19].max() == 0 and crop[22:, 22:].min() == 255


def people_with_spots(count=6):
    generator = np.random.default_rng(0)
    joints = generator.uniform(60, 140, (count, 16, 2)).astype(np.float32)
    pictures = [picture_of(points[:1]) for points in joints]         # joint 0 is the spot that can be seen
    return Samples("spots", joints, np.ones((count, 16), bool), np.full((count, 2), 100, np.float32),
                   generator.uniform(90, 130, count).astype(np.float32), np.ones(count, np.float32),
                   lambda i: pictures[i])


def test_plain_batch_is_the_middle_of_the_stored_crop():
    people = people_with_spots()
    stored, edge = store(people, 64), (stored_size(64) - 64) // 2
    batch = make_batch(people, stored, np.arange(6), 64)
    expected = torch.from_numpy(stored[:, edge:-edge, edge:-edge]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(batch.images, expected, atol=1e-4, rtol=0)


def test_augmented_joints_lie_where_the_picture_shows_them():
    people = people_with_spots()
    stored = store(people, 64)
    mirrored = 0
    for seed in range(8):
        batch = make_batch(people, stored, np.arange(6), 64,
                           params=TOKENPOSE.draw(range(6), torch.Generator().manual_seed(seed)))
        flipped = torch.linalg.det(batch.matrix[:, :, :2]) < 0
        mirrored += int(flipped.sum())
        for image, xy, flip in zip(batch.images, batch.xy, flipped):
            spot = xy[FLIP[0] if flip else 0] * 64 - 0.5  # in a mirror, joint 0 has become its partner
            if ((spot > 8) & (spot < 56)).all():
                assert np.abs(centre_of_mass(image[0]) - spot.numpy()).max() < 0.1
    assert 8 < mirrored < 40


def test_augmentation_keeps_to_its_recipe():
    rotation, zoom, flip, *_ = TOKENPOSE.draw(range(20_000), torch.Generator().manual_seed(0))
    assert rotation.abs().max() == 60 and zoom.min() == 0.75 and zoom.max() == 1.25
    assert (rotation != 0).float().mean() == pytest.approx(0.6, abs=0.02)
    assert flip.float().mean() == pytest.approx(0.5, abs=0.02)
    turned = rotation[rotation != 0]
    assert (turned.abs() < 30).float().mean() == pytest.approx(0.683, abs=0.02)         # one deviation


def test_joints_outside_the_crop_are_not_asked_for():
    people = people_with_spots(1)
    people.joints[0, 3] = 5, 100                                     # left of a crop that begins at about 40
    batch = make_batch(people, store(people, 64), np.array([0]), 64)
    assert not batch.visible[0, 3] and batch.visible.sum() == 15


def test_store_keeps_and_finds_crops(tmp_path):
    people = people_with_spots()
    first = store(people, 64, tmp_path)
    people.image = None                                            # must not be asked for again
    assert np.array_equal(store(people, 64, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError):
        store(people, 32, tmp_path)  # another size is another file, which is not there after a failure
    assert len(list(tmp_path.glob("*.bin"))) == 1


def test_flip_pairs_are_their_own_inverse():
    assert [FLIP[k] for k in FLIP] == list(range(16)) and FLIP[10] == 15 and FLIP[2] == 3 and FLIP[9] == 9


# ------------------------------------------------------------------------------- targets

def test_gaussian_by_hand():
    label = gaussian(torch.tensor([0.5]), 2.0, 5)  # centre of cell 2; one sigma is two cells
    one, half = math.exp(-0.5), math.exp(-1 / 8)
    torch.testing.assert_close(label[0], torch.tensor([one, half, 1, half, one]))


def test_heatmap_has_rows_for_y():
    heatmap = gaussian_heatmaps(torch.tensor([[[0.25 + 1 / 128, 0.75 + 1 / 128]]]), 2.0, 64)
    assert heatmap.shape == (1, 1, 64, 64)
    assert heatmap.flatten().argmax() == 48 * 64 + 16 and heatmap.max() == 1


def test_sigma_may_differ_by_axis():
    wide_x = gaussian_heatmaps(torch.full((1, 1, 2), 0.5), torch.tensor([[[4.0, 1.0]]]), 64)[0, 0]
    assert wide_x[31, 40] > 0.05 > wide_x[40, 31]


def test_coordinate_labels_sum_to_one():
    x, y = coordinate_labels(torch.rand(2, 16, 2), 6.0, 512)
    torch.testing.assert_close(x.sum(-1), torch.ones(2, 16))
    inside, _ = coordinate_labels(torch.full((1, 1, 2), 0.5), 6.0, 512)
    assert inside.max() == pytest.approx(1 / (6 * math.sqrt(2 * math.pi)), rel=1e-2)


def test_colours_vary_within_their_range_and_only_where_asked():
    gain, shift = AUGMENTATIONS["colour"].draw(range(10_000), torch.Generator().manual_seed(0))[3:5]
    assert 0.75 <= gain.min() < 0.76 and 1.24 < gain.max() <= 1.25
    assert -0.125 <= shift.min() < -0.12 < 0.12 < shift.max()
    plain = TOKENPOSE.draw(range(100), torch.Generator().manual_seed(0))
    assert (plain.gain == 1).all() and (plain.shift == 0).all()


def test_half_of_the_people_lose_a_rectangle_where_asked():
    params = AUGMENTATIONS["occlusion"].draw(range(10_000), torch.Generator().manual_seed(0))
    sides = params.hidden[:, 2:]
    assert (sides > 0).all(1).float().mean() == pytest.approx(0.5, abs=0.02)
    assert HIDDEN[0] <= sides[sides > 0].min() and sides.max() <= HIDDEN[1]
    assert not AUGMENTATIONS["colour"].draw(range(100), torch.Generator().manual_seed(0)).hidden[:, 2:].any()
    before = AUGMENTATIONS["colour"].draw(range(10_000), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before[:5], params[:5]))  # the rest is as without


def test_a_hidden_rectangle_by_hand():
    """8 x 8 pixels: middle (3/8, 4/8), 2 wide and 4 high hides columns 2 and 3 of rows 2 to 5."""
    images = torch.ones(2, 3, 8, 8)
    hidden = torch.tensor([[3 / 8, 4 / 8, 2 / 8, 4 / 8], [0.5, 0.5, 0, 0]])
    paint = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.0]])
    expected = images.clone()
    for channel in range(3):
        expected[0, channel, 2:6, 2:4] = (channel + 1) / 10
    torch.testing.assert_close(hide(images, hidden, paint), expected)


# ------------------------------------------------------------------------------- parts of people, loose boxes

def two_columns(side=200.0, visible=range(16)):
    """A person whose joint k is at x = 0 (even k) or 40 (odd k), y = 10 k."""
    joints = np.array([[[40 * (k % 2), 10 * k] for k in range(16)]], np.float32)
    return Samples("columns", joints, np.isin(np.arange(16), visible)[None], np.array([[20, 75]], np.float32),
                   np.array([side], np.float32), np.ones(1, np.float32), None)


@pytest.fixture
def halved(monkeypatch):
    """Everybody who can be is cut at the middle, and the picture ends there. -> sets the line's normal."""
    monkeypatch.setattr(crops_module, "CUT_AT", (0.5, 0.5))
    monkeypatch.setattr(crops_module, "BLACK", 1)
    normals = crops_module.CUTS[0]
    return lambda n: monkeypatch.setattr(crops_module, "CUTS", (normals, [float(n == m) for m in normals]))


# normal of the line, n . x of the line, the box of what is left (left, top, right, bottom)
@pytest.mark.parametrize("normal, line, box", [
    ((0, 1), 75, (0, 0, 40, 75)), ((0, -1), -75, (0, 75, 40, 150)),
    ((1, 0), 20, (0, 0, 20, 140)), ((-1, 0), -20, (20, 10, 40, 150))])
def test_a_person_cut_in_half_by_hand(halved, normal, line, box):
    """The box is that of the joints on the inner side, up to the line, and a quarter larger."""
    halved(normal)
    left, top, right, bottom = box
    zoom, offset, border = cut_people(two_columns(), 1, torch.Generator().manual_seed(0))
    assert zoom.item() == pytest.approx(1.25 * max(right - left, bottom - top) / 200)
    assert offset[0].tolist() == pytest.approx([(left + right) / 2 - 20, (top + bottom) / 2 - 75])
    assert border[0].tolist() == [*normal, line]


def test_who_is_not_cut(halved):
    """Whose part would show three joints, or be small; who has no joint; and who is not chosen."""
    halved((0, 1))
    for person, chance in ((two_columns(visible=[0, 1, 2, 12, 13, 14]), 1), (two_columns(side=400), 1),
                           (two_columns(visible=[]), 1), (two_columns(), 0)):
        zoom, offset, border = cut_people(person, chance, torch.Generator().manual_seed(0))
        assert zoom.item() == 1 and offset[0].tolist() == [0, 0] and border[0, 2] == math.inf
    seen = two_columns(visible=[1, 2, 3, 4, 12, 13, 14])                         # other joints do not count
    zoom, _, border = cut_people(seen, 1, torch.Generator().manual_seed(0))
    assert border[0, 2] == 75 and zoom.item() == pytest.approx(1.25 * (75 - 10) / 200)


def test_the_picture_ends_at_the_line_by_hand():
    """8 x 8 pixels as they are: beyond y = 4 is row 5; beyond x = 2, in a mirror, are the columns up to 4."""
    flip = torch.tensor([False, True, False])
    matrix = crop_matrix(torch.full((3, 2), 3.5), torch.full((3,), 8.0), 8, flip=flip)
    border = torch.tensor([[0, 1, 4], [1, 0, 2], [0, 1, math.inf]])
    expected = torch.ones(3, 3, 8, 8)
    expected[0, :, 5:], expected[1, :, :, :5] = 0, 0
    assert torch.equal(end_pictures(torch.ones(3, 3, 8, 8), matrix, border), expected)


def test_the_picture_ends_at_the_line_in_turned_crops():
    """Every pixel of 50 crops, taken back to the image, is beyond its line where it is black."""
    matrix, random = random_matrix(), torch.Generator().manual_seed(1)
    normal = torch.tensor(crops_module.CUTS[0])[torch.randint(4, (50,), generator=random)].double()
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    pixels = torch.stack([columns, rows], -1).flatten(0, 1).expand(50, -1, -1)
    along = (transform(invert(matrix), pixels) * normal[:, None]).sum(-1)                # (50, 64 * 64) n . x
    line = along.median(1).values + 0.01
    black = end_pictures(torch.ones(50, 3, 64, 64), matrix, torch.cat([normal, line[:, None]], 1)) == 0
    assert torch.equal(black.flatten(2), (along > line[:, None])[:, None].expand(-1, 3, -1))
    assert 0.4 < black.float().mean() < 0.6


def test_joints_beyond_the_line_are_not_asked_for(halved):
    """Half a person fills the crop: the joints up to the line are visible, and the pixels beyond it black."""
    halved((0, 1))
    person = two_columns()
    person.image = lambda i: Image.new("RGB", (300, 300), "white")
    plain = Augmentation(rotation=0, rotation_chance=0, zoom=0, flip_chance=0, part_chance=1)
    params = plain.draw(person, torch.Generator().manual_seed(0))
    matrix, xy, visible = crop_keypoints(person, torch.tensor([0]), 64, params)
    assert visible[0].tolist() == [k <= 7 for k in range(16)]
    corners = transform(matrix, torch.tensor([[[20, 37.5], [20, 0], [20, 75]]]))[0] + 0.5
    assert corners.flatten().tolist() == pytest.approx([32, 32, 32, 32 - 64 / 2.5, 32, 32 + 64 / 2.5])
    images = make_batch(person, store(person, 64), [0], 64, params=params).images[0, 0]
    assert images[8:57, 40].min() == 1 and images[58:].max() == 0                # the line: row 57.1


def test_a_tenth_of_the_boxes_do_not_fit():
    people = drawn_people("valid", 100, 32)
    people.side = np.full(10_000, 50, np.float32)
    people.joints = np.zeros((10_000, 16, 2), np.float32)
    plain = Augmentation(rotation=0, rotation_chance=0, zoom=0, flip_chance=0, loose_chance=0.1)
    params = plain.draw(people, torch.Generator().manual_seed(0))
    loose = params.zoom != 1
    assert loose.float().mean() == pytest.approx(0.1, abs=0.01)
    assert LOOSE_ZOOM[0] <= params.zoom.min() < 0.92 and 1.58 < params.zoom.max() <= LOOSE_ZOOM[1]
    sides = params.offset[loose].abs() / 50
    assert 0.24 < sides.max() <= LOOSE_OFFSET and (params.offset[~loose] == 0).all()
    assert sides.mean() == pytest.approx(LOOSE_OFFSET / 2, abs=0.01)             # even, to all sides
    assert (params.offset[loose] > 0).float().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    person = two_columns()                                                       # by hand: where is it then?
    params = plain.draw(person, torch.Generator().manual_seed(0))._replace(
        zoom=torch.tensor([1.5]), offset=torch.tensor([[50.0, -20.0]]))
    matrix, *_ = crop_keypoints(person, torch.tensor([0]), 64, params)
    torch.testing.assert_close(transform(matrix, torch.tensor([[[70.0, 55], [220, 55]]]))[0] + 0.5,
                               torch.tensor([[32.0, 32], [64, 32]], dtype=torch.float64))


def test_parts_and_loose_boxes_leave_the_other_numbers_as_they_are():
    """The other recipes draw what they drew before there were any; with them, the rest is the same."""
    rotation, zoom, flip, *_ = AUGMENTATIONS["upright"].draw(range(4), torch.Generator().manual_seed(0))
    assert rotation.tolist() == pytest.approx([15.4100, 0, -20, 5.6843], abs=1e-4)
    assert zoom.tolist() == pytest.approx([1.0403, 1.0838, 0.9281, 0.9597], abs=1e-4)
    assert flip.tolist() == [False, False, True, False]
    people = drawn_people("valid", 500, 32)
    draw = lambda augmentation: augmentation.draw(people, torch.Generator().manual_seed(0))._asdict()
    parts = AUGMENTATIONS["parts"]
    cut, both = draw(parts._replace(loose_chance=0)), draw(parts)
    plain = draw(parts._replace(part_chance=0, loose_chance=0))
    for name in ("rotation", "flip", "gain", "shift", "hidden", "paint"):
        assert torch.equal(plain[name], cut[name]) and torch.equal(plain[name], both[name])
    assert (plain["offset"] == 0).all() and (plain["border"][:, 2] == math.inf).all()
    assert torch.equal(cut["border"], both["border"])
    whole, fits = cut["offset"].eq(0).all(1), both["offset"].eq(cut["offset"]).all(1)
    assert torch.equal(cut["zoom"][whole], plain["zoom"][whole])
    assert torch.equal(cut["zoom"][fits], both["zoom"][fits]) and 0.9 < fits.float().mean() < 0.98
    assert 0.75 < whole.float().mean() < 0.9                         # 0.2 are chosen, not all can be cut
    black = (cut["border"][:, 2] < math.inf).float().mean() / (~whole).float().mean()
    assert black == pytest.approx(crops_module.BLACK, abs=0.1)


def test_a_batch_knows_where_nobody_is():
    people = people_with_spots(3)
    people.empty = np.array([False, True, False])
    assert make_batch(people, store(people, 64), [1, 2], 64).empty.tolist() == [True, False]


def test_parts_and_tensors_give_the_same_batch(monkeypatch):
    people = drawn_people("valid", 7, 64)
    stored = store(people, 64)
    params = TOKENPOSE.draw(range(7), torch.Generator().manual_seed(0))
    whole = make_batch(people, stored, range(7), 64, params=params).images
    assert torch.equal(make_batch(people, torch.from_numpy(stored), range(7), 64, params=params).images,
                       whole)
    monkeypatch.setattr(crops_module, "WARPED_AT_ONCE", 1)                             # one at a time
    assert torch.equal(make_batch(people, stored, range(7), 64, params=params).images, whole)


def test_what_is_kept_on_a_gpu_leaves_it_half(monkeypatch):
    """Crops of a read-only file, and a GPU that has twice their bytes free, or a little more."""
    crops = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    crops.flags.writeable = False
    monkeypatch.setattr(crops_module, "CHUNK", 2)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert on_device(crops, "cpu") is crops
    other = torch.device("cpu")                                      # stands for a GPU: it is not the string
    for free, kept in ((2 * crops.nbytes, False), (2 * crops.nbytes + 2, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 ** 6))
        found = on_device(crops, other)
        assert np.array_equal(found.numpy(), crops) if kept else found is crops


def test_a_full_disk_is_told_before_anything_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(crops_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=80_000))
    with pytest.raises(BadInput, match="lacks room for 0.0 GB of crops: name another folder"):
        store(drawn_people("valid", 3, 64), 64, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_crops_are_cut(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(crops_module.os, "fsync", full)
    with pytest.raises(BadInput, match="cannot be written .No space left on device.: name another folder"):
        store(drawn_people("valid", 3, 64), 64, tmp_path)


def test_without_locks_no_process_writes_into_anothers_file(tmp_path, monkeypatch):
    people, names = drawn_people("valid", 3, 64), []
    monkeypatch.setattr(common, "lock", lambda *_: None)
    image = people.image
    people.image = lambda i: names.extend(path.name for path in tmp_path.iterdir()) or image(i)
    assert np.array_equal(store(people, 64, tmp_path), store(drawn_people("valid", 3, 64), 64))
    assert names and all(f".{os.getpid()}.partial" in name for name in names)


def test_cutting_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crops_module, "SLICE", 2)
    people = drawn_people("valid", 7, 64)
    expected, picture, asked = store(people, 64), people.image, []

    def stopped(i):
        if i == 5:
            raise KeyboardInterrupt
        return picture(i)

    people.image = stopped
    with pytest.raises(KeyboardInterrupt):
        store(people, 64, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    people.image = lambda i: asked.append(i) or picture(i)
    assert np.array_equal(store(people, 64, tmp_path), expected) and sorted(asked) == [5, 6]
    assert "after the first 5" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1
