"""Captions, questions and conversations in English and Chinese, from the ground truth of an image.

Answers have one fixed frame per question, so that exact comparison is fair. A question is asked only where the image
allows one answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import Literal

import numpy as np

from train.nano.data.labels import COLOURS, FLAGS, LANGS, SHAPES, THINGS, Lang
from train.nano.data.layout import DIRECTIONS, direction, neighbour
from train.nano.data.sample import Item, Truth
from train.nano.text.combinations import combine, is_heldout
from train.nano.text.phrases import NUM_MEASURED, QUESTIONS, TALK
from train.nano.text.wording import (
    LETTERS,
    MAX_ITEMS,
    a_or_an,
    class_of,
    count_phrase,
    is_countable,
    joined,
    listed,
    noun,
    plural,
    sentence,
    several,
    shown,
    uncoloured,
    unique_items,
    with_article,
)

Turn = dict[str, str]
Skill = Literal["things", "flags", "digits", "words", "scenes", "same", "unknown"]
SKILLS: dict[str, Skill] = {
    "thing": "things", "flag": "flags", "digit": "digits", "word": "words", "scene": "scenes", "same": "same",
    "unknown": "unknown",
}  # fmt: skip

NOT_SURE: dict[Lang, str] = {"en": "I am not sure.", "zh": "我不确定。"}
MOST_MEASURED = 5  # items of the held-out scenes
_UNKNOWN_TOPICS = {"thing": 0.5, "describe": 0.2, "flag": 0.1, "digit": 0.1, "word": 0.1}  # what is asked
_PLACES = {
    "left": ("to the left of", "左边"), "right": ("to the right of", "右边"),
    "above": ("above", "上面"), "below": ("below", "下面"),
}  # fmt: skip
_SIDES = {
    "left": ("It is to the left.", "在左边。"), "right": ("It is to the right.", "在右边。"),
    "above": ("It is above.", "在上面。"), "below": ("It is below.", "在下面。"),
}  # fmt: skip


@dataclass(frozen=True)
class QAPair:
    """A question about an image with its answer; `topic` is its key in `phrases.QUESTIONS`."""

    topic: str
    lang: Lang
    question: str
    answer: str
    core: str  # the answer's word or two, as an option of a multiple-choice question
    accepted: tuple[str, ...] = ()  # further correct answers
    combination: str = ""  # what is asked about what, in no language: see combinations.py


def is_not_sure(answer: str) -> bool:
    """Whether a model says that it has no name for what it is shown."""
    return answer.strip() in NOT_SURE.values()


def all_questions(rng: np.random.Generator, truth: Truth, lang: Lang, measured: bool = False) -> list[QAPair]:
    """Every question that an image allows, each in one random phrasing, in random order.

    Args:
        measured: only in the phrasings that measurements use.
    """
    if truth.category == "scene":
        questions = _scene_questions(rng, truth, lang, measured)
    elif truth.category == "unknown":
        topic = str(rng.choice(list(_UNKNOWN_TOPICS), p=list(_UNKNOWN_TOPICS.values())))
        questions = [QAPair(topic, lang, _phrase(rng, topic, lang, measured), NOT_SURE[lang], NOT_SURE[lang])]
    else:
        answer, core, accepted = _single_answer(truth, lang)
        questions = [QAPair(truth.category, lang, _phrase(rng, truth.category, lang, measured), answer, core, accepted)]
    return [questions[i] for i in rng.permutation(len(questions))]


def training_questions(rng: np.random.Generator, truth: Truth, lang: Lang, skips_heldout: bool = False) -> list[QAPair]:
    """All questions with the comparisons, which the held-out images are not asked, in random order."""
    questions = all_questions(rng, truth, lang)
    if truth.category == "scene":
        questions += comparisons(rng, truth, lang)
        questions = [questions[i] for i in rng.permutation(len(questions))]
    return [qa for qa in questions if not (skips_heldout and is_heldout(qa.combination))]


def comparisons(rng: np.random.Generator, truth: Truth, lang: Lang, measured: bool = False) -> list[QAPair]:
    """ "Are there more dogs or more cats?" for every two classes of a scene of which there are not equally many."""
    counts = Counter(class_of(item) for item in truth.items)
    examples = [uncoloured(item) for item in {class_of(item): item for item in truth.items}.values()]
    questions = []
    for first, second in permutations(filter(is_countable, examples), 2):
        more = max(first, second, key=lambda item: counts[class_of(item)])
        if counts[class_of(first)] != counts[class_of(second)]:
            x, y, core = (_counted(item, lang) for item in (first, second, more))
            question = _phrase(rng, "more", lang, measured).format(x=x, y=y)
            answer = f"There are more {core}." if lang == "en" else f"{core}更多。"
            questions.append(QAPair("more", lang, question, answer, core, combination=combine("more", [first, second])))
    return [questions[i] for i in rng.permutation(len(questions))]


def tells_heldout(truth: Truth) -> bool:
    """Whether a caption tells a held-out combination: a count, or how the only two items lie to each other."""
    if truth.category != "scene":
        return False
    questions = all_questions(np.random.default_rng(0), truth, "en")
    captioned = [qa for qa in questions if qa.topic in ("count", "count_of") or len(truth.items) == 2]
    return any(is_heldout(qa.combination) for qa in captioned)


def caption(rng: np.random.Generator, truth: Truth, lang: Lang) -> str:
    """One sentence about the whole image."""
    english = lang == "en"
    if truth.category == "unknown":
        return NOT_SURE[lang]
    item = truth.items[0]
    if truth.category == "word":
        return f'The word "{truth.word}".' if english else f"单词“{truth.word}”。"
    if truth.category == "digit":
        return f"The digit {item.name}." if english else f"数字{item.name}。"
    if truth.category == "flag":
        return f"The flag of {FLAGS[item.name].en_with_article}." if english else f"{FLAGS[item.name].zh}的国旗。"
    if truth.category == "thing":
        return sentence(with_article(item)) if english else f"{noun(item, 'zh')}。"
    return _scene_caption(rng, truth, lang)


def conversation(rng: np.random.Generator, truth: Truth, max_turns: int = 4, skips_heldout: bool = False) -> list[Turn]:
    """Several questions about one sample in LLaVA's layout, in one language but for one turn in five.

    Args:
        skips_heldout: without held-out combinations: see combinations.py.
    """
    lang: Lang = LANGS[rng.integers(2)]
    by_lang = {each: training_questions(rng, truth, each, skips_heldout) for each in LANGS}
    num_images = 2 if truth.category == "same" else 1
    turns: list[Turn] = []
    used = set()
    for index in range(len(by_lang[lang])):
        if len(turns) == 2 * max_turns:
            break
        other = LANGS[1 - LANGS.index(lang)]
        use = other if index and rng.random() < 0.2 else lang
        candidates = [question for question in by_lang[use] if (question.topic, question.core) not in used]
        if not candidates:
            break
        chosen = candidates[0]
        used.add((chosen.topic, chosen.core))
        by_lang[use].remove(chosen)
        turns += _turns(chosen.question, chosen.answer)
    if truth.category != "same" and rng.random() < 0.25 and not (skips_heldout and tells_heldout(truth)):
        topic = "describe"
        described = _turns(_phrase(rng, topic, lang), caption(rng, truth, lang))
        turns = described + turns if rng.random() < 0.5 else turns + described
    if truth.category != "scene" and rng.random() < 0.25:  # the same once more in the other language: a follow-up
        other = LANGS[1 - LANGS.index(lang)]
        repeated = all_questions(rng, truth, other)[0]
        follow_up = (
            {"en": "And in English?", "zh": "用中文怎么说？"}[other] if truth.category != "same" else repeated.question
        )
        turns += _turns(follow_up, repeated.answer)
    turns[0]["value"] = "<image>" * num_images + "\n" + turns[0]["value"]
    return turns


def talk(rng: np.random.Generator) -> list[Turn]:
    """One to three turns without an image."""
    pairs = [TALK[i] for i in rng.choice(len(TALK), size=int(rng.integers(1, 4)), replace=False)]
    return [turn for questions, answer in pairs for turn in _turns(questions[rng.integers(len(questions))], answer)]


def multiple_choice(
    rng: np.random.Generator, truth: Truth, lang: Lang, measured: bool = False
) -> tuple[QAPair, list[str]]:
    """A question and four options in random order; `QAPair.answer` is the letter of the correct one."""
    return as_choice(rng, all_questions(rng, truth, lang, measured)[0], truth, measured)


def as_choice(rng: np.random.Generator, qa: QAPair, truth: Truth, measured: bool = False) -> tuple[QAPair, list[str]]:
    """A question with four options, or as many as there are, in random order; the answer becomes a letter."""
    lang = qa.lang
    wrong = [core for core in _alternatives(qa, truth, lang, measured) if core != qa.core]
    options = [qa.core, *(wrong[i] for i in rng.choice(len(wrong), size=min(3, len(wrong)), replace=False))]
    options = [options[i] for i in rng.permutation(len(options))]
    letter = LETTERS[options.index(qa.core)]
    return replace(qa, answer=letter, accepted=()), options


def _single_answer(truth: Truth, lang: Lang) -> tuple[str, str, tuple[str, ...]]:
    """(answer, its core, further accepted answers) for one thing, flag, digit or word, or for a pair."""
    item = truth.items[0]
    english = lang == "en"
    if truth.category == "word":
        return (f'It says "{truth.word}".' if english else f"上面写着“{truth.word}”。"), truth.word, ()
    if truth.category == "digit":
        return (f"It is the digit {item.name}." if english else f"这是数字{item.name}。"), item.name, ()
    if truth.category == "flag":
        names = [item.name, *FLAGS[item.name].alike]
        answers = [
            f"It is the flag of {FLAGS[name].en_with_article}." if english else f"这是{FLAGS[name].zh}的国旗。"
            for name in names
        ]
        return answers[0], (FLAGS[item.name].en if english else FLAGS[item.name].zh), tuple(answers[1:])
    if truth.category == "thing":
        return (f"It is {with_article(item)}." if english else f"这是{noun(item, 'zh')}。"), noun(item, lang), ()
    first, second = truth.items
    if first.name == second.name:
        return (
            (f"Yes, both show {shown(first, lang)}." if english else f"是的，都是{shown(first, lang)}。"),
            "Yes" if english else "是",
            (),
        )
    if english:
        return f"No, one shows {shown(first, lang)} and the other {shown(second, lang)}.", "No", ()
    return f"不是，一张是{shown(first, lang)}，另一张是{shown(second, lang)}。", "否", ()


def _scene_questions(rng: np.random.Generator, truth: Truth, lang: Lang, measured: bool) -> list[QAPair]:
    items, english = truth.items, lang == "en"
    questions = []

    def add(topic: str, about: Sequence[Item], answer: str, core: str, **words: str) -> None:
        question = _phrase(rng, topic, lang, measured).format(**words)
        number = len(items) if topic == "count" else len(about) if topic == "count_of" else 0
        questions.append(QAPair(topic, lang, question, answer, core, combination=combine(topic, about, number)))

    add("count", items, *count_phrase(len(items), lang))
    for name, count in Counter(class_of(item) for item in items).items():
        example = next(item for item in items if class_of(item) == name)
        if is_countable(example):
            counted = [uncoloured(example)] * count
            name_en, name = noun(counted[0], "en"), noun(counted[0], lang)
            add("count_of", counted, *count_phrase(count, lang), p=plural(name_en), x=name)
    shapes = [item for item in items if item.category == "shape"]
    for item in shapes:
        assert item.colour is not None
        colour = item.colour if english else COLOURS[item.colour][0]
        shape = item.name if english else SHAPES[item.name]
        if sum(other.name == item.name for other in shapes) == 1:
            add("colour", [item], f"It is {colour}." if english else f"它是{colour}的。", colour, s=shape)
        if sum(other.colour == item.colour for other in shapes) == 1:
            add("shape", [item], f"It is {a_or_an(shape)}." if english else f"它是{shape}。", shape, c=colour)
    unique = unique_items(items)
    for item in unique:
        for where in DIRECTIONS:
            other = neighbour(items, item, where)
            if other is not None and other in unique:
                name = noun(other, lang)
                add(where, [item, other], f"It is the {name}." if english else f"是{name}。", name, y=noun(item, lang))
        for other in unique:
            place = direction(item, other)
            if other is not item and place is not None:
                topic = "sideways" if place in ("left", "right") else "upright"
                add(
                    topic,
                    [item, other],
                    _SIDES[place][not english],
                    _PLACES[place][not english],
                    x=noun(item, lang),
                    y=noun(other, lang),
                )
    return questions


def _scene_caption(rng: np.random.Generator, truth: Truth, lang: Lang) -> str:
    items = list(truth.items)
    if len({item.label for item in items}) == 1:
        return sentence(several(items[0], len(items), lang), lang)
    if len(items) == 2:
        first, second = (items[i] for i in rng.permutation(2))
        place = direction(first, second)
        if place is not None:
            english, chinese = _PLACES[place]
            if lang == "en":
                return sentence(f"{with_article(first)} {english} {with_article(second)}")
            return f"{noun(first, 'zh')}在{noun(second, 'zh')}的{chinese}。"
    for axis, (start, end, zh_start) in enumerate((("left", "right", "从左到右"), ("top", "bottom", "从上到下"))):
        ordered = sorted(items, key=lambda item: item.centre[axis])
        pairs = pairwise(ordered)
        if all(direction(a, b) == ("left", "above")[axis] for a, b in pairs):
            ordered_names = listed(ordered, lang)
            return f"From {start} to {end}: {ordered_names}." if lang == "en" else f"{zh_start}：{ordered_names}。"
    counts = Counter(item.label for item in items)
    groups = [next(item for item in items if item.label == label) for label in counts]
    parts = [several(item, counts[item.label], lang) for item in groups]
    return sentence(joined(parts, lang), lang)


def _alternatives(qa: QAPair, truth: Truth, lang: Lang, measured: bool) -> list[str]:
    """Cores that a wrong option may have."""
    english = lang == "en"
    if qa.topic == "thing":
        return [named.en if english else named.zh for named in THINGS.values()]
    if qa.topic == "flag":
        alike = {FLAGS[key].en if english else FLAGS[key].zh for key in FLAGS[truth.items[0].name].alike}
        return [name for named in FLAGS.values() if (name := named.en if english else named.zh) not in alike]
    if qa.topic == "digit":
        return list("0123456789")
    if qa.topic == "word":
        from train.nano.data.vocabulary import VOCABULARY

        return [word.upper() for word in VOCABULARY]
    if qa.topic in ("count", "count_of"):
        most = MAX_ITEMS if len(truth.items) > MOST_MEASURED or not measured else MOST_MEASURED
        return [count_phrase(number, lang)[1] for number in range(1, most + 1)]
    if qa.topic == "more":
        return list(dict.fromkeys(_counted(uncoloured(item), lang) for item in truth.items if is_countable(item)))
    if qa.topic == "colour":
        return list(COLOURS) if english else [chinese for chinese, _ in COLOURS.values()]
    if qa.topic == "shape":
        return list(SHAPES) if english else list(SHAPES.values())
    if qa.topic in ("sideways", "upright"):
        return [pair[not english] for pair in _PLACES.values()]
    if qa.topic == "same":
        return ["Yes", "No"] if english else ["是", "否"]
    return [noun(Item("shape", shape, (0, 0, 1, 1), colour), lang) for shape in SHAPES for colour in COLOURS]


def _counted(item: Item, lang: Lang) -> str:
    """How one class is named among several: dogs, 狗"""
    return plural(noun(item, "en")) if lang == "en" else noun(item, "zh")


def _phrase(rng: np.random.Generator, topic: str, lang: Lang, measured: bool = False) -> str:
    phrasings = QUESTIONS[topic][lang]
    return phrasings[rng.integers(NUM_MEASURED if measured else len(phrasings))]


def _turns(question: str, answer: str) -> list[Turn]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
