"""Images in, pixels out: the ONE image transform of the project.

`load_image` turns whatever a user hands over into an RGB image, or says in one line why it cannot;
`YiVLImageProcessor` pads it to a square with the mean colour, resizes it and normalizes it.
H, W in pixels, N images.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from .config import IMAGE_MEAN, IMAGE_STD
from .image_file import MAX_PIXELS as MAX_PIXELS
from .image_file import MAX_SIDE_PX as MAX_SIDE_PX
from .image_file import WEB_FORMATS as WEB_FORMATS
from .image_file import check_image, check_size, halve_large_jpeg_, open_file
from .image_resize import resize_strips
from .image_samples import ImageError, RgbStrips, channels_last, strips_of_array, strips_of_image

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor

_LARGE_IMAGE_PIXELS = 1 << 25
_one_large_image = threading.Lock()  # large images are decoded one at a time: together they would take gigabytes


def load_image(source: ImageSource, formats: Sequence[str] | None = None) -> Image.Image:
    """An upright RGB image from a path, encoded bytes, a PIL image or an array.

    Arrays are (H, W), (H, W, 1|3|4), or as tensors also (1|3|4, H, W). What samples of more than 8 bits and floats mean
    is one rule, stated atop image_samples.py: floats are 0..1 or 0..255, wider integers keep their upper eight bits.
    Transparency is laid over white, of an animation the first frame counts, a JPEG of more than 50 megapixels is read
    at half its size.

    Args:
        formats: of files, those that are read, as Pillow calls them; `WEB_FORMATS` for those of strangers. By default
            all of raster images.

    Raises:
        ValueError: there is no such file, it is not an image, it is damaged, it has more than `MAX_PIXELS` or a side of
            more than `MAX_SIDE_PX`, or its samples are none of an image.
    """
    with _reading(source, formats) as strips:
        return strips.read_all()


@contextmanager
def open_image(source: ImageSource, formats: Sequence[str] | None = None) -> Iterator[Image.Image]:
    """An image as Pillow opens it, found to be within bounds before it is decoded; the arguments are `load_image`'s.

    Raises:
        ValueError: as `load_image`, but for damage that only shows when it is decoded.
    """
    name = _describe(source)
    if isinstance(source, Image.Image):
        check_image(source, name)
        yield source
        return
    if not isinstance(source, (str, os.PathLike, bytes, bytearray)):
        raise ImageError(f"{name} is no picture: expected a path, bytes, a PIL image or an array.")
    file = bytes(source) if isinstance(source, (bytes, bytearray)) else Path(source).expanduser()
    if isinstance(file, Path) and not file.exists():
        raise ImageError(f"{name}: there is no such file.")
    if isinstance(file, Path) and not file.is_file():
        raise ImageError(f"{name} is a folder, not a picture.")
    if not (file.stat().st_size if isinstance(file, Path) else len(file)):
        raise ImageError(f"{name} is empty (0 bytes), not a picture.")
    with open_file(file, name, formats) as image:
        yield image


def pad_and_resize(image: Image.Image, size_px: int) -> Image.Image:
    """Centre an RGB image on a square of the mean colour and resize it, bicubic, to size_px x size_px.

    Equal to the last bit to padding first and resizing then, in time and memory that grow with the image's own pixels.
    """
    return resize_strips(image.size, lambda start, stop: image.crop((0, start, image.width, stop)), size_px)


class YiVLImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (N, 3, size_px, size_px), float32, normalised as OpenCLIP's towers expect."""

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
        """An image, a list, or a list of lists (a batch); their pixels in reading order."""
        squares = [self.square(image) for image in _flatten(images)]
        return BatchFeature({"pixel_values": self.normalise(torch.stack(squares))}, tensor_type=return_tensors)

    def prepare(self, image: ImageSource, formats: Sequence[str] | None = None) -> Image.Image:
        """The image as the model sees it: upright, RGB, padded to a square, resized; arguments as of `load_image`."""
        with _reading(image, formats) as strips:
            return resize_strips(strips.size, strips.read, self.size_px)

    def square(self, image: ImageSource) -> Tensor:
        """A prepared image's bytes, (H, W, 3) uint8: what the trainer's workers send, a quarter of `pixel_values`."""
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


@contextmanager
def _reading(source: ImageSource, formats: Sequence[str] | None) -> Iterator[RgbStrips]:
    """An image of any source, found to be within bounds, to be read while the context lasts."""
    name = _describe(source)
    if isinstance(source, (np.ndarray, Tensor)):
        array = channels_last(source, name)
        check_size((array.shape[1], array.shape[0]), name)
        yield strips_of_array(array, name)
        return
    with open_image(source, formats) as image:
        if not isinstance(source, Image.Image):  # which is its owner's
            halve_large_jpeg_(image)
        is_large = image.width * image.height > _LARGE_IMAGE_PIXELS
        with _one_large_image if is_large else nullcontext():
            yield strips_of_image(image, name)


def _describe(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source) if len(str(source)) < 200 else f"{str(source)[:80]}..."
    if filename := getattr(source, "filename", None):  # of a PIL image that was opened from a file
        return str(filename)
    if isinstance(source, (bytes, bytearray)):
        return f"the picture of {len(source)} bytes"
    return f"the picture given as {type(source).__name__}"
