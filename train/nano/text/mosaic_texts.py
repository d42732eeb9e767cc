"""Texts about mosaics for the language model alone: many conversations about one mosaic, training and held-out.

A sample holds the mosaics' cells once and several conversations that all begin with the same images, so that a language
model computes the image tokens once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt

import numpy as np

from train.nano.data.labels import LANGS, Lang
from train.nano.data.sample import Truth
from train.nano.text.choices import CHOICE_MARK, choice_prompt, fill_prompt, judge_prompt, statement
from train.nano.text.combinations import HELD_OUT_TOPICS, is_heldout
from train.nano.text.dialogue import (
    QAPair,
    Turn,
    all_questions,
    as_choice,
    caption,
    comparisons,
    conversation,
    talk,
    tells_heldout,
    training_questions,
)
from train.nano.text.lists import list_cells, list_question
from train.nano.text.locations import location_question
from train.nano.text.mosaic import SIGN_IDS, distinct_scene, random_truth, to_cells
from train.nano.text.wording import class_of, noun

SHARES = {"scene": 0.62, "thing": 0.09, "flag": 0.11, "digit": 0.02, "word": 0.07, "same": 0.05, "unknown": 0.04}
_TALK, _CAPTION, _FORM, _CONVERSATION = 0.01, 0.1, 0.06, 0.06  # shares of samples; the last of a sample's conversations
_CHOICE = 0.12  # of a sample's conversations
_LOCATIONS, _LISTS = 0.2, 0.25  # of a scene's conversations
_SMALL = 0.35  # share of 4 x 4 mosaics
CHOICES: dict[Lang, str] = {"en": "choice (MMMU)", "zh": "choice (CMMMU)"}
TASKS = ("counting", "comparing", "left/right", "above/below", *CHOICES.values(), "cells")


@dataclass(frozen=True)
class MosaicText:
    """One mosaic, two for "same" or none, as ids of signs in reading order; and the conversations about them.

    A conversation begins with one "<image>" per mosaic; a caption is a human's turn of images alone and its answer.
    """

    cells: tuple[tuple[int, ...], ...]
    conversations: list[list[Turn]]
    is_caption: bool = False


@dataclass(frozen=True)
class TextQuestion:
    """A held-out question about one mosaic; `task` is one of `TASKS`."""

    task: str
    lang: Lang
    text: MosaicText  # of one conversation


@dataclass
class TextLayout:
    """What the texts look like, for ablations."""

    lists_first: bool = False  # a count is answered by "dog, dog, dog: three": what is counted, then the number
    image_last: bool = False  # the question stands before the mosaic
    has_locations: bool = True  # some conversations name the cells that items lie in


def training_text(rng: np.random.Generator, layout: TextLayout, max_conversations: int = 12) -> MosaicText:
    """A random sample without held-out combinations."""
    draw = rng.random()
    if draw < _TALK:
        return MosaicText((), [talk(rng)])
    truth, cells = _random_mosaic(rng)
    if draw < _TALK + _CAPTION and truth.category != "same" and not tells_heldout(truth):
        lang = LANGS[rng.integers(2)]
        return MosaicText(cells, [[*_turns("<image>", caption(rng, truth, lang))]], is_caption=True)
    if draw < _TALK + _CAPTION + _FORM and truth.category not in ("same", "unknown"):
        return MosaicText(cells, _in_one_form(rng, truth, max_conversations // 3))
    conversations = [
        _training_conversation(rng, truth, isqrt(len(cells[0])), layout)
        for _ in range(_num_conversations(truth, max_conversations))
    ]
    return MosaicText(cells, _distinct([each for each in conversations if each]))


def list_text(rng: np.random.Generator, layout: TextLayout, max_conversations: int = 12) -> MosaicText:
    """A random scene, often of different items, and questions about many of them at once.

    Training begins with these: they have many times the lookups of other texts, without which a language model takes
    thousands of steps to look up anything by its name.
    """
    truth, cells = _placed(rng, distinct_scene) if rng.random() < 0.4 else _random_mosaic(rng, category="scene")
    grid = isqrt(len(cells[0]))
    questions = [list_question(rng, truth, grid, LANGS[rng.integers(2)]) for _ in range(max_conversations)]
    return MosaicText(cells, _distinct([_listed(each, layout) for each in questions if each]))


def heldout_questions(layout: TextLayout, num_per_task: int, seed: int = 20240122) -> list[TextQuestion]:
    """As many questions for each of `TASKS` and both languages, about 8 x 8 mosaics.

    They are of held-out combinations only, but for "cells", which asks in which cells items of a scene are.
    """
    questions: dict[tuple[str, Lang], list[TextQuestion]] = {
        (task, lang): [] for task in TASKS for lang in LANGS if task not in set(CHOICES.values()) - {CHOICES[lang]}
    }
    rng = np.random.default_rng(seed)
    while any(len(each) < num_per_task for each in questions.values()):
        truth, cells = _random_mosaic(rng, category="scene", small=0.0)
        for lang in LANGS:
            if len(truth.items) > 1 and (listed := list_cells(rng, truth, lang, 8)):
                _add(questions, "cells", lang, cells, _listed(listed, layout), num_per_task)
            candidates = [
                *all_questions(rng, truth, lang, measured=True),
                *comparisons(rng, truth, lang, measured=True),
            ]
            heldout = [qa for qa in candidates if is_heldout(qa.combination)]
            if heldout:  # one of a mosaic, of the task that has fewest
                qa = min(heldout, key=lambda qa: len(questions[HELD_OUT_TOPICS[qa.topic], lang]))
                turns = _turns(_with_image(qa.question, "<image>", layout), _answer(qa, truth, layout))
                _add(questions, HELD_OUT_TOPICS[qa.topic], lang, cells, turns, num_per_task)
                chosen, options = as_choice(rng, qa, truth)
                _add(questions, CHOICES[lang], lang, cells, _choice(lang, chosen, options), num_per_task)
    return [question for each in questions.values() for question in each]


def _add(
    questions: dict[tuple[str, Lang], list[TextQuestion]],
    task: str,
    lang: Lang,
    cells: tuple[tuple[int, ...], ...],
    turns: list[Turn],
    limit: int,
) -> None:
    if len(questions[task, lang]) < limit:
        questions[task, lang].append(TextQuestion(task, lang, MosaicText(cells, [turns])))


def _random_mosaic(
    rng: np.random.Generator, category: str = "", small: float = _SMALL
) -> tuple[Truth, tuple[tuple[int, ...], ...]]:
    shares = {category: 1.0} if category else SHARES
    return _placed(rng, partial(random_truth, shares=shares), small)


def _placed(
    rng: np.random.Generator, random: Callable[[np.random.Generator], Truth], small: float = _SMALL
) -> tuple[Truth, tuple[tuple[int, ...], ...]]:
    """A random truth that a mosaic can show, and the mosaics' cells."""
    grid = 4 if rng.random() < small else 8
    while True:
        truth = random(rng)
        cells = to_cells(rng, truth, grid)
        if cells is not None:
            return truth, tuple(tuple(SIGN_IDS[label] for label in each.flat) for each in cells)


def _distinct(conversations: list[list[Turn]]) -> list[list[Turn]]:
    return [each for index, each in enumerate(conversations) if each not in conversations[:index]]


def _num_conversations(truth: Truth, most: int) -> int:
    return most if truth.category == "scene" else 4 if truth.category != "same" else 3


def _training_conversation(rng: np.random.Generator, truth: Truth, grid: int, layout: TextLayout) -> list[Turn]:
    """One question in its own conversation, or several in one; empty where all that was drawn is held out."""
    lang: Lang = LANGS[rng.integers(2)]
    questions = training_questions(rng, truth, lang, skips_heldout=True)
    draw = rng.random()
    if not questions:
        return []
    if draw < _CONVERSATION and not layout.image_last:
        return conversation(rng, truth, max_turns=3, skips_heldout=True)
    qa = _one_of_each_topic(rng, questions)
    if truth.category == "scene" and layout.has_locations and draw > 1 - _LOCATIONS - _LISTS:
        listed = list_question(rng, truth, grid, lang) if draw < 1 - _LOCATIONS else None
        return _listed(listed or location_question(rng, truth, grid, lang, qa), layout)
    if draw < _CONVERSATION + _CHOICE and truth.category not in ("same", "unknown"):
        chosen, options = as_choice(rng, qa, truth)
        if len(options) > 1:
            return _choice(lang, chosen, options, has_image_in_front=True)
    images = "<image>" * (2 if truth.category == "same" else 1)
    return _turns(_with_image(qa.question, images, layout), _answer(qa, truth, layout))


def _listed(question_and_answer: tuple[str, str], layout: TextLayout) -> list[Turn]:
    question, answer = question_and_answer
    return _turns(_with_image(question, "<image>", layout), answer)


def _with_image(question: str, images: str, layout: TextLayout) -> str:
    return f"{question}\n{images}" if layout.image_last else f"{images}\n{question}"


def _one_of_each_topic(rng: np.random.Generator, questions: list[QAPair]) -> QAPair:
    """A question of a random topic: a scene has far more questions about places than about counts."""
    topics = sorted({qa.topic for qa in questions})
    topic = topics[rng.integers(len(topics))]
    return next(qa for qa in questions if qa.topic == topic)


def _answer(qa: QAPair, truth: Truth, layout: TextLayout) -> str:
    if not layout.lists_first or qa.topic not in ("count", "count_of"):
        return qa.answer
    classes = {" ".join(name.split()) for name in qa.combination.split("|")[1:-1]}
    in_order = sorted(truth.items, key=lambda item: item.centre[::-1])
    names = [noun(item, qa.lang) for item in in_order if qa.topic == "count" or class_of(item) in classes]
    return f"{', '.join(names)}: {qa.core}." if qa.lang == "en" else f"{'、'.join(names)}：{qa.core}。"


def _in_one_form(rng: np.random.Generator, truth: Truth, number: int) -> list[list[Turn]]:
    """Questions in one of CMMMU's forms, the image within the prompt where CMMMU has it."""
    variant = rng.choice(["choice", "judge", "fill"], p=[0.6, 0.25, 0.15])
    conversations = []
    questions = training_questions(rng, truth, "zh", skips_heldout=True)
    for _ in range(number if questions else 0):
        qa = _one_of_each_topic(rng, questions)
        chosen, options = as_choice(rng, qa, truth)
        if variant == "fill":
            conversations.append(_turns(_inside(fill_prompt(qa.question)), qa.core))
        elif len(options) > 1 and variant == "choice":
            conversations.append(_choice("zh", chosen, options))
        elif len(options) > 1:
            claim, is_true = statement(rng, qa, options)
            conversations.append(_turns(_inside(judge_prompt(claim)), "对" if is_true else "错"))
        questions = questions[1:] + questions[:1]
    return conversations


def _choice(lang: Lang, chosen: QAPair, options: list[str], has_image_in_front: bool = False) -> list[Turn]:
    prompt = choice_prompt(chosen.question, options, lang)
    in_front = lang == "en" or has_image_in_front
    return _turns("<image>\n" + prompt if in_front else _inside(prompt), chosen.answer)


def _inside(prompt: str) -> str:
    return prompt.replace(CHOICE_MARK, CHOICE_MARK + "<image>", 1)


def _turns(question: str, answer: str) -> list[Turn]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
