"""A server over a tiny model in a thread, requests to it, and what the model answers without it."""

from __future__ import annotations

import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tiny import OFFICIAL, grow_cache, tiny_yi_vl

from yi_vl.engine.sampling import Sampling
from yi_vl.predict import YiVL
from yi_vl.server import create_app

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


@contextmanager
def serving(app: FastAPI, log_level: str = "warning") -> Iterator[str]:
    """The address of an application that runs in a thread; it is stopped at the end, and all its threads with it."""
    config = uvicorn.Config(app, port=0, log_config=None, log_level=log_level, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def client_of(address: str, client_class: Any = OpenAI, key: str = "none") -> Any:
    return client_class(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def openai_messages(turns: Turns) -> list[Any]:
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
    prompt = yi_vl.engine.prepare(messages)
    outputs = [output for step in yi_vl.engine.generate([prompt], Sampling(**options)) for output in step]
    text = "".join(output.text for output in outputs)
    return text, outputs[-1].finish_reason, len(prompt), outputs[-1].num_tokens


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


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


@pytest.fixture(scope="module")
def address(yi_vl: YiVL) -> Iterator[str]:
    with serving(create_app(yi_vl, "tiny")) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as client:
        yield client


@pytest.fixture
def gate(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(yi_vl, monkeypatch)
    yield gate
    gate.open()


def make_model_generate(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, text: str, then: int | Exception = 2) -> None:
    """Makes the model generate the tokens of a text, then one more token, or fail."""
    tokens = yi_vl.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    steps = iter([*tokens, then])

    def forward(**inputs: Any) -> SimpleNamespace:
        grow_cache(**inputs)
        token = next(steps)
        if isinstance(token, Exception):
            raise token
        return SimpleNamespace(logits=torch.eye(960)[None, None, token])

    monkeypatch.setattr(yi_vl.model, "forward", forward)


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI, "max_tokens": 2, **fields}


def show(url: Any, **fields: Any) -> dict[str, Any]:
    """A request with an image."""
    parts = [{"type": "image_url", "image_url": {"url": url, **fields}}, {"type": "text", "text": "What?"}]
    return ask(messages=[{"role": "user", "content": parts}])


def chat_message(role: str, content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def answer(client: OpenAI, **fields: Any) -> str:
    return client.chat.completions.create(**ask(**fields)).choices[0].message.content or ""


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
