"""People as stick figures on pictures: for predictions, labels and contact sheets."""

import numpy as np
from PIL import Image, ImageDraw

RIGHT, LEFT, MIDDLE = (255, 140, 0), (0, 200, 255), (120, 220, 90)       # colours of the person's own sides
WHITE = (255, 255, 255)
LIMBS = ((0, 1, RIGHT), (1, 2, RIGHT), (2, 6, RIGHT), (3, 6, LEFT), (3, 4, LEFT), (4, 5, LEFT),
         (6, 7, MIDDLE), (7, 8, MIDDLE), (8, 9, MIDDLE),
         (10, 11, RIGHT), (11, 12, RIGHT), (12, 7, RIGHT), (13, 7, LEFT), (13, 14, LEFT), (14, 15, LEFT))
FAINTEST = 0.3                       # opacity of a joint of no confidence


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
