"""One generation at a time: the thread that touches the model, the bounded line before it, and how one leaves it early.

Called by completions.py; calls protocol.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Generic, TypeVar

from .protocol import ApiError

T = TypeVar("T")
_RETRY_SECONDS = 1


class Places:
    """A context that at most `total` requests are in at once; one more is refused."""

    def __init__(self, total: int) -> None:
        self.num_taken = 0
        self._total = total

    def __enter__(self) -> None:
        if self.num_taken >= self._total:
            message = f"{self.num_taken} requests are under way already; try again in a moment."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(_RETRY_SECONDS)})
        self.num_taken += 1

    def __exit__(self, *_: object) -> None:
        self.num_taken -= 1


class Worker:
    """Runs generators, one after another in the order they came, in the one thread that touches the model.

    Every step is a call of its own, so the event loop stays free, short calls fit in between two steps, and a generator
    that nobody reads any more makes no further step.
    """

    def __init__(self, num_waiting: int) -> None:
        self.places = Places(1 + num_waiting)
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="yi-vl-worker")

    @property
    def num_running(self) -> int:
        return int(self._turn.locked())

    @property
    def num_waiting(self) -> int:
        return self.places.num_taken - self.num_running

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """A function's result, from the worker's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def run(self, steps: Generator[T, None, None]) -> AsyncGenerator[T, None]:
        """What a generator yields, once it is its turn. Its last step has ended when the next generator begins."""
        async with self._turn:
            try:
                while (item := await self.call(next, steps, None)) is not None:
                    yield item
            finally:
                await asyncio.shield(self.call(steps.close))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class Ahead(Generic[T]):
    """Reads an asynchronous generator in a task of its own, so that a slow client holds up nobody.

    Args:
        source: is closed, wherever it is, when it is `cancel`led.
    """

    def __init__(self, source: AsyncGenerator[T, None]) -> None:
        self._items: asyncio.Queue[T | None] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(source))

    def __aiter__(self) -> Ahead[T]:
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
