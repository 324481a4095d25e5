"""Do the drawn people obey their interface, MPII's conventions and human anatomy?

    python -m pytest tests/test_synthetic.py
"""

import os
import signal
import subprocess
import sys
from multiprocessing import current_process, get_context
from pathlib import Path

import numpy as np
import pytest

import synthetic
from synthetic import (
    HEAD_TOP,
    L_HIP,
    L_KNEE,
    L_SHOULDER,
    PELVIS,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    SIDES,
    THORAX,
    UPPER_NECK,
    draw_people,
    draw_person,
    pose,
    view,
)

SEED = 7
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def people():
    return draw_people(300, SEED, workers=1)


def skeletons(count):
    return [pose(np.random.default_rng((SEED, index))) for index in range(count)]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other))


def test_a_drawing_depends_on_seed_and_index_only(people):
    assert same(draw_people(3, SEED), [field[:3] for field in people])
    assert same(draw_person(SEED, 5), draw_person(SEED, 5))
    for other in (draw_person(SEED, 6), draw_person(SEED + 1, 5)):
        assert not np.array_equal(other.image, people.image[5])
        assert not np.array_equal(other.joints, people.joints[5])


def test_the_number_of_workers_changes_nothing(people, monkeypatch):
    monkeypatch.setattr(synthetic, "POOL_FROM", 1)
    assert same(draw_people(70, SEED, workers=2), [field[:70] for field in people])


def double_or_die(value):
    """Twice the value; of 3, in a worker, as where memory is full."""
    if value == 3 and current_process().name != "MainProcess":
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * value


def test_what_a_dead_worker_was_at_is_done_here():
    with get_context("spawn").Pool(2) as pool:
        assert list(synthetic.in_pool(pool, double_or_die, range(8))) == list(range(0, 16, 2))


@pytest.mark.parametrize("workers", (1, pytest.param(2, marks=pytest.mark.long)))
def test_a_script_without_a_main_guard_ends(workers, tmp_path):
    """The library starts no process by itself; where it is told to, each worker runs this script once."""
    (tmp_path / "script.py").write_text("from synthetic import drawn_people\nprint('began', flush=True)\n"
                                        f"print(len(drawn_people('valid', 1000, 16, {workers})))\n")
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    times = 1 if workers == 1 else 3
    assert sorted(done.stdout.split()) == times * ["1000"] + times * ["began"], done.stderr


def test_a_script_from_standard_input_ends():
    """Workers cannot import it: it draws alone."""
    script = "from synthetic import drawn_people\nprint(len(drawn_people('valid', 1000, 16, 2)))\n"
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=100,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "1000\n", "")


@pytest.mark.parametrize("size", (48, 64, 101))
def test_shapes_types_and_ranges(size):
    P = round(1.5 * size)
    drawings = draw_people(4, SEED, size, workers=1)
    assert drawings._fields == ("image", "joints", "visible", "center", "scale", "head_box")
    assert [field.shape for field in drawings] == [(4, P, P, 3), (4, 16, 2), (4, 16), (4, 2), (4,), (4, 4)]
    types = [np.uint8, np.float32, bool, np.float32, np.float32, np.float32]
    assert [field.dtype for field in drawings] == types
    drawing = draw_person(SEED, 0, size)
    assert type(drawing.scale) is float and drawing.image.flags.c_contiguous
    assert [np.asarray(field).dtype for field in drawing] == types[:4] + [float] + types[5:]
    assert drawings.image.std(axis=(1, 2)).min() > 2                    # no blank picture
    fraction = 250 * drawings.scale / size
    assert (fraction > 0.84).all() and (fraction < 1.12).all()


def test_a_joint_outside_the_picture_is_not_visible(monkeypatch):
    monkeypatch.setattr(synthetic, "OFFSET", 0.9)                           # shoves people out of the picture
    drawings = draw_people(40, SEED, workers=1)
    inside = ((drawings.joints >= -0.5) & (drawings.joints < 95.5)).all(-1)
    assert np.array_equal(drawings.visible, inside)
    assert 0.2 < inside.mean() < 0.9


def test_the_right_side_is_left_in_the_picture_of_a_person_facing_us():
    for skeleton in skeletons(50):
        for azimuth, sign in ((0, 1), (180, -1)):
            x = (skeleton.joints @ view(azimuth, 0, 0).T)[:, 0]
            assert sign * x[R_HIP] < sign * x[L_HIP]
            assert sign * x[R_SHOULDER] < sign * x[L_SHOULDER]
    ahead, left, up = (0, 0, 1), (1, 0, 0), (0, 1, 0)
    assert np.allclose(view(90, 0, 0) @ ahead, (1, 0, 0))                  # to the right edge
    assert (view(0, 0, 10) @ up)[0] < 0                                    # rolls to the left
    assert (view(0, 20, 0) @ up)[2] > 0                                    # from above, the head is nearer
    assert np.allclose(view(180, 0, 0) @ left, (-1, 0, 0))


def test_drawings_show_faces_in_front_and_hair_behind(monkeypatch):
    """In drawings of bare-headed people with dark skin and white hair, heads are dark from the front only."""
    monkeypatch.setattr(synthetic, "SKIN", [(60, 40, 30)])
    monkeypatch.setattr(synthetic, "HAIR", [(255, 255, 255)])
    monkeypatch.setattr(synthetic, "ARMS", synthetic.ARMS[:1])             # hands off the face
    monkeypatch.setattr(synthetic, "LEGS", synthetic.LEGS[:1])
    monkeypatch.setitem(synthetic.WARDROBE, "hat", 0)
    brightness = {}
    for azimuth in (0, 180):
        monkeypatch.setattr(synthetic, "view", lambda *angles, azimuth=azimuth: view(azimuth, 0, 0))
        drawings = draw_people(40, SEED, workers=1)
        faces = np.rint(drawings.joints[:, [UPPER_NECK, HEAD_TOP]].mean(1)).astype(int)
        brightness[azimuth] = np.mean([p[y, x].mean() for p, (x, y) in zip(drawings.image, faces)])
        right_of_left = drawings.joints[:, R_SHOULDER, 0] > drawings.joints[:, L_SHOULDER, 0]
        assert right_of_left.all() if azimuth else not right_of_left.any()
    assert brightness[180] > 2 * brightness[0]


def test_the_crop_holds_the_joints(people):
    center = people.center + np.stack([0 * people.scale, 15 * people.scale], axis=1)
    half = 100 * people.scale * 1.25
    inside = (np.abs(people.joints - center[:, None]) <= half[:, None, None]).all(-1)
    assert inside.mean() > 0.99
    assert people.visible.mean() > 0.99
    spread = np.ptp(people.joints, axis=1).max(1) / (2 * half)
    assert 0.5 < np.median(spread) < 0.9                                   # neither tiny nor cut off


def test_head_box_is_the_unit_of_pckh(people):
    x1, y1, x2, y2 = people.head_box.T
    assert np.allclose(0.6 * np.hypot(x2 - x1, y2 - y1), 25 * people.scale, rtol=1e-4)
    assert np.allclose(x2 - x1, y2 - y1, atol=1e-3)
    head = people.joints[:, [UPPER_NECK, HEAD_TOP]].mean(1)
    assert np.allclose(np.stack([x1 + x2, y1 + y2], 1) / 2, head, atol=1e-3)
    length = np.linalg.norm(np.diff(people.joints[:, [UPPER_NECK, HEAD_TOP]], axis=1), axis=-1)[:, 0]
    assert np.percentile(length / (25 * people.scale), 90) == pytest.approx(4 / 3, rel=0.08)


def test_knees_bend_backward_and_elbows_forward():
    for skeleton in skeletons(200):
        for (_, *limbs), shin, forearm in zip(SIDES, skeleton.shins, skeleton.forearms):
            hip, knee, ankle, shoulder, elbow, wrist = skeleton.joints[limbs]
            assert (knee - (hip + ankle) / 2) @ shin[:, 2] > -1e-9         # the knee bows to the toes' side
            assert (elbow - (shoulder + wrist) / 2) @ forearm[:, 2] < 1e-9
            assert abs(shin[:, 2] @ (ankle - knee)) < 1e-9                 # toes at right angles to the shin


def test_proportions_are_human():
    for joints, *_ in skeletons(100):
        sides = []
        for _, hip, knee, ankle, shoulder, elbow, wrist in SIDES:
            bones = joints[[knee, ankle, elbow, wrist]] - joints[[hip, knee, shoulder, elbow]]
            sides.append(np.linalg.norm(bones, axis=1))
        assert np.allclose(*sides)                                         # right is as long as left
        trunk = np.linalg.norm(np.diff(joints[[PELVIS, THORAX, UPPER_NECK, HEAD_TOP]], axis=0), axis=1)
        assert trunk[-1] == pytest.approx(1 / 6)
        assert 0.9 < 0.04 + sides[0][:2].sum() + trunk.sum() < 1.1         # foot, leg, trunk: stands 1 tall
        assert np.allclose((joints[R_HIP] + joints[L_HIP]) / 2, joints[PELVIS])
        assert np.allclose((joints[R_SHOULDER] + joints[L_SHOULDER]) / 2, joints[THORAX])


def test_poses_and_views_vary():
    right_leads = [joints[R_KNEE, 2] > joints[L_KNEE, 2] for joints, *_ in skeletons(300)]
    assert 0.4 < np.mean(right_leads) < 0.6
    drawings = draw_people(100, SEED, 32, workers=1)
    assert 0.3 < (drawings.joints[:, R_HIP, 0] < drawings.joints[:, L_HIP, 0]).mean() < 0.7


def test_size_scales_the_same_scene():
    for index in range(10):
        small, large = draw_person(SEED, index, 64), draw_person(SEED, index, 128)
        assert np.allclose(large.joints, 2 * small.joints + 0.5, atol=1e-2)
        assert np.allclose(large.center, 2 * small.center + 0.5, atol=1e-2)
        assert np.allclose(large.head_box, 2 * small.head_box + 0.5, atol=1e-2)
        assert large.scale == pytest.approx(2 * small.scale)
        halved = large.image.reshape(96, 2, 96, 2, 3).mean((1, 3))
        assert np.abs(halved - small.image).mean() < 8                   # noise alone makes 5 or so


def test_joints_lie_on_the_person(monkeypatch):
    """What differs between the same person before black and before white is background."""
    monkeypatch.setattr(synthetic, "NOISE", 0)
    pictures = []
    for grey in (0, 255):
        monkeypatch.setattr(synthetic, "clutter", lambda P, light, rng, grey=grey: (
            np.full((3, P, P), grey, np.float32), np.full((P, P), -np.inf, np.float32)))
        drawings = draw_people(100, SEED, workers=1)
        pictures.append(drawings.image.astype(int))
    covered = 1 - (pictures[1] - pictures[0]).mean(-1) / 255               # (100, P, P) fraction of the pixel
    x, y = np.rint(drawings.joints).astype(int).transpose(2, 0, 1)         # (100, 16) each
    at_joints = covered[np.arange(100)[:, None], y, x]                     # (100, 16)
    assert np.delete(at_joints, HEAD_TOP, axis=1).min() > 0.5
    assert 0.2 < at_joints[:, HEAD_TOP].mean() < 0.98                      # this one lies on the outline
    assert 0.02 < covered.mean() < 0.15                                    # people do not fill the picture


def test_the_nearer_capsule_hides_the_farther_whatever_is_painted_first():
    for order in ((0, 1), (1, 0)):
        picture, depth = np.zeros((3, 21, 21), np.float32), np.full((21, 21), -np.inf, np.float32)
        for n in order:                                                    # 0: red, far; 1: green, near
            start, end = np.array(((10, 2, -50), (2, 10, 50)))[n], np.array(((10, 18, -50), (18, 10, 50)))[n]
            synthetic.paint(picture, depth, start, end, np.array((3, 3)), np.eye(3)[n] * 100, (0, 0, 1))
        red, green, blue = picture
        assert green[10, 10] > 50 and red[10, 10] == 0 and blue.max() == 0
        assert red[4, 10] > 50 and green[4, 10] == 0
        assert picture[:, 0, 0].max() == 0 and depth[10, 10] == 53         # 3 px before its axis
