"""Which questions are kept out of training: one in eight of what may be asked about what, in both languages.

A combination is, for example, seven dogs to be counted, or the two classes of which one is left of the other. Training
has sevens and dogs, but no question about a held-out combination, so that only what generalizes answers it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from train.nano.data.sample import Item

HELD_OUT_TOPICS = {
    "count": "counting", "count_of": "counting", "more": "comparing",
    "left": "left/right", "right": "left/right", "sideways": "left/right",
    "above": "above/below", "below": "above/below", "upright": "above/below",
}  # fmt: skip
_ONE_IN = 8


def combine(topic: str, items: Iterable[Item], number: int = 0) -> str:
    """The combination that a question is about; "" for topics of which nothing is held out."""
    task = HELD_OUT_TOPICS.get(topic)
    classes = sorted({f"{item.category} {item.colour or ''} {item.name}" for item in items})
    return "" if task is None else "|".join([task, *classes, str(number)])


def is_heldout(combination: str) -> bool:
    """Whether no training text asks about it."""
    return combination != "" and zlib.crc32(combination.encode()) % _ONE_IN == 0
