"""Settings of a training run for images: how many tiles a large one is cut into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class ImageConfig:
    """Dynamic high resolution (yi_vl/image/tiles.py): the tower sees a large image whole, and in tiles.

    tiles: most tiles of an image, 2 or more, each of which takes as many tokens as the image as a whole; 0: none;
        null: the checkpoint's, which is none from parts. It is saved with the trained model.
    """

    tiles: int | None = None


def check_image(image: ImageConfig, require: Callable[[bool, str], None]) -> None:
    """Refuse a number of tiles that an image cannot have."""
    if image.tiles is None:
        return
    from yi_vl.image.tiles import as_max_tiles  # numpy and Pillow, where there are tiles

    try:
        as_max_tiles(image.tiles, "image.tiles")
    except ValueError as error:
        require(False, str(error))
