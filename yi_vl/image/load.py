"""Images opened, checked and decoded, from any source, without torch.

H, W in pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .file import check_image, check_size, halve_large_jpeg_, open_file
from .samples import ImageError, RgbStrips, channels_last, decoding, is_tensor, strips_of_array, strips_of_image
from .source import ImageSource, check_url, describe, is_stream, is_url, resolve

if TYPE_CHECKING:
    from torch import Tensor

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
    with open_strips(source, formats, allow_remote_images) as strips:
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


def check_source(
    source: ImageSource, allow_remote_images: bool = False, formats: Sequence[str] | None = None
) -> tuple[int, int] | None:
    """Find what is wrong with an image without decoding it; what can be read only once is not read, nor is a URL.

    Returns:
        Its width and height, not turned upright; None for what is not read.

    Raises:
        ValueError: as `load_image`, but for damage that only shows when it is decoded.
    """
    if isinstance(source, np.ndarray) or is_tensor(source):
        samples = _samples(source)
        return samples.shape[1], samples.shape[0]
    if is_url(source):
        check_url(source, allow_remote_images)
        return None
    if is_stream(source):
        return None
    with open_image(source, formats) as image:
        return image.size


@contextmanager
def open_strips(source: ImageSource, formats: Sequence[str] | None, allow_remote_images: bool) -> Iterator[RgbStrips]:
    """An image of any source, checked to be within bounds, readable within the context."""
    name = describe(source)
    if isinstance(source, np.ndarray) or is_tensor(source):
        with decoding(name):
            strips = strips_of_array(_samples(source), name)
        yield strips
        return
    with open_image(source, formats, allow_remote_images) as image:
        full_size = image.size
        if not isinstance(source, Image.Image):  # which is its owner's
            halve_large_jpeg_(image)
        is_halved = image.size != full_size
        is_large = image.width * image.height > _LARGE_IMAGE_PIXELS
        with _large_image_lock if is_large else nullcontext():
            strips = strips_of_image(image, name)
            if is_halved:
                is_turned = strips.size != image.size
                strips = replace(strips, full_size=full_size[::-1] if is_turned else full_size)
            yield strips


def _samples(array: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """(H, W) or (H, W, 3|4), checked to be within bounds."""
    name = describe(array)
    samples = channels_last(array, name)
    check_size((samples.shape[1], samples.shape[0]), name)
    return samples
