"""Which tiles an image is cut into, beside the thumbnail of the whole: dynamic high resolution.

A tower sees squares of one size, so a large image loses most of its pixels. LLaVA-NeXT (Liu et al., January 2024) and
InternVL 1.5 (arXiv 2404.16821) show it to the same tower several times: whole, and in tiles at a higher resolution.

THE RULE: the fewest tiles, at most `max_tiles` in a grid of columns and rows, that keep three quarters of the image's
pixels; where no grid keeps so many, the one that keeps the most. An image is fitted into its grid without being
distorted, so a grid keeps fewer pixels the less its shape is the image's, and one that only enlarges the image is never
taken. Of what the thumbnail alone keeps enough, there are no tiles.

The number of tiles of an image is that of the image turned by 90 degrees: a header's size is enough to know it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..arguments import as_int

MAX_TILES = 64  # of an image; at 448 px each takes 1,024 of Yi-VL's tokens
Grid = tuple[int, int]  # columns, rows
NO_TILES: Grid = (1, 1)  # the thumbnail alone
_LEAST_KEPT = 0.75  # of the pixels of an image; a square one has tiles from 518 px on, where a tower sees 448 px


@lru_cache(maxsize=4096)
def choose_grid(size: tuple[int, int], size_px: int, max_tiles: int) -> Grid:
    """The grid of an image of `size` (width, height) by `THE RULE`; `NO_TILES` for a thumbnail alone.

    Args:
        size_px: side of a tile and of the thumbnail.
        max_tiles: 0 for none.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows > 1
    ]
    enough = [grid for grid in (NO_TILES, *grids) if _kept(size, grid, size_px) >= _LEAST_KEPT]
    if enough:
        return min(enough, key=lambda grid: grid[0] * grid[1])  # of two as small, one smaller would keep enough
    return min((NO_TILES, *grids), key=lambda grid: (-_kept(size, grid, size_px), grid[0] * grid[1]))


def as_max_tiles(value: Any, name: str) -> int:
    """
    Raises:
        ValueError: an image cannot have so many tiles.
    """
    number = as_int(value, name, 0, MAX_TILES)
    if number == 1:
        raise ValueError(f"{name} is 1, but one tile would be the thumbnail again; expected 0, or 2 to {MAX_TILES}.")
    return number


def num_inputs(grid: Grid) -> int:
    """How often the tower sees an image: as a thumbnail, and each of its tiles."""
    num_tiles = grid[0] * grid[1]
    return 1 if num_tiles == 1 else 1 + num_tiles


def tile_side(size: tuple[int, int], grid: Grid) -> int:
    """Side in pixels of what becomes a tile, when an image of `size` is padded to its grid's shape."""
    return max(-(-size[0] // grid[0]), -(-size[1] // grid[1]))


def _scale(size: tuple[int, int], grid: Grid, size_px: int) -> float:
    """Pixels along a side in the tiles, for one in the image."""
    return min(grid[0] * size_px / size[0], grid[1] * size_px / size[1])


def _kept(size: tuple[int, int], grid: Grid, size_px: int) -> float:
    """The part of an image's pixels that its tiles have."""
    return min(1.0, _scale(size, grid, size_px)) ** 2
