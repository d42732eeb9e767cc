"""The benchmarks' official rules, quirk by quirk: on hand-made cases and on whole files of published responses."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import cmmmu_official, mmmu_official, mmmu_pro_official

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("YI_VL_REFERENCE", ROOT.parent / "shared" / "reference"))
with_reference = pytest.mark.skipif(
    not (REFERENCE / "edge_cases.json").exists(),
    reason="the benchmarks' published responses are not here (YI_VL_REFERENCE names their folder)",
)
CATEGORIES = (
    "art_and_design",
    "business",
    "science",
    "health_and_medicine",
    "humanities_and_social_sciences",
    "technology_and_engineering",
)


class Stream:
    """One seeded stream of random guesses, and those taken."""

    def __init__(self, seed: int = 42) -> None:
        self._random = random.Random(seed)
        self.guesses: list[tuple[list[str], str]] = []

    def __call__(self, choices: Sequence[str]) -> str:
        choice = self._random.choice(choices)
        self.guesses.append((list(choices), choice))
        return choice


def _read(*parts: str) -> Any:
    return json.loads(REFERENCE.joinpath(*parts).read_text(encoding="utf-8"))


def _lines(*parts: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in REFERENCE.joinpath(*parts).read_text(encoding="utf-8").splitlines()]


def _cases(name: str) -> list[dict[str, Any]]:
    cases = _read("edge_cases.json")[name]
    return cases["cases"] if isinstance(cases, dict) else cases


def _sorted(values: Sequence[str | float]) -> list[str | float]:
    return sorted(set(values), key=lambda value: (isinstance(value, str), str(value)))


OPTIONS = {"A": "red apple", "B": "green pear", "C": "blue plum", "D": "apple"}


@pytest.mark.parametrize(
    ("response", "letter", "is_guess"),
    [
        ("(C) then (A)", "A", False),
        ("The answer is A. Not B .", "B", False),
        ("I think it must be the green pear here", "B", False),
        ("The correct option is D, I believe", "A", True),
        ("B. green pear", "A", True),
        ("", "A", True),
    ],
)
def test_mmmu_choice(response: str, letter: str, is_guess: bool) -> None:
    stream = Stream()
    assert mmmu_official.parse_choice(response, OPTIONS, stream) == letter and bool(stream.guesses) == is_guess


@pytest.mark.parametrize(
    ("gold", "response", "is_correct"),
    [
        ("3.14", "The answer is 3.144.", True),
        ("30", "30 watts", True),
        ("B", "(b)", False),
        (["24/7", "3.429"], "so it is 24/7", True),
        (["24/7", "3.429"], "x = 3.43", True),
        ("1000", "1,000", True),
        ("0.1", "10%", False),
    ],
)
def test_mmmu_open(gold: str | list[str], response: str, is_correct: bool) -> None:
    assert mmmu_official.is_open_correct(mmmu_official.parse_open(response), gold) is is_correct


def test_cmmmu_by_hand() -> None:
    options = {"A": "红色", "B": "绿色", "C": "蓝色", "D": "紫色"}
    stream = Stream()
    assert cmmmu_official.parse_choice("", options, stream) is None and not stream.guesses
    assert cmmmu_official.parse_choice("A、C", options, stream) == "AC"
    assert cmmmu_official.parse_choice("应该是绿色", options, stream) == "B" and not stream.guesses
    assert cmmmu_official.parse_choice("。", options, stream) == "A" and len(stream.guesses) == 1
    assert cmmmu_official.parse_true_false("不正确", stream) == "对", "positive words are looked for first"
    assert cmmmu_official.parse_true_false("这个说法不合适", stream) == "错"
    assert cmmmu_official.is_blank_correct(cmmmu_official.parse_blank("所以等于60%。", "60"), "60")
    assert not cmmmu_official.is_blank_correct(cmmmu_official.normalize("60%", "60"), "60")


@with_reference
@pytest.mark.parametrize(
    ("name", "parse"),
    [
        ("mmmu_multi_choice", mmmu_official.parse_choice),
        ("mmmu_pro_multi_choice", mmmu_pro_official.parse_choice),
        ("cmmmu_multi_choice", cmmmu_official.parse_choice),
    ],
)
def test_choices_as_the_official_code_parses_them(name: str, parse: Callable[..., str | None]) -> None:
    options = _read("edge_cases.json")[name]["index2ans"]
    for case in _cases(name):
        stream = Stream()
        assert parse(case["response"], options, stream) == case["result"], case
        assert bool(stream.guesses) == case["random_fallback"], case


@with_reference
def test_open_answers_as_the_official_code_parses_them() -> None:
    for case in _cases("mmmu_open_parse") + _cases("mmmu_open_eval"):
        parsed = mmmu_official.parse_open(case["response"])
        assert _sorted(parsed) == _sorted(case["parsed"]), case
        if "gold" in case:
            assert mmmu_official.is_open_correct(parsed, case["gold"]) == case["correct"], case


@with_reference
def test_true_false_and_blanks_as_the_official_code_parses_them() -> None:
    for case in _cases("cmmmu_true_false"):
        stream = Stream()
        assert cmmmu_official.parse_true_false(case["response"], stream) == case["result"], case
        assert bool(stream.guesses) == case["random_fallback"], case
    for case in _cases("cmmmu_fill_blank"):
        parsed = cmmmu_official.parse_blank(case["response"], case["gold"])
        assert _sorted(parsed) == _sorted(case["parsed"]), case
        assert cmmmu_official.is_blank_correct(parsed, case["gold"]) == case["correct_response_mode"], case
        plain = cmmmu_official.normalize(case["response"], case["gold"])
        assert cmmmu_official.is_blank_correct(plain, case["gold"]) == case["correct_answer_mode"], case


@with_reference
def test_llava_on_mmmu_record_by_record() -> None:
    golds, expected = (
        _read("mmmu", "answer_dict_val.json"),
        _read("mmmu", "expected_parse_and_eval_llava1.5_13b_records.json"),
    )
    stream, num_correct = Stream(), 0
    for subject in sorted(path.parent.name for path in (REFERENCE / "mmmu" / "llava1.5_13b").glob("*/output.json")):
        for record in _read("mmmu", "llava1.5_13b", subject, "output.json"):
            gold = golds[record["id"]]["ground_truth"]
            if golds[record["id"]]["question_type"] == "multiple-choice":
                letter = mmmu_official.parse_choice(record["response"], record["index2ans"], stream)
                assert letter == expected[record["id"]]["parsed_pred"], record
                is_correct = mmmu_official.is_choice_correct(letter, gold)
            else:
                is_correct = mmmu_official.is_open_correct(mmmu_official.parse_open(record["response"]), gold)
            assert is_correct == (expected[record["id"]]["judge"] == "Correct"), record
            num_correct += is_correct
    assert num_correct == 330
    expected_guesses = _read("mmmu", "expected_random_draws_llava1.5_13b_seed42.json")
    assert stream.guesses == [(draw["choices"], draw["drawn"]) for draw in expected_guesses]


@with_reference
def test_yi_vl_34b_on_cmmmu_record_by_record() -> None:
    golds = {row["id"]: row for row in _lines("cmmmu", "answers.jsonl")}
    expected = _read("cmmmu", "expected_records.json")
    responses, answers = (
        {row["id"]: row for row in _lines("cmmmu", f"yi-vl-34b-{mode}.jsonl")} for mode in ("response", "answer")
    )
    stream, num_correct, num_correct_answers = Stream(), 0, 0
    for category in CATEGORIES:
        for key in [key for key in responses if expected[str(key)]["category"] == category]:
            row, gold, expected_record = responses[key], golds[key]["answer"], expected[str(key)]
            if row["type"] == "选择":
                options = {letter: golds[key][f"option{i}"] for i, letter in enumerate("ABCD", start=1)}
                is_correct = cmmmu_official.parse_choice(row["response"], options, stream) == gold
                is_answer_correct = answers[key]["answer"] == gold
            elif row["type"] == "判断":
                is_correct = cmmmu_official.parse_true_false(row["response"], stream) == gold
                is_answer_correct = answers[key]["answer"] == gold
            else:
                is_correct = cmmmu_official.is_blank_correct(cmmmu_official.parse_blank(row["response"], gold), gold)
                parsed = cmmmu_official.normalize(answers[key]["answer"], gold)
                is_answer_correct = cmmmu_official.is_blank_correct(parsed, gold)
            assert is_correct == expected_record["judge"], (row, gold)
            assert is_answer_correct == expected_record["answer_mode_judge"], (answers[key], gold)
            num_correct += is_correct
            num_correct_answers += is_answer_correct
    assert num_correct == num_correct_answers == 326 and len(stream.guesses) == 42
