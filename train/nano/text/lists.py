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

    At times the answer has the letters of options, "(A) C5 (B) E1": "dog A, cat B", or the options too: "dog C5 A, cat
    E1 B". The latter teaches to find an option's letter, the former to do so for what is not said.
    """
    makers = [partial(_cells, grid=grid), _sides, _counts, _counts]  # not every scene has something to count
    listings = (makers[i](truth, lang, rng) for i in rng.permutation(len(makers)))
    listing = next((each for each in listings if each.values), None)
    if listing is None:
        return None
    options = [str(value) for value in rng.permutation(sorted(set(listing.values.values())))][: len(LETTERS)]
    draw = rng.random()
    if len(options) == 1 or draw > _LETTERED:
        return _in_random_order(rng, listing, lang)
    letters = dict(zip(options, LETTERS))
    values = {name: value for name, value in listing.values.items() if value in letters}
    question = f"{listing.question}\n{lettered(options)}"
    if draw < _LETTERED / 2:
        return _in_random_order(rng, Listing(question, {name: letters[value] for name, value in values.items()}), lang)
    values = {name: f"{value} {letters[value]}" for name, value in values.items()}
    return _in_random_order(rng, Listing(f"{question}\n{_VALUES_TOO[lang]}", values), lang)


def list_cells(rng: np.random.Generator, truth: Truth, lang: Lang, grid: int) -> tuple[str, str] | None:
    """In which cell every item is that is there once; None where none is."""
    listing = _cells(truth, lang, rng, grid)
    return _in_random_order(rng, listing, lang) if listing.values else None


def _cells(truth: Truth, lang: Lang, rng: np.random.Generator, grid: int) -> Listing:
    values = {noun(item, lang): cell_name(item, grid) for item in unique_items(truth.items)}
    return Listing(_CELLS[lang], values)


def _counts(truth: Truth, lang: Lang, rng: np.random.Generator) -> Listing:
    """How many there are of every class; of none where there is one of each."""
    counts = Counter(class_of(item) for item in truth.items)
    examples = {class_of(item): uncoloured(item) for item in truth.items if is_countable(item)}
    values = {}
    for name, count in counts.items():
        if name in examples and not is_heldout(combine("count_of", [examples[name]] * count, count)):
            named = noun(examples[name], lang)
            values[plural(named) if lang == "en" else named] = count_phrase(count, lang)[1]
    return Listing(_COUNTS[lang], values if max(counts.values()) > 1 else {})


def _sides(truth: Truth, lang: Lang, rng: np.random.Generator) -> Listing:
    """On which side of one item the others are that are clearly on one."""
    unique = unique_items(truth.items)
    if not unique:
        return Listing("", {})
    of = unique[rng.integers(len(unique))]
    values = {}
    for item in unique:
        where = direction(item, of) if item is not of else None
        topic = "sideways" if where in ("left", "right") else "upright"
        if where and not is_heldout(combine(topic, [item, of])):
            values[noun(item, lang)] = _DIRECTIONS[lang][where]
    return Listing(_SIDES[lang].replace("{y}", noun(of, lang)), values)


def _in_random_order(rng: np.random.Generator, listing: Listing, lang: Lang) -> tuple[str, str]:
    """The question for names and the answer that gives what belongs to each, in the same random order."""
    pairs = list(listing.values.items())
    chosen = [pairs[i] for i in rng.permutation(len(pairs))]
    names = COMMAS[lang].join(name for name, _ in chosen)
    return listing.question.format(x=names), entries(chosen, lang)
