"""Encoded pictures to the model's pixels, quicker than yi_vl/image/transform.py and not to the last bit: for training.

Two things save time. A large JPEG is decoded to a half, a quarter or an eighth of its size: its decoder then skips most
of its work. And torch resizes bytes with vector instructions, which Pillow does not.

How far the pixels are from those of yi_vl/image/transform.py is printed by `python -m train.speed data`: by torch's
resizing 1 of 255 where it shrinks; by scaled decoding about as far as JPEG's own losses are.
H, W in pixels; a picture's size is (width, height), as Pillow has it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F

from yi_vl.config import IMAGE_MEAN
from yi_vl.image import load_image, open_image, pad_and_resize

# Decoded pixels per final one along a side. A halved picture may have fewer, because that saves most: further halvings
# save little, since a JPEG's code words must all be read in any case.
_LEAST_HALVED, _LEAST = 1.25, 2.0
_MEAN_COLOUR = tuple(int(255 * channel) for channel in IMAGE_MEAN)
_MAX_CANVAS_PIXELS = 100_000_000  # of the padded square
_MOST_LEAD = 16
_HAIR = 1e-7


def square(content: bytes, size_px: int) -> Tensor:
    """An encoded picture, padded to a square and resized: (H, W, 3) uint8, H = W = size_px

    Raises:
        ValueError: it is not a picture, or damaged, or too large.
    """
    with open_image(content) as opened:
        return _square(opened, size_px)


def _square(opened: Image.Image, size_px: int) -> Tensor:
    width, height = opened.size
    scale = _scale(max(width, height), size_px) if opened.format == "JPEG" else 1
    if scale > 1:
        opened.draft("RGB", (max(1, width // scale), max(1, height // scale)))
        scale = round(max(width, height) / max(opened.size))  # the decoder's choice
    image = load_image(opened)
    if scale == 1:
        width, height = image.size
    elif opened.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # lies on its side
        width, height = height, width
    side = max(width, height)
    if width == height == size_px or (side / scale) ** 2 > _MAX_CANVAS_PIXELS:  # or a strip
        return torch.from_numpy(np.array(pad_and_resize(image, size_px)))
    left, top = (side - width) // 2 / scale, (side - height) // 2 / scale
    return _resize(image, left, top, side / scale, size_px)


def _scale(side_px: int, size_px: int) -> int:
    """By how much to shrink while decoding."""
    for scale, least in ((8, _LEAST), (4, _LEAST), (2, _LEAST_HALVED)):
        if side_px >= scale * least * size_px:
            return scale
    return 1


def _resize(image: Image.Image, left: float, top: float, side: float, size_px: int) -> Tensor:
    """A picture at (left, top) of a square of the mean colour, resized. The three may end between pixels.

    torch's grid begins where the pixels do. So the canvas begins some final pixels earlier, as many as bring the
    picture's corner to a whole pixel, and they are cut off in the end.
    """
    step = side / size_px
    lead_x, lead_y = _lead(left, step), _lead(top, step)
    x, y = round(left + lead_x * step), round(top + lead_y * step)
    canvas = np.empty((_least(lead_y + size_px, step), _least(lead_x + size_px, step), 3), np.uint8)
    inside = canvas[y : y + image.height, x : x + image.width]
    inside[:] = np.asarray(image)[: len(inside), : inside.shape[1]]
    canvas[:y] = canvas[y + image.height :] = _MEAN_COLOUR
    canvas[:, :x] = canvas[:, x + image.width :] = _MEAN_COLOUR
    planes = torch.from_numpy(canvas).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), not copied
    factor = (1 + _HAIR) / step  # lest rounding cost the last pixel
    resized = F.interpolate(planes, scale_factor=factor, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return resized[lead_y : lead_y + size_px, lead_x : lead_x + size_px]


def _lead(start: float, step: float) -> int:
    """Final pixels, of `step` each, after which a place `start` pixels in comes to lie nearest a whole pixel."""
    return min(range(_MOST_LEAD), key=lambda lead: abs(start + lead * step - round(start + lead * step)))


def _least(num_final: int, step: float) -> int:
    """Pixels that so many final ones of `step` take."""
    return math.ceil(num_final * step * (1 - _HAIR))
