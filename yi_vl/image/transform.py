"""Images in, pixels out: the ONE image transform of the project.

`YiVLImageProcessor` pads an image, which load.py opens, to a square with the mean colour, resizes it and normalizes it.
With tiles, a large image is more than one input of the tower: such a thumbnail, then its tiles row by row (tiles.py).
H, W in pixels, N images, K inputs of the tower for one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from ..arguments import as_float, as_int, shown
from ..config import IMAGE_MEAN, IMAGE_STD
from .load import check_source, open_strips
from .resize import resize_strips
from .samples import ImageError
from .source import ImageSource
from .tiles import NO_TILES, Grid, as_max_tiles, choose_grid, num_inputs

NUM_INPUTS = "num_inputs"  # beside pixel_values: how many of them each image is
_MAX_SIZE_PX = 1 << 14


def pad_and_resize(image: Image.Image, size_px: int, grid: Grid = NO_TILES) -> Image.Image:
    """Centre an RGB image on a square of the mean colour and resize it, bicubic, to size_px x size_px; on a grid of
    columns and rows of such squares with `grid`.

    Equal to the last bit to padding first and resizing then, in time and memory that grow with the image's own pixels.
    """
    return resize_strips(image.size, lambda start, stop: image.crop((0, start, image.width, stop)), size_px, grid)


def cut(grid_uint8: Tensor, size_px: int) -> list[Tensor]:
    """The tiles of an image that fills its grid, (rows * H, columns * W, 3), row by row: (H, W, 3) each, H = W"""
    rows = grid_uint8.split(size_px)
    return [tile.contiguous() for row in rows for tile in row.split(size_px, dim=1)]


@dataclass(frozen=True, eq=False)
class TiledImage:
    """An image as the model sees it, for later use in the place of its source: K inputs, (H, W, 3) uint8 each."""

    inputs_uint8: tuple[Tensor, ...]

    @property
    def thumbnail(self) -> Image.Image:
        """The image as a whole, as one without tiles would be seen."""
        return Image.fromarray(self.inputs_uint8[0].numpy())


class YiVLImageProcessor(BaseImageProcessor):
    """Images to `pixel_values` (N, 3, size_px, size_px), float32, normalized as OpenCLIP's towers expect.

    Args:
        max_tiles: most tiles of an image beside its thumbnail, 2 or more; 0 for none. N is then the sum of the inputs
            of all images. The one place where a model's tiles are kept: processor_config.json.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size_px: int = 448,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        max_tiles: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size_px = as_int(size_px, "size_px", 1, _MAX_SIZE_PX)
        self.max_tiles = as_max_tiles(max_tiles, "max_tiles")
        self.image_mean = _as_rgb(image_mean, "image_mean")
        self.image_std = _as_rgb(image_std, "image_std")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std is {self.image_std}; it must be greater than 0.")

    def __call__(  # type: ignore[override]
        self, images: Any, return_tensors: str | None = None, **_: Any
    ) -> BatchFeature:
        """An image, a list, or a list of lists (a batch); their pixels in reading order.

        With tiles, `num_inputs` says how many of the `pixel_values` each image is.
        """
        none = torch.zeros(0, self.size_px, self.size_px, 3, dtype=torch.uint8)
        inputs = [self.to_inputs(image) for image in _flatten(images)]
        inputs_uint8 = [each for of_image in inputs for each in of_image]
        pixel_values = self.to_pixel_values(torch.stack(inputs_uint8) if inputs_uint8 else none)
        data: dict[str, Any] = {"pixel_values": pixel_values}
        if self.max_tiles:
            data[NUM_INPUTS] = [len(of_image) for of_image in inputs]
        return BatchFeature(data, tensor_type=return_tensors)

    def prepare(
        self, image: ImageSource, formats: Sequence[str] | None = None, allow_remote_images: bool = False
    ) -> Image.Image:
        """The image as a whole as the model sees it: upright, RGB, padded to a square, resized; arguments as of
        `load_image`."""
        with open_strips(image, formats, allow_remote_images) as strips:
            return resize_strips(strips.size, strips.read, self.size_px)

    def to_uint8(
        self, image: ImageSource, formats: Sequence[str] | None = None, allow_remote_images: bool = False
    ) -> Tensor:
        """`prepare` as a tensor (H, W, 3) uint8, a quarter of the bytes of `pixel_values`."""
        return torch.from_numpy(np.array(self.prepare(image, formats, allow_remote_images)))

    def to_inputs(
        self,
        image: ImageSource | TiledImage,
        formats: Sequence[str] | None = None,
        allow_remote_images: bool = False,
    ) -> list[Tensor]:
        """All that the tower sees of an image, (H, W, 3) uint8 each: `to_uint8`, and with tiles these after it."""
        if isinstance(image, TiledImage):
            return self._checked(image)
        if not self.max_tiles:
            return [self.to_uint8(image, formats, allow_remote_images)]
        with open_strips(image, formats, allow_remote_images) as strips:
            grid = choose_grid(strips.full_size, self.size_px, self.max_tiles)
            grids = [NO_TILES] if grid == NO_TILES else [NO_TILES, grid]
            whole, *tiled = (resize_strips(strips.size, strips.read, self.size_px, each) for each in grids)
        tiles = [tile for each in tiled for tile in cut(torch.from_numpy(np.array(each)), self.size_px)]
        return [torch.from_numpy(np.array(whole)), *tiles]

    def snapshot(
        self, image: ImageSource, formats: Sequence[str] | None = None, allow_remote_images: bool = False
    ) -> Image.Image | TiledImage:
        """An image as the model sees it, which can stand for its source when that is gone; arguments as of
        `load_image`."""
        if not self.max_tiles:
            return self.prepare(image, formats, allow_remote_images)
        return TiledImage(tuple(self.to_inputs(image, formats, allow_remote_images)))

    def count_inputs(
        self,
        image: ImageSource | TiledImage,
        allow_remote_images: bool = False,
        formats: Sequence[str] | None = None,
    ) -> int:
        """How many inputs of the tower an image is, K, by its size alone: it is not decoded.

        Of a URL, and of what can be read only once, this is the least: 1.

        Raises:
            ValueError: as `check_source`.
        """
        if isinstance(image, TiledImage):
            return len(image.inputs_uint8)
        size = check_source(image, allow_remote_images, formats)
        return 1 if size is None else num_inputs(choose_grid(size, self.size_px, self.max_tiles))

    def _checked(self, image: TiledImage) -> list[Tensor]:
        expected = (self.size_px, self.size_px, 3)
        for each in image.inputs_uint8:
            if tuple(each.shape) != expected or each.dtype != torch.uint8:
                raise ImageError(
                    f"The tiled image holds {each.dtype} of shape {tuple(each.shape)}; expected uint8 of shape "
                    f"{expected}. Take the image's source."
                )
        return list(image.inputs_uint8)

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
