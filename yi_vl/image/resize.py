"""Pad to a square and resize, in time and memory that grow with the image's own pixels, not with the square's.

Pillow resizes along x, then along y, and rounds to 8 bits after each. Most images are padded strip by strip and resized
by Pillow. Of a long and large one only the outputs that its own rows or columns reach are computed, here, with Pillow's
integer weights; the others are constant. h rows of n values among S rows, most of them padding, become O rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from ..config import IMAGE_MEAN

ReadStrip = Callable[[int, int], Image.Image]  # rows [start, stop) of an image: RGB, as wide as the image

_PADDING = tuple(int(255 * channel) for channel in IMAGE_MEAN)  # (122, 116, 104), as Yi-VL pads
_STRIP_PIXELS = 1 << 19  # that are converted and resized at once
_MAX_PADDED_PIXELS = 1 << 25  # of the square, up to which Pillow takes 0.2 s at most, whatever the image's shape
_MAX_RATIO = 2  # of the sides, up to which Pillow is faster at any size
_PRECISION_BITS = 22  # of Pillow's weights


def resize_strips(size: tuple[int, int], read_strip: ReadStrip, size_px: int) -> Image.Image:
    """An image of `size` (width, height) centred on a square and resized: RGB, size_px x size_px

    Equal to the last bit to pasting it on a square of the mean colour and `resize(..., BICUBIC)` of that.
    """
    width, height = size
    side = max(size)
    if width == height == size_px:
        return read_strip(0, height)
    if side * side <= _MAX_PADDED_PIXELS or side <= _MAX_RATIO * min(size):
        return _resize_x(size, read_strip, size_px, side).resize((size_px, size_px), Image.Resampling.BICUBIC)
    return (_resize_wide if height < side else _resize_tall)(size, read_strip, size_px)


def _resize_x(size: tuple[int, int], read_strip: ReadStrip, size_px: int, num_rows: int) -> Image.Image:
    """An image padded to max(size) columns, which become `size_px`, and to `num_rows` rows."""
    width, height = size
    side = max(size)
    narrow = Image.new("RGB", (size_px, num_rows), _PADDING)
    strip_rows = max(1, _STRIP_PIXELS // side)
    for start in range(0, height, strip_rows):
        strip = read_strip(start, min(start + strip_rows, height))
        if width < side:
            padded = Image.new("RGB", (side, strip.height), _PADDING)
            padded.paste(strip, ((side - width) // 2, 0))
            strip = padded
        resized = strip.resize((size_px, strip.height), Image.Resampling.BICUBIC)
        narrow.paste(resized, (0, (num_rows - height) // 2 + start))
    return narrow


def _resize_wide(size: tuple[int, int], read_strip: ReadStrip, size_px: int) -> Image.Image:
    width, height = size
    rows = _PaddedAxis(height, width, size_px)
    narrow = np.asarray(_resize_x(size, read_strip, size_px, height)).reshape(height, -1)  # (h, n)
    resized = Image.new("RGB", (size_px, size_px), _PADDING)
    resized.paste(Image.fromarray(rows.resample(narrow).reshape(-1, size_px, 3)), (0, rows.first_output))
    return resized


def _resize_tall(size: tuple[int, int], read_strip: ReadStrip, size_px: int) -> Image.Image:
    width, height = size
    columns = _PaddedAxis(width, height, size_px)
    narrow = Image.new("RGB", (columns.num_outputs, height))
    strip_rows = max(1, _STRIP_PIXELS // width)
    for start in range(0, height, strip_rows):
        strip = read_strip(start, min(start + strip_rows, height))
        transposed = np.asarray(strip.transpose(Image.Transpose.TRANSPOSE)).reshape(width, -1)  # (h, n)
        resampled = columns.resample(transposed).reshape(-1, strip.height, 3).transpose(1, 0, 2)
        narrow.paste(Image.fromarray(np.ascontiguousarray(resampled)), (0, start))
    resized = Image.new("RGB", (size_px, size_px), _PADDING)
    resized.paste(narrow.resize((narrow.width, size_px), Image.Resampling.BICUBIC), (columns.first_output, 0))
    return resized


class _PaddedAxis:
    """`num_inputs` rows in the middle of `side` rows, of whose `size_px` outputs `num_outputs` are not just padding."""

    def __init__(self, num_inputs: int, side: int, size_px: int) -> None:
        self._start = (side - num_inputs) // 2
        self._end = self._start + num_inputs
        kernels = _kernels(side, size_px)
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
