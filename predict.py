"""People and their joints in your own images and videos.

    python predict.py photo.jpg            # finds everybody -> predictions/photo-pose.jpg
    python predict.py holiday/ --json joints.json  # a folder; joints in the pixels of each file, upright
    python predict.py team.jpg --box 40 30 200 480 --box 260 25 210 490  # two people: x y width height
    python predict.py --camera 0 --smooth  # a camera, or name a video (OpenCV, requirements-extra.txt)

The network sees one person at a time: a square crop around a box. Without boxes, people.py finds them. A
person's right is orange, the left blue; joints whose confidence is below --threshold are drawn faint. A
video is known by its ending, or because OpenCV reads it and Pillow does not.
"""

import json
import os
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path

from tqdm import tqdm

import checkpoint
from common import (BadInput, CommandLine, check_device, check_folder, check_not_read, check_writable,
                    default_device, json_path, main_with_clear_errors, place_of, print_beside, refuse)
from data_coco import check_box, read_boxes
from data_mpii import JOINTS
from export import SHIPPED_STUDENT, for_inference
from images import (LONGEST, OUTPUT, THRESHOLD, VIDEO_OUTPUT, draw_poses, list_files, name_outputs,
                    read_image, report, write_image)
from people import find_people, person_score, poses_in_boxes
from videos import Tracker, draw_video, partial_name, title_of


# ------------------------------------------------------------------------------- images and boxes

def match_boxes(source, listed):
    """--boxes for the listed (file, path in the named folder) -> {absolute path: boxes}.

    A key is the path in the named folder, or another path to the file, or its bare name where no other image
    has it. BadInput for a key that is not that of one image.
    """
    paths, names, matched = defaultdict(set), defaultdict(set), {}
    for file, name in listed:
        for key in (str(name), os.path.abspath(file)):
            paths[key].add(os.path.abspath(file))
        names[file.name].add(os.path.abspath(file))
    for key, boxes in read_boxes(source, "--boxes ").items():
        files = paths[str(Path(key))] | paths[os.path.abspath(key)] or names[key]
        refuse((not files, f"--boxes {source} names {key}, which is not among the images"),
               (len(files) > 1, f"--boxes {source}: {key} may be any of {len(files)} images: write its path"),
               (files & matched.keys(), f"--boxes {source} names {key} twice, by two paths: leave one out"))
        matched[min(files)] = boxes
    return matched


def check_overlap(path, boxes, size, scale=1):
    """BadInput where a box, in pixels of the file, lies outside an image of this size, read at this scale."""
    for box in boxes or ():
        x, y, width, height = (scale * number for number in box)
        if not (x < size[0] and y < size[1] and x + width > 0 and y + height > 0):
            raise BadInput(f"{path} has nothing in the box {box}")


# ------------------------------------------------------------------------------- people

def people_in(args, model, image, boxes):
    """A list of Found in an image: in its boxes, in the whole of it (--whole), or wherever they are."""
    if args.whole:
        whole = [[0, 0, *image.info.get("decoded size", image.size)]]
        return poses_in_boxes(model, image, whole, args.device, args.flip_test, tight=False)
    if boxes is not None:
        return poses_in_boxes(model, image, boxes, args.device, args.flip_test)
    return find_people(model, image, args.device)


# ------------------------------------------------------------------------------- output

def record(path, people, scale=1, ids=None, **when):
    """The entry of --json for an image or a frame, in the pixels of the file as it is shown upright."""
    of_file = lambda value: round(float((value + 0.5) / scale - 0.5), 2)     # of a pixel's centre
    return {"file": str(path), **when, "people": [
        {**({} if number is None else {"id": number}),
         "box": [round(side / scale, 2) for side in person.box], "score": round(person_score(person), 4),
         "joints": {name: [of_file(x), of_file(y), round(float(sure), 4)]
                    for name, (x, y), sure in zip(JOINTS, person.joints, person.confidence)}}
        for number, person in zip(ids or repeat(None), people)]}


def in_words(count):
    return "1 person" if count == 1 else f"{count} people"


@contextmanager
def json_file(path):
    """A function that adds a record to a json file; the file appears at its path when it is complete.

    Where the work is interrupted, or the disk is full, what was found stays as PATH.partial; without a record
    nothing is written.
    """
    place, mode, target = place_of(path)
    file = None

    def add(record):
        nonlocal file
        before = ",\n"
        with json_errors(path):
            if file is None:
                file, before = open(place, mode), f'{{"joints": {json.dumps(JOINTS)}, "images": [\n'
            file.write(before + json.dumps(record))

    try:
        try:
            yield add
        finally:
            if file:
                with json_errors(path), file:      # closed, also when it cannot be written
                    file.write("]}\n")
        if file and target:
            with json_errors(path):
                os.replace(place, target)
    except BaseException as error:
        if file and target:
            if place.stat().st_size:
                cut = ", whose end may be missing" if isinstance(error, JsonError) else ""
                print(f"what was found until then is in {place}{cut}", file=sys.stderr)
            else:
                place.unlink()
        raise


class JsonError(BadInput):
    """--json cannot be written: nothing goes on."""


@contextmanager
def json_errors(path):
    """OSErrors in it become a JsonError."""
    try:
        yield
    except OSError as error:
        raise JsonError(f"--json {path} cannot be written: {error.strerror or error}") from error


def in_out(path, out):
    """Is a file to be written in the folder --out, which need not be there yet?"""
    return path and path.resolve().parent == out.resolve()


def free_outputs(args, listed, ending):
    """Where, below --out, each of the listed (file, path in the named folder) is drawn: over none of them."""
    read = {os.path.realpath(file) for file, _ in listed if not isinstance(file, int)}
    is_free = lambda output: read.isdisjoint(map(os.path.realpath, (args.out / output,
                                                                    partial_name(args.out / output))))
    return name_outputs([name for _, name in listed], ending, is_free)


def predict_images(args, model, listed, boxes_of, add, failed):
    """Find people in images, (file, path in the named folder) each, and draw them.

    What fails is reported, the rest goes on. boxes_of: {file: its boxes}, others have --box. add takes each
    `record`, if it is not None.
    """
    outputs = free_outputs(args, listed, OUTPUT)
    bar = tqdm(listed, "images", leave=False, disable=None if len(listed) > 1 else True)
    counts, reduced = [], 0                        # people in each image that was read
    for (path, _), output in zip(bar, outputs):
        try:
            image, scale = read_image(path)
            boxes = boxes_of.get(os.path.abspath(path), args.box)
            check_overlap(path, boxes, image.size, scale)
            boxes = boxes and [[scale * number for number in box] for box in boxes]
            people = people_in(args, model, image, boxes)
        except BadInput as error:
            report(error, failed)
            continue
        if add:
            add(record(path, people, scale))
        try:
            write_image(draw_poses(image, people, args.threshold), args.out / output)
            counts.append(len(people))
            reduced += scale < 1
        except OSError as error:
            report(f"{path}: {args.out / output} cannot be written ({error.strerror or error})"
                   + (f"; its joints are in {args.json}" if add else ""), failed)
    if counts:
        nobody = f", nobody found in {counts.count(0)}" if 0 in counts else ""
        below = "**/" if any(output.parent.name for output in outputs) else ""
        print(f"{in_words(sum(counts))} in {len(counts)} of {len(listed)} images{nobody}: "
              f"{args.out}/{below}*{OUTPUT}" + (f", {args.json}" if args.json else ""))
    if reduced:
        print(f"drawn in 1/2, 1/4 or 1/8 of their size, as JPEGs of {2 * LONGEST:,} pixels and up: "
              f"{reduced}; boxes and joints are in pixels of the file")


def predict_video(args, model, source, name, add):
    """Follow people through a video file, or a camera (an int), and draw them into the video `name`.

    add as in `predict_images`. BadInput where it cannot be read, or not to its end.
    """
    target, fixed, title = args.out / name, args.box or args.whole, title_of(source)
    tracker = Tracker(model, args.device, args.flip_test)

    def follow(image):
        check_overlap(title, args.box, image.size)
        return dict(enumerate(people_in(args, model, image, args.box))) if fixed else tracker(image)

    def draw(image, people):
        draw_poses(image, people.values(), args.threshold, () if fixed else people)

    def note(people, frame, seconds):
        add(record(title, people.values(), ids=people, frame=frame, seconds=round(seconds, 3)))

    video = draw_video(source, target, follow, draw, add and note, args.smooth)
    found = f"at most {in_words(video.most)} in a frame" if video.most else "nobody found"
    print(f"{target}: {video.frames} frames, {video.rate:g} a second, {found}"
          + (f", {args.json}" if add else ""))
    refuse((video.cut, f"{title} seems to be cut short: {video.cut} could be read, and are in {target}"))


def parse_arguments():
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("images", nargs="*", type=Path,
        help=f"images, videos, or folders of them (without our own *{OUTPUT} and *{VIDEO_OUTPUT})")
    add("--camera", type=int, metavar="N", help="number of a camera; Ctrl-C ends it")
    add("--checkpoint", type=Path, default=SHIPPED_STUDENT,
        help=f"network (default: {SHIPPED_STUDENT.parent.name}/{SHIPPED_STUDENT.name})")
    add("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="tight box around a person, in pixels, in every image; once for each person "
             "(default: people are found)")
    add("--boxes", type=Path,
        help='json file of boxes, by paths in the named folder: {"photo.jpg": [[x, y, width, height], ...]}; '
             "in images that it does not name people are found")
    add("--whole", action="store_true", help="one person, whose box is the whole image")
    add("--flip-test", action="store_true", help="average with the mirror image, in twice the time "
        "(people who are looked for always are)")
    add("--threshold", type=float, default=THRESHOLD,
        help=f"draw joints of less confidence faint (default: {THRESHOLD})")
    add("--smooth", action="store_true", help="smooth joints over time (videos and cameras; 1 Euro filter)")
    add("--out", type=Path, default=Path("predictions"), help="folder (default: predictions/)")
    add("--json", type=json_path, help="write boxes, scores, joints and confidences to this file, too (-: "
        "standard output); of videos also the frame, the second and each person's id")
    add("--device", default=default_device(), help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args()
    check_device(args.device)
    if args.out.is_dir() or not in_out(args.json, args.out):
        check_folder(args.json, "--json ")
    check_writable(args.out, "--out ")
    refuse((not args.images and args.camera is None, "name images, a folder, a video, or --camera N"),
           (args.camera is not None and not 0 <= args.camera < 2 ** 31, f"there is no camera {args.camera}"),
           (bool(args.box) + bool(args.boxes) + args.whole > 1,
            "--box, --boxes and --whole each say where people are: leave all but one out"),
           (not 0 <= args.threshold <= 1, f"--threshold {args.threshold:g} must be between 0 and 1"))
    try:
        args.box = args.box and [check_box(box) for box in args.box]
    except ValueError as error:
        raise BadInput(f"--box: {error}") from error
    return args


def main():
    args = parse_arguments()
    with print_beside(args.json):
        predict(args)


def predict(args):
    """Find, draw and write what the command line asks for. SystemExit(2) where some of it failed."""
    failed = []
    images, videos = list_files(args.images, args.out, failed)
    recording = Path(f"camera-{args.camera}-{time.strftime('%Y%m%d-%H%M%S')}")         # over none before
    sources = videos + [(args.camera, recording)] * (args.camera is not None)
    if images and not (sources or any(os.path.lexists(file) for file, _ in images)):
        raise BadInput(f"there is no file {images[0][0]}: name images, folders of images, or videos")
    if sources and args.boxes:
        refuse((not images or args.camera is not None or any(file in args.images for file, _ in videos),
                "--boxes is for images: leave it out for videos and cameras"))
        print(f"left out, as --boxes is for images: {', '.join(str(file) for file, _ in videos)}")
        sources = []
    read = [file for file, _ in images + videos] + [args.checkpoint] + [args.boxes] * bool(args.boxes)
    check_not_read(args.json, read)
    refuse((args.smooth and not sources, "--smooth is for videos and cameras: leave it out for images"))
    boxes = match_boxes(args.boxes, images) if args.boxes else {}
    if not (images or sources):
        raise SystemExit(2)
    model, metadata = checkpoint.load(args.checkpoint, args.device)
    print(f"{args.checkpoint.name}: {checkpoint.describe(model.config)}, learned from {metadata.get('data')}"
          + (f", PCKh@0.5 {metadata['pckh@0.5']:.1f} on people held out" if "pckh@0.5" in metadata else ""))
    if str(metadata.get("data")).startswith("drawn/"):
        print("it has only seen synthetic people: expect little of photos")
    looks = sources or any(os.path.abspath(file) not in boxes for file, _ in images)
    refuse((looks and not (args.box or args.whole or getattr(model.head, "scored", True)),
            f"{args.checkpoint} was trained without confidence, by which people are found: name them with "
            f"--box{'' if sources else ', --boxes'} or --whole, or train it with a teacher"))
    model = for_inference(model)
    if in_out(args.json, args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    with json_file(args.json) if args.json else nullcontext() as add:
        for (source, _), name in zip(sources, free_outputs(args, sources, VIDEO_OUTPUT)):
            try:
                predict_video(args, model, source, name, add)
            except JsonError:
                raise
            except BadInput as error:                    # the others go on
                report(error, failed)
        if images:
            predict_images(args, model, images, boxes, add, failed)
    if failed:
        raise SystemExit(2)


if __name__ == "__main__":
    main_with_clear_errors(main)
