"""Prompt lookup: tokens per step and per second of answers that repeat the prompt, and of ones that do not."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yi_vl.engine.sampling import Sampling
from yi_vl.hardware import synchronized_seconds

if TYPE_CHECKING:
    from yi_vl import YiVL

_QUESTIONS = ("Describe this image.", "Write down what you see as a list.", "图片里有什么？")


def compare_lookup(yi_vl: YiVL, image: Path, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Questions about an image, then the same ones again in the same chat, with and without drafts, in turns."""
    default = yi_vl.engine.max_draft_tokens
    measured: dict[str, list[tuple[float, float]]] = {}
    texts: dict[int, list[str]] = {}
    try:
        for _ in range(rounds):
            for max_draft_tokens in (0, default):
                yi_vl.engine.max_draft_tokens = max_draft_tokens
                texts[max_draft_tokens] = _chat(yi_vl, image, new_tokens, bool(max_draft_tokens), measured)
    finally:
        yi_vl.engine.max_draft_tokens = default
    variants = {
        name: {
            "tokens_per_step": statistics.median(per_step for per_step, _ in values),
            "tokens_per_second": statistics.median(per_second for _, per_second in values),
        }
        for name, values in measured.items()
    }
    rates = [variant["tokens_per_second"] for variant in variants.values()]
    return {
        "what": f"{len(_QUESTIONS)} questions about an image, then the same again, {new_tokens} new tokens at most",
        "variants": variants,
        "ratio_of_first_answers": rates[2] / rates[0],
        "ratio_of_repeated_answers": rates[3] / rates[1],
        "same_answers": texts[0] == texts[default],
    }


def _chat(
    yi_vl: YiVL, image: Path, new_tokens: int, has_drafts: bool, measured: dict[str, list[tuple[float, float]]]
) -> list[str]:
    yi_vl.clear_cache()
    messages: list[dict[str, Any]] = []
    texts = []
    suffix = "prompt lookup" if has_drafts else "one by one"
    for kind, questions in (("first answers", _QUESTIONS), ("repeated answers", _QUESTIONS)):
        num_steps, num_tokens, seconds = 0, 0, 0.0
        for question in questions:
            content = [{"type": "image", "image": image}] if not messages else []
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            steps = yi_vl.engine.generate([yi_vl.engine.prepare(messages)], Sampling(max_new_tokens=new_tokens))
            outputs = next(steps)  # prefill
            started = synchronized_seconds(yi_vl.model.device)
            outputs += [output for step in steps for output in step]
            seconds += synchronized_seconds(yi_vl.model.device) - started
            num_steps, num_tokens = num_steps + len(outputs) - 1, num_tokens + outputs[-1].num_tokens - 1
            texts.append("".join(output.text for output in outputs))
            messages.append({"role": "assistant", "content": texts[-1] or "Yes."})
        values = num_tokens / max(1, num_steps), num_tokens / max(1e-9, seconds)
        measured.setdefault(f"{kind}, {suffix}", []).append(values)
    return texts
