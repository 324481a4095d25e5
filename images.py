"""Images: files read in one way by every command, and skeletons drawn on them.

    python -m pytest tests/test_images.py

    read_image      a file -> RGB, upright by its Exif, whatever its mode and depth
    draw_skeleton   joints and limbs of one person on an image
    contact_sheet   many crops with their skeletons in rows and columns
"""

import math
import threading
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from common import BadInput

MOST_PIXELS = 200_000_000            # larger images are refused before they are decoded
LONGEST = 4096                       # JPEGs with a longer side may be decoded at 1/2, 1/4 or 1/8
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "AVIF")     # no EPS: it starts a program
READER = 2                           # raised where `read_image` gives other pixels: crops are cut anew
RIGHT, LEFT, MIDDLE = (255, 140, 0), (0, 200, 255), (120, 220, 90)       # colours of the person's own sides
WHITE = (255, 255, 255)
LIMBS = ((0, 1, RIGHT), (1, 2, RIGHT), (2, 6, RIGHT), (3, 6, LEFT), (3, 4, LEFT), (4, 5, LEFT),
         (6, 7, MIDDLE), (7, 8, MIDDLE), (8, 9, MIDDLE),
         (10, 11, RIGHT), (11, 12, RIGHT), (12, 7, RIGHT), (13, 7, LEFT), (13, 14, LEFT), (14, 15, LEFT))
FAINT = 0.3                          # opacity of a joint below the threshold
THRESHOLD = 0.5           # shipped student, photos: right are 30% of the joints below, 68% of those above


# ------------------------------------------------------------------------------- reading

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
        why = " ".join(str(error).split())[:160]
        raise BadInput(f"{path} cannot be read as an image ({why}): replace it, or convert it to JPEG or "
                       f"PNG") from error


def read_image(path, longest=LONGEST):
    """An image file -> (RGB, upright by its Exif; its pixels over the file's). BadInput if it cannot be read.

    Of an animation the first frame is taken. A JPEG with a side beyond `longest` is decoded at 1/2, 1/4 or
    1/8, and info["decoded size"] is that part of its size, a fraction where a pixel is cut; others have a
    scale of 1.
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
