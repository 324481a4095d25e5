"""Augmentation: how people are shown while a network learns, drawn for everybody at once before an epoch.

    python train.py --augmentation upright          # or tokenpose, colour, occlusion: the names at the end of this file

What a Variation says is done to a whole batch on the training device: turning, zooming and mirroring in one map
(crops.place), colours and hidden parts after it (crops.make_batch).
"""

from typing import NamedTuple

import torch

HIDDEN = 0.15, 0.4          # sides of a hidden rectangle over the crop's: a limb or two


class Variation(NamedTuple):
    """How each of N crops differs from the plain one."""
    rotation: torch.Tensor     # (N,) degrees
    zoom: torch.Tensor         # (N,) size of the box over the plain one's
    flip: torch.Tensor         # (N,) bool
    gain: torch.Tensor         # (N, 3) what red, green and blue are multiplied by
    shift: torch.Tensor        # (N, 1) what is then added to all three
    hidden: torch.Tensor       # (N, 4) middle x, y, width and height of a rectangle that hides them, fractions of the crop
    paint: torch.Tensor        # (N, 3) its colour

    def of(self, rows):
        return Variation(*(each[rows] for each in self))


class Augmentation(NamedTuple):
    """How far random crops differ from the plain one."""
    rotation: float            # deviation of the angle, degrees; twice that at most
    rotation_chance: float     # share of the crops that are turned at all
    zoom: float                # deviation of the box's size around 1; that much at most
    flip_chance: float         # share of the crops that are mirrored
    colour: float = 0          # gain of a colour off 1 by at most this, brightness off by half of it
    hidden_chance: float = 0   # share of the crops of which a rectangle is hidden

    def draw(self, count, random):
        """The Variation of `count` crops, from a torch.Generator."""
        rotation = (self.rotation * torch.randn(count, generator=random)).clamp(-2 * self.rotation, 2 * self.rotation)
        rotation *= torch.rand(count, generator=random) < self.rotation_chance
        zoom = 1 + (self.zoom * torch.randn(count, generator=random)).clamp(-self.zoom, self.zoom)
        flip = torch.rand(count, generator=random) < self.flip_chance
        gain = 1 + self.colour * (2 * torch.rand(count, 3, generator=random) - 1)
        shift = self.colour * (torch.rand(count, 1, generator=random) - 0.5)
        least, most = HIDDEN
        sides = least + (most - least) * torch.rand(count, 2, generator=random)
        sides *= torch.rand(count, 1, generator=random) < self.hidden_chance
        hidden = torch.cat([torch.rand(count, 2, generator=random), sides], 1)
        return Variation(rotation, zoom, flip, gain, shift, hidden, torch.rand(count, 3, generator=random))


def hide(images, hidden, paint):
    """Images (B, 3, size, size) with rectangles `hidden` (B, 4), as in Variation, painted over in colours (B, 3)."""
    middles = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]            # (size,)
    middle, sides = hidden.view(-1, 2, 2).unbind(1)                                        # (B, 2) each: x, y
    across, down = ((middles - middle[..., None]).abs() < sides[..., None] / 2).unbind(1)  # (B, size) each
    return torch.where(down[:, None, :, None] & across[:, None, None, :], paint[:, :, None, None], images)


TOKENPOSE = Augmentation(rotation=30, rotation_chance=0.6, zoom=0.25, flip_chance=0.5)       # its recipe on MPII
AUGMENTATIONS = {"upright": Augmentation(rotation=10, rotation_chance=0.6, zoom=0.1, flip_chance=0.5),
                 "tokenpose": TOKENPOSE,
                 "colour": TOKENPOSE._replace(colour=0.25),
                 "occlusion": TOKENPOSE._replace(colour=0.25, hidden_chance=0.5)}
