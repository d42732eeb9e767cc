"""Skips steps whose gradient norm is NaN, infinite or an outlier."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from .config import SpikeGuardConfig

_NUM_NORMS = 100  # in the running median
_MIN_NORMS = 20  # before any norm is an outlier


class DivergedError(ValueError):
    """So many steps in a row were skipped that the run stops."""


class SpikeGuard:
    """Decides by the gradient norm whether a step is skipped, and counts skipped steps."""

    def __init__(self, config: SpikeGuardConfig) -> None:
        self._max_ratio, self._stop_after = config.max_norm_ratio, config.stop_after
        self._norms: deque[float] = deque(maxlen=_NUM_NORMS)
        self.num_skipped = 0
        self.num_consecutive = 0

    @property
    def should_stop(self) -> bool:
        """Whether as many consecutive steps were skipped as the config allows."""
        return self.num_consecutive >= self._stop_after

    def accepts(self, norm: float) -> bool:
        """Whether a step with this gradient norm may update the weights."""
        accepted = math.isfinite(norm) and not self._is_outlier(norm)
        if accepted:
            self._norms.append(norm)
            self.num_consecutive = 0
        else:
            self.num_skipped += 1
            self.num_consecutive += 1
        return accepted

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "num_skipped": self.num_skipped, "num_consecutive": self.num_consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._norms.extend(state["norms"])
        self.num_skipped, self.num_consecutive = state["num_skipped"], state["num_consecutive"]

    def _is_outlier(self, norm: float) -> bool:
        if self._max_ratio is None or len(self._norms) < _MIN_NORMS:
            return False
        return norm > self._max_ratio * median(self._norms)
