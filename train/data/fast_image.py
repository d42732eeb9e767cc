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
from yi_vl.image.tiles import NO_TILES, Grid, choose_grid, tile_side
from yi_vl.image.transform import cut

# Least decoded pixels per final one along a side. The first halving saves most, so it is allowed a lower ratio.
_MIN_RATIO_HALVED, _MIN_RATIO = 1.25, 2.0
_MEAN_COLOUR = tuple(int(255 * channel) for channel in IMAGE_MEAN)
_MAX_CANVAS_PIXELS = 100_000_000  # of the padded square
_MAX_LEAD = 16
_EPSILON = 1e-7


def to_inputs(content: bytes, size_px: int, max_tiles: int = 0) -> list[Tensor]:
    """All that the tower sees of an encoded image, (H, W, 3) uint8 each, H = W = size_px: padded to a square and
    resized, then its tiles, if there are any.

    Raises:
        ValueError: it is not an image, or damaged, or too large.
    """
    with open_image(content) as opened:
        return _to_inputs(opened, size_px, max_tiles)


def _to_inputs(opened: Image.Image, size_px: int, max_tiles: int) -> list[Tensor]:
    size = opened.size
    scale = 1
    if opened.format == "JPEG":
        scale = _scale(tile_side(size, choose_grid(size, size_px, max_tiles)), size_px)
    if scale > 1:
        opened.draft("RGB", (max(1, size[0] // scale), max(1, size[1] // scale)))
        scale = round(max(size) / max(opened.size))  # as the decoder chose
    image = load_image(opened)
    if scale == 1:
        size = image.size
    elif opened.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # EXIF: rotated by 90 degrees
        size = size[::-1]
    inputs = [_pad_and_resize(image, size, scale, size_px, NO_TILES)]
    if (grid := choose_grid(size, size_px, max_tiles)) != NO_TILES:
        inputs += cut(_pad_and_resize(image, size, scale, size_px, grid), size_px)
    return inputs


def _pad_and_resize(image: Image.Image, size: tuple[int, int], scale: int, size_px: int, grid: Grid) -> Tensor:
    """(rows * size_px, columns * size_px, 3) of an image that was decoded at 1 / `scale` of its size."""
    side = tile_side(size, grid)
    padded_size = grid[0] * side, grid[1] * side
    is_unchanged = size == padded_size and side == size_px
    if is_unchanged or padded_size[0] * padded_size[1] / scale**2 > _MAX_CANVAS_PIXELS:  # or too elongated
        return torch.from_numpy(np.array(pad_and_resize(image, size_px, grid)))
    left, top = ((padded - length) // 2 / scale for padded, length in zip(padded_size, size))
    return _resize(image, left, top, side / scale, size_px, grid)


def _scale(side_px: int, size_px: int) -> int:
    """The factor by which to reduce the size in decoding."""
    for scale, min_ratio in ((8, _MIN_RATIO), (4, _MIN_RATIO), (2, _MIN_RATIO_HALVED)):
        if side_px >= scale * min_ratio * size_px:
            return scale
    return 1


def _resize(image: Image.Image, left: float, top: float, side: float, size_px: int, grid: Grid) -> Tensor:
    """An image at (left, top) in a grid of squares of the mean colour, resized. `left`, `top` and `side`, of a square,
    may be fractional.

    torch's grid starts at whole pixels. So the canvas starts some final pixels earlier, as many as move the image's
    corner to about a whole pixel, and they are cropped in the end.
    """
    step = side / size_px
    width, height = grid[0] * size_px, grid[1] * size_px
    lead_x, lead_y = _lead(left, step), _lead(top, step)
    x, y = round(left + lead_x * step), round(top + lead_y * step)
    num_rows, num_columns = _num_source_pixels(lead_y + height, step), _num_source_pixels(lead_x + width, step)
    canvas = np.empty((num_rows, num_columns, 3), np.uint8)
    inside = canvas[y : y + image.height, x : x + image.width]
    inside[:] = np.asarray(image)[: len(inside), : inside.shape[1]]
    canvas[:y] = canvas[y + image.height :] = _MEAN_COLOUR
    canvas[:, :x] = canvas[:, x + image.width :] = _MEAN_COLOUR
    planes = torch.from_numpy(canvas).permute(2, 0, 1).unsqueeze(0)  # (1, 3, H, W), not copied
    factor = (1 + _EPSILON) / step  # rounding must not lose the last pixel
    resized = F.interpolate(planes, scale_factor=factor, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return resized[lead_y : lead_y + height, lead_x : lead_x + width]


def _lead(start: float, step: float) -> int:
    """Final pixels, of `step` each, that move position `start` nearest to a whole pixel."""
    return min(range(_MAX_LEAD), key=lambda lead: abs(start + lead * step - round(start + lead * step)))


def _num_source_pixels(num_final: int, step: float) -> int:
    """Source pixels covered by `num_final` final ones of `step` each."""
    return math.ceil(num_final * step * (1 - _EPSILON))
