"""Joints of the people in your own images.

    python predict.py photo.jpg            # the whole image is the person's box -> predictions/photo-pose.jpg
    python predict.py holiday/ --json joints.json  # a folder; joints in the pixels of each file, upright
    python predict.py team.jpg --box 40 30 200 480 --box 260 25 210 490  # two people: x y width height
    python predict.py --camera 0 --smooth  # a camera, or name a video (OpenCV, requirements-extra.txt)

The network sees one person: a square crop around a box. The person's right is orange, the left blue; joints
whose confidence is below --threshold are drawn faint. What Pillow does not read and OpenCV does is a video.
"""

import json
import math
import os
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain, count, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
from common import (BadInput, CommandLine, check_device, check_folder, check_writable, default_device,
                    main_with_clear_errors, optional, refuse)
from crops import crop_matrix, cut, invert, transform
from data_mpii import BOX_ENLARGEMENT, FARTHEST, JOINTS
from evaluate import predict_crops
from export import WEIGHTS, for_inference
from images import THRESHOLD, LONGEST, draw_skeleton, image_endings, open_safely, read_image, rgb

# Endings of images that few Pillows read: in a folder each is named in an error, not passed over.
IMAGES = set(".avif .heic .heif .hif .jxl .jp2 .j2k .jpx .psd .svg .tga .ico .dib .eps .pcx .qoi .exr .hdr "
             ".dng .cr2 .cr3 .nef .arw .orf .raf .rw2".split())
# Endings of videos, as folders hold them. A file that is named may have any.
VIDEOS = set(".mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .wmv .3gp .3g2 .ts .mts .m2ts .flv .f4v .ogv .asf "
             ".vob .mjpeg .mjpg .mxf .divx .y4m".split())
OUTPUT, VIDEO_OUTPUT = "-pose.jpg", "-pose.mp4"      # end the names of our output: left out of folders
JPEG_SIDE = 65_500                   # pixels; libjpeg writes no longer side
TIMED_FRAMES = 1000                  # whose timestamps give a video's rate
WHOLE = 0.9                          # of a video's stated duration is there, or it is cut short
THINNEST = 2                         # pixels of a line
BATCH_IMAGES, BATCH_CROPS = 8, 32    # images read before the network runs, crops in the network at once
BATCH_PIXELS = 50_000_000            # of large images fewer are read
CUTOFF, BETA, SPEED_CUTOFF = 1.0, 5.0, 1.0       # of OneEuro: Hz, Hz for each box side a second, Hz


class Found(NamedTuple):
    """One person in one image."""
    box: list                        # x, y, width, height in pixels of the image
    joints: np.ndarray               # (16, 2) x, y in pixels of the image
    confidence: np.ndarray           # (16,) in [0, 1]


# ------------------------------------------------------------------------------- images and boxes

def list_files(paths, out, failed):
    """-> images, videos: (file, its path in the named folder) of named files, and of what folders hold.

    Left out of folders are our own output, macOS's "._" files, and what is neither image nor video by name.
    failed: list of errors, to which folders that cannot be read are added.
    """
    images, videos, known, out = [], [], image_endings() | IMAGES, out.resolve()
    for path in paths:
        if not path.is_dir():
            (videos if is_video(path) else images).append((path, Path(path.name)))
            if path.name.endswith((OUTPUT, VIDEO_OUTPUT)):
                print(f"{path} is named like our own output: a skeleton may be drawn on it already")
            continue
        within = out if path.resolve() in out.parents else None          # our output, below this folder
        inside, ours = [], 0
        for folder, _, names in os.walk(path, onerror=lambda error: report(error, failed)):
            names = [] if within and Path(folder).resolve().is_relative_to(within) else names
            for file in (Path(folder, name) for name in names if not name.startswith("._")):
                is_ours, is_lost = file.name.endswith((OUTPUT, VIDEO_OUTPUT)), not os.path.exists(file)
                ours += is_ours
                if file.suffix.lower() in known | VIDEOS and not is_ours and (is_lost or file.is_file()):
                    inside.append(file)
        if ours:
            print(f"{path}: left out as our own output, *{OUTPUT} or *{VIDEO_OUTPUT}: {ours}")
        if not inside:
            report(f"{path} holds no images or videos, by their names' endings", failed)
        for file in sorted(inside):
            (images if file.suffix.lower() in known else videos).append((file, file.relative_to(path)))
    return images, videos


def is_video(path):
    """Is a named file a video? By its ending, or else because OpenCV reads it and Pillow does not."""
    ending = path.suffix.lower()
    if ending in VIDEOS | IMAGES | image_endings() or not path.is_file():
        return ending in VIDEOS
    with suppress(BadInput):
        return not open_safely(path, lambda image: image.size)
    with suppress(BadInput):                                     # without OpenCV it is an image, in an error
        return open_video(path).read()[0]
    return False


def report(error, failed):
    """Print an error, and add it to the list of what failed: the rest goes on."""
    print(f"error: {error}", file=sys.stderr)
    failed.append(error)


def name_outputs(names, ending):
    """a.jpg -> a-pose.jpg, or a-2-pose.jpg where that is taken, by a.png or by a file of another folder."""
    taken = {}                                       # in order
    numbers = defaultdict(lambda: chain([""], (f"-{n}" for n in count(2))))       # of each stem, not used yet
    for name in names:
        free = (name.with_name(f"{name.stem}{n}{ending}") for n in numbers[name.with_suffix("")])
        taken[next(output for output in free if output not in taken)] = True
    return list(taken)


def read_boxes(file):
    """{"photo.jpg": [[x, y, width, height], ...], ...} of --boxes; BadInput for anything else."""
    try:
        boxes = json.loads(Path(file).read_bytes())
        return {name: [check_box(box) for box in of] for name, of in boxes.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"--boxes {file}: {' '.join(str(error).split())[:160]}; it must be json such as "
                       f'{{"photo.jpg": [[x, y, width, height]]}}') from error


def match_boxes(source, listed):
    """--boxes for the listed (file, path in the named folder) -> {absolute path: boxes}.

    A key is the path in the named folder, or another path to the file, or its bare name where no other image
    has it. BadInput for a key that is not that of one image.
    """
    paths, names, found = defaultdict(set), defaultdict(set), {}
    for file, name in listed:
        for key in (str(name), os.path.abspath(file)):
            paths[key].add(os.path.abspath(file))
        names[file.name].add(os.path.abspath(file))
    for key, boxes in read_boxes(source).items():
        files = paths[str(Path(key))] | paths[os.path.abspath(key)] or names[key]
        refuse((not files, f"--boxes {source} names {key}, which is not among the images"),
               (len(files) > 1, f"--boxes {source}: {key} may be any of {len(files)} images: write its path"),
               (files & found.keys(), f"--boxes {source} names {key} twice, by two paths: leave one out"))
        found[min(files)] = boxes
    return found


def check_box(box):
    x, y, width, height = (float(number) for number in box)
    if not ((np.abs([x, y, width, height]) < FARTHEST).all() and width > 0 and height > 0):
        raise ValueError(f"the box {box} is not x y width height with a size above 0, "
                         f"within {FARTHEST:,} pixels")
    return [x, y, width, height]


def check_overlap(path, boxes, size, scale=1):
    """BadInput where a box, in pixels of the file, lies outside an image of this size, read at this scale."""
    for box in boxes or ():
        x, y, width, height = (scale * number for number in box)
        if not (x < size[0] and y < size[1] and x + width > 0 and y + height > 0):
            raise BadInput(f"{path} has nothing in the box {box}")


# ------------------------------------------------------------------------------- people

def box_matrix(box, size, tight):
    """Affine map image -> crop (2, 3): a square around the box, with MPII's margin around a tight one."""
    x, y, width, height = box
    side = max(width, height) * (BOX_ENLARGEMENT if tight else 1)
    return crop_matrix([[x + (width - 1) / 2, y + (height - 1) / 2]], [side], size)[0]


@torch.inference_mode()
def find(model, images, boxes, device="cpu", flip_test=False):
    """A list of Found for each of some Pillow images, of any mode.

    boxes: for each image a list of tight boxes, or None for one person in the whole image.
    """
    images = [rgb(image) for image in images]
    tight = [of is not None for of in boxes]
    boxes = [[[0, 0, *image.info.get("decoded size", image.size)]] if of is None else of
             for image, of in zip(images, boxes)]
    if not any(boxes):
        return [[] for _ in boxes]
    matrices = torch.stack([box_matrix(box, model.size, is_tight)
                            for of, is_tight in zip(boxes, tight) for box in of])
    owners = [image for image, of in zip(images, boxes) for _ in of]
    crops = np.stack([cut(image, matrix, model.size) for image, matrix in zip(owners, matrices)])
    parts = [predict_crops(model, part.to(device).permute(0, 3, 1, 2).float() / 255, flip_test)
             for part in torch.from_numpy(crops).split(BATCH_CROPS)]
    xy, confidence = (torch.cat(part).cpu() for part in zip(*parts))
    people = iter(zip(transform(invert(matrices), xy).numpy(), confidence.numpy()))          # crop -> image
    return [[Found(box, *next(people)) for box in of] for of in boxes]


class OneEuro:
    """1 Euro filter: smooth at rest, quick in motion (Casiez, Roussel and Vogel, CHI 2012).

        a(f) = 1 / (1 + 1 / (2 pi f dt))               weight of a new value at a cut-off frequency f
        v   <- v + a(SPEED_CUTOFF) ((x_new - x) / dt - v)
        x   <- x + a(CUTOFF + BETA |v|) (x_new - x)
    """

    def __init__(self):
        self.x, self.speed = None, 0

    def __call__(self, x, dt):
        """Filtered positions: x is an array of any shape in box sides, dt the seconds since the last call."""
        if self.x is None:
            self.x = x
        self.speed = self.speed + self.weight(SPEED_CUTOFF, dt) * ((x - self.x) / dt - self.speed)
        self.x = self.x + self.weight(CUTOFF + BETA * np.abs(self.speed), dt) * (x - self.x)
        return self.x

    @staticmethod
    def weight(frequency, dt):
        return 1 / (1 + 1 / (2 * math.pi * frequency * dt))


def draw_poses(image, people, threshold=THRESHOLD):
    width = max(THINNEST, round(max(image.size) / 250))
    for person in people:
        visible = np.ones(len(JOINTS), bool)
        draw_skeleton(image, person.joints, visible, None, width, person.confidence, threshold)
    return image


# ------------------------------------------------------------------------------- output

def record(path, people, scale):
    """The entry of --json for an image, in the pixels of the file as it is shown upright."""
    of_file = lambda value: round(float((value + 0.5) / scale - 0.5), 2)     # of a pixel's centre
    return {"file": str(path), "people": [
        {"box": [round(number / scale, 2) for number in person.box],
         "joints": {name: [of_file(x), of_file(y), round(float(sure), 4)]
                    for name, (x, y), sure in zip(JOINTS, person.joints, person.confidence)}}
        for person in people]}


@contextmanager
def json_file(path):
    """A function that adds a record to a json file; the file appears at its path when it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w") as file:
            file.write(f'{{"joints": {json.dumps(JOINTS)}, "images": [')
            between = chain(["\n"], repeat(",\n"))
            yield lambda record: file.write(next(between) + json.dumps(record))
            file.write("]}\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def in_batches(images):
    """Lists of tuples (path, name, image, ...): BATCH_IMAGES of them, or as many as have BATCH_PIXELS."""
    batch, pixels = [], 0
    for each in images:
        batch.append(each)
        pixels += math.prod(each[2].size)
        del each
        if len(batch) == BATCH_IMAGES or pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def predict_images(args, model, listed, boxes, failed):
    """Find people in images: (file, path in the named folder) each. What fails is reported, the rest goes on.

    boxes: {file: its boxes}, others have --box.
    """
    read = reduced = 0

    def usable():
        outputs = name_outputs([name for _, name in listed], OUTPUT)
        bar = tqdm(listed, "images", leave=False, disable=None if len(listed) > 1 else True)
        for (path, _), output in zip(bar, outputs):
            try:
                image, scale = read_image(path)
                of = boxes.get(os.path.abspath(path), args.box)
                check_overlap(path, of, image.size, scale)
                yield path, output, image, scale, of and [[scale * number for number in box] for box in of]
            except BadInput as error:
                report(error, failed)

    with json_file(args.json) if args.json else nullcontext() as add:
        for batch in in_batches(usable()):
            found = find(model, [image for _, _, image, *_ in batch], [of for *_, of in batch], args.device,
                         args.flip_test)
            for (path, output, image, scale, _), people in zip(batch, found):
                if add:
                    add(record(path, people, scale))
                try:
                    write_image(draw_poses(image, people, args.threshold), args.out / output)
                    read, reduced = read + 1, reduced + (scale < 1)
                except OSError as error:
                    report(f"{path}: {args.out / output} cannot be written ({error.strerror or error})"
                           + (f"; its joints are in {args.json}" if add else ""), failed)
            del batch[:], image          # their memory is needed for the next ones
    if read or args.json:
        print(f"{read} of {len(listed)} images: {args.out}/*{OUTPUT}"
              + (f", {args.json}" if args.json else ""))
    if reduced:
        print(f"drawn in 1/2, 1/4 or 1/8 of their size, as JPEGs longer than {LONGEST:,} pixels: {reduced}; "
              f"boxes and joints are in pixels of the file")


def write_image(image, path):
    """Save as JPEG. OSError where that cannot be done."""
    if max(image.size) > JPEG_SIDE:
        raise OSError(f"a JPEG has at most {JPEG_SIDE:,} pixels a side")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


def open_video(source):
    """A cv2.VideoCapture of a file, or of a camera (an int), opened or not."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")             # what is wrong is said in one line, by us
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return optional("cv2").VideoCapture(source if isinstance(source, int) else utf8(source))


def utf8(path):
    """A path as OpenCV takes it. BadInput where the name is not UTF-8, with which OpenCV crashes."""
    try:
        return str(path).encode().decode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{path}: OpenCV takes no names that are not UTF-8: rename it") from error


def frame_rate(cv2, stream):
    """Frames a second by the timestamps of an opened video, which is read; 0 where it has none."""
    times = []
    while len(times) < TIMED_FRAMES and stream.grab():
        times.append(stream.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    steps = np.diff(times)
    return 1 / steps[steps > 0].mean() if (steps > 0).any() else 0


def predict_video(args, model, source, name):
    """Draw the frames of a video file, or of a camera (an int) until Ctrl-C, into the video `name`."""
    camera = isinstance(source, int)
    if not camera and not source.is_file():
        raise BadInput(f"there is no video {source}")
    stream, cv2 = open_video(source), optional("cv2")
    if not stream.isOpened():
        raise BadInput(f"OpenCV cannot open {'camera ' if camera else ''}{source}")
    stated, target, smooth = stream.get(cv2.CAP_PROP_FPS), args.out / name, OneEuro()
    rate = stated if 0 < stated < 1000 else 25           # a header may state the ticks of a clock instead
    if not camera:
        rate, stream = frame_rate(cv2, stream) or rate, open_video(source)
    rate = float(f"{rate:.4g}")                          # MPEG-4 has no room for more digits
    target.parent.mkdir(parents=True, exist_ok=True)
    writer, frames, written, began, last = None, 0, 0, time.perf_counter(), 0
    try:
        while (read := stream.read())[0]:
            image = Image.fromarray(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
            check_overlap(source, args.box, image.size)
            people, = find(model, [image], [args.box], args.device, args.flip_test)
            seconds = time.perf_counter() - began
            now = seconds if camera else stream.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if args.smooth:
                sides = np.array([max(person.box[2:]) for person in people])[:, None, None]
                joints = np.stack([person.joints for person in people]) / sides
                joints = smooth(joints, now - last if now > last else 1 / rate)
                people = [person._replace(joints=xy) for person, xy in zip(people, sides * joints)]
            last = now
            frame = cv2.cvtColor(np.asarray(draw_poses(image, people, args.threshold)), cv2.COLOR_RGB2BGR)
            if writer is None:
                if why := system_error(target, "wb"):
                    raise BadInput(f"{target} cannot be written: {why}")
                writer = cv2.VideoWriter(utf8(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, image.size)
                if not writer.isOpened():
                    raise BadInput(f"OpenCV cannot write {target}: it has no codec mp4v, or not for "
                                   f"{image.width} x {image.height} pixels")
            # a camera's frame stands for the time that the network took
            for _ in range(max(1, round(now * rate) - written) if camera else 1):
                writer.write(frame)
                written += 1
            frames += 1
            print(f"\r{frames} frames, {frames / seconds:.1f} a second", end="", flush=True)
    except KeyboardInterrupt:
        if source != args.camera:        # Ctrl-C ends a camera, and stops the work on files
            raise
    finally:
        expected = stream.get(cv2.CAP_PROP_FRAME_COUNT)          # by the header, as `stated` is
        stream.release()
        if writer is not None:
            writer.release()
    if not frames:
        raise BadInput(f"{source} gave no frame")
    if not open_video(target).read()[0]:
        why = system_error(target, "ab") or "OpenCV does not say why"
        raise BadInput(f"{target} cannot be written: {why}")
    print(f"\n{target}: {frames} frames, {rate:g} a second")
    if not camera and frames < WHOLE * expected and stated > 0 and frames / rate < WHOLE * expected / stated:
        raise BadInput(f"{source} seems to be cut short: {frames / rate:.1f} of {expected / stated:.1f} "
                       f"seconds could be read, and are in {target}")


def system_error(target, mode):
    """What the system says of writing 64 kB to a file, "" if nothing. The file is removed."""
    try:
        with open(target, mode) as file:
            file.write(bytes(2 ** 16))
        return ""
    except OSError as error:
        return error.strerror
    finally:
        with suppress(OSError):
            target.unlink()


def parse_arguments():
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("images", nargs="*", type=Path,
        help=f"images, videos, or folders of them (our own *{OUTPUT} and *{VIDEO_OUTPUT} are left out)")
    add("--camera", type=int, metavar="N", help="number of a camera")
    add("--checkpoint", type=Path, default=WEIGHTS,
        help=f"network (default: {WEIGHTS.parent.name}/{WEIGHTS.name})")
    add("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="tight box around a person, in pixels; once for each person (default: the whole image)")
    add("--boxes", type=Path,
        help='json file of boxes, by paths in the named folder: {"photo.jpg": [[x, y, width, height], ...]}')
    add("--flip-test", action="store_true", help="average with the mirror image, in twice the time")
    add("--threshold", type=float, default=THRESHOLD,
        help=f"draw joints of less confidence faint (default: {THRESHOLD})")
    add("--smooth", action="store_true", help="smooth joints over time (videos and cameras; 1 Euro filter)")
    add("--out", type=Path, default=Path("predictions"), help="folder (default: predictions/)")
    add("--json", type=Path, help="write joints and confidences to this file, too")
    add("--device", default=default_device(), help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args()
    check_device(args.device)
    check_folder(args.json, "--json ")
    check_writable(args.out, "--out ")
    refuse((not args.images and args.camera is None, "name images, a folder, a video, or --camera N"),
           (args.box and args.boxes, "--box and --boxes both say where people are: leave one out"),
           (not 0 <= args.threshold <= 1, f"--threshold {args.threshold:g} must be between 0 and 1"))
    try:
        args.box = args.box and [check_box(box) for box in args.box]
    except ValueError as error:
        raise BadInput(f"--box: {error}") from error
    return args


def main():
    args, failed = parse_arguments(), []
    images, videos = list_files(args.images, args.out, failed)
    sources = videos + [(args.camera, Path("camera"))] * (args.camera is not None)
    if images and not (sources or any(os.path.lexists(file) for file, _ in images)):
        raise BadInput(f"there is no file {images[0][0]}: name images, folders of images, or videos")
    if sources and (args.json or args.boxes):
        refuse((not images or args.camera is not None or any(file in args.images for file, _ in videos),
                "--json and --boxes are for images: leave them out for videos and cameras"))
        print(f"left out, as --json and --boxes are for images: {', '.join(str(file) for file, _ in videos)}")
        sources = []
    refuse((args.smooth and not sources, "--smooth is for videos and cameras: leave it out for images"))
    boxes = match_boxes(args.boxes, images) if args.boxes else {}
    if not (images or sources):
        raise SystemExit(2)
    model, metadata = checkpoint.load(args.checkpoint, args.device)
    print(f"{args.checkpoint.name}: {checkpoint.describe(model.config)}, learned from {metadata.get('data')}"
          + (f", PCKh@0.5 {metadata['pckh@0.5']:.1f} there" if "pckh@0.5" in metadata else ""))
    model = for_inference(model)
    for (source, _), name in zip(sources, name_outputs([name for _, name in sources], VIDEO_OUTPUT)):
        try:
            predict_video(args, model, source, name)
        except (BadInput, OSError) as error:             # the others go on
            report(error, failed)
    if images:
        predict_images(args, model, images, boxes, failed)
    if failed:
        raise SystemExit(2)


if __name__ == "__main__":
    main_with_clear_errors(main)
