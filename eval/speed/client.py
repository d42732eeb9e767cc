"""Requests over HTTP from a process of its own, like real clients, so that it leaves the interpreter to the server.

This module must not import torch: the process starts with it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx


@contextmanager
def client_process() -> Iterator[Callable[..., float]]:
    """A function (measure, *arguments) that calls a function of this module in the client's process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda measure, *arguments: pool.submit(measure, *arguments).result()


def tokens_per_second(address: str, bodies: list[dict[str, Any]], concurrency: int) -> float:
    """Tokens per second of all requests together, of which `concurrency` are under way at once."""
    return asyncio.run(_tokens_per_second(address, bodies, concurrency))


def first_token_seconds(address: str, body: dict[str, Any], others: list[dict[str, Any]]) -> float:
    """The time to first token of a request that is sent a second after the others."""
    return asyncio.run(_first_token_seconds(address, body, others))


async def _tokens_per_second(address: str, bodies: list[dict[str, Any]], concurrency: int) -> float:
    """Tokens per second of all requests together."""
    semaphore = asyncio.Semaphore(concurrency)

    async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
        async with semaphore:
            answer = await client.post(address, json=body)
            return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

    async with httpx.AsyncClient(timeout=None) as client:
        started = time.perf_counter()
        num_tokens = sum(await asyncio.gather(*(ask(client, body) for body in bodies)))
        return num_tokens / (time.perf_counter() - started)


async def _first_token_seconds(address: str, body: dict[str, Any], others: list[dict[str, Any]]) -> float:
    async with httpx.AsyncClient(timeout=None) as client:
        tasks = [asyncio.create_task(client.post(address, json=other)) for other in others]
        if tasks:
            await asyncio.sleep(1)  # all are let in, and some are under way
        started = time.perf_counter()
        async with client.stream("POST", address, json=body | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and "role" in json.loads(line[6:])["choices"][0]["delta"]:
                    seconds = time.perf_counter() - started
                    break
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seconds
