"""The server, asked over loopback by OpenAI's own client: answers, limits, errors, cancelling, load."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import math
import random
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI, OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from test_image_hostile import bmp_in_rle, gif_with, icon, jpeg_of_scans, png
from tiny import NUM_PATCHES, OFFICIAL, tiny_yi_vl
from transformers import DynamicCache
from web import serving_images

from yi_vl import cli
from yi_vl.engine.running_batch import Prompts
from yi_vl.engine.sampling import Sampling
from yi_vl.image import MAX_PIXELS
from yi_vl.predict import YiVL
from yi_vl.server import Limits, create_app
from yi_vl.server.worker import BufferedStream

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
Turns = list[tuple[str, list[Path], str]]  # role, images, words
CHATS: dict[str, Turns] = {
    "text": [("user", [], "Who are you?")],
    "image": [("user", [WIDE], "What is this?")],
    "several images": [("user", [WIDE, TALL], "比较一下。")],
    "images in several turns": [
        ("system", [], "Be brief."),
        ("user", [WIDE], "What is this?"),
        ("assistant", [], "A dog."),
        ("user", [TALL, WIDE], "And these?"),
    ],
}
HI = [{"role": "user", "content": "Hi"}]
PATIENCE_SECONDS = 120  # for what must come; never waited for in full


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


@contextmanager
def serving(app: FastAPI, log_level: str = "warning") -> Iterator[str]:
    """The address of an application that runs in a thread; it is stopped at the end, and all its threads with it."""
    config = uvicorn.Config(app, port=0, log_config=None, log_level=log_level, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(yi_vl: YiVL) -> Iterator[str]:
    with serving(create_app(yi_vl, "tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as client:
        yield client


def client_of(address: str, kind: Any = OpenAI, key: str = "none") -> Any:
    return kind(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def asked(turns: Turns) -> list[Any]:
    """Turns as OpenAI's client sends them."""
    messages = []
    for role, images, words in turns:
        parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(path.read_bytes())}} for path in images]
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": words}] if parts else words})
    return messages


def direct(yi_vl: YiVL, turns: Turns, **options: Any) -> tuple[str, str | None, int, int]:
    """What the model answers without a server: text, finish reason, tokens read, tokens generated."""
    messages = []
    for role, images, words in turns:
        parts: list[Any] = [{"type": "image", "image": path} for path in images]
        messages.append({"role": role, "content": [*parts, {"type": "text", "text": words}]})
    prompts = yi_vl.engine.prepare([messages])
    outputs = [output for (output,) in yi_vl.engine.generate(prompts, Sampling(**options))]
    text = "".join(output.text for output in outputs)
    return text, outputs[-1].finish_reason, prompts.num_tokens[0], outputs[-1].num_tokens


def metric(address: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    families = text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"yi_vl_{name}"]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


class Gate:
    """Stands before the model: counts its steps, and lets through as many as it is told to."""

    def __init__(self, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_begun = 0
        self._permits = threading.Semaphore(0)
        self._is_open = False
        forward = yi_vl.model.forward

        def step(**inputs: Any) -> Any:
            self.num_begun += 1
            if not self._is_open:
                assert self._permits.acquire(timeout=PATIENCE_SECONDS)
            return forward(**inputs)

        monkeypatch.setattr(yi_vl.model, "forward", step)

    def let(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        self._is_open = True
        self.let(1)


@pytest.fixture
def gate(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(yi_vl, monkeypatch)
    yield gate
    gate.open()


def say(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, text: str, then: int | Exception = 2) -> None:
    """Makes the model say a text, then a token or fail."""
    tokens = yi_vl.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    steps = iter([*tokens, then])

    def forward(**_: Any) -> SimpleNamespace:
        token = next(steps)
        if isinstance(token, Exception):
            raise token
        return SimpleNamespace(logits=torch.eye(960)[None, None, token])

    monkeypatch.setattr(yi_vl.model, "forward", forward)


@pytest.mark.core
@pytest.mark.parametrize("chat", CHATS)
def test_answers_are_those_of_the_model(client: OpenAI, yi_vl: YiVL, chat: str) -> None:
    text, reason, num_read, num_generated = direct(yi_vl, CHATS[chat], max_new_tokens=12)
    reply = client.chat.completions.create(model="tiny", messages=asked(CHATS[chat]), max_tokens=12)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, reason)
    assert reply.usage is not None and reply.model == "tiny" and reply.object == "chat.completion"
    usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens)
    assert usage == (num_read, num_generated, num_read + num_generated)
    assert num_read > NUM_PATCHES * sum(len(images) for _, images, _ in CHATS[chat])


def test_every_chat_has_an_answer_of_its_own(yi_vl: YiVL) -> None:
    assert len({direct(yi_vl, turns, max_new_tokens=12)[0] for turns in CHATS.values()}) == len(CHATS)


@pytest.mark.core
@pytest.mark.parametrize("includes_usage", [True, False])
def test_a_stream_is_the_answer_in_pieces(client: OpenAI, yi_vl: YiVL, includes_usage: bool) -> None:
    text, reason, num_read, num_generated = direct(yi_vl, CHATS["image"], max_new_tokens=12)
    options: Any = {"stream_options": {"include_usage": True}} if includes_usage else {}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=asked(CHATS["image"]), max_completion_tokens=12, stream=True, **options
        )
    )
    if includes_usage:
        last = chunks.pop()
        assert last.choices == [] and last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (num_read, num_generated)
    deltas = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(delta or "" for delta in deltas) == text and len(deltas) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.usage for chunk in chunks} == {None} and len({chunk.id for chunk in chunks}) == 1


def test_pieces_are_sent_as_they_come(client: OpenAI, gate: Gate) -> None:
    gate.let(3)
    stream = client.chat.completions.create(model="tiny", messages=HI, max_tokens=9, stream=True)  # type: ignore[call-overload]
    for _, chunk in zip(range(2), stream):  # the role and a piece
        assert chunk.choices[0].finish_reason is None
    assert gate.num_begun <= 4
    gate.open()
    assert list(stream)[-1].choices[0].finish_reason == "length"


def test_sampling_options_are_those_of_the_model(client: OpenAI, yi_vl: YiVL) -> None:
    options = {"temperature": 1.0, "top_p": 0.9}
    expected = [direct(yi_vl, CHATS["text"], max_new_tokens=8, seed=5 + i, **options)[0] for i in range(3)]
    assert len(set(expected)) == 3
    reply = client.chat.completions.create(
        model="tiny", messages=asked(CHATS["text"]), max_tokens=8, seed=5, n=3, **options
    )
    assert [choice.message.content for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage is not None and reply.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="tiny", messages=asked(CHATS["text"]), max_tokens=8, seed=5, n=3, stream=True, **options
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == expected
    negative = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, seed=-1, temperature=1.0)
    assert negative.choices[0].finish_reason == "length"


@pytest.mark.parametrize("as_list", [True, False])
def test_stop_strings_end_an_answer_and_are_not_in_it(client: OpenAI, yi_vl: YiVL, as_list: bool) -> None:
    text, _, _, num_generated = direct(yi_vl, CHATS["text"], max_new_tokens=12)
    stop = text[len(text) // 2 :][:3]
    reply = client.chat.completions.create(
        model="tiny", messages=asked(CHATS["text"]), max_tokens=12, stop=["never", stop] if as_list else stop
    )
    assert reply.choices[0].message.content == text.partition(stop)[0].rstrip()
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and 0 < reply.usage.completion_tokens < num_generated


@pytest.mark.parametrize(
    ("said", "then", "limit", "heard"),
    [
        (" A dog.", 2, 9, ("A dog.", "stop")),
        (" A dog.\n### Human: more", 2, 50, ("A dog.", "stop")),
        (" dog" * 9, 2, 3, ("dog dog dog", "length")),
    ],
)
def test_finish_reasons(
    client: OpenAI, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, said: str, then: int, limit: int, heard: Any
) -> None:
    say(yi_vl, monkeypatch, said, then)
    (choice,) = client.chat.completions.create(model="tiny", messages=HI, max_tokens=limit).choices
    assert (choice.message.content, choice.finish_reason) == heard


def test_models_and_health(client: OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI, "max_tokens": 2, **fields}


def show(url: Any, **fields: Any) -> dict[str, Any]:
    """A request with an image."""
    parts = [{"type": "image_url", "image_url": {"url": url, **fields}}, {"type": "text", "text": "What?"}]
    return ask(messages=[{"role": "user", "content": parts}])


def encoded_image(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, format)
    return file.getvalue()


def bomb() -> bytes:
    """An image that says it has more pixels than are read."""
    content = bytearray(encoded_image("PNG"))
    content[16:24] = struct.pack(">II", 20_000, 6_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def with_text(request: dict[str, Any], text: str) -> dict[str, Any]:
    request["messages"][0]["content"].append({"type": "text", "text": text})
    return request


URL = "messages[0].content[0].image_url.url"
REFUSED: list[tuple[Any, int, str | None, str]] = [
    (b"{", 400, None, "not JSON"),
    (b"\xff", 400, None, "not JSON"),
    (b"[" * 100_000, 400, None, "not JSON"),
    ([], 400, None, "object"),
    ({"messages": HI}, 400, "model", "missing"),
    ({"model": "tiny"}, 400, "messages", "missing"),
    (ask(model="gpt-4o"), 404, "model", "no model 'gpt-4o'"),
    (ask(messages=[]), 400, "messages", "at least 1"),
    (ask(messages=[{"role": "wizard", "content": "Hi"}]), 400, "messages[0].role", "'wizard'"),
    (ask(messages=[{"role": "user"}]), 400, "messages[0].content", "missing"),
    (ask(messages=[{"role": "user", "content": "Hi", "nmae": "Li"}]), 400, "messages[0].nmae", "not supported"),
    (ask(messages=[{"role": "tool", "content": "Hi"}]), 400, "messages[0].role", "'tool'"),
    (
        ask(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
        400,
        "messages[0].content[0].type",
        "audio",
    ),
    (ask(messages=[{"role": "user", "content": [{"type": "text"}]}]), 400, "messages[0].content[0]", "holds `text`"),
    (ask(messages=[{"role": "assistant", "content": "Hi"}]), 400, "messages", "nothing to answer"),
    (ask(messages=[{"role": "user", "content": " "}]), 400, "messages", "question is empty"),
    (ask(messages=[{"role": "user", "content": "a dog " * 600}]), 400, "messages", "the model holds 512"),
    (ask(temperature=-1), 400, "temperature", "greater than or equal to 0"),
    (ask(temperature="hot"), 400, "temperature", "'hot'"),
    (json.dumps(ask(temperature=math.nan)).encode(), 400, "temperature", "finite"),
    (ask(top_p=-0.1), 400, "top_p", "greater than or equal to 0"),
    (ask(max_tokens=0), 400, "max_tokens", "at least 1"),
    (ask(max_tokens=-2), 400, "max_tokens", "at least 1"),
    (ask(max_tokens=1.5), 400, "max_tokens", "integer"),
    (ask(max_tokens=True), 400, "max_tokens", "integer"),
    (ask(max_tokens=10**6), 400, "max_tokens", "at most 2048"),
    (ask(max_tokens=None, max_completion_tokens=10**6), 400, "max_completion_tokens", "at most 2048"),
    (ask(max_completion_tokens=3), 400, None, "they differ; give one"),
    (ask(n=5), 400, "n", "at most 4"),
    (ask(seed=2**64), 400, "seed", "less than"),
    (ask(stop=3), 400, "stop", "array"),
    (ask(stop=["a"] * 5), 400, "stop", "at most 4"),
    (ask(temprature=1), 400, "temprature", "not supported"),
    (ask(logprobs=True), 400, "logprobs", "not supported"),
    (ask(presence_penalty=0.5), 400, "presence_penalty", "not supported"),
    (ask(response_format={"type": "json_object"}), 400, "response_format", "not supported"),
    (ask(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    (show("data:image/png;base64,AAAA"), 422, URL, "not an image"),
    (show("data:image/png;base64,!"), 422, URL, "not base64"),
    (show("data:image/png,abc"), 400, URL, "must have the form"),
    (show(data_url(TALL.read_bytes()[:2000])), 422, URL, "damaged"),
    (show(data_url(bomb())), 422, URL, f"at most {MAX_PIXELS:,}"),
    (show(data_url(encoded_image("EPS"))), 422, URL, "not an image of a format"),
    (show(data_url(png(1, 300_000, 8, 2, 3))), 422, URL, "a side of at most 65,535"),
    (show(data_url(gif_with(b"!\xfe\1a\0" * 100_000))), 422, URL, "too many pieces"),
    (show(data_url(jpeg_of_scans(10_000, 400))), 422, URL, "more than 50 scans"),
    (show(data_url(bmp_in_rle(10_000))), 422, URL, "decoded slowly"),
    (show(data_url(icon(png(10_000, 10_000, 1, 0, 1)))), 422, URL, "an icon that holds"),
    (ask(messages=[{"role": "user", "content": "a" * 10_000_000}]), 400, "messages", "takes at least"),
    (ask(messages=[{"role": "user", "content": "#" * 5_000}]), 400, "messages", "takes at least"),
    ({"messages": [], "metadata": [0] * 250_002}, 413, None, "more than 250,000 values"),
    ({"messages": [], "metadata": [json.loads("[" * 100 + "]" * 100)] * 2501}, 413, None, "more than 250,000 values"),
    ({"messages": [], "metadata": [{"a": {}}] * 90_000}, 413, None, "more than 250,000 values"),
    (with_text(show(data_url(bomb())), "a" * 100_000), 400, "messages", "takes at least"),  # before it is decoded
    (show(str(WIDE)), 400, URL, "files are not read"),
    (show(f"file://{WIDE}"), 400, URL, "files are not read"),
    (show("http://127.0.0.1/a.png"), 400, URL, "fetches no images"),
    (show(3), 400, URL, "string"),
    (show(data_url(encoded_image("PNG")), crop="high"), 400, URL.replace("url.url", "url.crop"), "not supported"),
    (ask(messages=show("data:,")["messages"] * 9), 413, "messages", "9 images"),
]


@pytest.mark.parametrize(("request_", "status", "param", "problem"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_requests_are_refused_by_name(
    address: str, request_: Any, status: int, param: str | None, problem: str
) -> None:
    content = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{address}/v1/chat/completions", content=content, headers=headers, timeout=PATIENCE_SECONDS)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert problem in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 500


def test_a_stream_that_is_refused_has_a_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a dog " * 600}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


def test_defaults_of_openai_pass_and_its_answers_come_back(client: OpenAI, yi_vl: YiVL) -> None:
    first = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=4, frequency_penalty=0, logprobs=False, stop=None, user="Li",
        response_format={"type": "text"},
    )  # fmt: skip
    history: Any = [*HI, first.choices[0].message, {"role": "user", "content": "So?"}]
    second = client.chat.completions.create(model="tiny", messages=history, max_tokens=4)
    told: Turns = [("user", [], "Hi"), ("assistant", [], first.choices[0].message.content or ""), ("user", [], "So?")]
    assert second.choices[0].message.content == direct(yi_vl, told, max_new_tokens=4)[0]


def test_pages_that_do_not_exist_and_other_methods(address: str) -> None:
    missing, wrong = httpx.get(f"{address}/v1/nothing"), httpx.get(f"{address}/v1/chat/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["type"] == wrong.json()["error"]["type"] == "invalid_request_error"
    form = httpx.post(f"{address}/v1/chat/completions", data={"model": "tiny"})
    assert form.status_code == 400 and "application/json" in form.json()["error"]["message"]


def test_bodies_and_images_are_limited_in_bytes(yi_vl: YiVL) -> None:
    limits = Limits(body_bytes=40_000, image_bytes=5_000)
    with serving(create_app(yi_vl, "tiny", limits=limits)) as address, client_of(address) as client:
        with pytest.raises(openai.APIStatusError, match="larger than 40,000 bytes") as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a" * 5_000_000}])
        assert caught.value.status_code == 413
        chunked = httpx.post(
            f"{address}/v1/chat/completions",
            content=(b" " * 10_000 for _ in range(9)),  # of a length that no header tells
            headers={"Content-Type": "application/json"},
        )
        assert chunked.status_code == 413
        with pytest.raises(openai.APIStatusError, match="larger than 5,000 bytes") as caught:
            client.chat.completions.create(model="tiny", messages=asked([("user", [TALL], "What?")]))
        assert caught.value.status_code == 413 and caught.value.param == URL
        assert client.chat.completions.create(model="tiny", messages=asked(CHATS["image"]), max_tokens=1).choices


def test_a_body_that_does_not_arrive_is_given_up(yi_vl: YiVL) -> None:
    with serving(create_app(yi_vl, "tiny", limits=Limits(body_seconds=0.1))) as address:
        connection = socket.create_connection(("127.0.0.1", httpx.URL(address).port or 0), PATIENCE_SECONDS)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with connection:
            connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_key_is_asked_for_and_never_logged(yi_vl: YiVL, caplog: pytest.LogCaptureFixture) -> None:
    with serving(create_app(yi_vl, "tiny", api_keys=["öffne dich"])) as address:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
                answer = httpx.request(method, address + path, headers=header)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    caplog.set_level("DEBUG")
    with serving(create_app(yi_vl, "tiny", api_keys=["sesame"]), log_level="trace") as address:
        with client_of(address, key="wrong") as client, pytest.raises(openai.AuthenticationError, match="key"):
            client.models.list()
        with client_of(address, key="sesame") as client:
            assert client.chat.completions.create(model="tiny", messages=HI, max_tokens=1).choices
        assert httpx.get(f"{address}/healthz").status_code == httpx.get(f"{address}/metrics").status_code == 200
    log = "".join(record.getMessage() for record in caplog.records if not record.name.startswith(("http", "openai")))
    assert "/v1/models" in log and "sesame" not in log


def start(address: str, **fields: Any) -> threading.Thread:
    """A client in a thread of its own, that asks and remembers what it hears in `heard`."""

    def ask_and_listen() -> None:
        with client_of(address) as client:
            thread.heard = client.chat.completions.create(**ask(**fields)).choices[0].message.content  # type: ignore[attr-defined]

    thread = threading.Thread(target=ask_and_listen)
    thread.start()
    return thread


def test_overload_is_told_and_the_others_are_answered(yi_vl: YiVL, gate: Gate) -> None:
    with serving(create_app(yi_vl, "tiny", limits=Limits(num_waiting=1))) as address:
        first = start(address, max_tokens=5)
        until(lambda: gate.num_begun == 1)
        second = start(address, max_tokens=7)
        until(lambda: metric(address, "requests_waiting") == 1)  # the loop is free while the model is not
        with client_of(address) as client, pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**ask())
        assert int(caught.value.response.headers["Retry-After"]) > 0
        assert metric(address, "requests_running") == 1 and metric(address, "requests_total", status="429") == 1
        gate.open()
        first.join(PATIENCE_SECONDS), second.join(PATIENCE_SECONDS)
        for thread, length in ((first, 5), (second, 7)):
            assert thread.heard == direct(yi_vl, [("user", [], "Hi")], max_new_tokens=length)[0]  # type: ignore[attr-defined]
        until(lambda: metric(address, "requests_running") + metric(address, "requests_waiting") == 0)


def leave(address: str, when: Callable[[], bool], stream: bool) -> None:
    """A client that asks for a long answer and closes its connection after a while."""

    async def ask_and_leave() -> None:
        async with client_of(address, AsyncOpenAI) as client:
            task = asyncio.create_task(listen(client))
            await asyncio.to_thread(until, when)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def listen(client: AsyncOpenAI) -> None:
        answer: Any = await client.chat.completions.create(**ask(max_tokens=40, stream=stream))
        async for _ in answer:
            pass

    asyncio.run(ask_and_leave())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_worker_within_a_step(yi_vl: YiVL, gate: Gate, stream: bool) -> None:
    with serving(create_app(yi_vl, "tiny")) as address:
        gate.let(3)
        leave(address, lambda: gate.num_begun == 4, stream)  # it leaves during the fourth step
        until(lambda: metric(address, "requests_total", status="499") == 1)
        assert metric(address, "requests_running") == 1  # the step goes on
        gate.open()
        until(lambda: metric(address, "requests_running") == 0)
        assert gate.num_begun == 4 and metric(address, "completion_tokens_total") == 4
        with client_of(address) as client:
            heard = client.chat.completions.create(**ask(max_tokens=5)).choices[0].message.content
        assert gate.num_begun == 9 and heard == direct(yi_vl, [("user", [], "Hi")], max_new_tokens=5)[0]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_line_costs_no_step(yi_vl: YiVL, gate: Gate, stream: bool) -> None:
    with serving(create_app(yi_vl, "tiny")) as address:
        first = start(address, max_tokens=5)
        until(lambda: gate.num_begun == 1)
        leave(address, lambda: metric(address, "requests_waiting") == 1, stream)
        until(lambda: metric(address, "requests_total", status="499") == 1)
        assert metric(address, "requests_waiting") == 0
        gate.open()
        first.join(PATIENCE_SECONDS)
        assert gate.num_begun == 5


def test_a_slow_reader_holds_up_nobody() -> None:
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


def test_a_failure_is_told_and_the_server_goes_on(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(create_app(yi_vl, "tiny")) as address, client_of(address) as client:
        say(yi_vl, monkeypatch, " dog dog", RuntimeError("out of memory at 0x1234"))
        with pytest.raises(openai.InternalServerError, match="The server failed") as caught:
            client.chat.completions.create(**ask(max_tokens=9))
        assert "0x1234" not in str(caught.value)
        say(yi_vl, monkeypatch, " dog dog", RuntimeError("out of memory at 0x1234"))
        heard = ""
        with pytest.raises(openai.APIError, match="The server failed"):
            for chunk in client.chat.completions.create(**ask(max_tokens=9, stream=True)):
                heard += chunk.choices[0].delta.content or ""
        assert heard == "dog dog"
        monkeypatch.undo()
        assert client.chat.completions.create(**ask()).choices[0].finish_reason == "length"
        assert metric(address, "failures_total") == metric(address, "requests_total", status="500") == 2


def test_metrics_count(yi_vl: YiVL) -> None:
    with serving(create_app(yi_vl, "tiny")) as address, client_of(address) as client:
        usages = [client.chat.completions.create(**ask(max_tokens=n)).usage for n in (3, 4)]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ask(n=99))
        until(lambda: metric(address, "requests_total") == 3)
        assert metric(address, "requests_total", status="200") == 2
        assert metric(address, "requests_total", status="400") == 1
        assert metric(address, "prompt_tokens_total") == sum(usage.prompt_tokens for usage in usages)
        assert metric(address, "completion_tokens_total") == 7
        assert metric(address, "time_to_first_token_seconds_count") == 2
        assert metric(address, "time_to_first_token_seconds_sum") > 0
        assert metric(address, "requests_running") == metric(address, "requests_waiting") == 0


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    with serving_images(monkeypatch) as server:
        yield server


def look(yi_vl: YiVL, web: ThreadingHTTPServer, place: str) -> str:
    """What a server that may fetch images answers about the one at `host/path`."""
    host, _, path = place.partition("/")
    limits = Limits(image_bytes=100_000, fetch_seconds=0.5 if path == "slow" else PATIENCE_SECONDS)
    app = create_app(yi_vl, "tiny", allow_remote_images=True, limits=limits)
    with serving(app) as address, client_of(address) as client:
        request = show(f"http://{host}:{web.server_address[1]}/{path}")
        return client.chat.completions.create(**request).choices[0].message.content


@pytest.mark.parametrize("place", ["public.test/wide.png", "public.test/moved", "rebinding.test/wide.png"])
def test_remote_images_are_fetched(web: Any, yi_vl: YiVL, place: str) -> None:
    assert look(yi_vl, web, place) == direct(yi_vl, [("user", [WIDE], "What?")], max_new_tokens=2)[0]
    host = place.partition("/")[0]
    assert set(web.asked) <= {(f"{host}:{web.server_address[1]}", path) for path in ("/wide.png", "/moved")}


@pytest.mark.parametrize(
    ("place", "status", "problem", "num_asked"),
    [
        ("private.test/wide.png", 422, "not public", 0),
        ("both.test/wide.png", 422, "not public", 0),
        ("127.0.0.2/wide.png", 422, "not public", 0),
        ("public.test/elsewhere", 422, "not public", 1),
        ("public.test/file", 422, "no http or https", 1),
        ("public.test/loop", 422, "redirected more than 3", 4),
        ("public.test/missing", 422, "answers 404", 1),
        ("public.test/endless", 413, "larger than 100,000", 1),
        ("public.test/slow", 422, "longer than 0.5 seconds", 1),
        ("public.test/empty", 422, "not an image", 1),
        ("nowhere.test/wide.png", 422, "cannot be fetched", 0),
    ],
)
def test_remote_images_have_limits(
    web: Any, yi_vl: YiVL, place: str, status: int, problem: str, num_asked: int
) -> None:
    with pytest.raises(openai.APIStatusError, match=problem) as caught:
        look(yi_vl, web, place)
    assert (caught.value.status_code, caught.value.param, len(web.asked)) == (status, URL, num_asked)


@pytest.mark.slow
def test_many_clients_at_once(yi_vl: YiVL) -> None:
    """200 requests, 20 at once; a third leaves, a tenth is malformed. Afterwards everything is as it was before."""
    chats: list[Turns] = [[("user", [WIDE] * (i % 3), f"Question {i}?")] for i in range(8)]
    expected = [direct(yi_vl, chats[i], max_new_tokens=6, temperature=1.0, seed=i)[0] for i in range(8)]
    assert len(set(expected)) == len(chats)
    bad = [ask(n=0), ask(messages=[{"role": "wizard", "content": "Hi"}]), ask(tools=[{}]), ask(model="other")]
    threads, draw, seen = set(threading.enumerate()), random.Random(0), Counter[str]()

    async def listen(client: AsyncOpenAI, index: int) -> None:
        chat, stream = index % len(chats), index % 2 == 0
        request = ask(messages=asked(chats[chat]), max_tokens=6, stream=stream, temperature=1.0, seed=chat)
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
            with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
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

    async def insist(client: AsyncOpenAI, index: int, crowd: asyncio.Semaphore) -> None:
        async with crowd:
            while True:
                try:
                    seen[await request(client, index)] += 1
                    return
                except openai.RateLimitError as error:
                    assert int(error.response.headers["Retry-After"]) > 0
                    seen["refused"] += 1
                    await asyncio.sleep(0.2)

    async def run(address: str) -> None:
        crowd = asyncio.Semaphore(20)
        async with client_of(address, AsyncOpenAI) as client:
            await asyncio.gather(*(insist(client, index, crowd) for index in range(200)))

    with serving(create_app(yi_vl, "tiny", limits=Limits(num_waiting=12))) as address:
        asyncio.run(run(address))
        num_refused = seen.pop("refused", 0)
        assert seen == {"malformed": 20, "interrupted": 34, "impatient": 26, "answered": 120}
        until(lambda: metric(address, "requests_running") + metric(address, "requests_waiting") == 0)
        malformed = metric(address, "requests_total", status="400") + metric(address, "requests_total", status="404")
        assert malformed == 20 and metric(address, "requests_total", status="500") == 0
        assert metric(address, "requests_total", status="429") >= num_refused
        assert metric(address, "requests_total", status="499") > 0
        assert metric(address, "completion_tokens_total") < 6 * 146 + 60 * 34  # had nobody left
        gc.collect()
        assert not any(type(thing) in (DynamicCache, Prompts) for thing in gc.get_objects())
    assert set(threading.enumerate()) == threads


def test_the_command_serves(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[uvicorn.Config] = []

    class Server:
        def __init__(self, config: uvicorn.Config) -> None:
            configs.append(config)

        def run(self, sockets: list[socket.socket]) -> None:
            assert sockets[0].getsockname() == ("127.0.0.1", port)
            sockets[0].close()

    monkeypatch.setattr(cli, "load_quickly", lambda *_: yi_vl)
    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setenv("YI_VL_API_KEY", "sesame other")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--max-tokens", "5", "--port", str(port), "--shutdown-seconds", "7"]
    monkeypatch.setattr(sys, "argv", ["yi-vl", "serve", str(tmp_path), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and configs[0].timeout_graceful_shutdown == 7
    monkeypatch.undo()
    with serving(configs[0].app) as address:  # type: ignore[arg-type]
        assert httpx.get(f"{address}/v1/models").status_code == 401
        with client_of(address, key="other") as client:
            assert [model.id for model in client.models.list()] == [tmp_path.name]
        with client_of(address, key="sesame") as client:
            with pytest.raises(openai.BadRequestError, match="at most 5"):
                client.chat.completions.create(model=tmp_path.name, messages=HI, max_tokens=6)
            reply = client.chat.completions.create(model=tmp_path.name, messages=HI)
            assert reply.usage is not None and reply.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("arguments", "missing", "problem"),
    [
        ([], "uvicorn", 'pip install "yi_vl[serve]"'),
        ([], "prometheus_client", 'pip install "yi_vl[serve]"'),
        (["--api-key", ""], None, "key is empty"),
        (["--api-key", "a", "--api-key", " "], None, "key is empty"),
        (["--api-key-file", "/nowhere"], None, "/nowhere cannot be read"),
        (["--port", "99999"], None, "no port 99999"),
        (["--port=-1"], None, "no port -1"),
        (["--host", ""], None, "host is empty"),
        (["--host", "256.1.1.1"], None, "'256.1.1.1'"),
        (["--host", "192.0.2.1"], None, "Cannot assign"),
        (["--cors-origin", "https://example.org/"], None, "https://example.org/"),
        (["--cors-origin", "example.org"], None, "'example.org'"),
        (["--allowed-host", "https://example.org"], None, "'https://example.org'"),
        (["--ssl-keyfile", "/nowhere"], None, "--ssl-certfile"),
        (["--ssl-certfile", "/nowhere"], None, "/nowhere is not a file"),
        (["--ssl-certfile", __file__], None, "no PEM certificate"),
    ],
)
def test_what_hinders_serving_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    missing: Any,
    problem: str,
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(cli, "load_quickly", None)  # is not called
    monkeypatch.setattr(sys, "argv", ["yi-vl", "serve", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
