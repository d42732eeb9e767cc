"""How often the tower sees an average image of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from yi_vl.checkpoint.find import find
from yi_vl.checkpoint.load import read_max_tiles
from yi_vl.config import PRESETS
from yi_vl.image.file import MAX_SIDE_PX
from yi_vl.image.tiles import choose_grid, num_inputs

from ..config import TrainConfig
from .models import maker_of

ImageSize = tuple[int, int]  # width, height


def as_image_size(text: str) -> ImageSize:
    """
    Raises:
        ValueError: it is not of the form 1024x768, or has more pixels along a side than are read.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", text)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= MAX_SIDE_PX for side in sides):
        raise ValueError(
            f"--image-pixels is {text!r}; expected WIDTHxHEIGHT, such as 1024x768, of at most {MAX_SIDE_PX:,} each."
        )
    return sides


def planned_tiles(config: TrainConfig, path: Path, model: str | None = None) -> int:
    """Most tiles of an image: the config's, else those of what it starts from.

    Args:
        path: of the config.
        model: a preset or folder instead of the config's.
    """
    if config.image.tiles is not None:
        return config.image.tiles
    source = config.init_from.checkpoint if model is None else model
    if source is None or source in PRESETS:
        return 0
    if model is not None or Path(source).is_dir():
        return read_max_tiles(find(source))
    maker = maker_of(source, path)
    return 0 if maker is None else planned_tiles(*maker)


def average_inputs(max_tiles: int, size_px: int, image_size: ImageSize | None) -> int:
    """Inputs of the tower for an image of this size; None: for one with as many tiles as an image may have."""
    if image_size is None:
        return 1 + max_tiles if max_tiles else 1
    return num_inputs(choose_grid(image_size, size_px, max_tiles))


def tile_assumptions(numbers: Iterable[tuple[int, int]], image_size: ImageSize | None) -> list[str]:
    """What is assumed of an average image, and the range, for each two numbers: most tiles, tokens for each."""
    assumed = "that have all tiles" if image_size is None else f"of {image_size[0]} x {image_size[1]} px"
    return [
        f"Assumed: images {assumed} (--image-pixels); with up to {max_tiles} tiles an image has {tokens:,} to "
        f"{(1 + max_tiles) * tokens:,} tokens."
        for max_tiles, tokens in dict.fromkeys(numbers)
        if max_tiles
    ]
