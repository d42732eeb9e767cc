"""The evaluation's runner against a baseline script: questions per second, over the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from yi_vl.chat import stop_strings
from yi_vl.hardware import synchronized_seconds

from ..models import ModelChoice, Settings, YiVLModel, read_images
from ..types import Question
from .rounds import measure_rounds, median_ratio, spread

if TYPE_CHECKING:
    from yi_vl import YiVL


def compare_runner(
    choice: ModelChoice, questions: Sequence[Question], batch_size: int, max_new_tokens: int
) -> dict[str, Any]:
    """Both variants over the same questions, greedily, in turns."""
    answerer = YiVLModel(choice.source, choice.device, choice.quantize)
    ordered = sorted(questions, key=lambda question: (len(question.images), len(question.prompt.encode())))
    settings, device = Settings(max_new_tokens), answerer.yi_vl.model.device

    def in_batches(some: Sequence[Question]) -> list[str]:
        return [
            reply.text
            for start in range(0, len(some), batch_size)
            for reply in answerer.answer(
                [question.content() for question in some[start : start + batch_size]], settings
            )
        ]

    def one_by_one(some: Sequence[Question]) -> list[str]:
        return [_generate(answerer.yi_vl, question, max_new_tokens) for question in some]

    texts: dict[str, list[str]] = {}

    def rate(name: str, variant: Callable[[Sequence[Question]], list[str]]) -> float:
        answerer.yi_vl.clear_cache()
        started = synchronized_seconds(device)
        texts[name] = variant(ordered)
        return len(ordered) / (synchronized_seconds(device) - started)

    variants = {"transformers' generate, one by one": one_by_one, f"eval's runner, batch {batch_size}": in_batches}
    for variant in variants.values():
        variant(ordered[:batch_size])  # warm-up
    rounds = measure_rounds({name: partial(rate, name, variant) for name, variant in variants.items()})
    slow, fast = rounds.values()
    first, second = texts.values()
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return {
        "what": f"{len(ordered)} questions, at most {max_new_tokens} new tokens, {choice.title}",
        "variants": {name: spread(rates, "questions_per_second") for name, rates in rounds.items()},
        "ratio": median_ratio(fast, slow),
        "rounds": len(slow),
        "same_answers": f"{same} of {len(ordered)}",
    }


def _generate(yi_vl: YiVL, question: Question, max_new_tokens: int) -> str:
    """What a script for one question does: processor, `generate`, decode."""
    prompt = yi_vl.engine.prepare([{"role": "user", "content": read_images(question.content())}])
    stops = list(stop_strings(yi_vl.processor.chat_format))
    with torch.inference_mode():
        tokens = yi_vl.model.generate(  # type: ignore[misc]  # transformers annotates `self` as a protocol that its own models do not fit
            **yi_vl.engine.model_inputs(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=stops or None,
            tokenizer=yi_vl.processor.tokenizer,
        )
    text: str = yi_vl.processor.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True)
    return text.split(stops[0])[0].strip() if stops else text.strip()
