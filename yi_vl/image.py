"""Pictures in, pixels out: the ONE image transform of the project.

`load_image` turns whatever a user hands over into an RGB picture, or says in one line why it cannot;
`YiVLImageProcessor` pads it to a square with the mean colour, resizes it and normalises it.
Called by processor.py, predict.py and the trainer's data; calls config.py. H, W in pixels, N images.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .config import IMAGE_MEAN, IMAGE_STD

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor

MAX_PIXELS = 100_000_000  # what a picture may hold before it is taken for a decompression bomb
_STRIP_ROWS = 256


def load_image(source: ImageSource) -> Image.Image:
    """An upright RGB picture from a path, encoded bytes, a PIL image or an array.

    Arrays are (H, W), (H, W, 1|3|4), or as tensors also (1|3|4, H, W); uint8, or float in 0..1. Transparency is laid
    over white, 16 bits are reduced to 8, of an animation the first frame counts.

    Raises:
        ValueError: there is no such file, it is not a picture, it is damaged, or it is larger than `MAX_PIXELS`.
    """
    name = _describe(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    if isinstance(source, (np.ndarray, Tensor)):
        return _to_rgb(_from_array(source, name), name)
    if isinstance(source, (bytes, bytearray)):
        if not source:
            raise ValueError(f"{name} is empty (0 bytes).")
        return _open(io.BytesIO(source), name)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source).expanduser()
        if not path.exists():
            raise ValueError(f"{name}: there is no such file.")
        if not path.is_file():
            raise ValueError(f"{name} is a folder, not a picture.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty (0 bytes).")
        return _open(path, name)
    raise ValueError(f"{name} is no picture: expected a path, bytes, a PIL image or an array.")


def pad_and_resize(image: Image.Image, size_px: int) -> Image.Image:
    """Centre an RGB picture on a square of the mean colour and resize it, bicubic, to size_px x size_px.

    Equal to the last bit to padding first and resizing then, but never holds the padded square, which for a
    60000 x 10 picture would be 10 GB: Pillow resizes along x, then along y, and so does this, in strips of rows.
    """
    width, height = image.size
    if width == height == size_px:
        return image
    side = max(width, height)
    mean_colour = tuple(int(255 * channel) for channel in IMAGE_MEAN)  # (122, 116, 104), as Yi-VL pads
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (size_px, side), mean_colour)  # resized along x only
    for start in range(0, height, _STRIP_ROWS):
        rows = min(_STRIP_ROWS, height - start)
        strip = image.crop((0, start, width, start + rows))
        if left:
            padded = Image.new("RGB", (side, rows), mean_colour)
            padded.paste(strip, (left, 0))
            strip = padded
        narrow.paste(strip.resize((size_px, rows), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((size_px, size_px), Image.Resampling.BICUBIC)


class YiVLImageProcessor(BaseImageProcessor):
    """Pictures to `pixel_values` (N, 3, size_px, size_px), float32, normalised as OpenCLIP's towers expect."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size_px: int = 448,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size_px = size_px
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def __call__(  # type: ignore[override]
        self, images: Any, return_tensors: str | None = None, **_: Any
    ) -> BatchFeature:
        """A picture, a list, or a list of lists (a batch); their pixels in reading order."""
        squares = [self.square(image) for image in _flatten(images)]
        return BatchFeature({"pixel_values": self.normalise(torch.stack(squares))}, tensor_type=return_tensors)

    def prepare(self, image: ImageSource) -> Image.Image:
        """The picture as the model sees it: upright, RGB, padded to a square, resized."""
        return pad_and_resize(load_image(image), self.size_px)

    def square(self, image: ImageSource) -> Tensor:
        """A prepared picture's bytes, (H, W, 3) uint8: what the trainer's workers send, a quarter of `pixel_values`."""
        return torch.from_numpy(np.array(self.prepare(image)))

    def normalise(self, squares: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> pixel_values (N, 3, H, W) float32"""
        mean, std = (torch.tensor(values, device=squares.device) for values in (self.image_mean, self.image_std))
        scaled = torch.addcmul(-mean / std, squares.float(), 1 / (255 * std))  # (N, H, W, 3)
        return scaled.permute(0, 3, 1, 2)


def _flatten(images: Any) -> list[ImageSource]:
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten(entry)]
    return [images]


def _describe(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source) if len(str(source)) < 200 else f"{str(source)[:80]}..."
    if filename := getattr(source, "filename", None):  # of a PIL image that was opened from a file
        return str(filename)
    if isinstance(source, (bytes, bytearray)):
        return f"the picture of {len(source)} bytes"
    return f"the picture given as {type(source).__name__}"


def _open(file: io.BytesIO | Path, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides, in _to_rgb
            with Image.open(file) as image:
                return _to_rgb(image, name)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is refused, it unpacks to too many pixels ({error}).") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is not a picture in a format Pillow knows (its content counts, not its name)."
        ) from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}.") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{name} has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are read. Shrink it first.")
    try:
        image.load()
        if (upright := ImageOps.exif_transpose(image)) is not None:
            image = upright
        if image.mode.startswith("I"):
            samples = np.asarray(image).astype(np.int64)
            image = Image.fromarray(
                (samples >> 8 if samples.max(initial=0) > 255 else samples).clip(0, 255).astype(np.uint8)
            )
        elif image.mode == "F":
            image = Image.fromarray(np.nan_to_num(np.asarray(image)).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")  # even of RGB that would be a copy
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, ZeroDivisionError) as error:
        # Pillow's decoders and its EXIF reader raise all of these on damaged files.
        raise ValueError(f"{name} is damaged and cannot be decoded: {error}.") from error


def _from_array(array: np.ndarray | Tensor, name: str) -> Image.Image:
    if isinstance(array, Tensor):
        array = array.detach().cpu().float().numpy() if array.is_floating_point() else array.cpu().numpy()
        if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
            array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"{name} has shape {array.shape}; expected (H, W) or (H, W, 3 or 4).")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min(initial=0) < 0 or array.max(initial=0) > 1:
            raise ValueError(f"{name} holds floats outside 0..1 (or not finite); scale them, or give uint8.")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        if array.min(initial=0) < 0 or array.max(initial=0) > 255:
            raise ValueError(f"{name} holds {array.dtype} values outside 0..255; give uint8.")
        array = array.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))
