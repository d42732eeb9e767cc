"""Mosaics: images as one sign per patch, which nano's language model is trained on before it gets images.

An image reaches a language model as one vector per patch. A mosaic has one sign per patch in the same order, so a
language model trained on mosaics can use image features, and the first stage only has to map each patch to its sign.
There is a sign for each of `labels.LABELS`, and one for every two letters that can share a patch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np

from train.nano.data.labels import BACKGROUND, COLOURS, DIGITS, FLAGS, LABELS, SHAPES, THINGS, UNKNOWN
from train.nano.data.layout import place_items, scene_items, word_width
from train.nano.data.sample import Box, Item, Truth
from train.nano.data.vocabulary import VOCABULARY
from train.nano.text.wording import MAX_ITEMS

_LETTER_PAIRS = sorted({f"letter {a}{b}" for word in VOCABULARY for a, b in pairwise(word)})
_NAMES = (*(label for label in LABELS if label != UNKNOWN), *_LETTER_PAIRS, UNKNOWN)
SIGN_IDS: dict[str, int] = {label: index for index, label in enumerate(_NAMES)}

Shares = dict[str, float]  # category -> fraction
_NARROW, _WIDE = "fijlrt", "mw"
_FRAME: Box = (0.0, 0.0, 1.0, 1.0)  # of items that have no place yet
_COVERED = 0.4  # of a patch: then it shows the item
_NOISY, _NOISE = 0.5, 0.25  # share of single items seen badly, and of their patches that are mistaken
_LABELS_OF = {each: [label for label in LABELS if label.startswith(each)] for each in ("thing", "flag", "digit")}


def random_truth(rng: np.random.Generator, shares: Shares, max_items: int = MAX_ITEMS) -> Truth:
    """A random ground truth, without drawing an image of it.

    Args:
        max_items: the most items of a scene.
    """
    category = list(shares)[rng.choice(len(shares), p=list(shares.values()))]
    if category == "scene":
        return _scene(rng, scene_items(rng, int(rng.integers(1, max_items + 1))))
    if category == "unknown":
        return Truth("unknown", (Item("unknown", "", _box(rng)),))
    if category == "word":
        return Truth("word", _letters(rng, VOCABULARY[rng.integers(len(VOCABULARY))]))
    if category == "digit":
        return Truth("digit", (Item("digit", DIGITS[rng.integers(10)], _box(rng)),))
    is_flag = category == "flag" or (category == "same" and rng.random() < 0.25)
    of: Literal["thing", "flag"] = "flag" if is_flag else "thing"
    keys = tuple(FLAGS if is_flag else THINGS)
    names = [keys[rng.integers(len(keys))] for _ in range(2 if category == "same" else 1)]
    if category == "same" and rng.random() < 0.5:
        names[1] = names[0]
    return Truth(category, tuple(Item(of, name, _box(rng)) for name in names))  # type: ignore[arg-type]


def distinct_scene(rng: np.random.Generator) -> Truth:
    """A random scene of two to nine items, no two alike, things and shapes in any proportion."""
    things = [Item("thing", name, _FRAME) for name in rng.permutation(list(THINGS))]
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    shapes = [Item("shape", pairs[i][0], _FRAME, pairs[i][1]) for i in rng.permutation(len(pairs))]
    num_items = int(rng.integers(2, MAX_ITEMS + 1))
    num_things = int(rng.integers(num_items + 1))
    items = things[:num_things] + shapes[: num_items - num_things]
    return _scene(rng, [items[i] for i in rng.permutation(num_items)])


def to_cells(rng: np.random.Generator, truth: Truth, grid: int) -> list[np.ndarray] | None:
    """(grid, grid) keys of `SIGN_IDS` for every image; None where a patch would need more than one.

    Single items have mistaken patches at times. A scene's items have one sign each: what covers more cannot always be
    counted.
    """
    if truth.category == "same":
        return [_mistaken(rng, _covered(item, grid), item) for item in truth.items]
    if truth.category == "unknown":
        return [_unknown(rng, truth.items[0], grid)]
    cells = ideal_cells(truth, grid)
    if None in cells.flat:
        return None
    if truth.category in ("word", "scene"):
        return [cells]
    return [_mistaken(rng, cells, truth.items[0])]


def ideal_cells(truth: Truth, grid: int) -> np.ndarray:
    """(grid, grid) keys of `SIGN_IDS` for one image: a single item wherever it is, those of a word or scene by centre.

    None where a patch would need more than one sign.
    """
    if truth.category in ("word", "scene"):
        return _by_centre(truth.items, grid)
    return _covered(truth.items[0], grid)


def centre_cell(item: Item, grid: int) -> tuple[int, int]:
    """The row and the column of the cell that an item's centre lies in."""
    x, y = (min(grid - 1, max(0, int(side * grid))) for side in item.centre)
    return y, x


def _scene(rng: np.random.Generator, items: list[Item]) -> Truth:
    placed = zip(items, place_items(rng, len(items)))
    boxes = [(item, (x - s / 2, y - s / 2, x + s / 2, y + s / 2)) for item, (x, y, s) in placed]
    return Truth("scene", tuple(Item(item.category, item.name, box, item.colour) for item, box in boxes))


def _empty(grid: int) -> np.ndarray:
    return np.full((grid, grid), BACKGROUND, dtype=object)


def _by_centre(items: tuple[Item, ...], grid: int) -> np.ndarray:
    """(grid, grid) labels: each item in the patch of its centre, two letters together; None where that cannot be."""
    cells = _empty(grid)
    for item in items:
        y, x = centre_cell(item, grid)
        label = item.label if cells[y, x] == BACKGROUND else f"{cells[y, x]}{item.name}"
        cells[y, x] = label if label in SIGN_IDS else None
    return cells


def _covered(item: Item, grid: int) -> np.ndarray:
    """(grid, grid) labels: the item in every patch that it covers well, and in that of its centre."""
    x0, y0, x1, y1 = (side * grid for side in item.box)
    edges = np.arange(grid)
    across = np.clip(np.minimum(edges + 1, x1) - np.maximum(edges, x0), 0, 1)
    down = np.clip(np.minimum(edges + 1, y1) - np.maximum(edges, y0), 0, 1)
    cells = _empty(grid)
    cells[np.outer(down, across) >= _COVERED] = item.label
    cells[min(grid - 1, int((y0 + y1) / 2)), min(grid - 1, int((x0 + x1) / 2))] = item.label
    return cells


def _mistaken(rng: np.random.Generator, cells: np.ndarray, item: Item) -> np.ndarray:
    """The labels with a tower's errors: some patches of an item become background, or another class of its category."""
    if rng.random() >= _NOISY:
        return cells
    others = _LABELS_OF[item.category]
    for y, x in np.argwhere((cells != BACKGROUND) & (rng.random(cells.shape) < _NOISE)):
        cells[y, x] = BACKGROUND if rng.random() < 0.5 else others[rng.integers(len(others))]
    return cells


def _unknown(rng: np.random.Generator, item: Item, grid: int) -> np.ndarray:
    """(grid, grid) labels of what has no name: its own sign, or patches that a tower takes for many things."""
    cells = _covered(item, grid)
    covered = np.argwhere(cells != BACKGROUND)
    is_recognized = rng.random() < 0.6
    for y, x in covered:
        cells[y, x] = UNKNOWN if is_recognized or rng.random() < 0.2 else LABELS[rng.integers(len(LABELS))]
    return cells


def _box(rng: np.random.Generator) -> Box:
    """Where a single item may lie: its longer side a third of the frame or more."""
    longer, shape = rng.uniform(0.35, 1.0), rng.uniform(0.5, 1.0)
    width, height = (longer, longer * shape) if rng.random() < 0.7 else (longer * shape, longer)
    x, y = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    return float(x), float(y), float(x + width), float(y + height)


def _letters(rng: np.random.Generator, word: str) -> tuple[Item, ...]:
    """A printed word's letters, side by side on a line that may rise or fall a little."""
    widths = np.array([0.55 if letter in _NARROW else 1.4 if letter in _WIDE else 1.0 for letter in word])
    widths *= rng.uniform(0.85, 1.15, len(word))
    total = word_width(len(word)) * rng.uniform(0.75, 1.0)
    ends = np.cumsum(widths) / widths.sum() * total
    starts = np.concatenate([[0.0], ends[:-1]])
    left, slope = rng.uniform(0, 1 - total), rng.uniform(-0.1, 0.1)
    height = total / len(word)
    level = rng.uniform(0.1, 0.9 - height)
    return tuple(
        Item("letter", letter, (left + a, level + slope * a, left + b, level + slope * a + height))
        for letter, a, b in zip(word, starts.tolist(), ends.tolist(), strict=True)
    )
