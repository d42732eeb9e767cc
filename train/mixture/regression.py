"""Predicts the held-out loss of a mixture: ridge regression on log shares, judged by leaving each run out.

Shapes: n runs, p features, c candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .design import Point

Array = NDArray[np.float64]

MIN_CORRELATION = 0.5
_PENALTIES = 10.0 ** np.arange(-3, 3)  # per run, on standardized features
_BEST_PERCENT = 1
_SHARE_DIGITS = 4  # what is judged is what is printed


def features(points: Sequence[Point], num_values: Sequence[int]) -> Array:
    """(n, p): the log of each share, then for each value of a setting but the first whether the run has it."""
    rows = []
    for point in points:
        indicators = [level == value for level, number in zip(point.levels, num_values) for value in range(1, number)]
        rows.append([*np.log(point.shares), *map(float, indicators)])
    return np.array(rows, dtype=np.float64)


@dataclass(frozen=True)
class Ridge:
    """A linear model on standardized features. coefficients: (p,), of the features as they are."""

    coefficients: Array
    intercept: float
    penalty: float

    def predict(self, inputs: Array) -> Array:
        """(n, p) features -> (n,) losses."""
        return np.asarray(inputs @ self.coefficients + self.intercept)


def fit_ridge(inputs: Array, targets: Array) -> Ridge:
    """The ridge regression whose penalty has the smallest leave-one-out error.

    Args:
        inputs: (n, p)
        targets: (n,)
    """
    number = len(targets)
    mean, scale = inputs.mean(0), inputs.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    left, singular, right = np.linalg.svd((inputs - mean) / scale, full_matrices=False)
    centered = targets - targets.mean()
    best = (np.inf, _PENALTIES[-1])
    for penalty in _PENALTIES:
        shrink = singular**2 / (singular**2 + penalty * number)
        leverage = (left**2 * shrink).sum(1) + 1 / number  # the diagonal of the hat matrix
        residuals = centered - left @ (shrink * (left.T @ centered))
        error = float(np.mean((residuals / np.maximum(1 - leverage, 1e-9)) ** 2))
        best = min(best, (error, float(penalty)))
    penalty = best[1]
    weights = right.T @ (singular / (singular**2 + penalty * number) * (left.T @ centered))
    coefficients = weights / scale
    return Ridge(coefficients, float(targets.mean() - mean @ coefficients), penalty)


def leave_one_out(inputs: Array, targets: Array) -> Array:
    """(n,) predictions of each run by a regression, its penalty too, that has not seen it."""
    kept = ~np.eye(len(targets), dtype=bool)
    return np.array(
        [fit_ridge(inputs[rows], targets[rows]).predict(inputs[[index]])[0] for index, rows in enumerate(kept)]
    )


def spearman(first: Sequence[float] | Array, second: Sequence[float] | Array) -> float | None:
    """The rank correlation; equal values share the mean of their ranks. None where one side is constant."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    deviations = [rank - rank.mean() for rank in ranks]
    norm = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float(deviations[0] @ deviations[1]) / norm if norm > 0 else None


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse])


def best_point(model: Ridge, candidates: Array, num_values: Sequence[int]) -> Point:
    """The point with the lowest predicted loss: the mean of the best hundredth of the candidates.

    Args:
        candidates: (c, sources) shares.
    """
    num_sources = candidates.shape[1]
    losses = np.log(candidates) @ model.coefficients[:num_sources]
    best = np.argsort(losses)[: max(1, len(candidates) * _BEST_PERCENT // 100)]
    levels, start = [], num_sources
    for number in num_values:  # effects add up, so each setting has a best value of its own
        effects = [0.0, *model.coefficients[start : start + number - 1]]
        levels.append(int(np.argmin(effects)))
        start += number - 1
    return Point(tuple(candidates[best].mean(0).round(_SHARE_DIGITS).tolist()), tuple(levels))
