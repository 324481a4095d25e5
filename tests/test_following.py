"""People followed from frame to frame, by the stand-in network of test_people.py, and joints smoothed."""

import numpy as np
import pytest
from test_people import BLUE, GREEN, PEOPLE, RED, StandIn, drawn, near

import videos as module
from people import Found, box_of_joints, find_people, person_score, windows
from videos import BETA, CUTOFF, LOOK_AGAIN, LOOK_SOON, OneEuro, Tracker, frame_rate

# ------------------------------------------------------------------------------- from frame to frame

def follow(frames, model=None):
    """A Tracker's {id: Found} of each frame; a frame is a list of people as `drawn` takes them."""
    tracker = Tracker(model or StandIn())
    return [tracker(drawn(*people)) for people in frames]


def colours(found, people):
    """{id: colour} of those found where people are."""
    return {number: colour for number, one in found.items()
            for colour, *box in people if near(box_of_joints(one), box)}


def crossing(n):
    """Two people of whom one walks to the right and one, below, to the left."""
    return [(RED, 10 + 6 * n, 10, 40, 85), (GREEN, 260 - 6 * n, 105, 40, 85)]


@pytest.mark.parametrize("sure, followed", [(0.56, True), (0.48, False)])
def test_who_is_followed_may_be_less_sure_than_who_is_new(sure, followed):
    """STILL is below PERSON: a score between them keeps somebody, and makes nobody new."""
    assert module.STILL < module.PERSON
    model, image = StandIn(), drawn(*PEOPLE)
    tracker = Tracker(model)
    first = tracker(image)
    assert len(first) == 2
    model.sure = sure / max(person_score(person) for person in first.values())
    assert find_people(model, image) == []
    assert set(tracker(image)) == (set(first) if followed else set())


def test_people_keep_their_ids_while_they_pass_each_other():
    frames = [crossing(n) for n in range(40)]
    followed = follow(frames)
    assert all(one.box == box_of_joints(one) for found in followed for one in found.values())
    seen = [colours(found, people) for found, people in zip(followed, frames)]
    assert len(seen[0]) == 2 and set(seen[0]) == {0, 1} and set(seen[0].values()) == {RED, GREEN}
    assert all(of == seen[0] for of in seen)


def test_who_leaves_is_lost_and_who_comes_gets_an_id_of_his_own():
    """GREEN leaves after frame 9; BLUE comes in frame 15 and is found by the next look around."""
    red, green, blue = (RED, 30, 40, 50, 130), (GREEN, 130, 60, 60, 90), (BLUE, 230, 30, 50, 100)
    frames = [[red, green] if n < 10 else [red] if n < 15 else [red, blue] for n in range(15 + LOOK_AGAIN)]
    found = follow(frames)
    seen = [colours(of, people) for of, people in zip(found, frames)]
    ids = {colour: number for number, colour in seen[0].items()}
    assert all(of == seen[0] for of in seen[:10]) and len(seen[0]) == 2
    assert all(of == {ids[RED]: RED} for of in seen[10:15]) and all(len(of) == 1 for of in found[10:15])
    assert seen[-1] == {ids[RED]: RED, 2: BLUE}
    first = next(n for n, of in enumerate(seen) if BLUE in of.values())
    assert 15 <= first <= 15 + LOOK_AGAIN and all(of == seen[-1] for of in seen[first:])


def test_who_is_lost_is_looked_for_at_once():
    """RED jumps across the image between two frames, far from the next look around."""
    frames = [[(RED, 20, 40, 50, 130)]] * LOOK_SOON + [[(RED, 230, 20, 50, 130)]] * 3
    ids = [sorted(colours(found, people)) for found, people in zip(follow(frames), frames)]
    assert ids == [[0]] * LOOK_SOON + [[1]] * 3


def test_who_is_not_seen_for_some_frames_keeps_the_id():
    """Unsure in frames 3, and 8 to 11: found again around the last joints. Lost for good from 25 on, through
    the look around of 25 and the next: who is found by the one after that, soon, is new.
    """
    model, image = StandIn(), drawn(*PEOPLE)
    tracker = Tracker(model)
    again = 25 + LOOK_AGAIN + LOOK_SOON
    for n in range(again + 1):
        model.sure = 0.3 if n in (3, *range(8, 12), *range(25, 25 + LOOK_AGAIN + 1)) else 1
        expected = [0, 1] if n < 25 and model.sure == 1 else [2, 3] if n == again else []
        assert sorted(tracker(image)) == expected, n


def test_who_comes_and_goes_does_not_cost_a_look_around_each_time(monkeypatch):
    """Unsure in every second frame: in all others everybody is there, and not every loss is a look around."""
    model, image, looks = StandIn(), drawn(*PEOPLE), []
    tracker = Tracker(model)
    monkeypatch.setattr(module, "find_people", lambda *how: looks.append(n) or find_people(*how))
    for n in range(20):
        model.sure = 1 if n % 2 == 0 else 0.3
        assert sorted(tracker(image)) == ([0, 1] if n % 2 == 0 else [])
    assert looks == [0, 5, 11, 17]


def test_who_is_lost_gets_the_id_of_the_box_that_is_most_alike():
    at = lambda x: Found([], np.array([[x, 0], [x + 100, 200]] * 8, float), np.ones(16))
    tracker = Tracker(None)
    tracker.ids = 2
    assert [tracker.who(at(x), {0: at(0), 1: at(56)}) for x in (42, -12, 0, 300, 301)] == [1, 0, 0, 2, 3]


def test_who_is_found_where_somebody_was_lost_is_the_same(monkeypatch):
    """Nobody is seen around the last joints; the look around finds both, in another order, and a third."""
    image = drawn(*PEOPLE)
    tracker = Tracker(StandIn())
    before = [tracker(image) for _ in range(LOOK_SOON)][-1]
    new = before[0]._replace(joints=before[0].joints + 500)
    monkeypatch.setattr(module, "poses_in_boxes", lambda *_: [one._replace(confidence=np.zeros(16))
                                                              for one in before.values()])
    monkeypatch.setattr(module, "find_people", lambda *_: [new, before[1], before[0]])
    assert tracker(image) == {0: before[0], 1: before[1], 2: new} and not tracker.lost


def test_who_was_hidden_is_followed_again():
    """Two people meet in one row; when they part both are followed, well before the next look around."""
    frames = [[(RED, 10 + 12 * n, 50, 40, 85), (GREEN, 260 - 12 * n, 50, 40, 85)] for n in range(20)]
    found = follow(frames)
    assert any(len(of) == 1 for of in found)                  # hidden
    for of, people in zip(found[14:], frames[14:]):
        assert sorted(of) == [0, 1] and set(colours(of, people).values()) == {RED, GREEN}


def test_most_frames_cost_a_crop_a_person():
    model = StandIn()
    follow([crossing(0)] * LOOK_AGAIN, model)
    assert model.looked[-(LOOK_AGAIN - 1):] == [2] * (LOOK_AGAIN - 1)
    assert sum(model.looked) > 2 * LOOK_AGAIN
    model = StandIn()
    assert follow([[]] * (LOOK_AGAIN + 1), model) == [{}] * (LOOK_AGAIN + 1)
    assert sum(model.looked) == (LOOK_AGAIN // LOOK_SOON + 1) * len(windows(320, 200))      # nobody is there


def test_who_comes_where_nobody_is_is_soon_seen():
    frames = [[]] * (LOOK_SOON + 1) + [[(RED, 20, 40, 50, 130)]] * LOOK_SOON
    assert [list(found) for found in follow(frames)] == [[]] * (2 * LOOK_SOON) + [[0]]


# ------------------------------------------------------------------------------- smoothing

def test_one_step_of_smoothing_by_hand():
    """dt = 1 / (2 pi): weight 1 / (1 + 1 / f) for a cut-off of f Hz; from 0 to 1 at rest the speed becomes
    half of 2 pi.
    """
    smooth, dt = OneEuro(), 1 / (2 * np.pi)
    assert smooth(np.zeros(1), dt, 1) == 0
    f = CUTOFF + BETA * np.pi
    assert smooth(np.ones(1), dt, 1) == pytest.approx(1 / (1 + 1 / f))
    speed = np.pi + 0.5 * (2 * np.pi * (1 - 1 / (1 + 1 / f)) - np.pi)  # stands still at 1: the filter goes on
    f2, x = CUTOFF + BETA * speed, 1 / (1 + 1 / f)
    assert smooth(np.ones(1), dt, 1) == pytest.approx(x + (1 - x) / (1 + 1 / f2))


def test_smoothing_is_the_same_at_any_size_and_place():
    """Pixels twice as large, and far from the image's corner; a box that changes moves nobody who stands."""
    steps = np.random.default_rng(0).standard_normal((20, 16, 2)).cumsum(0)
    small, large, still = OneEuro(), OneEuro(), OneEuro()
    for n, step in enumerate(steps):
        expected = small(step, 1 / 30, 50)
        np.testing.assert_allclose(large(1000 + 2 * step, 1 / 30, 100), 1000 + 2 * expected)
        np.testing.assert_allclose(still(steps[0] + 1000, 1 / 30, 50 + 10 * (n % 3)), steps[0] + 1000)
    assert np.abs(expected - steps[-1]).max() > 0.1


def test_a_noisy_sine_comes_out_smoother_and_nearer():
    """30 frames a second; a joint swings by 0.2 box sides every 3 seconds and is seen with a deviation of
    0.02.
    """
    t = np.arange(300) / 30
    true = 0.2 * np.sin(2 * np.pi * t / 3)
    noisy = true + 0.02 * np.random.default_rng(0).standard_normal(300)
    smooth = OneEuro()
    found = np.array([smooth(x, 1 / 30, 1) for x in noisy])
    assert np.abs(np.diff(found)).mean() < 0.6 * np.abs(np.diff(noisy)).mean()
    assert ((found - true) ** 2).mean() < 0.7 * ((noisy - true) ** 2).mean()
    still = OneEuro()
    assert np.std([still(x, 1 / 30, 1) for x in noisy - true][60:]) < 0.5 * 0.02


# ------------------------------------------------------------------------------- the pace

def test_the_rate_of_timestamps_by_hand():
    """3 steps of 40 ms; at most a thousand frames are looked at; a clock that stands still, or goes back."""
    class Stream:
        def __init__(self, times):
            self.times, self.at = times, -1

        def grab(self):
            self.at += 1
            return self.at < len(self.times)

        def get(self, what):
            return 1000 * self.times[self.at]

    cv2, slow = type("cv2", (), {"CAP_PROP_POS_MSEC": 0}), Stream(np.arange(2000) / 10)
    for times, rate in (([0, 0.04, 0.08, 0.12], 25), ([0, 0, 0.1, 0], 10), ([0] * 9, 0), ([0], 0), ([], 0)):
        assert frame_rate(cv2, Stream(times)) == pytest.approx(rate)
    assert frame_rate(cv2, slow) == pytest.approx(10) and slow.at == 999
