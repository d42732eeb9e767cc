"""Which runs a search makes: pure functions of the config and the sizes of the sources.

Shares are fractions of the samples, in the order of the sources; they sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .config import GRID

Shares = NDArray[np.float64]  # (sources,)

GRID_WEIGHTS = tuple(0.5**power for power in range(7))  # 1 to 1/64
_MIN_SHARE = GRID_WEIGHTS[-1]  # of an equal share: the regression takes logarithms
_NUM_CANDIDATES = 10_000
_MAX_TRIES = 1000


@dataclass(frozen=True)
class Point:
    """What is tried in one run.

    shares: of the searched sources.
    levels: which value each of `Search.hyper` has.
    """

    shares: tuple[float, ...]
    levels: tuple[int, ...]


def cap_shares(shares: Shares, caps: Shares) -> Shares:
    """The shares with none above its cap; what is cut off is divided among the others by their shares."""
    shares, is_capped = shares.astype(np.float64), np.zeros(len(shares), bool)
    while (over := (shares > caps * (1 + 1e-9)) & ~is_capped).any():
        is_capped |= over
        shares[is_capped] = caps[is_capped]
        is_free = ~is_capped
        shares[is_free] *= (1 - shares[is_capped].sum()) / max(shares[is_free].sum(), 1e-12)
    return shares / shares.sum()


def share_caps(sizes: Sequence[int], num_samples: float, max_epochs: float | None) -> Shares:
    """The largest share of each source that repeats it at most `max_epochs` times in `num_samples`.

    Raises:
        ValueError: all sources together are too small.
    """
    if max_epochs is None:
        return np.ones(len(sizes))
    caps = np.minimum(1.0, np.array(sizes) * max_epochs / num_samples)
    if caps.sum() < 1:
        needed = num_samples / sum(sizes)
        raise ValueError(
            f"search.max_epochs is {max_epochs:g}, but the sources hold {sum(sizes):,} samples and the stage takes "
            f"{num_samples:,.0f} of them, {needed:.3g} epochs; raise search.max_epochs, or set it to null."
        )
    return caps


class Region:
    """The mixtures that a search tries.

    Args:
        caps: (sources,) largest shares.
    """

    def __init__(self, method: str, caps: Shares, seed: int) -> None:
        self._method, self._caps, self._seed = method, caps, seed
        self.equal = cap_shares(np.full(len(caps), 1 / len(caps)), caps)

    def mixtures(self, number: int) -> list[Shares]:
        """The first so many mixtures to try, all different; a larger number begins with the same ones.

        Raises:
            ValueError: the grid has fewer.
        """
        if len(self.equal) == 1:
            return [self.equal] * number
        mixtures: list[Shares] = []
        seen, tries = {tuple(self.equal.round(9))}, 0
        while len(mixtures) < number:
            if tries - len(mixtures) > _MAX_TRIES:
                raise ValueError(
                    f"search.budget is {number}, but no more than {len(mixtures)} different mixtures were found; lower "
                    "it, or take search.method: dirichlet."
                )
            drawn = self._draw(np.random.default_rng((self._seed, tries)))
            tries += 1
            if tuple(drawn.round(9)) not in seen:
                seen.add(tuple(drawn.round(9)))
                mixtures.append(drawn)
        return mixtures

    def candidates(self) -> NDArray[np.float64]:
        """(candidates, sources) of mixtures that the best prediction is looked for among."""
        generator = np.random.default_rng((self._seed, _MAX_TRIES, 1))
        return np.stack([self._draw(generator) for _ in range(_NUM_CANDIDATES)])

    def _draw(self, generator: np.random.Generator) -> Shares:
        num_sources = len(self.equal)
        if self._method == GRID:
            weights = generator.choice(GRID_WEIGHTS, num_sources)
        else:  # around equal shares: each share's mean is its own, and without caps all mixtures are as likely
            weights = np.maximum(generator.dirichlet(num_sources * self.equal), _MIN_SHARE / num_sources)
        return cap_shares(weights / weights.sum(), self._caps)


def draw_levels(num_values: Sequence[int], number: int, seed: int) -> list[tuple[int, ...]]:
    """For so many runs, which value each setting has; every value is taken as often as the others of its setting.

    A larger number begins with the same ones.
    """
    columns = []
    for setting, values in enumerate(num_values):
        blocks = -(-number // values)
        order = [np.random.default_rng((seed, 1, setting, block)).permutation(values) for block in range(blocks)]
        columns.append(np.concatenate(order)[:number].tolist() if order else [])
    return list(zip(*columns)) if columns else [()] * number


def tried_points(
    region: Region, num_values: Sequence[int], number: int, seed: int, stored: Sequence[Point] = ()
) -> list[Point]:
    """The points of a search in their order.

    Args:
        num_values: of each searched setting.
        stored: the first ones, of an earlier start.
    """
    drawn = zip(region.mixtures(number), draw_levels(num_values, number, seed))
    points = [Point(tuple(shares.tolist()), levels) for shares, levels in drawn]
    return [*stored[:number], *points[len(stored) :]]


def baselines(region: Region, sizes: Sequence[int], present: Sequence[float], num_levels: int) -> dict[str, Point]:
    """Equal shares, shares by size, and the present weights, at the present settings; each mixture once.

    Args:
        present: shares of the present weights, which may be above the caps.
    """
    shares = {
        "equal": region.equal,
        "size": np.array(sizes) / sum(sizes),
        "present": np.array(present) / sum(present),
    }
    distinct: dict[str, Point] = {}
    for name, mixture in shares.items():
        if not any(np.allclose(mixture, point.shares) for point in distinct.values()):
            distinct[name] = Point(tuple(mixture.tolist()), (0,) * num_levels)
    return distinct
