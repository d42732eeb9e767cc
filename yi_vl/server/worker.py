"""One generation at a time: the thread that uses the model, the bounded queue before it, and cancellation."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Generic, TypeVar

from .protocol import ApiError

T = TypeVar("T")
_MAX_RETRY_SECONDS = 60  # OpenAI's client heeds no longer ones
_NEWEST_SHARE = 0.3  # of the latest answer in the mean duration


def retry_seconds(mean: float | None, elapsed: float) -> int:
    """Estimated seconds until the running answer ends and the queue has a free slot.

    Args:
        mean: seconds an answer takes; None if none has ended yet: then this one is expected to be half done.
        elapsed: seconds since the running answer began.
    """
    remaining = elapsed if mean is None else mean - elapsed
    return min(max(1, math.ceil(remaining)), _MAX_RETRY_SECONDS)


class AdmissionLimit:
    """A context for at most `total` concurrent requests; further ones get 429 with `Retry-After`."""

    def __init__(self, total: int, retry_seconds: Callable[[], int] = lambda: 1) -> None:
        self.num_admitted = 0
        self._total = total
        self._retry_seconds = retry_seconds

    def __enter__(self) -> None:
        if self.num_admitted >= self._total:
            seconds = self._retry_seconds()
            message = f"{self.num_admitted} requests are under way already; try again in {seconds} s."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
        self.num_admitted += 1

    def __exit__(self, *_: object) -> None:
        self.num_admitted -= 1


class Worker:
    """Runs generators, one after another in the order of arrival, in the one thread that uses the model.

    Every step is a call of its own, so the event loop stays free, short calls run between two steps, and a generator
    that is no longer read makes no further step.
    """

    def __init__(self, num_waiting: int) -> None:
        self.admission = AdmissionLimit(1 + num_waiting, self.retry_seconds)
        self._mean_seconds: float | None = None  # of the answers so far, the latest ones above all
        self._turn_began = 0.0
        self._is_closed = False
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="yi-vl-worker")

    @property
    def num_running(self) -> int:
        return int(self._turn.locked())

    @property
    def num_waiting(self) -> int:
        return self.admission.num_admitted - self.num_running

    def retry_seconds(self) -> int:
        """Seconds until a full queue has a free slot."""
        return retry_seconds(self._mean_seconds, time.monotonic() - self._turn_began if self.num_running else 0)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """A function's result, from the worker's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def run(self, steps: Generator[T, None, None]) -> AsyncGenerator[T, None]:
        """What a generator yields, after those before it. Its last step has ended when the next generator begins."""
        async with self._turn:
            self._turn_began = time.monotonic()
            try:
                while (item := await self.call(next, steps, None)) is not None:
                    yield item
            finally:
                if not self._is_closed:
                    await asyncio.shield(self.call(steps.close))
                self._note_duration(time.monotonic() - self._turn_began)

    def _note_duration(self, seconds: float) -> None:
        mean = seconds if self._mean_seconds is None else self._mean_seconds
        self._mean_seconds = mean + _NEWEST_SHARE * (seconds - mean)

    def close(self) -> None:
        """Wait until the step under way is over; none begins after it."""
        self._is_closed = True
        self._thread.shutdown(cancel_futures=True)


class BufferedStream(Generic[T]):
    """Reads an asynchronous generator in a task of its own into a buffer, so that a slow client delays no other.

    Args:
        source: is closed, wherever it is, when it is `cancel`led.
    """

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._items: asyncio.Queue[T | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(source))

    def __aiter__(self) -> BufferedStream[T]:
        return self

    async def __anext__(self) -> T:
        if (item := await self._items.get()) is not None:
            return item
        await self._task  # raises what the source raised
        raise StopAsyncIteration

    def cancel(self) -> None:
        self._task.cancel()

    async def _read(self, source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    self._items.put_nowait(item)
        finally:
            self._items.put_nowait(None)
