"""Repeated measurements of several variants in turns, and their medians and spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

_MIN_ROUNDS, _MAX_ROUNDS = 5, 15
_MAX_SECONDS = 300.0
_TARGET_ERROR = 0.03  # of each median: two runs then agree within 10%, also on a machine that others use


def measure_rounds(
    variants: Mapping[str, Callable[[], float]], clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """What each variant measures, round by round: in a round all take turns, as other processes may slow any of them.

    Rounds are repeated until every median is known to 3%, or for five minutes.
    """
    values: dict[str, list[float]] = {name: [] for name in variants}
    started = clock()
    for index in range(_MAX_ROUNDS):
        is_late = clock() - started > _MAX_SECONDS
        if index >= _MIN_ROUNDS and (is_late or all(median_error(v) < _TARGET_ERROR for v in values.values())):
            break
        for name, variant in variants.items():
            values[name].append(variant())
    return values


def median_error(values: list[float]) -> float:
    """The standard error of a median relative to it, from the interquartile range of the values."""
    low, middle, high = statistics.quantiles(values, n=4)
    return 0.93 * (high - low) / math.sqrt(len(values)) / middle  # of a normal distribution: 1.25 sigma, 1.35 sigma


def spread(values: list[float], name: str) -> dict[str, float]:
    """The median and the quartiles, as columns of a table."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {name: middle, "lower_quartile": low, "upper_quartile": high}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
