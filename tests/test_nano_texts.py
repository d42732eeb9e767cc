"""Texts about mosaics: what they say is true, nothing is asked twice, and held-out questions are kept out."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn")
from train.nano.data.labels import BACKGROUND, LANGS, Lang
from train.nano.data.layout import DIRECTIONS, direction
from train.nano.text import dialogue, lists
from train.nano.text.combinations import combine, is_heldout
from train.nano.text.dialogue import all_questions, comparisons
from train.nano.text.lists import list_question
from train.nano.text.locations import cell_name, location_question
from train.nano.text.mosaic import SIGN_IDS, distinct_scene, random_truth, to_cells
from train.nano.text.mosaic_texts import TASKS, TextLayout, heldout_questions, list_text, training_text
from train.nano.text.wording import COMMAS, noun, plural, uncoloured


def test_no_training_text_asks_a_held_out_question() -> None:
    combinations: set[str] = set()
    for seed in range(60):
        truth = random_truth(np.random.default_rng(seed), {"scene": 1.0}, 9)
        for lang in ("en", "zh"):
            rng = np.random.default_rng(seed)
            combinations |= {
                qa.combination for qa in [*all_questions(rng, truth, lang), *comparisons(rng, truth, lang)]
            }
    heldout = {combination for combination in combinations if is_heldout(combination)}
    assert 0.05 < len(heldout) / len(combinations) < 0.25
    questions = heldout_questions(TextLayout(), 20)
    assert {each.task for each in questions} == set(TASKS) and len(questions) == 20 * 12


def test_with_every_combination_held_out_no_training_text_counts_or_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> str:
        texts = [training_text(np.random.default_rng(seed), TextLayout()) for seed in range(300)]
        return "\n".join(turn["value"] for text in texts for turns in text.conversations for turn in turns[1::2])

    counted = re.compile(r"There (are|is) |^有.个|更多|It is (to the|above|below)|在.边|[两三四五六七八九]个", re.M)
    assert len(counted.findall(answers())) > 500
    for module in (dialogue, lists):
        monkeypatch.setattr(module, "is_heldout", lambda combination: combination != "")
    assert not counted.findall(answers())


def test_held_out_questions_of_both_languages_have_the_same_combinations_held_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = random_truth(rng, {"scene": 1.0}, 9)
        english, chinese = ({qa.combination for qa in all_questions(rng, truth, lang)} for lang in ("en", "zh"))
        assert english == chinese


def test_counts_go_to_nine_and_are_listed_first_if_asked() -> None:
    counts = [each for each in heldout_questions(TextLayout(lists_first=True), 60) if each.task == "counting"]
    answers = [each.text.conversations[0][1]["value"] for each in counts if each.lang == "en"]
    assert any(answer.endswith(": nine.") or answer.endswith(": eight.") for answer in answers)
    for answer in answers:
        listed, _, number = answer.rstrip(".").rpartition(": ")
        words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
        assert len(listed.split(", ")) == words.index(number)


def test_cells_are_where_a_mosaic_has_its_signs_and_lead_to_the_answer() -> None:
    numbers = dict(zip(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), range(1, 10)))
    num_questions: Counter[str] = Counter()
    for seed in range(1200):
        rng = np.random.default_rng(seed)
        truth = random_truth(rng, {"scene": 1.0}, 9)
        (cells,) = to_cells(rng, truth, 8) or [None]
        if cells is None:
            continue
        where = {cell_name(item, 8): item.label for item in truth.items}
        shown = {f"{'ABCDEFGH'[x]}{y + 1}": cells[y, x] for y, x in np.argwhere(cells != BACKGROUND)}
        assert where == shown
        qa = all_questions(rng, truth, "en")[0]
        question, answer = location_question(rng, truth, 8, "en", qa)
        listed, _, core = answer.partition(": ")
        if question.startswith("List"):
            rows_first = [named.split()[-1][::-1] for named in listed.split(", ")]
            assert rows_first == sorted(rows_first) and len(rows_first) == len(truth.items)
        elif core and qa.topic in ("count", "count_of"):
            assert len(listed.split(", ")) == numbers[core]
        elif core and qa.topic in ("sideways", "upright"):
            assert len(listed.split(", ")) == 2
        elif question.startswith("Cell"):
            (item,) = [item for item in truth.items if question == f"Cell of the {noun(item, 'en')}?"]
            assert answer == cell_name(item, 8)
        num_questions[qa.topic if core else question.split()[0]] += 1
    topics = ("List", "Cell", "What", "count_of", "sideways", "upright")
    assert min(num_questions[topic] for topic in topics) >= 5, num_questions


LIST_QUESTIONS = {
    "en": {
        "cells": r"Cells of (?P<names>.*)\?",
        "counts": r"How many of each: (?P<names>.*)\?",
        "sides": r"Where are they as seen from the (?P<of>.*?): (?P<names>.*)\?",
    },
    "zh": {
        "cells": "(?P<names>.*)的位置？",
        "counts": "各有几个：(?P<names>.*)？",
        "sides": "从(?P<of>.*?)看，都在哪边：(?P<names>.*)？",
    },
}


@pytest.mark.parametrize("lang", LANGS)
def test_lists_are_true_in_random_order_and_without_what_is_held_out(lang: Lang) -> None:
    """Every entry of an answer, parsed and compared with the scene."""
    directions = dict(zip(("左边", "右边", "上面", "下面"), DIRECTIONS))
    num_entries, num_letters, num_both = Counter[str](), Counter[str](), Counter[str]()
    orders: set[bool] = set()
    english = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    numbers = english if lang == "en" else [f"{each}个" for each in "零一两三四五六七八九"]
    for seed in range(600):
        rng = np.random.default_rng(seed)
        truth = random_truth(rng, {"scene": 1.0}, 9) if seed % 2 else distinct_scene(rng)
        question, answer = list_question(rng, truth, 8, lang) or ("", "")
        if not question:
            continue
        question, *lines = question.split("\n")
        matches = {topic: re.fullmatch(pattern, question) for topic, pattern in LIST_QUESTIONS[lang].items()}
        ((topic, parts),) = [(topic, match) for topic, match in matches.items() if match]
        names = parts["names"].split(COMMAS[lang])
        assert len(set(names)) == len(names)
        orders.add(names == sorted(names))
        values = []
        for name, entry in zip(names, answer.split(COMMAS[lang]), strict=True):
            assert entry.startswith(name)
            values.append(entry.removeprefix(name).strip())
        options = {line[1]: line[4:] for line in lines if line.startswith("(")}  # "(A) two"
        if len(lines) > len(options):  # the values are said too: "dogs two A"
            stated, values = zip(*(value.rsplit(" ", 1) for value in values))
            assert [options[letter] for letter in values] == list(stated)
            num_both[topic] += 1
        elif options:
            num_letters[topic] += 1
        if options:
            assert len(set(options.values())) == len(options) <= 4 and "".join(options) == "ABCD"[: len(options)]
            assert set(values) == options.keys()
            values = [options[letter] for letter in values]
        items = {noun(item, lang): item for item in truth.items}
        for name, value in zip(names, values):
            if topic == "cells":
                assert value == cell_name(items[name], 8)
            elif topic == "counts":
                nouns = [noun(uncoloured(item), lang) for item in truth.items]
                same = [item for item, each in zip(truth.items, nouns) if name in (each, plural(each))]
                assert value == numbers[len(same)]
                assert not is_heldout(combine("count_of", [uncoloured(item) for item in same], len(same)))
            else:
                of, where = items[parts["of"]], directions.get(value, value)
                assert where == direction(items[name], of)
                assert not is_heldout(
                    combine("sideways" if where in ("left", "right") else "upright", [items[name], of])
                )
            num_entries[topic] += 1
    topics = LIST_QUESTIONS[lang]
    assert min(num_entries[topic] for topic in topics) > 50 and orders == {True, False}
    assert min(num_letters[topic] for topic in topics) > 10 and min(num_both[topic] for topic in topics) > 10


def test_a_question_has_one_answer() -> None:
    """A language model cannot know which of two forms is meant."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        truth = distinct_scene(rng) if seed % 3 else random_truth(rng, {"scene": 1.0}, 2)
        answers: dict[str, set[str]] = {}
        for lang in LANGS:
            questions = all_questions(rng, truth, lang)
            for _ in range(300):
                qa = questions[rng.integers(len(questions))]
                pairs = (list_question(rng, truth, 8, lang), location_question(rng, truth, 8, lang, qa))
                for question, answer in filter(None, pairs):
                    answers.setdefault(question, set()).add(answer)
        assert {question: each for question, each in answers.items() if len(each) > 1} == {}


def test_no_list_is_asked_twice_and_its_image_is_where_the_layout_says() -> None:
    num_conversations = 0
    for seed in range(50):
        labels = [item.label for item in distinct_scene(np.random.default_rng(seed)).items]
        assert 2 <= len(labels) == len(set(labels)) <= 9
        for is_last in (False, True):
            text = list_text(np.random.default_rng(seed), TextLayout(image_last=is_last))
            questions = [conversation[0]["value"] for conversation in text.conversations]
            assert len(set(questions)) == len(questions)
            assert all(each.endswith("<image>") if is_last else each.startswith("<image>") for each in questions)
            num_conversations += len(questions)
    assert num_conversations > 400


def test_the_sign_of_unknown_things_is_the_last() -> None:
    assert list(SIGN_IDS)[-1] == "unknown"
