"""Being told to stop: a signal is remembered, and the loop leaves where it can go on later.

Called by loop.py.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

_ASKED_TO_STOP = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While it is entered, the first SIGTERM or Ctrl-C is only remembered; the next one acts as it always does."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number
        self._usual: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._usual = {number: signal.signal(number, self._remember) for number in _ASKED_TO_STOP}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
