"""Images and videos: found, read in one way by every command, drawn on, written.

    python -m pytest tests/test_images.py

    list_files      the images and videos that paths name, and that their folders hold
    read_image      a file -> RGB, upright by its Exif, whatever its mode and depth
    open_video      a file or camera, by OpenCV (an optional package)
    draw_skeleton   joints and limbs of one person on an image; draw_poses: of everybody found
    contact_sheet   many crops with their skeletons in rows and columns
"""

import math
import os
import sys
import threading
import warnings
from collections import defaultdict
from contextlib import suppress
from itertools import chain, count
from os.path import isfile
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageOps

from common import BadInput, optional

MOST_PIXELS = 200_000_000            # larger images are refused before they are decoded
FARTHEST = 100_000                   # pixels; a coordinate beyond that is an error
LONGEST = 4096                       # JPEGs are decoded at 1/2, 1/4 or 1/8 where that leaves as much
TRANSPOSED = 5, 6, 7, 8              # values of Exif's orientation that exchange width and height
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "AVIF")     # no EPS: it starts a program
# Endings of images that few Pillows read: in a folder each is named in an error, not passed over.
IMAGES = set(".avif .pjpeg .heic .heif .hif .jxl .jp2 .j2k .jpx .psd .svg .tga .ico .dib .eps .pcx .qoi .exr "
             ".hdr .dng .cr2 .cr3 .nef .arw .orf .raf .rw2".split())
# Endings of videos, as folders hold them. A file that is named may have any.
VIDEOS = set(".mp4 .avi .mov .mkv .webm .m4v .mpg .mpeg .wmv .3gp .3g2 .ts .mts .m2ts .flv .f4v .ogv .asf "
             ".vob .mjpeg .mjpg .mxf .divx .y4m".split())
OUTPUT, VIDEO_OUTPUT = "-pose.jpg", "-pose.mp4"      # end the names of our output: left out of folders
JPEG_SIDE = 65_500                   # pixels; libjpeg writes no longer side
READER = 2                           # raised where `read_image` gives other pixels: crops are cut anew
RIGHT, LEFT, MIDDLE = (255, 140, 0), (0, 200, 255), (120, 220, 90)       # colours of the person's own sides
WHITE = (255, 255, 255)
LIMBS = ((0, 1, RIGHT), (1, 2, RIGHT), (2, 6, RIGHT), (3, 6, LEFT), (3, 4, LEFT), (4, 5, LEFT),
         (6, 7, MIDDLE), (7, 8, MIDDLE), (8, 9, MIDDLE),
         (10, 11, RIGHT), (11, 12, RIGHT), (12, 7, RIGHT), (13, 7, LEFT), (13, 14, LEFT), (14, 15, LEFT))
THINNEST = 2                         # pixels of a line of `draw_poses`
FAINT = 0.3                          # opacity of a joint below the threshold
THRESHOLD = 0.5           # shipped student, LSPET: right are 31% of the joints below, 71% of those above


# ------------------------------------------------------------------------------- which files

def list_files(paths, out, failed):
    """-> images, videos: (file, its path in the named folder) of named files, and of what folders hold.

    Links to folders are followed; each folder is listed once. Left out of folders are our own output, macOS's
    "._" files, and what is neither image nor video by name.
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
        inside, own, linked = [], 0, set()
        for folder, below, names in os.walk(path, onerror=lambda error: report(error, failed),
                                            followlinks=True):
            below[:] = [name for name in below if is_unlisted(Path(folder, name), path, linked)]
            names = [] if within and Path(folder).resolve().is_relative_to(within) else names
            for file in (Path(folder, name) for name in names if not name.startswith("._")):
                is_own, is_lost = file.name.endswith((OUTPUT, VIDEO_OUTPUT)), not os.path.exists(file)
                own += is_own
                if file.suffix.lower() in known | VIDEOS and not is_own and (is_lost or file.is_file()):
                    inside.append(file)
        if own:
            print(f"{path}: left out as our own output, *{OUTPUT} or *{VIDEO_OUTPUT}: {own}")
        if not inside:
            report(f"{path} holds no images or videos, by their names' endings", failed)
        for file in sorted(inside):
            (images if file.suffix.lower() in known else videos).append((file, file.relative_to(path)))
    return images, videos


def is_unlisted(folder, path, linked):
    """Is a folder below `path` to be listed? Each is once; linked: those that links led to, added to."""
    real, root = folder.resolve(), path.resolve()
    if real.is_relative_to(root):
        return real == root / folder.relative_to(path)          # else a link to what is listed without it
    if real in linked:
        return False
    linked.add(real)
    return True


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


def name_outputs(names, ending, is_free=lambda output: True):
    """a.jpg -> a-pose.jpg, or a-2-pose.jpg where that is taken, by a.png or another a.jpg, or not free."""
    taken = {}                                       # in order
    numbers = defaultdict(lambda: chain([""], (f"-{n}" for n in count(2))))       # of each stem, not used yet
    for name in names:
        free = (name.with_name(f"{name.stem}{n}{ending}") for n in numbers[name.with_suffix("")])
        taken[next(output for output in free if output not in taken and is_free(output))] = True
    return list(taken)


# ------------------------------------------------------------------------------- images

def check_image(path, images):
    """BadInput where an image is missing, or lies outside the folder `images`."""
    if not isfile(path):                                   # False for a name that is too long, too
        raise BadInput(f"there is no image {str(path)[:200]!r} (are they unpacked into {images}?)")
    if not path.resolve().is_relative_to(images.resolve()):
        raise BadInput(f"{path} is a link to something outside {images}")


OPENING = threading.Lock()


def open_safely(path, read):
    """read(image) of an opened image, not yet decoded. BadInput where it cannot be read or is too large."""
    readable = Image.registered_extensions().values()            # not every Pillow has AVIF
    try:
        with OPENING:                    # Pillow's own limit is a global: here ours stands in for it
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(path, formats=[name for name in IMAGE_FORMATS if name in readable])
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS // 10 ** 6} "
                                 f"million: make it smaller")
            return read(image)
    except Exception as error:          # Pillow raises a dozen kinds on damaged files
        if isinstance(error, OSError) and error.errno:                          # the system's
            raise BadInput(f"{path} cannot be read: {error.strerror}") from error
        why = " ".join(str(error).split())[:160]
        raise BadInput(f"{path} cannot be read as an image ({why}): replace it, or convert it to JPEG or "
                       f"PNG") from error


def read_image(path, longest=LONGEST):
    """An image file -> (RGB, upright by its Exif; its pixels over the file's). BadInput if it cannot be read.

    Of an animation the first frame is taken. A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves `longest`
    pixels of a side, and info["decoded size"] is that part of its size, a fraction where a pixel is cut;
    others have a scale of 1.
    """
    def read(image):
        size, deep = image.size, ";16" in str(image.tile)             # of a colour's 16 bits Pillow keeps 8
        if max(size) > longest:
            image.draft("RGB", [max(1, int(side * longest / max(size))) for side in size])
        scale = 1 / round(max(size) / max(image.size))
        upright = ImageOps.exif_transpose(image)
        turned = upright.size != image.size
        upright.info["decoded size"] = [scale * side for side in (size[::-1] if turned else size)]
        return rgb(upright, deep), scale

    return open_safely(path, read)


def upright_size(image):
    """(width, height) of an image that is opened, as its Exif turns it. Only a TIFF is decoded for that."""
    if image.format == "TIFF":                       # its size is that of the turned image in some Pillows
        return ImageOps.exif_transpose(image).size
    return image.size[::-1] if image.getexif().get(ExifTags.Base.Orientation) in TRANSPOSED else image.size


def open_image(path):
    """The RGB image of a file, upright, in the file's own pixels."""
    return read_image(path, math.inf)[0]


def image_endings():
    """Endings of the names of images that this Pillow reads for us: {".jpg", ".jfif", ...}."""
    return {ending for ending, name in Image.registered_extensions().items() if name in IMAGE_FORMATS}


def rgb(image, deep=False):
    """A Pillow image of any mode as RGB: 16 bits and floats by `to_bytes`, what is transparent on black.

    deep: these are the upper 8 of 16 bits.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(to_bytes(np.asarray(image)))
    elif deep and image.mode == "RGB":
        image = Image.fromarray(to_bytes(np.asarray(image).astype(np.int32) * 257))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_bytes(values):
    """Numbers of any shape -> uint8, stretched. NaN becomes black. ValueError if none is finite.

    Black is 0, or the lowest of negative ones. White is where the range ends: for whole numbers the bits in
    use, at least 8 (255, 4095, 65535), for others 1 or the largest.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("none of its values is finite")
    low, high = min(0.0, float(finite.min())), float(finite.max())
    if values.dtype.kind in "iu" and low == 0:
        high = max(255, 2 ** int(high).bit_length() - 1)
    high = max(high, low + 1)
    if low < 0 or high not in (1, 255, 65535):
        warnings.warn("an image's values do not fill 8 or 16 bits, or 0 to 1: such images are stretched to "
                      "their own range", stacklevel=1)           # once, wherever it is called
    values, gain = values.astype(np.float32), 255 / (high - low)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low) * gain - low * gain
    return values.round().clip(0, 255).astype(np.uint8)


def write_image(image, path):
    """Save as JPEG. OSError where that cannot be done."""
    if max(image.size) > JPEG_SIDE:
        raise OSError(f"a JPEG has at most {JPEG_SIDE:,} pixels a side")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=92)


# ------------------------------------------------------------------------------- videos

def open_video(source):
    """A cv2.VideoCapture of a file, or of a camera (an int), opened or not."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")             # what is wrong is said in one line, by us
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    return optional("cv2").VideoCapture(source if isinstance(source, int) else utf8(source))


def utf8(path):
    """A path as OpenCV takes it: FFmpeg takes what is before a colon for a protocol, but not behind "./".

    BadInput where the name is not UTF-8, with which OpenCV crashes.
    """
    try:
        return ("" if Path(path).is_absolute() else "./") + str(path).encode().decode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{path}: OpenCV takes no names that are not UTF-8: rename it") from error


# ------------------------------------------------------------------------------- drawing

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


def draw_poses(image, people, threshold=THRESHOLD, ids=()):
    """Draw everybody's skeleton, and ids at their boxes, on a Pillow image, in place, and return it."""
    width = max(THINNEST, round(max(image.size) / 250))
    for person in people:
        all_joints = np.ones(len(person.joints), bool)
        draw_skeleton(image, person.joints, all_joints, None, width, person.confidence, threshold)
    for number, person in zip(ids, people):
        corner = [max(0, min(place, side - 8 * width)) for place, side in zip(person.box, image.size)]
        ImageDraw.Draw(image).text(corner, str(number), font_size=8 * width, stroke_width=1, stroke_fill=0)
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
