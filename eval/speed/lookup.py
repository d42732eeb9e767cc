"""Prompt lookup: tokens per step and per second of answers that repeat the prompt, and of ones that do not."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yi_vl.engine.sampling import Sampling
from yi_vl.hardware import synchronized_seconds

from .rounds import measure_rounds, median_ratio, spread

if TYPE_CHECKING:
    from yi_vl import YiVL

_QUESTIONS = ("Describe this image.", "Write down what you see as a list.", "图片里有什么？")


def compare_lookup(yi_vl: YiVL, image: Path, new_tokens: int) -> dict[str, Any]:
    """Questions about an image, then the same ones again in the same chat, with and without drafts, in turns."""
    default = yi_vl.engine.max_draft_tokens
    variants = {"one token per step": 0, "prompt lookup": default}
    measured: dict[str, list[_Chat]] = {name: [] for name in variants}

    def rate(name: str) -> float:
        yi_vl.engine.max_draft_tokens = variants[name]
        measured[name].append(_chat(yi_vl, image, new_tokens))
        return measured[name][-1].tokens_per_second

    try:
        rounds = measure_rounds({name: partial(rate, name) for name in variants})
    finally:
        yi_vl.engine.max_draft_tokens = default
    chats = {name: chats[0] for name, chats in measured.items()}
    return {
        "what": f"{len(_QUESTIONS)} questions about an image, then the same ones, at most {new_tokens} new tokens each",
        "variants": {
            name: {"tokens_per_step": chats[name].tokens_per_step} | spread(values, "tokens_per_second")
            for name, values in rounds.items()
        },
        "ratio": median_ratio(rounds["prompt lookup"], rounds["one token per step"]),
        "rounds": len(rounds["prompt lookup"]),
        "same_answers": chats["prompt lookup"].texts == chats["one token per step"].texts,
    }


@dataclass
class _Chat:
    """What was measured of one chat, without its prefills."""

    texts: list[str] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / max(1, self.num_steps)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / max(1e-9, self.seconds)


def _chat(yi_vl: YiVL, image: Path, new_tokens: int) -> _Chat:
    yi_vl.clear_cache()
    messages: list[dict[str, Any]] = []
    chat = _Chat()
    for question in (*_QUESTIONS, *_QUESTIONS):
        content = [] if messages else [{"type": "image", "image": image}]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        steps = yi_vl.engine.generate([yi_vl.engine.prepare(messages)], Sampling(max_new_tokens=new_tokens))
        outputs = next(steps)  # prefill
        started = synchronized_seconds(yi_vl.model.device)
        outputs += [output for step in steps for output in step]
        chat.seconds += synchronized_seconds(yi_vl.model.device) - started
        chat.num_steps += len(outputs) - 1
        chat.num_tokens += outputs[-1].num_tokens - 1
        chat.texts.append("".join(output.text for output in outputs))
        messages.append({"role": "assistant", "content": chat.texts[-1] or "Yes."})
    return chat
