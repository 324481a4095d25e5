"""Joints of the people in your own pictures.

    python predict.py photo.jpg                            # the whole picture is the person's box -> predictions/photo-pose.jpg
    python predict.py holiday/ --json joints.json          # every picture of a folder; joints in each picture's own pixels
    python predict.py team.jpg --box 40 30 200 480 --box 260 25 210 490       # two people: x y width height, in pixels
    python predict.py --camera 0                           # a webcam, or name a video (OpenCV, requirements-extra.txt)

A network sees one person: a square crop around a box. Right is orange, left blue (the person's own), faint is unsure.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import checkpoint
from common import BadInput, CommandLine, check_device, default_device, main_with_clear_errors
from crops import crop_matrix, cut, invert, transform
from data_mpii import BOX_ENLARGEMENT, FARTHEST, IMAGE_FORMATS, JOINTS, MOST_PIXELS
from evaluate import predict_crops
from export import WEIGHTS, for_inference

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
DRAWN = "-pose.jpg"                  # ends the names of what we draw; such files are not looked at again
LONGEST = 4096                       # JPEGs with a longer side are decoded at 1/2, 1/4 or 1/8
THINNEST = 2                         # pixels of a line
BATCH_CROPS, BATCH_PIXELS = 32, 50_000_000      # a batch is as many pictures, or as many pixels
RIGHT, LEFT, MIDDLE = (255, 140, 0), (0, 200, 255), (120, 220, 90)       # colours of the person's own sides
WHITE = (255, 255, 255)
LIMBS = ((0, 1, RIGHT), (1, 2, RIGHT), (2, 6, RIGHT), (3, 6, LEFT), (3, 4, LEFT), (4, 5, LEFT),
         (6, 7, MIDDLE), (7, 8, MIDDLE), (8, 9, MIDDLE),
         (10, 11, RIGHT), (11, 12, RIGHT), (12, 7, RIGHT), (13, 7, LEFT), (13, 14, LEFT), (14, 15, LEFT))
FAINTEST = 0.3                       # opacity of a joint of no confidence


class Found(NamedTuple):
    """One person in one picture."""
    box: list                        # x, y, width, height, pixels of the picture
    joints: np.ndarray               # (16, 2) x, y, pixels of the picture
    confidence: np.ndarray           # (16,) in [0, 1]


# ------------------------------------------------------------------------------- stick figures

def draw_skeleton(picture, joints, visible, colour=None, width=2, confidence=None):
    """Draw joints (16, 2), in pixels, on an RGB Pillow picture; a limb needs both of its joints visible.

    colour: of everything, or None for the person's right orange, left blue, middle green.
    confidence: (16,) in [0, 1]: the less, the fainter; a limb is as faint as the fainter of its ends. None: all certain.
    """
    pen = ImageDraw.Draw(picture, "RGBA")                                    # blends
    confidence = np.ones(len(joints)) if confidence is None else np.asarray(confidence)
    opacity = (255 * (FAINTEST + (1 - FAINTEST) * confidence.clip(0, 1))).round().astype(int)
    for a, b, side in LIMBS:
        if visible[a] and visible[b]:
            pen.line([tuple(joints[a]), tuple(joints[b])], fill=(*(colour or side), min(opacity[a], opacity[b])), width=width)
    for (x, y), seen, strong in zip(joints, visible, opacity):
        if seen:
            pen.ellipse([x - width, y - width, x + width, y + width], fill=(*(colour or WHITE), strong),
                        outline=(0, 0, 0, strong))
    return picture


def contact_sheet(crops, *skeletons, columns=6, side=192):
    """Crops (N, S, S, 3) uint8 in rows and columns, with skeletons drawn on each.

    skeletons: (joints (N, 16, 2) in pixels of the crops, visible (N, 16)), and a colour as a third if it has one.
    """
    sheet = Image.new("RGB", (columns * side, -(-len(crops) // columns) * side))
    zoom = side / crops.shape[1]
    for n, crop in enumerate(crops):
        cell = Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC)
        for joints, visible, *colour in skeletons:
            # enlarging moves the centre of pixel 0 to (zoom - 1) / 2
            draw_skeleton(cell, (np.asarray(joints[n]) + 0.5) * zoom - 0.5, visible[n], *colour, width=1 if colour else 2)
        sheet.paste(cell, (n % columns * side, n // columns * side))
    return sheet


# ------------------------------------------------------------------------------- pictures

def read_picture(path):
    """-> (RGB picture, upright as its Exif says; its pixels over those of the file: 1, or less where that is huge).

    Grey, palette, transparent (on black) and CMYK pictures become RGB, 16 bits 8, an animation its first frame.
    BadInput where the file is no picture.
    """
    try:
        picture = Image.open(path, formats=IMAGE_FORMATS)
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise BadInput(f"{path} has {width} x {height} pixels, more than {MOST_PIXELS // 10 ** 6} million: make it smaller")
        shrink = max(width, height) / LONGEST
        if shrink > 1:
            picture.draft("RGB", (int(width / shrink), int(height / shrink)))     # what a JPEG can do while decoding
        scale = picture.size[0] / width
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        elif picture.mode in ("I", "F"):
            values = np.asarray(picture, np.float64)
            picture = Image.fromarray((values * (255 / max(values.max(), 1))).clip(0, 255).astype(np.uint8))
        elif picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), picture)
        return picture.convert("RGB"), scale
    except BadInput:
        raise
    except Exception as error:       # Pillow raises a dozen kinds on damaged files
        raise BadInput(f"{path} cannot be read as a picture ({' '.join(str(error).split())[:120]})") from error


def list_pictures(paths, out=None):
    """-> (file, name of its output) of files as they are named, and of the pictures of folders in order of their names."""
    listed = []
    for path in paths:
        if path.is_dir():
            drawings = out and path.resolve() in out.resolve().parents and out.resolve()      # a folder of ours in theirs
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES and file.is_file()
                            and not file.name.endswith(DRAWN)
                            and not (drawings and file.resolve().is_relative_to(drawings)))
            if not inside:
                raise BadInput(f"{path} holds no pictures ({', '.join(sorted(PICTURES))})")
            listed += [(file, file.relative_to(path)) for file in inside]
        else:
            listed.append((path, Path(path.name)))
    outputs = name_outputs([name for _, name in listed], DRAWN)
    return [(file, output) for (file, _), output in zip(listed, outputs)]


def name_outputs(names, ending):
    """a.jpg -> a-pose.jpg, and a-2-pose.jpg where that is taken: by a.png, or by one name in two folders."""
    taken = {}                                       # in order
    for name in names:
        free = (name.with_name(f"{name.stem}{number}{ending}") for number in chain([""], (f"-{n}" for n in count(2))))
        taken[next(output for output in free if output not in taken)] = True
    return list(taken)


def read_boxes(file):
    """--boxes: {"photo.jpg": [[x, y, width, height], ...], ...} by the name of the file."""
    try:
        boxes = json.loads(Path(file).read_text())
        return {name: [check_box(box) for box in of] for name, of in boxes.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"--boxes {file}: {' '.join(str(error).split())[:160]}; it must be json such as "
                       f'{{"photo.jpg": [[x, y, width, height]]}}') from error


def check_box(box):
    x, y, width, height = (float(number) for number in box)
    if not ((np.abs([x, y, width, height]) < FARTHEST).all() and width > 0 and height > 0):
        raise ValueError(f"the box {box} is not x y width height with a size above 0, within {FARTHEST:,} pixels")
    return [x, y, width, height]


def meets(box, size, scale):
    """Is some of this picture in the box? size: of the picture as read, box: in pixels of the file, scale between them."""
    x, y, width, height = (scale * number for number in box)
    return x < size[0] and y < size[1] and x + width > 0 and y + height > 0


# ------------------------------------------------------------------------------- people

def box_matrix(box, size, tight):
    """Picture -> crop (2, 3): a square around the middle of the box; around a tight box of a person with MPII's margin."""
    x, y, width, height = box
    side = max(width, height) * (BOX_ENLARGEMENT if tight else 1)
    return crop_matrix([[x + (width - 1) / 2, y + (height - 1) / 2]], [side], size)[0]


@torch.inference_mode()
def find(model, pictures, boxes, device="cpu", flip_test=False):
    """The people of pictures, boxes of each (None: one person, the whole picture): a list of Found for each picture."""
    tight = [of is not None for of in boxes]
    boxes = [[[0, 0, *picture.size]] if of is None else of for picture, of in zip(pictures, boxes)]
    if not any(boxes):
        return [[] for _ in boxes]
    matrices = torch.stack([box_matrix(box, model.size, is_tight) for of, is_tight in zip(boxes, tight) for box in of])
    owners = [picture for picture, of in zip(pictures, boxes) for _ in of]
    crops = np.stack([cut(picture, matrix, model.size) for picture, matrix in zip(owners, matrices)])
    places, confidences = [], []
    for part in torch.from_numpy(crops).split(BATCH_CROPS):
        joints, confidence = predict_crops(model, part.to(device).permute(0, 3, 1, 2).float() / 255, flip_test)
        places.append(joints.cpu()), confidences.append(confidence.cpu())
    joints = transform(invert(matrices), torch.cat(places)).numpy()                      # crop -> picture
    people = iter(zip(joints, torch.cat(confidences).numpy()))
    return [[Found(box, *next(people)) for box in of] for of in boxes]


def draw_people(picture, people):
    width = max(THINNEST, round(max(picture.size) / 250))
    for person in people:
        draw_skeleton(picture, person.joints, np.ones(len(JOINTS), bool), width=width, confidence=person.confidence)
    return picture


def record(path, people, scale):
    """What --json says of a picture, in the pixels of the file as it is shown upright."""
    return {"file": str(path), "people": [
        {"box": [round(number / scale, 2) for number in person.box],
         "joints": {name: [round(float(x / scale), 2), round(float(y / scale), 2), round(float(sure), 4)]
                    for name, (x, y), sure in zip(JOINTS, person.joints, person.confidence)}} for person in people]}


class Records:
    """A json file written picture by picture, however many there are; it is at its place when all are through."""

    def __init__(self, path):
        self.path, self.partial, self.count = path, path.with_name(path.name + ".partial"), 0
        self.file = self.partial.open("w")

    def add(self, record):
        self.file.write((",\n" if self.count else f'{{"joints": {json.dumps(JOINTS)}, "pictures": [\n') + json.dumps(record))
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.file.write("]}\n" if self.count else '{"pictures": []}\n')
        self.file.close()
        self.partial.unlink() if kind else os.replace(self.partial, self.path)


def predict_pictures(args, model):
    """-> number of pictures that could not be read; each is told in a line, and the rest go on."""
    listed, failed, read = list_pictures(args.pictures, args.out), 0, 0
    boxes = read_boxes(args.boxes) if args.boxes else {}
    if unknown := boxes.keys() - {path.name for path, _ in listed}:
        raise BadInput(f"--boxes {args.boxes} names {sorted(unknown)[0]}, which is not among the pictures")
    waiting = []

    def flush(records):
        nonlocal read
        found = find(model, [picture for _, _, picture, _, _ in waiting], [of for *_, of in waiting], args.device,
                     args.flip_test)
        for (path, name, picture, scale, _), people in zip(waiting, found):
            target = args.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            draw_people(picture, people).save(target, quality=92)
            if records:
                records.add(record(path, people, scale))
        read += len(waiting)
        waiting.clear()

    with Records(args.json) if args.json else nullcontext() as records:
        for path, name in tqdm(listed, desc="pictures", unit="", leave=False, disable=None if len(listed) > 1 else True):
            try:
                picture, scale = read_picture(path)
            except BadInput as error:
                print(f"error: {error}", file=sys.stderr)
                failed += 1
                continue
            of = boxes.get(path.name, args.box)
            if outside := [box for box in of or () if not meets(box, picture.size, scale)]:
                print(f"error: {path} has nothing in the box {outside[0]}", file=sys.stderr)
                failed += 1
                continue
            waiting.append((path, name, picture, scale, of and [[scale * number for number in box] for box in of]))
            if len(waiting) >= BATCH_CROPS or sum(p.size[0] * p.size[1] for _, _, p, _, _ in waiting) > BATCH_PIXELS:
                flush(records)
        flush(records)
    print(f"{read} of {len(listed)} pictures: {args.out}/*-pose.jpg" + (f", {args.json}" if args.json else ""))
    return failed


def predict_video(args, model, source, name):
    """Frames of a video file or camera, drawn into the video `name` of --out; Ctrl-C ends a camera."""
    if not isinstance(source, int) and not source.is_file():
        raise BadInput(f"there is no video {source}")
    try:
        import cv2
    except ImportError as error:
        raise BadInput("video needs OpenCV: python -m pip install -r requirements-extra.txt") from error
    stream = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not stream.isOpened():
        raise BadInput(f"OpenCV cannot open {'camera ' if isinstance(source, int) else ''}{source}")
    target = args.out / name
    args.out.mkdir(parents=True, exist_ok=True)
    writer, frames, began = None, 0, time.perf_counter()
    try:
        while (read := stream.read())[0]:
            picture = Image.fromarray(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
            people, = find(model, [picture], [args.box], args.device, args.flip_test)
            frame = cv2.cvtColor(np.asarray(draw_people(picture, people)), cv2.COLOR_RGB2BGR)
            if writer is None:
                rate = stream.get(cv2.CAP_PROP_FPS) or 25
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, picture.size)
                if not writer.isOpened():
                    raise BadInput(f"OpenCV cannot write {target}: it lacks the mp4v codec")
            writer.write(frame)
            frames += 1
            print(f"\r{frames} frames, {frames / (time.perf_counter() - began):.1f} a second", end="", flush=True)
    except KeyboardInterrupt:        # how one leaves a camera
        pass
    finally:
        stream.release()
        if writer is not None:
            writer.release()
    if not frames:
        raise BadInput(f"{source} gave no frame")
    print(f"\n{target}: {frames} frames")


def parse_arguments():
    parser = CommandLine(__doc__)
    parser.add_argument("pictures", nargs="*", type=Path,
                        help="pictures, folders of pictures (but for what ends in -pose.jpg: our own), or videos")
    parser.add_argument("--camera", type=int, metavar="N", help="number of a camera")
    parser.add_argument("--checkpoint", type=Path, default=WEIGHTS,
                        help=f"network (default: {WEIGHTS.parent.name}/{WEIGHTS.name})")
    parser.add_argument("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "WIDTH", "HEIGHT"),
                        help="tight box around a person, in pixels; once for each person (default: the whole picture)")
    parser.add_argument("--boxes", type=Path, help='json file of boxes: {"photo.jpg": [[x, y, width, height], ...], ...}')
    parser.add_argument("--flip-test", action="store_true", help="look at the mirror image, too: surer, in twice the time")
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder (default: predictions/)")
    parser.add_argument("--json", type=Path, help="write joints and confidences to this file, too")
    parser.add_argument("--device", default=default_device(),
                        help="where to run: cpu, cuda or cuda:N (default: cuda where there is one)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    check_device(args.device)
    if not args.pictures and args.camera is None:
        raise BadInput("name pictures, a folder, a video, or --camera N")
    if args.json and not args.json.resolve().parent.is_dir():
        raise BadInput(f"--json {args.json}: there is no folder {args.json.parent} to write into: make it first")
    if args.box and args.boxes:
        raise BadInput("--box and --boxes both say where people are: leave one out")
    if args.box:
        try:
            args.box = [check_box(box) for box in args.box]
        except ValueError as error:
            raise BadInput(f"--box: {error}") from error
    model, metadata = checkpoint.load(args.checkpoint, args.device)
    print(f"{args.checkpoint.name}: {checkpoint.describe(model.config)}, learned from {metadata.get('data')}"
          + (f", PCKh@0.5 {metadata['pckh@0.5']:.1f} there" if "pckh@0.5" in metadata else ""))
    model = for_inference(model)
    videos = [path for path in args.pictures if path.suffix.lower() in VIDEOS]
    sources = videos + [args.camera] * (args.camera is not None)
    if sources and (args.json or args.boxes):
        raise BadInput("--json and --boxes are for pictures: leave them out for videos and cameras")
    names = name_outputs([Path("camera" if isinstance(source, int) else source.name) for source in sources], "-pose.mp4")
    failed = 0
    for source, name in zip(sources, names):
        try:
            predict_video(args, model, source, name)
        except BadInput as error:                        # the others go on
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    args.pictures = [path for path in args.pictures if path not in videos]
    if args.pictures:
        failed += predict_pictures(args, model)
    if failed:
        raise SystemExit(2)
    print("next: python export.py student.onnx puts this network on other machines"
          + (f" (--checkpoint {args.checkpoint})" if args.checkpoint != WEIGHTS else ""))


if __name__ == "__main__":
    main_with_clear_errors(main)
