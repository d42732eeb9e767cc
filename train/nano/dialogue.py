"""From what a picture shows to what is said about it, in English and Chinese: captions, questions, conversations.

Answers have one fixed frame per question, so that exact comparison is fair. A question is asked only where the picture
allows one answer. Called by shards.py and heldout.py; calls phrases.py and layout.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from train.nano.layout import DIRECTIONS, direction, neighbour
from train.nano.names import COLOURS, FLAGS, LANGS, SHAPES, THINGS, Lang
from train.nano.phrases import NUM_MEASURED, QUESTIONS, TALK
from train.nano.picture import Item, Truth

Turn = dict[str, str]
Skill = Literal["things", "flags", "digits", "words", "scenes", "same"]
SKILLS: dict[str, Skill] = {
    "thing": "things", "flag": "flags", "digit": "digits", "word": "words", "scene": "scenes", "same": "same"
}  # fmt: skip

_NUMBERS_EN = ("no", "one", "two", "three", "four", "five")
_NUMBERS_ZH = ("零", "一", "两", "三", "四", "五")
_PLACES = {
    "left": ("to the left of", "左边"), "right": ("to the right of", "右边"),
    "above": ("above", "上面"), "below": ("below", "下面"),
}  # fmt: skip
_SIDES = {
    "left": ("It is to the left.", "在左边。"), "right": ("It is to the right.", "在右边。"),
    "above": ("It is above.", "在上面。"), "below": ("It is below.", "在下面。"),
}  # fmt: skip
_PLURALS = {
    "mouse": "mice",
    "fish": "fish",
    "octopus": "octopuses",
    "maple leaf": "maple leaves",
    "grapes": "grapes",
    "cherries": "cherries",
}


@dataclass(frozen=True)
class Asked:
    """A question about a picture with its answer; `topic` is its kind in phrases.py."""

    topic: str
    lang: Lang
    question: str
    answer: str
    core: str  # the answer's word or two, as an option of a multiple-choice question
    accepted: tuple[str, ...] = ()  # further right answers


def all_questions(rng: np.random.Generator, truth: Truth, lang: Lang, measured: bool = False) -> list[Asked]:
    """Everything that can be asked about a picture, each in one random phrasing, in random order.

    Args:
        measured: only in the phrasings that measurements use.
    """
    if truth.kind == "scene":
        found = _scene_questions(rng, truth, lang, measured)
    else:
        answer, core, accepted = _single_answer(truth, lang)
        found = [Asked(truth.kind, lang, _phrase(rng, truth.kind, lang, measured), answer, core, accepted)]
    return [found[i] for i in rng.permutation(len(found))]


def caption(rng: np.random.Generator, truth: Truth, lang: Lang) -> str:
    """One sentence that tells all of the picture."""
    item = truth.items[0]
    english = lang == "en"
    if truth.kind == "word":
        return f'The word "{truth.word}".' if english else f"单词“{truth.word}”。"
    if truth.kind == "digit":
        return f"The digit {item.name}." if english else f"数字{item.name}。"
    if truth.kind == "flag":
        return f"The flag of {FLAGS[item.name].en_with_article}." if english else f"{FLAGS[item.name].zh}的国旗。"
    if truth.kind == "thing":
        return _sentence(_with_article(item)) if english else f"{_noun(item, 'zh')}。"
    return _scene_caption(rng, truth, lang)


def conversation(rng: np.random.Generator, truth: Truth, max_turns: int = 4) -> list[Turn]:
    """Several questions about one picture, LLaVA style, in one language but for one turn in five."""
    lang: Lang = LANGS[rng.integers(2)]
    by_lang = {each: all_questions(rng, truth, each) for each in LANGS}
    num_pictures = 2 if truth.kind == "same" else 1
    turns: list[Turn] = []
    asked = set()
    for index in range(len(by_lang[lang])):
        if len(turns) == 2 * max_turns:
            break
        other = LANGS[1 - LANGS.index(lang)]
        use = other if index and rng.random() < 0.2 else lang
        candidates = [question for question in by_lang[use] if (question.topic, question.core) not in asked]
        if not candidates:
            break
        chosen = candidates[0]
        asked.add((chosen.topic, chosen.core))
        by_lang[use].remove(chosen)
        turns += _turns(chosen.question, chosen.answer)
    if truth.kind != "same" and rng.random() < 0.25:
        topic = "describe"
        turns += _turns(_phrase(rng, topic, lang), caption(rng, truth, lang))
    if truth.kind != "scene" and rng.random() < 0.25:  # the same once more in the other language: a follow-up
        other = LANGS[1 - LANGS.index(lang)]
        repeated = all_questions(rng, truth, other)[0]
        follow_up = (
            {"en": "And in English?", "zh": "用中文怎么说？"}[other] if truth.kind != "same" else repeated.question
        )
        turns += _turns(follow_up, repeated.answer)
    turns[0]["value"] = "<image>" * num_pictures + "\n" + turns[0]["value"]
    return turns


def described(rng: np.random.Generator, truth: Truth) -> list[Turn]:
    """A conversation about a picture that is told in words: what a language model can learn before it sees."""
    return in_words(rng, truth, conversation(rng, truth))


def in_words(rng: np.random.Generator, truth: Truth, turns: list[Turn]) -> list[Turn]:
    """A conversation with its picture replaced by a description that every question about it can be answered from."""
    lang: Lang = LANGS[rng.integers(2)]
    told = {"en": "Picture: ", "zh": "图片："}[lang] + _told(rng, truth, lang)
    question = turns[0]["value"].replace("<image>", "").removeprefix("\n")
    return [{"from": "human", "value": f"{told}\n{question}"}, *turns[1:]]


def described_caption(rng: np.random.Generator, truth: Truth) -> str:
    """A description and then a caption, the languages of both drawn: what comes before a caption decides it."""
    told, written = (LANGS[i] for i in rng.integers(2, size=2))
    return f"{_told(rng, truth, told)}\n{caption(rng, truth, written)}"


def talk(rng: np.random.Generator) -> list[Turn]:
    """One to three turns without a picture."""
    pairs = [TALK[i] for i in rng.choice(len(TALK), size=int(rng.integers(1, 4)), replace=False)]
    return [turn for questions, answer in pairs for turn in _turns(questions[rng.integers(len(questions))], answer)]


def multiple_choice(
    rng: np.random.Generator, truth: Truth, lang: Lang, measured: bool = False
) -> tuple[Asked, list[str]]:
    """A question and four options in random order; `Asked.answer` is the letter of the right one."""
    asked = all_questions(rng, truth, lang, measured)[0]
    wrong = [core for core in _alternatives(asked, truth, lang) if core != asked.core]
    options = [asked.core, *(wrong[i] for i in rng.choice(len(wrong), size=min(3, len(wrong)), replace=False))]
    options = [options[i] for i in rng.permutation(len(options))]
    letter = "ABCD"[options.index(asked.core)]
    return Asked(asked.topic, lang, asked.question, letter, asked.core), options


def _single_answer(truth: Truth, lang: Lang) -> tuple[str, str, tuple[str, ...]]:
    """(answer, its core, further accepted answers) of a picture with one thing, flag, digit or word, or a pair."""
    item = truth.items[0]
    english = lang == "en"
    if truth.kind == "word":
        return (f'It says "{truth.word}".' if english else f"上面写着“{truth.word}”。"), truth.word, ()
    if truth.kind == "digit":
        return (f"It is the digit {item.name}." if english else f"这是数字{item.name}。"), item.name, ()
    if truth.kind == "flag":
        names = [item.name, *FLAGS[item.name].alike]
        answers = [
            f"It is the flag of {FLAGS[name].en_with_article}." if english else f"这是{FLAGS[name].zh}的国旗。"
            for name in names
        ]
        return answers[0], (FLAGS[item.name].en if english else FLAGS[item.name].zh), tuple(answers[1:])
    if truth.kind == "thing":
        return (f"It is {_with_article(item)}." if english else f"这是{_noun(item, 'zh')}。"), _noun(item, lang), ()
    first, second = truth.items
    if first.name == second.name:
        return (
            (f"Yes, both show {_shown(first, lang)}." if english else f"是的，都是{_shown(first, lang)}。"),
            "Yes" if english else "是",
            (),
        )
    if english:
        return f"No, one shows {_shown(first, lang)} and the other {_shown(second, lang)}.", "No", ()
    return f"不是，一张是{_shown(first, lang)}，另一张是{_shown(second, lang)}。", "否", ()


def _scene_questions(rng: np.random.Generator, truth: Truth, lang: Lang, measured: bool) -> list[Asked]:
    items, english = truth.items, lang == "en"
    found = []

    def add(topic: str, answer: str, core: str, **words: str) -> None:
        found.append(Asked(topic, lang, _phrase(rng, topic, lang, measured).format(**words), answer, core))

    add("count", *_count(len(items), lang))
    for name, count in Counter(_kind(item) for item in items).items():
        example = next(item for item in items if _kind(item) == name)
        if example.kind == "shape" or THINGS[example.name].article:
            kind = Item(example.kind, example.name, example.box)
            add("count_of", *_count(count, lang), p=_plural(_noun(kind, "en")), x=_noun(kind, lang))
    shapes = [item for item in items if item.kind == "shape"]
    for item in shapes:
        assert item.colour is not None
        colour = item.colour if english else COLOURS[item.colour][0]
        shape = item.name if english else SHAPES[item.name]
        if sum(other.name == item.name for other in shapes) == 1:
            add("colour", f"It is {colour}." if english else f"它是{colour}的。", colour, s=shape)
        if sum(other.colour == item.colour for other in shapes) == 1:
            add("shape", f"It is {_a(shape)}." if english else f"它是{shape}。", shape, c=colour)
    unique = [item for item in items if sum(_label(other) == _label(item) for other in items) == 1]
    for item in unique:
        for where in DIRECTIONS:
            other = neighbour(items, item, where)
            if other is not None and other in unique:
                noun = _noun(other, lang)
                add(where, f"It is the {noun}." if english else f"是{noun}。", noun, y=_noun(item, lang))
        for other in unique:
            place = direction(item, other)
            if other is not item and place is not None:
                topic = "sideways" if place in ("left", "right") else "upright"
                add(
                    topic,
                    _SIDES[place][not english],
                    _PLACES[place][not english],
                    x=_noun(item, lang),
                    y=_noun(other, lang),
                )
    return found


def _scene_caption(rng: np.random.Generator, truth: Truth, lang: Lang) -> str:
    items = list(truth.items)
    if len({_label(item) for item in items}) == 1:
        return _sentence(_several(items[0], len(items), lang), lang)
    if len(items) == 2:
        first, second = (items[i] for i in rng.permutation(2))
        place = direction(first, second)
        if place is not None:
            english, chinese = _PLACES[place]
            if lang == "en":
                return _sentence(f"{_with_article(first)} {english} {_with_article(second)}")
            return f"{_noun(first, 'zh')}在{_noun(second, 'zh')}的{chinese}。"
    for axis, (start, end, zh_start) in enumerate((("left", "right", "从左到右"), ("top", "bottom", "从上到下"))):
        ordered = sorted(items, key=lambda item: item.centre[axis])
        pairs = pairwise(ordered)
        if all(direction(a, b) == ("left", "above")[axis] for a, b in pairs):
            told = _listed(ordered, lang)
            return f"From {start} to {end}: {told}." if lang == "en" else f"{zh_start}：{told}。"
    counts = Counter(_label(item) for item in items)
    groups = [next(item for item in items if _label(item) == label) for label in counts]
    parts = [_several(item, counts[_label(item)], lang) for item in groups]
    return _sentence(_joined(parts, lang), lang)


def _told(rng: np.random.Generator, truth: Truth, lang: Lang) -> str:
    """What is there; in a scene with every item's rank from left to right and from top to bottom."""
    if truth.kind == "same":
        first, second = truth.items
        return (
            f"{_shown(first, lang)}. {_shown(second, lang)}."
            if lang == "en"
            else f"{_shown(first, lang)}。{_shown(second, lang)}。"
        )
    if truth.kind != "scene":
        return caption(rng, truth, lang)
    ordered = sorted(truth.items, key=lambda item: item.centre[0])
    columns, rows = (np.argsort(np.argsort([item.centre[axis] for item in ordered])) + 1 for axis in (0, 1))
    return " ".join(f"{_noun(item, lang)} ({x},{y})" for item, x, y in zip(ordered, columns, rows)) + "."


def _alternatives(asked: Asked, truth: Truth, lang: Lang) -> list[str]:
    """Cores that a wrong option may have."""
    english = lang == "en"
    if asked.topic == "thing":
        return [named.en if english else named.zh for named in THINGS.values()]
    if asked.topic == "flag":
        alike = {FLAGS[key].en if english else FLAGS[key].zh for key in FLAGS[truth.items[0].name].alike}
        return [name for named in FLAGS.values() if (name := named.en if english else named.zh) not in alike]
    if asked.topic == "digit":
        return list("0123456789")
    if asked.topic == "word":
        from train.nano.words import VOCABULARY

        return list(VOCABULARY)
    if asked.topic in ("count", "count_of"):
        return [_count(number, lang)[1] for number in range(1, 6)]
    if asked.topic == "colour":
        return list(COLOURS) if english else [chinese for chinese, _ in COLOURS.values()]
    if asked.topic == "shape":
        return list(SHAPES) if english else list(SHAPES.values())
    if asked.topic in ("sideways", "upright"):
        return [places[not english] for places in _PLACES.values()]
    if asked.topic == "same":
        return ["Yes", "No"] if english else ["是", "否"]
    return [_noun(Item("shape", shape, (0, 0, 1, 1), colour), lang) for shape in SHAPES for colour in COLOURS]


def _count(number: int, lang: Lang) -> tuple[str, str]:
    if lang == "zh":
        return f"有{_NUMBERS_ZH[number]}个。", f"{_NUMBERS_ZH[number]}个"
    return ("There is one." if number == 1 else f"There are {_NUMBERS_EN[number]}."), _NUMBERS_EN[number]


def _several(item: Item, count: int, lang: Lang) -> str:
    if lang == "zh":
        return f"{_NUMBERS_ZH[count]}个{_noun(item, 'zh')}" if count > 1 else _noun(item, "zh")
    return f"{_NUMBERS_EN[count]} {_plural(_noun(item, 'en'))}" if count > 1 else _with_article(item)


def _listed(items: list[Item], lang: Lang) -> str:
    return _joined([_with_article(item) if lang == "en" else _noun(item, "zh") for item in items], lang)


def _joined(parts: list[str], lang: Lang) -> str:
    and_, comma = (" and ", ", ") if lang == "en" else ("和", "、")
    return comma.join(parts[:-1]) + and_ + parts[-1] if len(parts) > 1 else parts[0]


def _label(item: Item) -> str:
    return item.label


def _kind(item: Item) -> str:
    return f"{item.kind} {item.name}"


def _noun(item: Item, lang: Lang) -> str:
    """ "red circle", "dog"; 红色的圆形, 狗"""
    if item.kind == "shape":
        if lang == "en":
            return f"{item.colour} {item.name}" if item.colour else item.name
        return f"{COLOURS[item.colour][0]}的{SHAPES[item.name]}" if item.colour else SHAPES[item.name]
    named = (THINGS if item.kind == "thing" else FLAGS)[item.name]
    return named.en if lang == "en" else named.zh


def _shown(item: Item, lang: Lang) -> str:
    if item.kind == "flag":
        return f"the flag of {FLAGS[item.name].en_with_article}" if lang == "en" else f"{FLAGS[item.name].zh}的国旗"
    return _with_article(item) if lang == "en" else _noun(item, "zh")


def _with_article(item: Item) -> str:
    return _a(_noun(item, "en")) if item.kind == "shape" else THINGS[item.name].en_with_article


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _plural(noun: str) -> str:
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun in ("tomato",) else "s")


def _sentence(text: str, lang: Lang = "en") -> str:
    return text[0].upper() + text[1:] + "." if lang == "en" else text + "。"


def _phrase(rng: np.random.Generator, topic: str, lang: Lang, measured: bool = False) -> str:
    phrasings = QUESTIONS[topic][lang]
    return phrasings[rng.integers(NUM_MEASURED if measured else len(phrasings))]


def _turns(question: str, answer: str) -> list[Turn]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
