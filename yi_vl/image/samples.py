"""Samples of any mode, type and depth as upright 8-bit RGB, strip by strip, so that no image is copied as a whole.

THE RULE, the same for PIL images, arrays and tensors: 8-bit samples are taken as they are. Floats up to 1 are scaled by
255. All others count as integers of 8, 10, 12, 14, 16, 20, 24, 28, 31 or 32 bits, the fewest that hold the largest
sample, of which the upper eight are kept. Resizing overshoots, so white may be exceeded by an eighth, and is clipped.

8-bit samples that were stored in 16 bits, times 256 or 257, are known by their lower byte, however dark they are. Any
other dark image is taken for one of fewer bits; nothing but zeros is black. Refused are samples that are not finite,
negative by more than an eighth of white, or beyond 32 bits, and floats whose largest lies between 9/8 and 16: they are
neither 0..1 nor 0..255.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeIs

_CHANNELS = (1, 3, 4)
_STRIP_PIXELS = 1 << 19
_BITS = (8, 10, 12, 14, 16, 20, 24, 28, 31, 32)
_UNIT = 0  # in the place of a number of bits: floats in 0..1
_OVERSHOOT = 1 / 8  # of white
_LEAST_OF_255 = 16  # floats whose largest is less are not taken for 0..255
_TURN = Image.Transpose
_UPRIGHT = {  # by EXIF orientation
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
_FROM_COLUMNS = (_TURN.TRANSPOSE, _TURN.ROTATE_270, _TURN.TRANSVERSE, _TURN.ROTATE_90)  # rows were columns
_FROM_THE_END = (
    _TURN.ROTATE_180,
    _TURN.FLIP_TOP_BOTTOM,
    _TURN.TRANSVERSE,
    _TURN.ROTATE_90,
)  # the last come first


def is_tensor(value: object) -> TypeIs[Tensor]:
    """Whether it is a tensor; torch, which a check of files does not need, is not imported to find out."""
    return isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ()))


class ImageError(ValueError):
    """An image that is not read, and why."""


@dataclass(frozen=True)
class RgbStrips:
    """An upright 8-bit RGB image of `size` (width, height); `read(start, stop)` gives some of its rows.

    full_size: of the file, where it is decoded at a reduced size.
    """

    size: tuple[int, int]
    read: Callable[[int, int], Image.Image]
    full_size: tuple[int, int]

    def read_all(self) -> Image.Image:
        """All rows, which are converted strip by strip."""
        width, height = self.size
        num_rows = max(1, _STRIP_PIXELS // width)
        if num_rows >= height:
            return self.read(0, height)
        image = Image.new("RGB", self.size)
        for start in range(0, height, num_rows):
            image.paste(self.read(start, min(start + num_rows, height)), (0, start))
        return image


def strips_of_image(image: Image.Image, name: str) -> RgbStrips:
    """A PIL image of any mode, turned upright by its EXIF orientation, transparency laid over white.

    Args:
        name: of the image, for errors.

    Raises:
        ImageError: it is damaged, or `THE RULE` refuses its samples.
    """
    with decoding(name):
        image.load()
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    width, height = image.size
    bits: int | None = None
    if image.mode == "F" or image.mode.startswith("I"):
        bits = _num_bits(lambda start, stop: np.asarray(image.crop((0, start, width, stop))), image.size, name)

    def read(start: int, stop: int) -> Image.Image:
        num_lines = width if turn in _FROM_COLUMNS else height
        if turn in _FROM_THE_END:
            start, stop = num_lines - stop, num_lines - start
        box = (start, 0, stop, height) if turn in _FROM_COLUMNS else (0, start, width, stop)
        with decoding(name):
            strip = image if box == (0, 0, width, height) else image.crop(box)
            strip = _over_white(strip if bits is None else _grey(strip, bits))
            return strip if turn is None else strip.transpose(turn)

    upright_size = (height, width) if turn in _FROM_COLUMNS else (width, height)
    return RgbStrips(upright_size, read, upright_size)


def strips_of_array(array: np.ndarray | Tensor, name: str) -> RgbStrips:
    """Samples of shape (H, W) or (H, W, 3|4), of any real type.

    Raises:
        ImageError: `THE RULE` refuses them.
    """

    def samples(start: int, stop: int) -> np.ndarray:
        strip = array[start:stop]
        if is_tensor(strip):
            strip = strip.detach().cpu()
            strip = (strip.float() if strip.is_floating_point() else strip).numpy()
        return strip * np.uint8(255) if strip.dtype == bool else strip

    size = (array.shape[1], array.shape[0])
    bits = 8 if samples(0, 1).dtype == np.uint8 else _num_bits(samples, size, name)

    def read(start: int, stop: int) -> Image.Image:
        return _over_white(Image.fromarray(np.ascontiguousarray(_to_8_bits(samples(start, stop), bits))))

    return RgbStrips(size, read, size)


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """What Pillow raises on damaged files, which is nearly every exception there is, as an `ImageError`."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name} takes more memory than there is; shrink it first.") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{name} is damaged and cannot be decoded: {reason}.") from error


def channels_last(array: np.ndarray | Tensor, name: str) -> np.ndarray | Tensor:
    """(H, W), (H, W, 1|3|4) or, of a tensor, (1|3|4, H, W) -> (H, W) or (H, W, 3|4), not copied

    Channels of an array come last, so that (3, H, 3) is three rows. A tensor's may come first, and of such a shape it
    cannot be told which of the two are the channels.

    Raises:
        ImageError: it has another shape, a tensor's may be either, or its values are no real numbers.
    """
    if array.dtype.is_complex if is_tensor(array) else array.dtype.kind not in "biuf":
        raise ImageError(f"{name} holds {array.dtype} values; expected integers or floats.")
    if is_tensor(array) and array.ndim == 3 and array.shape[0] in _CHANNELS:
        if array.shape[-1] in _CHANNELS:
            raise ImageError(
                f"{name} has shape {tuple(array.shape)}, which may be (channels, height, width) or (height, width, "
                "channels). Give an array, whose channels come last: tensor.permute(1, 2, 0).numpy() of the former, "
                "tensor.numpy() of the latter."
            )
        array = array.permute(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        hint = "; channels come last, as of array.transpose(1, 2, 0)" if array.shape[:1] in ((3,), (4,)) else ""
        raise ImageError(f"{name} has shape {tuple(array.shape)}; expected (H, W) or (H, W, 3 or 4){hint}.")
    return array


def _num_bits(samples: Callable[[int, int], np.ndarray], size: tuple[int, int], name: str) -> int:
    """How many bits white has, or `_UNIT`, by `THE RULE`; `samples(start, stop)` gives rows of an image of `size`."""
    width, height = size
    starts = range(0, height, max(1, _STRIP_PIXELS // width))
    low, high, is_float = float("inf"), float("-inf"), False
    for start in starts:
        strip = samples(start, min(start + starts.step, height))
        is_float = strip.dtype.kind == "f"
        if is_float and not np.isfinite(strip).all():
            raise ImageError(f"{name} holds samples that are not finite, outside any range; expected 0..1 or 0..255.")
        low, high = min(low, strip.min().item()), max(high, strip.max().item())
    if is_float and high <= 1 + _OVERSHOOT:
        bits, white = _UNIT, 1
    elif is_float and high < _LEAST_OF_255:
        raise ImageError(f"{name} holds floats up to {high:.4g}, outside 0..1 and too dark for 0..255; scale them.")
    else:
        bits = next((bits for bits in _BITS if high <= (2**bits - 1) * (1 + _OVERSHOOT)), -1)
        white = 2**bits - 1 if bits > 0 else 0
    if not white or high < 0 or low < -white * _OVERSHOOT:
        raise ImageError(f"{name} holds samples from {low:.6g} to {high:.6g}, outside 0..1, 0..255 and up to 32 bits.")
    if not is_float and 8 <= bits < 16 and high > 255:
        strips = (samples(start, min(start + starts.step, height)) for start in starts)
        if all((((strip & 255) == 0) | ((strip & 255) == strip >> 8)).all() for strip in strips):
            return 16
    return bits


def _to_8_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    if samples.dtype == np.uint8:
        return samples
    if bits == _UNIT:
        return np.rint(samples.clip(0, 1) * 255).astype(np.uint8)
    upper = np.floor(samples / 2 ** (bits - 8)) if samples.dtype.kind == "f" else samples >> (bits - 8)
    return upper.clip(0, 255).astype(np.uint8)


def _grey(strip: Image.Image, bits: int) -> Image.Image:
    samples = np.asarray(strip)
    grey = _to_8_bits(samples, bits)
    if isinstance(transparent := strip.info.get("transparency"), int):
        grey[samples == transparent] = 255
    return Image.fromarray(grey)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # which Pillow converts to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)  # the same bits as alpha_composite, in less time and memory
        return white
    return image if image.mode == "RGB" else image.convert("RGB")  # even of RGB that would be a copy
