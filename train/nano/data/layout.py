"""The items of a scene, their positions, and how they lie to each other."""

from typing import Literal

import numpy as np

from train.nano.data.labels import COLOURS, SHAPES, THINGS
from train.nano.data.sample import Item

Direction = Literal["left", "right", "above", "below"]
DIRECTIONS: tuple[Direction, ...] = ("left", "right", "above", "below")
_SIDES = {
    1: (0.3, 0.7), 2: (0.24, 0.42), 3: (0.2, 0.36), 4: (0.18, 0.32), 5: (0.17, 0.28),
    6: (0.16, 0.26), 7: (0.15, 0.24), 8: (0.15, 0.23), 9: (0.14, 0.22),
}  # fmt: skip
_MOST_DIFFERENT = 5
_GAP = 0.03
_CLEAR = 0.08  # centres nearer than this along an axis are level


def scene_items(rng: np.random.Generator, num_items: int) -> list[Item]:
    """Shapes, things or both; at times a few classes repeated, so that counting has something to count.

    Of more than five items one to three classes are always repeated: more different ones are too small to tell apart.
    """
    shape_fraction = rng.choice([1.0, 0.5, 0.0], p=[0.6, 0.25, 0.15])
    pool: list[Item] = []
    num_classes = num_items if rng.random() < 0.6 else int(rng.integers(1, 3))
    if num_items > _MOST_DIFFERENT:
        num_classes = int(rng.integers(1, 4))
    for _ in range(num_classes):
        if rng.random() < shape_fraction:
            pool.append(Item("shape", choice(rng, tuple(SHAPES)), (0, 0, 1, 1), choice(rng, tuple(COLOURS))))
        else:
            pool.append(Item("thing", choice(rng, tuple(THINGS)), (0, 0, 1, 1)))
    if num_classes == num_items:
        return pool
    return [pool[rng.integers(num_classes)] for _ in range(num_items)]


def place_items(rng: np.random.Generator, num_items: int) -> list[tuple[float, float, float]]:
    """(centre x, centre y, side) of `num_items` squares in the unit frame, apart from each other."""
    arrangement = rng.choice(["row", "column", "free"], p=[0.3, 0.3, 0.4])
    if arrangement == "free" or num_items == 1 or num_items > _MOST_DIFFERENT:
        return _scattered(rng, num_items)
    line = _line(rng, num_items)
    return line if arrangement == "row" else [(y, x, side) for x, y, side in line]


def _line(rng: np.random.Generator, num_items: int) -> list[tuple[float, float, float]]:
    """Squares side by side, their centres nearly level."""
    slot = 1.0 / num_items
    level = rng.uniform(0.3, 0.7)
    placed = []
    for index in range(num_items):
        side = min(rng.uniform(*_SIDES[num_items]), slot - _GAP)
        slack = (slot - _GAP - side) / 2
        placed.append(((index + 0.5) * slot + rng.uniform(-slack, slack), level + rng.uniform(-0.04, 0.04), side))
    rng.shuffle(placed)
    return [(float(x), float(y), float(side)) for x, y, side in placed]


def _scattered(rng: np.random.Generator, num_items: int) -> list[tuple[float, float, float]]:
    """Squares anywhere; when no room is found, all are thrown again a little smaller."""
    shrink = 1.0
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(30 * num_items):
            side = rng.uniform(*_SIDES[num_items]) * shrink
            x, y = rng.uniform(side / 2 + 0.01, 0.99 - side / 2, 2)
            if all(max(abs(x - a), abs(y - b)) > (side + c) / 2 + _GAP for a, b, c in placed):
                placed.append((float(x), float(y), float(side)))
            if len(placed) == num_items:
                return placed
        shrink *= 0.93


def direction(item: Item, of: Item) -> Direction | None:
    """Where `item` lies as seen from `of`, or None where it is not clearly one of the four."""
    (x, y), (of_x, of_y) = item.centre, of.centre
    across, down = x - of_x, y - of_y
    if abs(across) > 1.5 * abs(down) and (item.box[2] < of.box[0] or item.box[0] > of.box[2]):
        return "left" if across < 0 else "right"
    if abs(down) > 1.5 * abs(across) and (item.box[3] < of.box[1] or item.box[1] > of.box[3]):
        return "above" if down < 0 else "below"
    return None


def neighbour(items: tuple[Item, ...], of: Item, where: Direction) -> Item | None:
    """The one item that lies `where` of `of`; None when there is none, or when another one could be meant too."""
    axis = 0 if where in ("left", "right") else 1
    sign = -1 if where in ("left", "above") else 1
    candidates = [item for item in items if sign * (item.centre[axis] - of.centre[axis]) > _CLEAR and item is not of]
    if len(candidates) == 1 and direction(candidates[0], of) == where:
        return candidates[0]
    return None


def word_width(num_letters: int) -> float:
    """How much of an image's width the largest print of a word takes."""
    return min(0.95, 0.3 + 0.11 * num_letters)


def choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
