"""Pad to a square, or to the shape of a grid of tiles, and resize, in time and memory that grow with the image's own
pixels, not with the padded one's.

Pillow resizes along x, then along y, and rounds to 8 bits after each. Most images are padded strip by strip and resized
by Pillow. Of a long and large one only the outputs that its own rows or columns reach are computed, here, with Pillow's
integer weights; the others are constant. h rows of n values among H rows, most of them padding, become O rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from ..config import IMAGE_MEAN
from .tiles import NO_TILES, Grid, tile_side

ReadStrip = Callable[[int, int], Image.Image]  # rows [start, stop) of an image: RGB, as wide as the image

_PADDING = tuple(int(255 * channel) for channel in IMAGE_MEAN)  # (122, 116, 104), as Yi-VL pads
_STRIP_PIXELS = 1 << 19  # that are converted and resized at once
_MAX_PADDED_PIXELS = 1 << 25  # up to which Pillow takes 0.2 s at most, whatever the image's shape
_MAX_RATIO = 2  # of padded pixels to the image's own, up to which Pillow is faster at any size
_PRECISION_BITS = 22  # of Pillow's weights


def resize_strips(size: tuple[int, int], read_strip: ReadStrip, size_px: int, grid: Grid = NO_TILES) -> Image.Image:
    """An image of `size` (width, height) centred on a grid of squares, each of which becomes size_px x size_px: RGB

    Equal to the last bit to pasting it on that rectangle of the mean colour and `resize(..., BICUBIC)` of that.

    Args:
        grid: columns and rows; by default one square.
    """
    side = tile_side(size, grid)
    padded_size = grid[0] * side, grid[1] * side
    new_size = grid[0] * size_px, grid[1] * size_px
    if size == padded_size == new_size:
        return read_strip(0, size[1])
    num_padded = padded_size[0] * padded_size[1]
    if num_padded <= _MAX_PADDED_PIXELS or num_padded <= _MAX_RATIO * size[0] * size[1]:
        rows = _resize_x(size, read_strip, padded_size, new_size[0])
        return rows.resize(new_size, Image.Resampling.BICUBIC)
    is_wide = size[1] * padded_size[0] < size[0] * padded_size[1]  # most of the padding is above and below
    return (_resize_wide if is_wide else _resize_tall)(size, read_strip, padded_size, new_size)


def _resize_x(
    size: tuple[int, int], read_strip: ReadStrip, padded_size: tuple[int, int], new_width: int
) -> Image.Image:
    """An image padded to columns, which become `new_width`, and to rows."""
    (width, height), (num_columns, num_rows) = size, padded_size
    narrow = Image.new("RGB", (new_width, num_rows), _PADDING)
    strip_rows = max(1, _STRIP_PIXELS // num_columns)
    for start in range(0, height, strip_rows):
        strip = read_strip(start, min(start + strip_rows, height))
        if width < num_columns:
            padded = Image.new("RGB", (num_columns, strip.height), _PADDING)
            padded.paste(strip, ((num_columns - width) // 2, 0))
            strip = padded
        resized = strip.resize((new_width, strip.height), Image.Resampling.BICUBIC)
        narrow.paste(resized, (0, (num_rows - height) // 2 + start))
    return narrow


def _resize_wide(
    size: tuple[int, int], read_strip: ReadStrip, padded_size: tuple[int, int], new_size: tuple[int, int]
) -> Image.Image:
    height = size[1]
    rows = _PaddedAxis(height, padded_size[1], new_size[1])
    narrow = np.asarray(_resize_x(size, read_strip, (padded_size[0], height), new_size[0])).reshape(
        height, -1
    )  # (h, n)
    resized = Image.new("RGB", new_size, _PADDING)
    resized.paste(Image.fromarray(rows.resample(narrow).reshape(-1, new_size[0], 3)), (0, rows.first_output))
    return resized


def _resize_tall(
    size: tuple[int, int], read_strip: ReadStrip, padded_size: tuple[int, int], new_size: tuple[int, int]
) -> Image.Image:
    (width, height), num_rows = size, padded_size[1]
    columns = _PaddedAxis(width, padded_size[0], new_size[0])
    narrow = Image.new("RGB", (columns.num_outputs, num_rows), _PADDING)
    strip_rows = max(1, _STRIP_PIXELS // width)
    for start in range(0, height, strip_rows):
        strip = read_strip(start, min(start + strip_rows, height))
        transposed = np.asarray(strip.transpose(Image.Transpose.TRANSPOSE)).reshape(width, -1)  # (h, n)
        resampled = columns.resample(transposed).reshape(-1, strip.height, 3).transpose(1, 0, 2)
        narrow.paste(Image.fromarray(np.ascontiguousarray(resampled)), (0, (num_rows - height) // 2 + start))
    resized = Image.new("RGB", new_size, _PADDING)
    resized.paste(narrow.resize((narrow.width, new_size[1]), Image.Resampling.BICUBIC), (columns.first_output, 0))
    return resized


class _PaddedAxis:
    """`num_inputs` rows in the middle of `num_padded`, of which `new_size` are made, `num_outputs` of them not just
    padding."""

    def __init__(self, num_inputs: int, num_padded: int, new_size: int) -> None:
        self._start = (num_padded - num_inputs) // 2
        self._end = self._start + num_inputs
        kernels = _kernels(num_padded, new_size)
        reached = [
            index
            for index, (first, weights) in enumerate(kernels)
            if first < self._end and first + len(weights) > self._start
        ]
        self.first_output, self.num_outputs = reached[0], len(reached)
        self._kernels = kernels[reached[0] : reached[-1] + 1]

    def resample(self, inputs: np.ndarray) -> np.ndarray:
        """(h, n) uint8, rows of interleaved RGB -> (num_outputs, n) uint8, in Pillow's arithmetic: 32-bit integers."""
        num_values = inputs.shape[1]
        inputs = inputs.astype(np.int32)
        padding = np.resize(np.array(_PADDING, np.int32), num_values)
        outputs = np.empty((self.num_outputs, num_values), np.uint8)
        for output, (first, weights) in zip(outputs, self._kernels):
            low, high = max(first, self._start), min(first + len(weights), self._end)
            inside = weights[low - first : high - first]
            sums = np.einsum("j,jk->k", inside, inputs[low - self._start : high - self._start])  # no BLAS, no threads
            sums += padding * (weights.sum() - inside.sum()) + (1 << _PRECISION_BITS - 1)
            output[:] = (sums >> _PRECISION_BITS).clip(0, 255)
        return outputs


def _kernels(num_inputs: int, num_outputs: int) -> list[tuple[int, np.ndarray]]:
    """Of each output, its first input and its weights, int32: Pillow's bicubic ones, times 2**22.

    The operations and their order are those of `precompute_coeffs` in Pillow's src/libImaging/Resample.c.
    """
    scale = num_inputs / num_outputs
    support = 2.0 * max(scale, 1.0)
    kernels = []
    for center in (np.arange(num_outputs) + 0.5) * scale:
        first, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), num_inputs)
        x = np.abs((np.arange(first, end) - center + 0.5) * (1.0 / max(scale, 1.0)))
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
        weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
        weights /= np.cumsum(weights)[-1]  # summed in order: pairwise sums differ in the last bit
        rounded = np.trunc(weights * 2**_PRECISION_BITS + np.where(weights < 0, -0.5, 0.5))
        kernels.append((first, rounded.astype(np.int32)))
    return kernels
