"""How much work fits into one step, so that a long prompt holds up the other requests for a bounded time only."""

from __future__ import annotations

_NEWEST_SHARE = 0.5  # of the latest measurement in the rate


class Pace:
    """The number of units (tokens to prefill, images to encode) that take about `seconds`, as measured.

    A power of two, so that noise in the measurements rarely changes how a prompt is divided.
    """

    def __init__(self, seconds: float, least: int, most: int, first: int) -> None:
        self._seconds = seconds
        self._first = first
        self._least = least
        self._most = most
        self._rate: float | None = None  # units per second

    def record(self, num_units: int, seconds: float) -> None:
        """A step of so many units took so long."""
        if num_units < self._least:  # dominated by what a step costs anyway
            return
        rate = num_units / max(seconds, 1e-9)
        self._rate = rate if self._rate is None else self._rate + _NEWEST_SHARE * (rate - self._rate)

    @property
    def num_units(self) -> int:
        """For the next step; `first` before anything was measured."""
        if self._rate is None:
            return self._first
        fitting = int(self._rate * self._seconds)
        return min(max(self._least, 1 << max(fitting.bit_length() - 1, 0)), self._most)
