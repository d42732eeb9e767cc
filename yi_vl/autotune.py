"""Kernels chosen by measurement: which one is fastest depends on the processor, the dtype and the shape.

They are measured on one thread, in time of the processor, which other processes do not add to. On all threads of a busy
machine a call of less than a millisecond waits most of the time for a thread that is not running.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

Candidate = Callable[[int], object]  # of the call's number, 0, 1, ..., by which it takes other weights each time

_MIN_CALLS = 4
_MAX_SECONDS = 0.5  # a quiet machine takes a few calls of each candidate
_SAME = 1.05  # times closer than this are the same: a candidate has to beat the default by more


def _cpu_seconds() -> float:
    return time.perf_counter() if sys.platform == "win32" else time.thread_time()  # Windows counts ticks of 16 ms


def least_seconds(candidates: Mapping[str, Candidate], clock: Callable[[], float] = _cpu_seconds) -> dict[str, float]:
    """The least time that a call of each candidate takes on one thread.

    Calls alternate, so that what slows the machine slows all candidates alike, until the two fastest calls of each are
    equal.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with _one_thread():
        for candidate in candidates.values():
            candidate(0)  # the first call compiles
        started, num_calls = clock(), 0
        while clock() - started < _MAX_SECONDS and not all(map(_is_confirmed, seconds.values())):
            for name, candidate in candidates.items():
                before = clock()
                candidate(num_calls)
                seconds[name].append(clock() - before)
                num_calls += 1
    return {name: min(times) for name, times in seconds.items()}


def fastest(seconds: Mapping[str, float]) -> str:
    """The name of the fastest candidate; the first is the default, which another replaces only for a clear gain."""
    default, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return best if seconds[default] > _SAME * seconds[best] else default


def _is_confirmed(times: list[float]) -> bool:
    """Whether a second call took as little time as the fastest."""
    least = sorted(times)[:2]
    return len(times) >= _MIN_CALLS and least[1] <= _SAME * least[0]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
