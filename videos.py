"""People in videos: followed from frame to frame, smoothed, drawn into a video of the same pace.

    python predict.py film.mp4 --smooth        # or --camera 0; needs OpenCV, requirements-extra.txt

    Tracker       looks for each person around the joints of the last frame, and now and then for everybody
    OneEuro       lets joints shake less
    draw_video    reads frames, asks who is in each, draws them, writes them
"""

import math
import os
import sys
import time
from contextlib import suppress
from os.path import isdir, isfile
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import BadInput, optional
from images import open_video, utf8
from people import PERSON, box_of_joints, find_people, is_new, person_score, poses_in_boxes, shared

STILL = 0.52                # least score of somebody who was in the last frame: below PERSON
# frames after which newcomers are looked for; the same where somebody gets lost, or nobody is there
LOOK_AGAIN, LOOK_SOON = 30, 5
CUTOFF, BETA, SPEED_CUTOFF = 1.0, 5.0, 1.0       # of OneEuro: Hz, Hz for each box side a second, Hz
TIMED_FRAMES = 1000         # whose timestamps give a video's rate
WHOLE = 0.9                 # of a video's stated duration is there, or it is cut short


# ------------------------------------------------------------------------------- from frame to frame

class Tracker:
    """People followed from frame to frame: each is looked for around the joints that it had in the last one.

    Everybody is looked for in the first frame, every LOOK_AGAIN frames, and sooner where somebody gets lost
    or nobody is there. Who is lost is also looked for around the last joints, and given up when the second
    look around ends in vain.
    """

    def __init__(self, model, device="cpu", flip_test=False):
        self.model, self.device, self.flip_test = model, device, flip_test
        self.people, self.lost = {}, {}                       # {id: Found}
        self.missed = set()                                   # ids of lost people whom a look around missed
        self.since, self.ids = LOOK_AGAIN, 0                  # frames since the last look around, ids given

    def __call__(self, image):
        """The next frame, a Pillow image -> {id: Found}.

        A person keeps its id. People of whom one hides the other may exchange theirs.
        """
        people, lost = {}, {}
        for before, least, flip_test in ((self.people, STILL, self.flip_test), (self.lost, PERSON, True)):
            boxes = list(map(box_of_joints, before.values()))
            seen = poses_in_boxes(self.model, image, boxes, self.device, flip_test)
            for number, person in zip(before, seen):
                if person_score(person) >= least and is_new(person, people.values()):
                    people[number] = person._replace(box=box_of_joints(person))
                else:
                    lost[number] = before[number]
        missed = self.missed & lost.keys()
        # somebody lost whom no look around has missed yet, or nobody at all
        soon = len(missed) < len(lost) or not (people or lost)
        if self.since >= LOOK_AGAIN or soon and self.since >= LOOK_SOON:
            for person in find_people(self.model, image, self.device):
                if is_new(person, people.values()):
                    number = self.who(person, lost)
                    lost.pop(number, None)
                    people[number] = person
            lost = {number: person for number, person in lost.items() if number not in missed}
            missed, self.since = set(lost), 0
        self.people, self.lost, self.missed, self.since = people, lost, missed, self.since + 1
        return dict(people)

    def who(self, person, lost):
        """The id of the lost person whose box is most alike, if one is that of this person, or a new id."""
        alike = {number: shared(box_of_joints(person), box_of_joints(old))[0] for number, old in lost.items()
                 if not is_new(person, [old])}
        if alike:
            return max(alike, key=alike.get)
        self.ids += 1
        return self.ids - 1


class OneEuro:
    """1 Euro filter: smooth at rest, quick in motion (Casiez, Roussel and Vogel, CHI 2012).

        a(f) = 1 / (1 + 1 / (2 pi f dt))               weight of a new value at a cut-off frequency f
        v   <- v + a(SPEED_CUTOFF) ((x_new - x) / dt - v)
        x   <- x + a(CUTOFF + BETA |v| / side) (x_new - x)
    """

    def __init__(self):
        self.x, self.speed = None, 0

    def __call__(self, x, dt, side):
        """Filtered positions: x is an array of any shape in pixels, dt the seconds since the last call.

        side: of the person's box, in pixels; what is quick is measured in it.
        """
        if self.x is None:
            self.x = x
        self.speed = self.speed + self.weight(SPEED_CUTOFF, dt) * ((x - self.x) / dt - self.speed)
        self.x = self.x + self.weight(CUTOFF + BETA * np.abs(self.speed) / side, dt) * (x - self.x)
        return self.x

    @staticmethod
    def weight(frequency, dt):
        return 1 / (1 + 1 / (2 * math.pi * frequency * dt))


# ------------------------------------------------------------------------------- a whole video

class Video(NamedTuple):
    """What `draw_video` has written."""
    frames: int
    rate: float                      # frames a second
    most: int                        # people in a frame
    cut: str                         # how much could be read of a video that is cut short; "": all of it


def partial_name(target):
    """What a video is called until it is complete: like our own output, which folders are listed without."""
    return target.with_name(f"partial-{target.name}")


def title_of(source):
    """What messages and --json call a video file or a camera (an int)."""
    return f"camera {source}" if isinstance(source, int) else str(source)


def draw_video(source, target, follow, draw, note=None, smooth=False):
    """Draw people into the frames of a video file, or of a camera (an int) until Ctrl-C -> Video.

    follow(image) -> {id: Found} of the next frame, a Pillow image; draw(image, people) draws them, in place;
    note(people, frame, seconds), if any, is told of each frame that is read, by its number in the target; a
    camera's frame stands there until the next. smooth: joints by OneEuro, each person's by itself. Until
    it is complete the target is called partial-... BadInput where nothing can be read or written.
    """
    camera, title = isinstance(source, int), title_of(source)
    if not camera and not isfile(source):
        raise BadInput(f"there is no video {source}")
    if isdir(target):
        raise BadInput(f"{target} is a folder: remove it, or name another place with --out")
    partial = partial_name(target)
    stream, cv2 = open_video(source), optional("cv2")
    if not stream.isOpened():
        raise BadInput(f"OpenCV cannot open {title}"
                       + ("" if camera else ": it is no video, a damaged one, or of a kind to be converted"))
    stated, filters, most = stream.get(cv2.CAP_PROP_FPS), {}, 0
    rate = stated if 0 < stated < 1000 else 25           # a header may state the ticks of a clock instead
    if not camera:
        rate, stream = frame_rate(cv2, stream) or rate, open_video(source)
    rate = float(f"{rate:.4g}")                  # MPEG-4 has no room for more digits of any rate
    writer, written, began, last = None, 0, time.perf_counter(), 0
    bar = tqdm(unit=" frames", leave=False, disable=None)
    try:
        while (read := stream.read())[0]:
            image = Image.fromarray(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
            people = follow(image)
            most = max(most, len(people))
            seconds = time.perf_counter() - began
            now = seconds if camera else stream.get(cv2.CAP_PROP_POS_MSEC) / 1000
            step = now - last if now > last else 1 / rate
            now = last + step if written else now                  # also where there are no timestamps
            if smooth:
                # who comes back may be elsewhere, and begins anew
                filters = {number: filters.get(number) or OneEuro() for number in people}
                smoothed = lambda number, person: person._replace(
                    joints=filters[number](person.joints, step, max(person.box[2:])))
                people = {number: smoothed(number, person) for number, person in people.items()}
            last = now
            if writer is None:
                writer = open_writer(cv2, partial, rate, image.size)
            draw(image, people)
            frame = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
            # a camera's frame stands for the time that the network took
            first, copies = written, max(1, round(now * rate) - written) if camera else 1
            for _ in range(copies):
                writer.write(frame)
                written += 1
            if note:
                note(people, first, now)
            bar.update()
    except BaseException as reason:
        if not (camera and written and isinstance(reason, KeyboardInterrupt)):   # Ctrl-C ends a camera alone
            if written:
                print(f"{partial} ends after {written} frames", file=sys.stderr)
            raise
    finally:
        bar.close()
        expected = stream.get(cv2.CAP_PROP_FRAME_COUNT)          # by the header, as `stated` is
        stream.release()
        if writer is not None:
            writer.release()
    if not written:
        raise BadInput(f"{title} gave no frame")
    if not open_video(partial).read()[0]:
        raise BadInput(f"{partial} cannot be written: "
                       + (system_error(partial, "ab") or "OpenCV does not say why"))
    try:
        os.replace(partial, target)
    except OSError as error:
        raise BadInput(f"{target} cannot be replaced ({error.strerror}): the video is {partial}") from error
    is_cut = (not camera and written < WHOLE * expected
              and stated > 0 and written / rate < WHOLE * expected / stated)
    return Video(written, rate, most,
                 f"{written / rate:.1f} of {expected / stated:.1f} seconds" if is_cut else "")


def frame_rate(cv2, stream):
    """Frames a second by the timestamps of an opened video, which is read; 0 where it has none."""
    times = []
    while len(times) < TIMED_FRAMES and stream.grab():
        times.append(stream.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    steps = np.diff(times)
    return 1 / steps[steps > 0].mean() if (steps > 0).any() else 0


def open_writer(cv2, target, rate, size):
    """A cv2.VideoWriter of an MPEG-4 file. BadInput where it cannot be written."""
    if why := system_error(target, "wb"):
        raise BadInput(f"{target} cannot be written: {why}")
    writer = cv2.VideoWriter(utf8(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise BadInput(f"OpenCV cannot write {target}: it has no codec mp4v, or not for "
                       f"{size[0]} x {size[1]} pixels")
    return writer


def system_error(target, mode):
    """What the system says of writing 64 kB to a file, "" if nothing. Makes its folder, removes the file."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, mode) as file:
            file.write(bytes(2 ** 16))
        return ""
    except OSError as error:
        return error.strerror
    finally:
        with suppress(OSError):
            target.unlink()
