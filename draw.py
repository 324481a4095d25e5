"""People as stick figures on pictures: what predictions, labels and contact sheets are drawn with."""

import numpy as np
from PIL import Image, ImageDraw

RIGHT, LEFT, MIDDLE = (255, 140, 0), (0, 200, 255), (120, 220, 90)       # colours of the person's own sides
LIMBS = ((0, 1, RIGHT), (1, 2, RIGHT), (2, 6, RIGHT), (3, 6, LEFT), (3, 4, LEFT), (4, 5, LEFT),
         (6, 7, MIDDLE), (7, 8, MIDDLE), (8, 9, MIDDLE),
         (10, 11, RIGHT), (11, 12, RIGHT), (12, 7, RIGHT), (13, 7, LEFT), (13, 14, LEFT), (14, 15, LEFT))


def draw_skeleton(picture, joints, visible, width=2):
    """Draw joints (16, 2), in pixels, on a Pillow picture; limbs between two visible joints only."""
    pen = ImageDraw.Draw(picture)
    for a, b, colour in LIMBS:
        if visible[a] and visible[b]:
            pen.line([tuple(joints[a]), tuple(joints[b])], fill=colour, width=width)
    for joint, seen in zip(joints, visible):
        if seen:
            x, y = joint
            pen.ellipse([x - width, y - width, x + width, y + width], fill=(255, 255, 255), outline=(0, 0, 0))
    return picture


def contact_sheet(cells, columns=6, side=192):
    """Crops with skeletons as one picture. cells: list of (crop (S, S, 3) uint8, joints (16, 2), visible (16,))."""
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for n, (crop, joints, visible) in enumerate(cells):
        zoom = side / crop.shape[0]
        cell = Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC)
        draw_skeleton(cell, (np.asarray(joints) + 0.5) * zoom - 0.5, visible)
        sheet.paste(cell, (n % columns * side, n // columns * side))
    return sheet
