"""The server under load: overload, clients that disconnect or read slowly, and many clients at once."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from serving import (
    PATIENCE_SECONDS,
    TALL,
    WIDE,
    Gate,
    Turns,
    ask,
    bomb,
    client_of,
    data_url,
    direct,
    gate,
    metric,
    openai_messages,
    serving,
    show,
    wait_until,
    yi_vl,
)
from test_image_hostile import bmp_in_rle, gif_with
from transformers import Cache

from yi_vl.engine.prompt import Prompt
from yi_vl.engine.sampling import Sampling
from yi_vl.predict import YiVL
from yi_vl.server import Limits, create_app
from yi_vl.server.engine_loop import BufferedStream, EngineLoop
from yi_vl.server.protocol import ApiError


def start(address: str, **fields: Any) -> threading.Thread:
    """A request from another thread, which keeps the response in `text`."""

    def ask_and_listen() -> None:
        with client_of(address) as client:
            thread.text = client.chat.completions.create(**ask(**fields)).choices[0].message.content  # type: ignore[attr-defined]

    thread = threading.Thread(target=ask_and_listen)
    thread.start()
    return thread


def test_overload_is_refused_with_429_and_the_others_are_answered(yi_vl: YiVL, gate: Gate) -> None:
    with serving(create_app(yi_vl, "tiny", limits=Limits(max_batch_size=1, num_waiting=1))) as address:
        first = start(address, max_tokens=5)
        wait_until(lambda: gate.num_begun == 1)
        second = start(address, max_tokens=7)
        wait_until(lambda: metric(address, "requests_waiting") == 1)  # the loop is free while the model is not
        with client_of(address) as client, pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**ask())
        assert int(caught.value.response.headers["Retry-After"]) > 0
        assert metric(address, "requests_running") == 1 and metric(address, "requests_total", status="429") == 1
        gate.open()
        first.join(PATIENCE_SECONDS), second.join(PATIENCE_SECONDS)
        for thread, length in ((first, 5), (second, 7)):
            assert thread.text == direct(yi_vl, [("user", [], "Hi")], max_new_tokens=length)[0]  # type: ignore[attr-defined]
        wait_until(lambda: metric(address, "requests_running") + metric(address, "requests_waiting") == 0)


def disconnect(address: str, when: Callable[[], bool], stream: bool) -> None:
    """A client that asks for a long answer and closes its connection after a while."""

    async def ask_and_disconnect() -> None:
        async with client_of(address, AsyncOpenAI) as client:
            task = asyncio.create_task(listen(client))
            await asyncio.to_thread(wait_until, when)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def listen(client: AsyncOpenAI) -> None:
        answer: Any = await client.chat.completions.create(**ask(max_tokens=40, stream=stream))
        async for _ in answer:
            pass

    asyncio.run(ask_and_disconnect())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot_within_a_step(yi_vl: YiVL, gate: Gate, stream: bool) -> None:
    with serving(create_app(yi_vl, "tiny")) as address:
        gate.let(3)
        disconnect(address, lambda: gate.num_begun == 4, stream)  # it leaves during the fourth step
        wait_until(lambda: metric(address, "requests_total", status="499") == 1)
        assert metric(address, "requests_running") == 1  # the step goes on
        gate.open()
        wait_until(lambda: metric(address, "requests_running") == 0)
        assert gate.num_begun == 4 and metric(address, "completion_tokens_total") == 3
        with client_of(address) as client:
            text = client.chat.completions.create(**ask(max_tokens=5)).choices[0].message.content
        assert gate.num_begun == 9 and text == direct(yi_vl, [("user", [], "Hi")], max_new_tokens=5)[0]


@pytest.mark.parametrize("stream", [True, False])
def test_a_waiting_client_that_disconnects_costs_no_step(yi_vl: YiVL, gate: Gate, stream: bool) -> None:
    with serving(create_app(yi_vl, "tiny", limits=Limits(max_batch_size=1))) as address:
        first = start(address, max_tokens=5)
        wait_until(lambda: gate.num_begun == 1)
        disconnect(address, lambda: metric(address, "requests_waiting") == 1, stream)
        wait_until(lambda: metric(address, "requests_total", status="499") == 1)
        assert metric(address, "requests_waiting") == 0
        gate.open()
        first.join(PATIENCE_SECONDS)
        assert gate.num_begun == 5


def test_a_slow_reader_delays_no_other() -> None:
    async def count(made: list[int]) -> AsyncGenerator[int, None]:
        for number in range(1, 10):
            made.append(number)
            yield number

    async def read_late() -> None:
        made: list[int] = []
        ahead = BufferedStream(count(made))
        assert await anext(ahead) == 1
        await asyncio.sleep(0)
        assert len(made) == 9 and [number async for number in ahead] == made[1:]

    asyncio.run(read_late())


@pytest.mark.slow
def test_many_clients_at_once(yi_vl: YiVL) -> None:
    """200 requests, 20 at once; a third leaves, a tenth is malformed or hostile. Afterwards all is as it was before."""
    chats: list[Turns] = [[("user", [WIDE] * (i % 3), f"Question {i}?")] for i in range(8)]
    expected = [direct(yi_vl, chats[i], max_new_tokens=6, temperature=1.0, seed=i)[0] for i in range(8)]
    assert len(set(expected)) == len(chats)
    bad = [ask(n=0), ask(messages=[{"role": "wizard", "content": "Hi"}]), ask(tools=[{}]), ask(model="other")]
    bad += [show(data_url(content)) for content in (bomb(), gif_with(b"!\xfe\1a\0" * 100_000), bmp_in_rle(10_000))]
    threads, draw, seen = set(threading.enumerate()), random.Random(0), Counter[str]()

    async def listen(client: AsyncOpenAI, index: int) -> None:
        chat, stream = index % len(chats), index % 2 == 0
        request = ask(messages=openai_messages(chats[chat]), max_tokens=6, stream=stream, temperature=1.0, seed=chat)
        answer: Any = await client.chat.completions.create(**request)
        if stream:
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
        else:
            text = answer.choices[0].message.content
        assert text == expected[chat]

    async def interrupt(client: AsyncOpenAI) -> None:
        answer: Any = await client.chat.completions.create(**ask(max_tokens=60, stream=True))
        await anext(answer)
        await answer.close()

    async def request(client: AsyncOpenAI, index: int) -> str:
        if index % 10 == 5:
            with pytest.raises((openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError)):
                await client.chat.completions.create(**bad[index // 10 % len(bad)])
            return "malformed"
        if index % 6 == 0:
            await interrupt(client)
            return "interrupted"
        if index % 6 == 3:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(listen(client, index), draw.uniform(0, 0.1))
            return "impatient"
        await listen(client, index)
        return "answered"

    async def retry_until_served(client: AsyncOpenAI, index: int, semaphore: asyncio.Semaphore) -> None:
        async with semaphore:
            while True:
                try:
                    seen[await request(client, index)] += 1
                    return
                except openai.RateLimitError as error:
                    assert int(error.response.headers["Retry-After"]) > 0
                    seen["refused"] += 1
                    await asyncio.sleep(0.2)

    async def run(address: str) -> None:
        semaphore = asyncio.Semaphore(20)
        async with client_of(address, AsyncOpenAI) as client:
            await asyncio.gather(*(retry_until_served(client, index, semaphore) for index in range(200)))

    with serving(create_app(yi_vl, "tiny", limits=Limits(max_batch_size=4, num_waiting=9))) as address:
        asyncio.run(run(address))
        num_refused = seen.pop("refused", 0)
        assert seen == {"malformed": 20, "interrupted": 34, "impatient": 26, "answered": 120}
        wait_until(lambda: metric(address, "requests_running") + metric(address, "requests_waiting") == 0)
        malformed = sum(metric(address, "requests_total", status=status) for status in ("400", "404", "422"))
        assert malformed == 20 and metric(address, "requests_total", status="500") == 0
        assert metric(address, "requests_total", status="429") >= num_refused
        assert metric(address, "requests_total", status="499") > 0
        assert metric(address, "completion_tokens_total") < 6 * 146 + 60 * 34  # had no client disconnected
        gc.collect()
        assert not any(type(thing) in (Cache, Prompt) for thing in gc.get_objects())
    assert set(threading.enumerate()) == threads


def watch_rows(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many answers each decode step is for."""
    forward, rows = yi_vl.model.forward, []

    def watch(**inputs: Any) -> Any:
        rows.append(len(inputs.get("input_ids", [])))
        return forward(**inputs)

    monkeypatch.setattr(yi_vl.model, "forward", watch)
    return rows


def test_requests_are_generated_together(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (9, 12, 15, 20)
    expected = [direct(yi_vl, [("user", [], "Hi")], max_new_tokens=length)[0] for length in lengths]
    with serving(create_app(yi_vl, "tiny")) as address:
        gate = Gate(yi_vl, monkeypatch)
        threads = [start(address, max_tokens=length) for length in lengths]
        wait_until(lambda: metric(address, "requests_running") + metric(address, "requests_waiting") == len(lengths))
        rows = watch_rows(yi_vl, monkeypatch)
        gate.open()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert [thread.text for thread in threads] == expected  # type: ignore[attr-defined]
        assert max(rows) == len(lengths) and sum(rows) <= sum(lengths)
        assert metric(address, "slots") == 16 and metric(address, "batch_size") == 0
        assert metric(address, "tokens_per_second") > 0


def test_choices_are_rows_of_one_batch(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = watch_rows(yi_vl, monkeypatch)
    with serving(create_app(yi_vl, "tiny")) as address, client_of(address) as client:
        answer = client.chat.completions.create(**ask(n=3, max_tokens=10, temperature=1.0, seed=7))
    monkeypatch.undo()
    expected = [
        direct(yi_vl, [("user", [], "Hi")], max_new_tokens=10, temperature=1.0, seed=seed)[0] for seed in (7, 8, 9)
    ]
    assert [choice.message.content for choice in answer.choices] == expected
    assert max(rows) == 3


def test_an_image_that_takes_long_to_decode_delays_no_other(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, is_released = yi_vl.processor.image_processor.prepare, threading.Event()

    def prepare_slowly(source: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(source, bytes) and source == WIDE.read_bytes():
            assert is_released.wait(PATIENCE_SECONDS)
        return prepare(source, *arguments, **options)

    monkeypatch.setattr(yi_vl.processor.image_processor, "prepare", prepare_slowly)
    with serving(create_app(yi_vl, "tiny")) as address, client_of(address) as client:
        slow = start(address, messages=openai_messages([("user", [WIDE], "What?")]))
        wait_until(lambda: metric(address, "requests_waiting") == 1)
        for turns in ([("user", [], "Hi")], [("user", [TALL], "What?")]):
            assert client.chat.completions.create(**ask(messages=openai_messages(turns))).choices
        assert slow.is_alive()
        is_released.set()
        slow.join(PATIENCE_SECONDS)
        assert slow.text == direct(yi_vl, [("user", [WIDE], "What?")], max_new_tokens=2)[0]  # type: ignore[attr-defined]


def test_slots_are_shared_among_addresses_or_keys_and_not_among_what_a_client_claims(
    yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, admit = [], yi_vl.engine.admit

    def watch(prompt: Prompt, sampling: Any, on_output: Any, client: Any) -> int:
        clients.append(client)
        return admit(prompt, sampling, on_output, client)

    monkeypatch.setattr(yi_vl.engine, "admit", watch)
    for api_keys in ([], ["first", "second"]):
        with serving(create_app(yi_vl, "tiny", api_keys=api_keys)) as address:
            for key in ("first", "second", "first"):
                with client_of(address, key=key) as client:
                    client.chat.completions.create(**ask())
    open_to_all, keyed = clients[:3], clients[3:]
    assert open_to_all == ["127.0.0.1"] * 3
    assert keyed[0] == keyed[2] != keyed[1]


def test_a_closed_loop_ends_answers_with_an_error(yi_vl: YiVL, gate: Gate) -> None:
    async def run() -> int:
        loop = EngineLoop(yi_vl.engine, max_batch_size=1, num_waiting=1)
        prompt = yi_vl.engine.prepare([{"role": "user", "content": "Hi"}])
        outputs = loop.generate(prompt, [Sampling(max_new_tokens=9)], None)
        gate.let(1)
        await anext(outputs)
        closing = asyncio.create_task(asyncio.to_thread(loop.close))
        await asyncio.to_thread(wait_until, lambda: loop._is_closed)
        gate.open()
        await closing
        with pytest.raises(ApiError) as caught:
            while True:
                await anext(outputs)
        return caught.value.status

    assert asyncio.run(run()) == 503


def test_a_failure_between_steps_does_not_stop_the_loop(
    yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, num_failures = yi_vl.engine.step, 0

    def fail_once() -> Any:
        nonlocal num_failures
        if not num_failures:
            num_failures += 1
            raise RuntimeError("no memory to cache a prefix")
        return step()

    monkeypatch.setattr(yi_vl.engine, "step", fail_once)
    with serving(create_app(yi_vl, "tiny")) as address, client_of(address) as client:
        assert client.chat.completions.create(**ask()).choices
    assert num_failures == 1 and "A step failed" in caplog.text
