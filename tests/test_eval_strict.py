"""The strict rules: what counts as said, in English and Chinese."""

from __future__ import annotations

import pytest

from eval import strict

OPTIONS = {"A": "red apple", "B": "green pear", "C": "blue plum", "D": "apple"}
TEN = dict(zip("ABCDEFGHIJ", ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]))


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("C\n", "C"),
        ("**B**", "B"),
        ("(D)", "D"),
        ("（Ｂ）", "B"),
        ("A) red apple", "A"),
        ("B. green pear", "B"),
        ("\\boxed{C}", "C"),
        ("The answer is B.", "B"),
        ("Answer: C", "C"),
        ("The correct option is D, I believe", "D"),
        ("It is not A. The answer is B.", "B"),
        ("A is wrong, so I would say B", "B"),
        ("The answer is not C", None),
        ("I think it must be the green pear here", "B"),
        ("It is a red apple.", "A"),
        ("It is not a green pear but a blue plum.", "C"),
        ("A green pear", "B"),
        ("Either A or B", None),
        ("", None),
        ("I do not know.", None),
        ("答案是B。", "B"),
        ("不选A，选C。", "C"),
        ("选项B不正确，答案为D", "D"),
    ],
)
def test_a_choice(response: str, letter: str | None) -> None:
    assert strict.choice(response, OPTIONS) == letter


def test_a_pronoun_is_no_option() -> None:
    assert strict.choice("I think that NASA was eight", TEN) == "H"
    assert strict.choice("I would say (I)", TEN) == "I"


@pytest.mark.parametrize(
    ("response", "letters"),
    [
        ("AC", "AC"),
        ("A、C", "AC"),
        ("A和C", "AC"),
        ("(C)(A)", "AC"),
        ("答案是A、B、D。", "ABD"),
        ("(A) 红\n(C) 蓝", "AC"),
        ("B", "B"),
    ],
)
def test_several_choices(response: str, letters: str) -> None:
    assert strict.choice(response, dict.fromkeys("ABCD", ""), several=True) == letters


@pytest.mark.parametrize(
    ("response", "gold", "is_right"),
    [
        ("The answer is 3.144.", "3.14", True),
        ("30 watts", "30", True),
        ("1,000", "1000", True),
        ("The answer is 1,234.5", "234.5", False),  # by the official rules it is right
        ("It is not 30", "30", False),
        ("so it is 24/7", "24/7", True),
        ("the transformation", "Transformation", True),
        ("information", "format", False),
        ("First we get 5. Then we get 7. The answer is 9.", "5", False),
        ("-2.5", "2.5", False),
        ("60%", "60", True),
        ("", "x", False),
        ("所以等于250,000元。", "250000", True),
        ("答案是二分法", "二分法", True),
        ("不是二分法", "二分法", False),
    ],
)
def test_a_free_answer(response: str, gold: str, is_right: bool) -> None:
    assert strict.text_or_number(response, [gold])[1] is is_right


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("对", "对"),
        ("正确。", "对"),
        ("不正确", "错"),  # by the official rules it means 对
        ("不对", "错"),
        ("这个说法是错误的。", "错"),
        ("错误。它确实起到了一定的作用。", "错"),
        ("这个陈述是对还是错？无法判断。", None),
        ("没有足够的信息来给出一个确定的答案。", None),
        ("相对于A，B更好。所以该说法正确。", "对"),
        ("有人认为正确，有人认为错误。因此，该说法错误。", "错"),
        ("True", "对"),
        ("The statement is incorrect.", "错"),
        ("", None),
    ],
)
def test_a_judgement(response: str, verdict: str | None) -> None:
    assert strict.judgement(response) == verdict
