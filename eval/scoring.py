"""From answers to scores: per protocol, subject, discipline and overall, with intervals. Knows no benchmark."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .types import Answered, Benchmark, Question, Verdict

# The benchmark's own script; the same with every random guess counted as wrong; a judge model.
Rules = Literal["official", "no_guess", "judge"]
RULES: tuple[Rules, ...] = ("official", "no_guess", "judge")
OFFICIAL_SEED = 42
_NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Scored:
    """An answer with its verdict by the official rules, and a judge's where there is item."""

    answered: Answered
    official: Verdict
    judge: Verdict | None = None

    def verdict(self, rules: Rules) -> Verdict | None:
        """None where a judge was not asked, or failed."""
        if rules == "no_guess":
            return replace(self.official, is_correct=self.official.is_correct and not self.official.is_guess)
        return self.official if rules == "official" else self.judge


class RandomGuesses:
    """The official code's one stream of random guesses, and how many were taken."""

    def __init__(self, seed: int = OFFICIAL_SEED) -> None:
        self._random = random.Random(seed)
        self.count = 0

    def __call__(self, choices: Sequence[str]) -> str:
        self.count += 1
        return self._random.choice(choices)


def score(benchmark: Benchmark, answered: Iterable[Answered]) -> list[Scored]:
    """Every answer scored by the official rules, in the official order, on which the random guesses depend."""
    guesses = RandomGuesses()
    return [Scored(item, _official(benchmark, item, guesses)) for item in benchmark.official_order(list(answered))]


def is_correct_without_guess(benchmark: Benchmark, answered: Answered) -> bool:
    """Whether an answer is correct by the official rules and not by a random guess."""
    verdict = _official(benchmark, answered, RandomGuesses())
    return verdict.is_correct and not verdict.is_guess


def _official(benchmark: Benchmark, answered: Answered, random_guess: RandomGuesses) -> Verdict:
    before = random_guess.count
    parsed = benchmark.parse_official(answered, random_guess)
    return Verdict(parsed, benchmark.is_correct(answered, parsed), is_guess=random_guess.count > before)


def summarize(benchmark: Benchmark, scored: Sequence[Scored], rules: Rules) -> dict[str, Any]:
    """Accuracy overall, by discipline with their subjects, and by type of question; micro averages everywhere.

    By the official rules also the ids of the "random_guesses": all other answers are scored as the official script
    scores them, whatever its random numbers are. By a judge only the questions that it judged are counted.
    """
    scored = [item for item in scored if item.verdict(rules) is not None]
    if not scored:
        return {"num": 0}
    subjects = dict.fromkeys(item.answered.question.subject for item in scored)
    known = {subject for group in benchmark.GROUPS.values() for subject in group}
    groups = dict(benchmark.GROUPS) if known >= set(subjects) else {subject: (subject,) for subject in subjects}
    whole = _tally(benchmark, scored, rules)
    return whole | {
        "interval_95": interval([_is_correct(item, rules) for item in scored]),
        **(
            {"random_guesses": [item.answered.question.id for item in scored if item.official.is_guess]}
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
        "question_types": {
            question_type: _tally(
                benchmark, [item for item in scored if item.answered.question.question_type == question_type], rules
            )
            for question_type in dict.fromkeys(item.answered.question.question_type for item in scored)
        },
    }


def count_outcomes(answered: Sequence[Answered]) -> dict[str, int]:
    """How many responses are not whole answers; one that was cut may be empty too.

    "refused" is known of endpoints only.

    "empty": no text at all; "unfinished_reasoning": text, but no answer behind it. "failed" questions have no response
    and are in none of the others; the official rules score them as an empty response.
    """
    completed = [item for item in answered if item.outcome != "failed"]
    return {
        "num": len(answered),
        "failed": len(answered) - len(completed),
        "refused": sum(item.outcome == "refused" for item in completed),
        "cut": sum(item.outcome == "cut" for item in completed),
        "empty": sum(not item.response.strip() for item in completed),
        "unfinished_reasoning": sum(bool(item.response.strip()) and not item.answer.strip() for item in completed),
    }


def chance(questions: Iterable[Question]) -> float:
    """The expected accuracy of guessing: one option of a choice, one verdict of two, nothing for free text."""
    guesses = [_chance_of_question(question) for question in questions]
    return sum(guesses) / len(guesses)


def _chance_of_question(question: Question) -> float:
    if question.question_type != "choice":
        return 0.5 if question.question_type == "true_false" else 0.0
    golds = [question.gold] if isinstance(question.gold, str) else question.gold
    if question.gold and question.options and not any(gold in question.options for gold in golds):
        return 0.0  # MMMU-Pro has a question whose answer is none of its options
    return 1 / (len(question.options) or 4)


def interval(right: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of an accuracy.

    Resampling n verdicts with replacement and counting the correct ones is one draw from a binomial.
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
    samples = np.random.default_rng(seed).multinomial(num, shares, _NUM_RESAMPLES)
    low, high = np.percentile((samples[:, 0] - samples[:, 1]) / num, [2.5, 97.5])
    tail = sum(math.comb(num_uneven, k) for k in range(min(only_first, only_second) + 1))
    return {
        "num": num,
        "difference": (only_first - only_second) / num,
        "interval_95": (float(low), float(high)),
        "only_first_correct": only_first,
        "only_second_correct": only_second,
        "p_value": min(1.0, 2 * tail / 2**num_uneven),
    }


def _is_correct(scored: Scored, rules: Rules) -> bool:
    verdict = scored.verdict(rules)
    return verdict is not None and verdict.is_correct


def _of_subjects(scored: Sequence[Scored], subjects: Sequence[str]) -> list[Scored]:
    return [item for item in scored if item.answered.question.subject in subjects]


def _tally(benchmark: Benchmark, scored: Sequence[Scored], rules: Rules) -> dict[str, Any]:
    num_correct = sum(_is_correct(item, rules) for item in scored)
    return {
        "num": len(scored),
        "correct": num_correct,
        "accuracy": num_correct / len(scored),
        "formatted": benchmark.format_official(num_correct, len(scored)),
    }
