"""Questions about several items of a scene at once, and answers that name each of them: "dog C5, cat E1".

For pretraining only: such an answer has several lookups by name, where an answer like "to the left" has one bit.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np

from train.nano.data.labels import Lang
from train.nano.data.layout import DIRECTIONS, direction
from train.nano.data.sample import Truth
from train.nano.text.combinations import combine, is_heldout
from train.nano.text.locations import cell_name
from train.nano.text.wording import (
    COMMAS,
    class_of,
    count_phrase,
    entries,
    is_countable,
    noun,
    plural,
    uncoloured,
    unique_items,
)

_CELLS: dict[Lang, str] = {"en": "Cells of {x}?", "zh": "{x}的位置？"}
_COUNTS: dict[Lang, str] = {"en": "How many of each: {x}?", "zh": "各有几个：{x}？"}
_SIDES: dict[Lang, str] = {"en": "Where are they as seen from the {y}: {x}?", "zh": "从{y}看，都在哪边：{x}？"}
_DIRECTIONS: dict[Lang, dict[str, str]] = {
    "en": {where: where for where in DIRECTIONS},
    "zh": dict(zip(DIRECTIONS, ("左边", "右边", "上面", "下面"))),
}


def list_question(rng: np.random.Generator, truth: Truth, grid: int, lang: Lang) -> tuple[str, str] | None:
    """A random question and its answer, without held-out combinations; None where there is nothing to ask."""
    makers = [partial(list_cells, grid=grid), _sides, _counts, _counts]  # not every scene has something to count
    questions = (makers[i](rng, truth, lang) for i in rng.permutation(len(makers)))
    return next((question for question in questions if question), None)


def list_cells(rng: np.random.Generator, truth: Truth, lang: Lang, grid: int) -> tuple[str, str] | None:
    """In which cell every item is that is there once; None where none is."""
    pairs = [(noun(item, lang), cell_name(item, grid)) for item in unique_items(truth.items)]
    return _listed(rng, _CELLS[lang], pairs, lang)


def _counts(rng: np.random.Generator, truth: Truth, lang: Lang) -> tuple[str, str] | None:
    """How many there are of every class; None where there is one of each."""
    counts = Counter(class_of(item) for item in truth.items)
    if max(counts.values()) == 1:
        return None
    examples = {class_of(item): uncoloured(item) for item in truth.items if is_countable(item)}
    pairs = []
    for name, count in counts.items():
        if name in examples and not is_heldout(combine("count_of", [examples[name]] * count, count)):
            named = noun(examples[name], lang)
            pairs.append((plural(named) if lang == "en" else named, count_phrase(count, lang)[1]))
    return _listed(rng, _COUNTS[lang], pairs, lang)


def _sides(rng: np.random.Generator, truth: Truth, lang: Lang) -> tuple[str, str] | None:
    """On which side of one item the others are that are clearly on one."""
    unique = unique_items(truth.items)
    if not unique:
        return None
    of = unique[rng.integers(len(unique))]
    pairs = []
    for item in unique:
        where = direction(item, of) if item is not of else None
        topic = "sideways" if where in ("left", "right") else "upright"
        if where and not is_heldout(combine(topic, [item, of])):
            pairs.append((noun(item, lang), _DIRECTIONS[lang][where]))
    return _listed(rng, _SIDES[lang], pairs, lang, y=noun(of, lang))


def _listed(
    rng: np.random.Generator, question: str, pairs: list[tuple[str, str]], lang: Lang, **words: str
) -> tuple[str, str] | None:
    """The question for names and the answer that gives what belongs to each, in the same random order."""
    if not pairs:
        return None
    chosen = [pairs[i] for i in rng.permutation(len(pairs))]
    names = COMMAS[lang].join(name for name, _ in chosen)
    return question.format(x=names, **words), entries(chosen, lang)
