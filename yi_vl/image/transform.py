"""Images in, pixels out: the ONE image transform of the project.

`YiVLImageProcessor` pads an image, which load.py opens, to a square with the mean colour, resizes it and normalizes it.
H, W in pixels, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ..arguments import as_float, as_int, shown
from ..config import IMAGE_MEAN, IMAGE_STD
from .load import open_strips
from .resize import resize_strips
from .source import ImageSource

_MAX_SIZE_PX = 1 << 14


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
        with open_strips(image, formats, allow_remote_images) as strips:
            return resize_strips(strips.size, strips.read, self.size_px)

    def to_uint8(
        self, image: ImageSource, formats: Sequence[str] | None = None, allow_remote_images: bool = False
    ) -> Tensor:
        """`prepare` as a tensor (H, W, 3) uint8, a quarter of the bytes of `pixel_values`."""
        return torch.from_numpy(np.array(self.prepare(image, formats, allow_remote_images)))

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
