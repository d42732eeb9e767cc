"""From answers to scores: per protocol, subject, discipline and overall, with intervals. Knows no benchmark."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .types import Answered, Benchmark, Question, Verdict

# As the benchmark's own script scores; the same with every draw counted as wrong; as a judge model reads the answers.
Rules = Literal["official", "no_guess", "judge"]
RULES: tuple[Rules, ...] = ("official", "no_guess", "judge")
OFFICIAL_SEED = 42
_NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Scored:
    """An answer with its verdict by the official rules, and a judge's where there is one."""

    answered: Answered
    official: Verdict
    judge: Verdict | None = None

    def verdict(self, rules: Rules) -> Verdict | None:
        """None where a judge was not asked, or failed."""
        if rules == "no_guess":
            return replace(self.official, is_right=self.official.is_right and not self.official.is_guess)
        return self.official if rules == "official" else self.judge


class Draws:
    """The official code's one stream of draws, and how many were had."""

    def __init__(self, seed: int = OFFICIAL_SEED) -> None:
        self._random = random.Random(seed)
        self.count = 0

    def __call__(self, choices: Sequence[str]) -> str:
        self.count += 1
        return self._random.choice(choices)


def score(benchmark: Benchmark, answered: Iterable[Answered]) -> list[Scored]:
    """Every answer scored by the official rules, in the official order: draws depend on it."""
    draws = Draws()
    return [Scored(one, _official(benchmark, one, draws)) for one in benchmark.official_order(list(answered))]


def is_right_without_guess(benchmark: Benchmark, answered: Answered) -> bool:
    """Whether an answer is right by the official rules and not by their draw."""
    verdict = _official(benchmark, answered, Draws())
    return verdict.is_right and not verdict.is_guess


def _official(benchmark: Benchmark, answered: Answered, draws: Draws) -> Verdict:
    before = draws.count
    meaning = benchmark.parse_official(answered, draws)
    return Verdict(meaning, benchmark.is_right(answered, meaning), is_guess=draws.count > before)


def summarise(benchmark: Benchmark, scored: Sequence[Scored], rules: Rules) -> dict[str, Any]:
    """Accuracy overall, by discipline with their subjects, and by kind of question; micro averages everywhere.

    By the official rules also the ids of the answers that were "drawn": all others are scored as the official script
    scores them, whatever its random numbers are. By a judge only the questions that it judged are counted.
    """
    scored = [one for one in scored if one.verdict(rules) is not None]
    if not scored:
        return {"num": 0}
    subjects = dict.fromkeys(one.answered.question.subject for one in scored)
    known = {subject for group in benchmark.GROUPS.values() for subject in group}
    groups = dict(benchmark.GROUPS) if known >= set(subjects) else {subject: (subject,) for subject in subjects}
    whole = _tally(benchmark, scored, rules)
    return whole | {
        "interval_95": interval([_is_right(one, rules) for one in scored]),
        **(
            {"drawn": [one.answered.question.id for one in scored if one.official.is_guess]}
            if rules == "official"
            else {}
        ),
        "disciplines": {
            name: _tally(benchmark, members, rules)
            | {
                "subjects": {
                    subject: _tally(benchmark, _of_subjects(members, (subject,)), rules)
                    for subject in group
                    if subject in subjects
                }
            }
            for name, group in groups.items()
            if (members := _of_subjects(scored, group))
        },
        "kinds": {
            kind: _tally(benchmark, [one for one in scored if one.answered.question.kind == kind], rules)
            for kind in dict.fromkeys(one.answered.question.kind for one in scored)
        },
    }


def count_outcomes(answered: Sequence[Answered]) -> dict[str, int]:
    """How many responses are not whole answers; one that was cut may be empty too.

    "refused" is known where an endpoint told.

    "empty": no text at all; "unfinished_reasoning": text, but no answer behind it. "failed" questions have no response
    and are in none of the others; the official rules score them as an empty response.
    """
    came = [one for one in answered if one.outcome != "failed"]
    return {
        "num": len(answered),
        "failed": len(answered) - len(came),
        "refused": sum(one.outcome == "refused" for one in came),
        "cut": sum(one.outcome == "cut" for one in came),
        "empty": sum(not one.said.strip() for one in came),
        "unfinished_reasoning": sum(bool(one.said.strip()) and not one.answer.strip() for one in came),
    }


def chance(questions: Iterable[Question]) -> float:
    """The expected accuracy of guessing: one option of a choice, one verdict of two, nothing for free text."""
    guesses = [_chance_of_one(question) for question in questions]
    return sum(guesses) / len(guesses)


def _chance_of_one(question: Question) -> float:
    if question.kind != "choice":
        return 0.5 if question.kind == "judgement" else 0.0
    golds = [question.gold] if isinstance(question.gold, str) else question.gold
    if question.gold and question.options and not any(gold in question.options for gold in golds):
        return 0.0  # MMMU-Pro has a question whose answer is none of its options
    return 1 / (len(question.options) or 4)


def interval(right: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of an accuracy.

    To draw n verdicts with replacement and count the right ones is to draw from a binomial; nothing else is needed.
    """
    share = sum(right) / len(right)
    means = np.random.default_rng(seed).binomial(len(right), share, _NUM_RESAMPLES) / len(right)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def compare(first: Mapping[str, bool], second: Mapping[str, bool], seed: int = 0) -> dict[str, Any]:
    """A paired comparison of two models on the questions that both answered (id -> right).

    Returns:
        the difference first - second with its 95% bootstrap interval over questions, how often only one of the two is
        right, and the exact McNemar p-value: how likely so uneven a split of these is if neither is better.
    """
    common = [key for key in first if key in second]
    if not common:
        raise ValueError("The two models have no question in common.")
    only_first = sum(first[key] and not second[key] for key in common)
    only_second = sum(second[key] and not first[key] for key in common)
    num, num_uneven = len(common), only_first + only_second
    shares = [only_first / num, only_second / num, 1 - num_uneven / num]
    draws = np.random.default_rng(seed).multinomial(num, shares, _NUM_RESAMPLES)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / num, [2.5, 97.5])
    tail = sum(math.comb(num_uneven, k) for k in range(min(only_first, only_second) + 1))
    return {
        "num": num,
        "difference": (only_first - only_second) / num,
        "interval_95": (float(low), float(high)),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": min(1.0, 2 * tail / 2**num_uneven),
    }


def _is_right(scored: Scored, rules: Rules) -> bool:
    verdict = scored.verdict(rules)
    return verdict is not None and verdict.is_right


def _of_subjects(scored: Sequence[Scored], subjects: Sequence[str]) -> list[Scored]:
    return [one for one in scored if one.answered.question.subject in subjects]


def _tally(benchmark: Benchmark, scored: Sequence[Scored], rules: Rules) -> dict[str, Any]:
    num_right = sum(_is_right(one, rules) for one in scored)
    return {
        "num": len(scored),
        "right": num_right,
        "accuracy": num_right / len(scored),
        "printed": benchmark.printed(num_right, len(scored)),
    }
