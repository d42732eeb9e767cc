"""A tiny model behind the demo whose steps a test counts, holds and ends."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import OFFICIAL, tiny_yi_vl

from yi_vl.predict import YiVL

pytest.importorskip("gradio")


WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
PATIENCE_MS = 120_000  # a busy machine is no reason to fail


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl(max_position_embeddings=2048)


class Pace:
    """Counts the model's steps and its ended answers, ends every answer after `num_tokens`, and stops the model before
    a step on demand."""

    def __init__(self, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tokens = 8
        self.num_steps = 0
        self.num_ended = 0
        self._in_answer = 0
        self._gate = threading.Semaphore(0)
        self._is_held = False
        self._eos = yi_vl.processor.tokenizer.eos_token_id
        self._forward = yi_vl.model.forward
        self._generate = yi_vl.engine.generate
        monkeypatch.setattr(yi_vl.model, "forward", self._step)
        monkeypatch.setattr(yi_vl.engine, "generate", self._answer)

    def hold(self, after: int) -> None:
        """Let the model take so many steps, and wait then."""
        self._is_held = True
        for _ in range(after):
            self._gate.release()

    def release(self) -> None:
        self._is_held = False
        self._gate.release()

    def wait_for(self, num_steps: int) -> None:
        wait_until(lambda: self.num_steps >= num_steps)

    def _answer(self, *arguments: Any) -> Iterator[list[str]]:
        try:
            yield from self._generate(*arguments)
        finally:
            self.num_ended += 1

    def _step(self, **inputs: Any) -> Any:
        if self._is_held:
            assert self._gate.acquire(timeout=PATIENCE_MS / 1000)
        self.num_steps += 1
        self._in_answer = 1 if "inputs_embeds" in inputs else self._in_answer + 1
        outputs = self._forward(**inputs)
        outputs.logits[..., self._eos] = torch.inf if self._in_answer > self.num_tokens else -torch.inf
        return outputs


@pytest.fixture
def pace(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pace]:
    pace = Pace(yi_vl, monkeypatch)
    yield pace
    pace.release()


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def pixels_of(data_url: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2]))).convert("RGB").tobytes()
