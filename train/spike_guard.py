"""Which steps would spoil the weights: their gradient is not a number, or out of all proportion.

Called by loop.py; calls nothing of the project but the settings.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from .config import BadStepsConfig

_NUM_NORMS = 100  # whose median is what is usual
_MIN_NORMS = 20  # before anything is unusual


class GradientGuard:
    """Judges each step by the norm of its gradient, and counts those that are left out."""

    def __init__(self, config: BadStepsConfig) -> None:
        self._max_ratio, self._stop_after = config.max_norm_ratio, config.stop_after
        self._norms: deque[float] = deque(maxlen=_NUM_NORMS)
        self.num_skipped = 0
        self.num_in_a_row = 0

    @property
    def has_had_enough(self) -> bool:
        """Whether as many steps in a row were left out as the settings allow."""
        return self.num_in_a_row >= self._stop_after

    def accepts(self, norm: float) -> bool:
        """Whether the step whose gradient has this norm may change the weights."""
        accepted = math.isfinite(norm) and not self._is_unusual(norm)
        if accepted:
            self._norms.append(norm)
            self.num_in_a_row = 0
        else:
            self.num_skipped += 1
            self.num_in_a_row += 1
        return accepted

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms.extend(state["norms"])
        self.num_skipped, self.num_in_a_row = state["num_skipped"], state["num_in_a_row"]

    def _is_unusual(self, norm: float) -> bool:
        if self._max_ratio is None or len(self._norms) < _MIN_NORMS:
            return False
        return norm > self._max_ratio * median(self._norms)
