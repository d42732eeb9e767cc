"""Where the items of a scene lie, as cells of its grid: "C5" is the third column, the fifth row.

For pretraining only. An answer "to the left" teaches a language model one bit about two items; their cells teach it
to find items, and then to compare and to count them.
"""

from __future__ import annotations

import numpy as np

from train.nano.data.labels import Lang
from train.nano.data.sample import Item, Truth
from train.nano.text.dialogue import QAPair
from train.nano.text.mosaic import centre_cell
from train.nano.text.wording import class_of, entries, noun, unique_items

COLUMNS = "ABCDEFGH"
_LISTS: dict[Lang, str] = {"en": "List the items with their cells.", "zh": "列出所有东西和位置。"}
_FIND: dict[Lang, str] = {"en": "Cell of the {x}?", "zh": "{x}在哪格？"}
_NAME: dict[Lang, str] = {"en": "What is in {x}?", "zh": "{x}里是什么？"}
_STEPS: dict[Lang, str] = {"en": "{x} First name the cells.", "zh": "{x}先说位置。"}
_COLONS: dict[Lang, str] = {"en": ": ", "zh": "："}


def cell_name(item: Item, grid: int) -> str:
    """The column's letter and the row's number of an item's centre."""
    row, column = centre_cell(item, grid)
    return f"{COLUMNS[column]}{row + 1}"


def location_question(rng: np.random.Generator, truth: Truth, grid: int, lang: Lang, qa: QAPair) -> tuple[str, str]:
    """A question about cells and its answer: of all items, of some, or of those that a question is about.

    Args:
        qa: a question about the scene; it is the one that is asked in steps.
    """
    draw = rng.random()
    items = sorted(truth.items, key=lambda item: centre_cell(item, grid))
    unique = unique_items(items)
    if draw < 0.3 and unique:
        item = unique[rng.integers(len(unique))]
        return _FIND[lang].format(x=noun(item, lang)), cell_name(item, grid)
    if draw < 0.5:
        return _LISTS[lang], _with_cells(items, grid, lang)
    if draw < 0.75 or not qa.combination:  # a colour or a shape
        item = items[rng.integers(len(items))]
        return _NAME[lang].format(x=cell_name(item, grid)), noun(item, lang)
    cells = _with_cells(_asked_about(qa, items), grid, lang)
    return _STEPS[lang].format(x=qa.question), cells + _COLONS[lang] + qa.core


def _with_cells(items: list[Item], grid: int, lang: Lang) -> str:
    return entries([(noun(item, lang), cell_name(item, grid)) for item in items], lang)


def _asked_about(qa: QAPair, items: list[Item]) -> list[Item]:
    """All items for "how many items"; otherwise those of the classes, or the very items, that are named."""
    if qa.topic == "count":
        return items
    named = {" ".join(name.split()) for name in qa.combination.split("|")[1:]}
    return [item for item in items if class_of(item) in named or item.label in named]
