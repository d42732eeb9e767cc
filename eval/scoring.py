"""From answers to scores: both protocols, per subject, discipline and overall, with intervals. Knows no benchmark."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .question import Answered, Benchmark, Question, Verdict

Rules = Literal["official", "strict"]
RULES: tuple[Rules, Rules] = ("official", "strict")
OFFICIAL_SEED = 42
_NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Scored:
    """An answer with its verdict under either protocol."""

    answered: Answered
    official: Verdict
    strict: Verdict


class Draws:
    """The official code's one stream of draws, and how many were had."""

    def __init__(self, seed: int = OFFICIAL_SEED) -> None:
        self._random = random.Random(seed)
        self.count = 0

    def __call__(self, choices: Sequence[str]) -> str:
        self.count += 1
        return self._random.choice(choices)


def score(benchmark: Benchmark, answered: Iterable[Answered]) -> list[Scored]:
    """Every answer judged by both protocols, in the official order: draws depend on it."""
    draws, scored = Draws(), []
    for one in benchmark.official_order(list(answered)):
        before = draws.count
        meaning = benchmark.judge(one, draws)
        official = Verdict(meaning, benchmark.is_right(one, meaning), is_parsed=draws.count == before)
        scored.append(Scored(one, official, benchmark.judge_strictly(one)))
    return scored


def summarise(benchmark: Benchmark, scored: Sequence[Scored], rules: Rules) -> dict[str, Any]:
    """Accuracy overall, by discipline with their subjects, and by kind of question; micro averages everywhere.

    By the official rules also the ids of the answers that were "drawn": all others are judged as the official script
    judges them, whatever its random numbers are.
    """
    subjects = dict.fromkeys(one.answered.question.subject for one in scored)
    known = {subject for group in benchmark.GROUPS.values() for subject in group}
    groups = dict(benchmark.GROUPS) if known >= set(subjects) else {subject: (subject,) for subject in subjects}
    whole = _tally(benchmark, scored, rules)
    return whole | {
        "interval_95": interval([_verdict(one, rules).is_right for one in scored]),
        "unparsed": sum(not _verdict(one, rules).is_parsed for one in scored),
        **({"drawn": _drawn_ids(scored)} if rules == "official" else {}),
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


def _drawn_ids(scored: Sequence[Scored]) -> list[str]:
    return [one.answered.question.id for one in scored if not one.official.is_parsed]


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


def _verdict(scored: Scored, rules: Rules) -> Verdict:
    return scored.official if rules == "official" else scored.strict


def _of_subjects(scored: Sequence[Scored], subjects: Sequence[str]) -> list[Scored]:
    return [one for one in scored if one.answered.question.subject in subjects]


def _tally(benchmark: Benchmark, scored: Sequence[Scored], rules: Rules) -> dict[str, Any]:
    num_right = sum(_verdict(one, rules).is_right for one in scored)
    return {
        "num": len(scored),
        "right": num_right,
        "accuracy": num_right / len(scored),
        "printed": benchmark.printed(num_right, len(scored)),
    }
