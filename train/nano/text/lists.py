"""Questions about several items of a scene at once, and answers that name each of them: "dog C5, cat E1".

For pretraining only: such an answer has several lookups by name, where an answer like "to the left" has one bit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np

from train.nano.data.labels import Lang
from train.nano.data.layout import DIRECTIONS, direction
from train.nano.data.sample import Truth
from train.nano.text.combinations import combine, is_heldout
from train.nano.text.locations import cell_name
from train.nano.text.wording import (
    COMMAS,
    LETTERS,
    class_of,
    count_phrase,
    entries,
    is_countable,
    lettered,
    noun,
    plural,
    uncoloured,
    unique_items,
)

_CELLS: dict[Lang, str] = {"en": "Cells of {x}?", "zh": "{x}的位置？"}
_COUNTS: dict[Lang, str] = {"en": "How many of each: {x}?", "zh": "各有几个：{x}？"}
_SIDES: dict[Lang, str] = {"en": "Where are they as seen from the {y}: {x}?", "zh": "从{y}看，都在哪边：{x}？"}
_VALUES_TOO: dict[Lang, str] = {"en": "Say what and which letter.", "zh": "说出是什么和选项。"}
_LETTERED = 0.6  # of the lists that have several values
_DIRECTIONS: dict[Lang, dict[str, str]] = {
    "en": {where: where for where in DIRECTIONS},
    "zh": dict(zip(DIRECTIONS, ("左边", "右边", "上面", "下面"))),
}


@dataclass(frozen=True)
class Listing:
    """A question with a place for names, and for each name what is asked about it."""

    question: str
    values: dict[str, str]


def list_question(rng: np.random.Generator, truth: Truth, grid: int, lang: Lang) -> tuple[str, str] | None:
    """A random question and its answer, without held-out combinations; None where there is nothing to ask.

    Where several values occur, some questions offer them as options; see `_with_options`.
    """
    counts = partial(_counts, truth, lang)  # twice: not every scene has something to count
    makers = [partial(_cells, truth, grid, lang), partial(_sides, rng, truth, lang), counts, counts]
    listings = (makers[i]() for i in rng.permutation(len(makers)))
    listing = next((each for each in listings if each.values), None)
    if listing is None:
        return None
    if len(set(listing.values.values())) > 1 and rng.random() < _LETTERED:
        listing = _with_options(rng, listing, lang)
    return _in_random_order(rng, listing, lang)


def list_cells(rng: np.random.Generator, truth: Truth, lang: Lang, grid: int) -> tuple[str, str] | None:
    """In which cell every item is that is there once; None where none is."""
    listing = _cells(truth, grid, lang)
    return _in_random_order(rng, listing, lang) if listing.values else None


def _cells(truth: Truth, grid: int, lang: Lang) -> Listing:
    return Listing(_CELLS[lang], {noun(item, lang): cell_name(item, grid) for item in unique_items(truth.items)})


def _counts(truth: Truth, lang: Lang) -> Listing:
    """How many there are of every class; of none where there is one of each."""
    counts = Counter(class_of(item) for item in truth.items)
    if max(counts.values()) == 1:
        return Listing(_COUNTS[lang], {})
    examples = {class_of(item): uncoloured(item) for item in truth.items if is_countable(item)}
    values = {}
    for name, count in counts.items():
        if name in examples and not is_heldout(combine("count_of", [examples[name]] * count, count)):
            named = noun(examples[name], lang)
            values[plural(named) if lang == "en" else named] = count_phrase(count, lang)[1]
    return Listing(_COUNTS[lang], values)


def _sides(rng: np.random.Generator, truth: Truth, lang: Lang) -> Listing:
    """On which side of one item the others are that are clearly on one."""
    unique = unique_items(truth.items)
    if not unique:
        return Listing(_SIDES[lang], {})
    of = unique[rng.integers(len(unique))]
    values = {}
    for item in unique:
        where = direction(item, of) if item is not of else None
        topic = "sideways" if where in ("left", "right") else "upright"
        if where and not is_heldout(combine(topic, [item, of])):
            values[noun(item, lang)] = _DIRECTIONS[lang][where]
    return Listing(_SIDES[lang].format(y=noun(of, lang), x="{x}"), values)


def _with_options(rng: np.random.Generator, listing: Listing, lang: Lang) -> Listing:
    """Up to four of its values as options, "(A) C5 (B) E1", and what has them.

    Half of the answers are letters alone, "dog A, cat B", the others values and letters, "dog C5 A, cat E1 B". These
    teach to find the letter of what is said; the former then need the letter of what is not.
    """
    values = sorted(set(listing.values.values()))
    options = [values[i] for i in rng.permutation(len(values))][: len(LETTERS)]
    letters = dict(zip(options, LETTERS))
    question = f"{listing.question}\n{lettered(options)}"
    offered = {name: value for name, value in listing.values.items() if value in letters}
    if rng.random() < 0.5:
        return Listing(question, {name: letters[value] for name, value in offered.items()})
    both = {name: f"{value} {letters[value]}" for name, value in offered.items()}
    return Listing(f"{question}\n{_VALUES_TOO[lang]}", both)


def _in_random_order(rng: np.random.Generator, listing: Listing, lang: Lang) -> tuple[str, str]:
    """The question for names and the answer that gives what belongs to each, in the same random order."""
    pairs = list(listing.values.items())
    chosen = [pairs[i] for i in rng.permutation(len(pairs))]
    names = COMMAS[lang].join(name for name, _ in chosen)
    return listing.question.format(x=names), entries(chosen, lang)
