"""Joints of the people in your own images.

    python predict.py photo.jpg            # the whole image is the person's box -> predictions/photo-pose.jpg
    python predict.py holiday/ --json joints.json  # a folder; joints in each image's own pixels
    python predict.py team.jpg --box 40 30 200 480 --box 260 25 210 490  # two people: x y width height
    python predict.py --camera 0 --smooth  # a camera, or name a video (OpenCV, requirements-extra.txt)

The network sees one person: a square crop around a box. The person's right is orange, the left blue; joints
whose confidence is below --threshold are drawn faint.
"""

import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain, count, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

import checkpoint
from common import (BadInput, CommandLine, check_device, check_folder, default_device, main_with_clear_errors,
                    optional, refuse)
from crops import crop_matrix, cut, invert, make_batch, transform
from data_mpii import BOX_ENLARGEMENT, FARTHEST, JOINTS, open_image
from evaluate import predict_crops
from export import WEIGHTS, for_inference

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm"}
OUTPUT = "-pose.jpg"                 # ends the names of our output, which is never taken as input
LONGEST = 4096                       # JPEGs with a longer side are decoded at 1/2, 1/4 or 1/8
THINNEST = 2                         # pixels of a line
BATCH_IMAGES, BATCH_CROPS = 8, 32    # images read before the network runs, crops in the network at once
BATCH_PIXELS = 50_000_000            # of large images fewer are read
RIGHT, LEFT, MIDDLE = (255, 140, 0), (0, 200, 255), (120, 220, 90)       # colours of the person's own sides
WHITE = (255, 255, 255)
LIMBS = ((0, 1, RIGHT), (1, 2, RIGHT), (2, 6, RIGHT), (3, 6, LEFT), (3, 4, LEFT), (4, 5, LEFT),
         (6, 7, MIDDLE), (7, 8, MIDDLE), (8, 9, MIDDLE),
         (10, 11, RIGHT), (11, 12, RIGHT), (12, 7, RIGHT), (13, 7, LEFT), (13, 14, LEFT), (14, 15, LEFT))
FAINT = 0.3                          # opacity of a joint below the threshold
THRESHOLD = 0.5           # shipped student, photos: right are 30% of the joints below, 68% of those above
CUTOFF, BETA, SPEED_CUTOFF = 1.0, 5.0, 1.0       # of OneEuro: Hz, Hz for each box side a second, Hz


class Found(NamedTuple):
    """One person in one image."""
    box: list                        # x, y, width, height in pixels of the image
    joints: np.ndarray               # (16, 2) x, y in pixels of the image
    confidence: np.ndarray           # (16,) in [0, 1]


# ------------------------------------------------------------------------------- stick figures

def draw_skeleton(image, joints, visible, colour=None, width=2, confidence=None, threshold=THRESHOLD):
    """Draw joints (16, 2), in pixels, on an RGB Pillow image and return it; a limb needs both joints visible.

    colour: of everything, or None for right orange, left blue, middle green. confidence: (16,) in [0, 1], or
    None: a joint below the threshold is faint, and so are its limbs.
    """
    pen = ImageDraw.Draw(image, "RGBA")                                      # blends
    sure = np.ones(len(joints), bool) if confidence is None else np.asarray(confidence) >= threshold
    opacity = np.where(sure, 255, round(255 * FAINT))
    for a, b, side in LIMBS:
        if visible[a] and visible[b]:
            pen.line([tuple(joints[a]), tuple(joints[b])], width=width,
                     fill=(*(colour or side), int(min(opacity[a], opacity[b]))))
    for (x, y), seen, alpha in zip(joints, visible, opacity.tolist()):
        if seen:
            pen.ellipse([x - width, y - width, x + width, y + width], fill=(*(colour or WHITE), alpha),
                        outline=(0, 0, 0, alpha))
    return image


def contact_sheet(crops, *skeletons, columns=6, side=192):
    """A Pillow image of crops (N, S, S, 3) uint8 in rows and columns, with skeletons drawn on each.

    skeletons: (joints (N, 16, 2) in pixels of the crops, visible (N, 16)), and optionally a colour.
    """
    sheet = Image.new("RGB", (columns * side, -(-len(crops) // columns) * side))
    zoom = side / crops.shape[1]
    for n, crop in enumerate(crops):
        cell = Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC)
        for joints, visible, *colour in skeletons:
            # enlarging moves the centre of pixel 0 to (zoom - 1) / 2
            xy = (np.asarray(joints[n]) + 0.5) * zoom - 0.5
            draw_skeleton(cell, xy, visible[n], *colour, width=1 if colour else 2)
        sheet.paste(cell, (n % columns * side, n // columns * side))
    return sheet


def prediction_sheet(samples, stored, rows, joints, size, **layout):
    """A contact sheet of samples `rows`: predicted joints (N, 16, 2) in colour over labels in white.

    stored, size: crops of all N samples, side of the network's input. layout: columns and side of the sheet.
    """
    batch, visible = make_batch(samples, stored, rows, size), samples.visible[rows]
    crops = (255 * batch.images.permute(0, 2, 3, 1)).round().byte().numpy()
    labels, found = (transform(batch.matrix, torch.from_numpy(xy[rows])) for xy in (samples.joints, joints))
    return contact_sheet(crops, (labels, visible, WHITE), (found, np.ones_like(visible)), **layout)


# ------------------------------------------------------------------------------- images and boxes

def upright_rgb(image):
    """An opened image -> (RGB, upright by its Exif; its pixels over the file's: 1, or less for a huge JPEG).

    Grey, palette, transparent (on black) and CMYK images become RGB, 16 bits 8; of an animation the first
    frame is taken.
    """
    width, height = image.size
    shrink = max(width, height) / LONGEST
    if shrink > 1:
        image.draft("RGB", (int(width / shrink), int(height / shrink)))     # JPEGs are decoded smaller
    scale = image.size[0] / width
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, np.float64)
        image = Image.fromarray((values * (255 / max(values.max(), 1))).clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert("RGB"), scale


read_image = partial(open_image, read=upright_rgb)       # path -> the same; BadInput if it is no image


def list_images(paths, out=None):
    """-> [(file, name of its output)] of the named files and of the images in named folders, sorted."""
    listed = []
    for path in paths:
        if path.is_dir():
            ours = out and path.resolve() in out.resolve().parents and out.resolve()  # our output
            inside = sorted(file for file in path.rglob("*")
                            if file.suffix.lower() in IMAGES and file.is_file()
                            and not file.name.endswith(OUTPUT)
                            and not (ours and file.resolve().is_relative_to(ours)))
            if not inside:
                raise BadInput(f"{path} holds no images ({', '.join(sorted(IMAGES))})")
            listed += [(file, file.relative_to(path)) for file in inside]
        else:
            listed.append((path, Path(path.name)))
    outputs = name_outputs([name for _, name in listed], OUTPUT)
    return [(file, output) for (file, _), output in zip(listed, outputs)]


def name_outputs(names, ending):
    """a.jpg -> a-pose.jpg, or a-2-pose.jpg where that is taken, by a.png or by a file of another folder."""
    taken = {}                                       # in order
    for name in names:
        free = (name.with_name(f"{name.stem}{n}{ending}") for n in chain([""], (f"-{n}" for n in count(2))))
        taken[next(output for output in free if output not in taken)] = True
    return list(taken)


def read_boxes(file):
    """{"photo.jpg": [[x, y, width, height], ...], ...} of --boxes; BadInput for anything else."""
    try:
        boxes = json.loads(Path(file).read_text())
        return {name: [check_box(box) for box in of] for name, of in boxes.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"--boxes {file}: {' '.join(str(error).split())[:160]}; it must be json such as "
                       f'{{"photo.jpg": [[x, y, width, height]]}}') from error


def check_box(box):
    x, y, width, height = (float(number) for number in box)
    if not ((np.abs([x, y, width, height]) < FARTHEST).all() and width > 0 and height > 0):
        raise ValueError(f"the box {box} is not x y width height with a size above 0, "
                         f"within {FARTHEST:,} pixels")
    return [x, y, width, height]


def overlaps(box, size, scale):
    """Does a box, in pixels of the file, overlap an image of this size, as read at this scale?"""
    x, y, width, height = (scale * number for number in box)
    return x < size[0] and y < size[1] and x + width > 0 and y + height > 0


# ------------------------------------------------------------------------------- people

def box_matrix(box, size, tight):
    """Affine map image -> crop (2, 3): a square around the box, with MPII's margin around a tight one."""
    x, y, width, height = box
    side = max(width, height) * (BOX_ENLARGEMENT if tight else 1)
    return crop_matrix([[x + (width - 1) / 2, y + (height - 1) / 2]], [side], size)[0]


@torch.inference_mode()
def find(model, images, boxes, device="cpu", flip_test=False):
    """A list of Found for each of some RGB Pillow images.

    boxes: for each image a list of tight boxes, or None for one person in the whole image.
    """
    tight = [of is not None for of in boxes]
    boxes = [[[0, 0, *image.size]] if of is None else of for image, of in zip(images, boxes)]
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
    return {"file": str(path), "people": [
        {"box": [round(number / scale, 2) for number in person.box],
         "joints": {name: [round(float(x / scale), 2), round(float(y / scale), 2), round(float(sure), 4)]
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


def predict_images(args, model):
    """-> number of images that could not be used; each is reported in a line, and the others go on."""
    listed, failed, read = list_images(args.images, args.out), 0, 0
    boxes = read_boxes(args.boxes) if args.boxes else {}
    if unknown := boxes.keys() - {path.name for path, _ in listed}:
        raise BadInput(f"--boxes {args.boxes} names {sorted(unknown)[0]}, which is not among the images")

    def usable():
        nonlocal failed
        for path, name in tqdm(listed, "images", leave=False, disable=None if len(listed) > 1 else True):
            try:
                image, scale = read_image(path)
                of = boxes.get(path.name, args.box)
                if outside := [box for box in of or () if not overlaps(box, image.size, scale)]:
                    raise BadInput(f"{path} has nothing in the box {outside[0]}")
                yield path, name, image, scale, of and [[scale * number for number in box] for box in of]
            except BadInput as error:
                print(f"error: {error}", file=sys.stderr)
                failed += 1

    with json_file(args.json) if args.json else nullcontext() as add:
        for batch in in_batches(usable()):
            found = find(model, [image for _, _, image, *_ in batch], [of for *_, of in batch], args.device,
                         args.flip_test)
            for (path, name, image, scale, _), people in zip(batch, found):
                target = args.out / name
                target.parent.mkdir(parents=True, exist_ok=True)
                draw_poses(image, people, args.threshold).save(target, quality=92)
                if add:
                    add(record(path, people, scale))
            read += len(batch)
            del batch[:], image          # their memory is needed for the next ones
    if read or args.json:
        print(f"{read} of {len(listed)} images: {args.out}/*{OUTPUT}"
              + (f", {args.json}" if args.json else ""))
    return failed


def predict_video(args, model, source, name):
    """Draw the frames of a video file, or of a camera (an int) until Ctrl-C, into the video `name`."""
    camera = isinstance(source, int)
    if not camera and not source.is_file():
        raise BadInput(f"there is no video {source}")
    cv2 = optional("cv2")
    stream = cv2.VideoCapture(source if camera else str(source))
    if not stream.isOpened():
        raise BadInput(f"OpenCV cannot open {'camera ' if camera else ''}{source}")
    target, rate, smooth = args.out / name, stream.get(cv2.CAP_PROP_FPS) or 25, OneEuro()
    args.out.mkdir(parents=True, exist_ok=True)
    writer, frames, began = None, 0, time.perf_counter()
    last = began
    try:
        while (read := stream.read())[0]:
            image = Image.fromarray(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
            people, = find(model, [image], [args.box], args.device, args.flip_test)
            now = time.perf_counter()
            if args.smooth:
                sides = np.array([max(person.box[2:]) for person in people])[:, None, None]
                joints = np.stack([person.joints for person in people]) / sides
                joints = smooth(joints, now - last if camera else 1 / rate)
                people = [person._replace(joints=xy) for person, xy in zip(people, sides * joints)]
            last = now
            frame = cv2.cvtColor(np.asarray(draw_poses(image, people, args.threshold)), cv2.COLOR_RGB2BGR)
            if writer is None:
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, image.size)
                if not writer.isOpened():
                    raise BadInput(f"OpenCV cannot write {target}: it lacks the mp4v codec")
            writer.write(frame)
            frames += 1
            print(f"\r{frames} frames, {frames / (now - began):.1f} a second", end="", flush=True)
    except KeyboardInterrupt:
        if source != args.camera:        # Ctrl-C ends a camera, and stops the work on files
            raise
    finally:
        stream.release()
        if writer is not None:
            writer.release()
    if not frames:
        raise BadInput(f"{source} gave no frame")
    print(f"\n{target}: {frames} frames")


def parse_arguments():
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("images", nargs="*", type=Path,
        help=f"images, folders of images (our own *{OUTPUT} are left out), or videos")
    add("--camera", type=int, metavar="N", help="number of a camera")
    add("--checkpoint", type=Path, default=WEIGHTS,
        help=f"network (default: {WEIGHTS.parent.name}/{WEIGHTS.name})")
    add("--box", type=float, nargs=4, action="append", metavar=("X", "Y", "WIDTH", "HEIGHT"),
        help="tight box around a person, in pixels; once for each person (default: the whole image)")
    add("--boxes", type=Path, help='json file of boxes: {"photo.jpg": [[x, y, width, height], ...], ...}')
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
    refuse((not args.images and args.camera is None, "name images, a folder, a video, or --camera N"),
           (args.box and args.boxes, "--box and --boxes both say where people are: leave one out"),
           (not 0 <= args.threshold <= 1, f"--threshold {args.threshold:g} must be between 0 and 1"))
    try:
        args.box = args.box and [check_box(box) for box in args.box]
    except ValueError as error:
        raise BadInput(f"--box: {error}") from error
    return args


def main():
    args = parse_arguments()
    videos = [path for path in args.images if path.suffix.lower() in VIDEOS]
    args.images = [path for path in args.images if path not in videos]
    sources = videos + [args.camera] * (args.camera is not None)
    refuse((sources and (args.json or args.boxes),
            "--json and --boxes are for images: leave them out for videos and cameras"),
           (args.smooth and not sources, "--smooth is for videos and cameras: leave it out for images"))
    if args.images and not (sources or any(path.exists() for path in args.images)):
        raise BadInput(f"there is no file {args.images[0]}: name images, folders of images, or videos")
    model, metadata = checkpoint.load(args.checkpoint, args.device)
    print(f"{args.checkpoint.name}: {checkpoint.describe(model.config)}, learned from {metadata.get('data')}"
          + (f", PCKh@0.5 {metadata['pckh@0.5']:.1f} there" if "pckh@0.5" in metadata else ""))
    model, failed = for_inference(model), 0
    names = name_outputs([Path("camera" if source == args.camera else source.name) for source in sources],
                         "-pose.mp4")
    for source, name in zip(sources, names):
        try:
            predict_video(args, model, source, name)
        except BadInput as error:                        # the others go on
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    if args.images:
        failed += predict_images(args, model)
    if failed:
        raise SystemExit(2)
    print("next: python export.py student.onnx puts this network on other machines"
          + (f" (--checkpoint {args.checkpoint})" if args.checkpoint != WEIGHTS else ""))


if __name__ == "__main__":
    main_with_clear_errors(main)
