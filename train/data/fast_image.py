"""A faster, slightly different version of the transform in yi_vl/image/transform.py, for training.

Large JPEGs are decoded at a half, a quarter or an eighth of their size, which skips most of the decoder's work, and
torch resizes uint8 images with vector instructions. `python -m train.speed data` prints the difference in pixels: 1 of
255 for torch's resizing; for scaled decoding about as much as JPEG's own losses.

H, W in pixels; an image's size is (width, height), as in Pillow.
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

# Least decoded pixels per final one along a side. The first halving saves most, so it is allowed a lower ratio.
_MIN_RATIO_HALVED, _MIN_RATIO = 1.25, 2.0
_MEAN_COLOUR = tuple(int(255 * channel) for channel in IMAGE_MEAN)
_MAX_CANVAS_PIXELS = 100_000_000  # of the padded square
_MAX_LEAD = 16
_EPSILON = 1e-7


def to_uint8(content: bytes, size_px: int) -> Tensor:
    """An encoded image, padded to a square and resized: (H, W, 3) uint8, H = W = size_px

    Raises:
        ValueError: it is not an image, or damaged, or too large.
    """
    with open_image(content) as opened:
        return _pad_and_resize(opened, size_px)


def _pad_and_resize(opened: Image.Image, size_px: int) -> Tensor:
    width, height = opened.size
    scale = _scale(max(width, height), size_px) if opened.format == "JPEG" else 1
    if scale > 1:
        opened.draft("RGB", (max(1, width // scale), max(1, height // scale)))
        scale = round(max(width, height) / max(opened.size))  # as the decoder chose
    image = load_image(opened)
    if scale == 1:
        width, height = image.size
    elif opened.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # EXIF: rotated by 90 degrees
        width, height = height, width
    side = max(width, height)
    if width == height == size_px or (side / scale) ** 2 > _MAX_CANVAS_PIXELS:  # or too elongated
        return torch.from_numpy(np.array(pad_and_resize(image, size_px)))
    left, top = (side - width) // 2 / scale, (side - height) // 2 / scale
    return _resize(image, left, top, side / scale, size_px)


def _scale(side_px: int, size_px: int) -> int:
    """The factor by which to reduce the size in decoding."""
    for scale, min_ratio in ((8, _MIN_RATIO), (4, _MIN_RATIO), (2, _MIN_RATIO_HALVED)):
        if side_px >= scale * min_ratio * size_px:
            return scale
    return 1


def _resize(image: Image.Image, left: float, top: float, side: float, size_px: int) -> Tensor:
    """An image at (left, top) in a square of the mean colour, resized. `left`, `top` and `side` may be fractional.

    torch's grid starts at whole pixels. So the canvas starts some final pixels earlier, as many as move the image's
    corner to about a whole pixel, and they are cropped in the end.
    """
    step = side / size_px
    lead_x, lead_y = _lead(left, step), _lead(top, step)
    x, y = round(left + lead_x * step), round(top + lead_y * step)
    canvas = np.empty(
        (_num_source_pixels(lead_y + size_px, step), _num_source_pixels(lead_x + size_px, step), 3), np.uint8
    )
    inside = canvas[y : y + image.height, x : x + image.width]
    inside[:] = np.asarray(image)[: len(inside), : inside.shape[1]]
    canvas[:y] = canvas[y + image.height :] = _MEAN_COLOUR
    canvas[:, :x] = canvas[:, x + image.width :] = _MEAN_COLOUR
    planes = torch.from_numpy(canvas).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), not copied
    factor = (1 + _EPSILON) / step  # rounding must not lose the last pixel
    resized = F.interpolate(planes, scale_factor=factor, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return resized[lead_y : lead_y + size_px, lead_x : lead_x + size_px]


def _lead(start: float, step: float) -> int:
    """Final pixels, of `step` each, that move position `start` nearest to a whole pixel."""
    return min(range(_MAX_LEAD), key=lambda lead: abs(start + lead * step - round(start + lead * step)))


def _num_source_pixels(num_final: int, step: float) -> int:
    """Source pixels covered by `num_final` final ones of `step` each."""
    return math.ceil(num_final * step * (1 - _EPSILON))
