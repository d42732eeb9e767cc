"""Rounds of measurements: variants take turns, until the medians are known well enough or time is up."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import cycle

import pytest

from eval.speed.rounds import measure_rounds, median_error, median_ratio, spread


def test_variants_take_turns_until_their_medians_are_known() -> None:
    called: list[str] = []

    def variant(name: str, values: Iterator[float]) -> float:
        called.append(name)
        return next(values)

    steady, noisy = cycle([10.0, 10.1]), cycle([10.0, 14.0, 6.0, 10.0, 10.0])
    rounds = measure_rounds({"steady": lambda: variant("steady", steady)}, clock=lambda: 0.0)
    assert len(rounds["steady"]) == 5
    called.clear()
    rounds = measure_rounds(
        {"steady": lambda: variant("steady", steady), "noisy": lambda: variant("noisy", noisy)}, clock=lambda: 0.0
    )
    assert called == ["steady", "noisy"] * len(rounds["noisy"]) and 5 < len(rounds["noisy"]) <= 15


def test_time_is_bounded_however_noisy_the_machine() -> None:
    now = iter(range(0, 100_000, 100))
    values = cycle([1.0, 5.0])
    rounds = measure_rounds({"noisy": lambda: next(values)}, clock=lambda: next(now))
    assert len(rounds["noisy"]) == 5


def test_medians_and_spread() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert spread(values, "rate")["rate"] == 3.0
    assert spread(values, "rate")["lower_quartile"] < 3.0 < spread(values, "rate")["upper_quartile"]
    assert median_ratio([2.0, 4.0, 60.0], [1.0, 2.0, 3.0]) == 2.0
    assert median_error([5.0] * 5) == 0.0


@pytest.mark.parametrize("num_rounds", [5, 15])
def test_the_error_is_that_of_a_median(num_rounds: int) -> None:
    """Over many runs of normal noise."""
    import random

    generator = random.Random(0)
    runs = [[generator.gauss(100, 5) for _ in range(num_rounds)] for _ in range(2000)]
    observed = statistics.stdev(statistics.median(run) for run in runs) / 100
    predicted = statistics.mean(median_error(run) for run in runs)
    assert 0.7 < predicted / observed < 1.5
