"""Images in, pixels out: the ONE image transform of the project.

`load_image` decodes any source to an RGB image; `YiVLImageProcessor` pads it to a square with the mean colour, resizes
it and normalizes it.
H, W in pixels, N images.
"""

from __future__ import annotations

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

from ..arguments import as_float, as_int, shown
from ..config import IMAGE_MEAN, IMAGE_STD
from .file import check_image, check_size, halve_large_jpeg_, open_file
from .resize import resize_strips
from .samples import ImageError, RgbStrips, channels_last, decoding, strips_of_array, strips_of_image
from .source import ImageSource, check_url, describe, is_stream, is_url, resolve

_MAX_SIZE_PX = 1 << 14
_LARGE_IMAGE_PIXELS = 1 << 25
_large_image_lock = threading.Lock()  # large images are decoded one at a time: together they would take gigabytes


def load_image(
    source: ImageSource, formats: Sequence[str] | None = None, allow_remote_images: bool = False
) -> Image.Image:
    """An upright RGB image from a path, encoded bytes, a URL, a file object, a PIL image or an array.

    A file object is read from its current position, a pipe to its end. Arrays are (H, W), (H, W, 1|3|4), or as tensors
    also (1|3|4, H, W); an ambiguous tensor is refused. samples.py has the rule for samples that are not 8-bit: floats
    are 0..1 or 0..255, wider integers keep their upper eight bits.
    Transparency is laid over white, of an animation the first frame counts, a JPEG of more than 50 megapixels is read
    at half its size.

    Args:
        formats: of files, those that are read, as Pillow calls them; `WEB_FORMATS` for those of strangers. By default
            all of raster images.
        allow_remote_images: fetch http and https URLs, from the public internet only; see remote.py. `data:`
            URLs are always read.

    Raises:
        ValueError: there is no such file, it cannot be fetched, it is not an image, it is damaged, it has more than
            `MAX_PIXELS` or a side of more than `MAX_SIDE_PX`, or its samples are none of an image.
    """
    with _open_strips(source, formats, allow_remote_images) as strips:
        return strips.read_all()


@contextmanager
def open_image(
    source: ImageSource, formats: Sequence[str] | None = None, allow_remote_images: bool = False
) -> Iterator[Image.Image]:
    """An image as Pillow opens it, checked to be within bounds but not decoded; the arguments are `load_image`'s.

    Raises:
        ValueError: as `load_image`, but for damage that only shows when it is decoded.
    """
    name, resolved = describe(source), resolve(source, allow_remote_images)
    if isinstance(resolved, (Path, bytes)):
        with open_file(resolved, name, formats) as image:
            yield image
    elif isinstance(resolved, Image.Image):
        check_image(resolved, name)
        yield resolved
    else:
        raise ImageError(f"{name} holds samples, not an image in a file's format.")


def check_source(source: ImageSource, allow_remote_images: bool = False) -> None:
    """Find what is wrong with an image without decoding it; what can be read only once is not read, nor is a URL.

    Raises:
        ValueError: as `load_image`, but for damage that only shows when it is decoded.
    """
    if isinstance(source, (np.ndarray, Tensor)):
        _samples(source)
    elif is_url(source):
        check_url(source, allow_remote_images)
    elif not is_stream(source):
        with open_image(source):
            pass


def pad_and_resize(image: Image.Image, size_px: int) -> Image.Image:
    """Centre an RGB image on a square of the mean colour and resize it, bicubic, to size_px x size_px.

    Equal to the last bit to padding first and resizing then, in time and memory that grow with the image's own pixels.
    """
    return resize_strips(image.size, lambda start, stop: image.crop((0, start, image.width, stop)), size_px)


class YiVLImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (N, 3, size_px, size_px), float32, normalized as OpenCLIP's towers expect."""

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size_px: int = 448,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size_px = as_int(size_px, "size_px", 1, _MAX_SIZE_PX)
        self.image_mean = _as_rgb(image_mean, "image_mean")
        self.image_std = _as_rgb(image_std, "image_std")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std is {self.image_std}; it must be greater than 0.")

    def __call__(  # type: ignore[override]
        self, images: Any, return_tensors: str | None = None, **_: Any
    ) -> BatchFeature:
        """An image, a list, or a list of lists (a batch); their pixels in reading order."""
        none = torch.zeros(0, self.size_px, self.size_px, 3, dtype=torch.uint8)
        images_uint8 = [self.to_uint8(image) for image in _flatten(images)]
        pixel_values = self.to_pixel_values(torch.stack(images_uint8) if images_uint8 else none)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    def prepare(
        self, image: ImageSource, formats: Sequence[str] | None = None, allow_remote_images: bool = False
    ) -> Image.Image:
        """The image as the model sees it: upright, RGB, padded to a square, resized; arguments as of `load_image`."""
        with _open_strips(image, formats, allow_remote_images) as strips:
            return resize_strips(strips.size, strips.read, self.size_px)

    def to_uint8(self, image: ImageSource, allow_remote_images: bool = False) -> Tensor:
        """`prepare` as a tensor (H, W, 3) uint8, a quarter of the bytes of `pixel_values`."""
        return torch.from_numpy(np.array(self.prepare(image, allow_remote_images=allow_remote_images)))

    def to_pixel_values(self, images_uint8: Tensor) -> Tensor:
        """(N, H, W, 3) uint8 -> pixel_values (N, 3, H, W) float32"""
        mean, std = (torch.tensor(values, device=images_uint8.device) for values in (self.image_mean, self.image_std))
        scaled = torch.addcmul(-mean / std, images_uint8.float(), 1 / (255 * std))  # (N, H, W, 3)
        return scaled.permute(0, 3, 1, 2)


def _as_rgb(values: Any, name: str) -> list[float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ValueError(f"{name} is {shown(values)}; expected three numbers, one of each channel.")
    return [as_float(value, name) for value in values]


def _flatten(images: Any) -> list[ImageSource]:
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten(entry)]
    return [images]


@contextmanager
def _open_strips(source: ImageSource, formats: Sequence[str] | None, allow_remote_images: bool) -> Iterator[RgbStrips]:
    """An image of any source, checked to be within bounds, readable within the context."""
    name = describe(source)
    if isinstance(source, (np.ndarray, Tensor)):
        with decoding(name):
            strips = strips_of_array(_samples(source), name)
        yield strips
        return
    with open_image(source, formats, allow_remote_images) as image:
        if not isinstance(source, Image.Image):  # which is its owner's
            halve_large_jpeg_(image)
        is_large = image.width * image.height > _LARGE_IMAGE_PIXELS
        with _large_image_lock if is_large else nullcontext():
            yield strips_of_image(image, name)


def _samples(array: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """(H, W) or (H, W, 3|4), checked to be within bounds."""
    name = describe(array)
    samples = channels_last(array, name)
    check_size((samples.shape[1], samples.shape[0]), name)
    return samples
