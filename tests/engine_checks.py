"""What every decoder's engine is held to: answers as the model alone and uncached would give them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import uncached

from yi_vl.engine import prompt_lookup
from yi_vl.engine.pace import Pace
from yi_vl.engine.prompt import Prompt
from yi_vl.engine.prompt_lookup import PromptLookup
from yi_vl.engine.running_batch import RunningBatch
from yi_vl.engine.sampling import Sampling
from yi_vl.messages import Message, user_message
from yi_vl.predict import YiVL

Requests = dict[int, tuple[list[Message], Prompt, Sampling]]
Texts = dict[int, str]


def alone(yi_vl: YiVL, prompt: Prompt, sampling: Sampling) -> str:
    """An answer without any cache: every token from a forward pass over all tokens before it."""
    engine = yi_vl.engine
    request = engine._new_request(prompt, sampling, lambda _: None, None, False)
    inputs, text = engine.model_inputs(prompt), ""
    with torch.inference_mode():
        while not request.is_done:
            logits = yi_vl.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
            token = engine._sampler(logits, [sampling], [request.generator])
            text += request.add(int(token)).text
            inputs["input_ids"] = torch.cat([inputs["input_ids"], token.unsqueeze(0)], dim=1)
    return text


def uncached_logits(yi_vl: YiVL, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """(1 + number of tokens, V): after a prompt, and after each token that follows it."""
    inputs = yi_vl.engine.model_inputs(prompt)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], dim=1)
    with torch.inference_mode():
        return yi_vl.model(**inputs, use_cache=False).logits[0, len(prompt) - 1 :]


def assert_decodes_as_uncached(yi_vl: YiVL, batch: RunningBatch, num_steps: int) -> None:
    seen, tokens = [batch.logits], []
    for _ in range(num_steps):
        tokens.append(batch.logits.argmax(-1))
        batch.step(tokens[-1])
        seen.append(batch.logits)
    for row, request in enumerate(batch.requests):
        expected = uncached_logits(yi_vl, request.prompt, [int(step[row]) for step in tokens])
        torch.testing.assert_close(torch.stack(seen)[:, row], expected, atol=1e-4, rtol=0)


def prompt_of(yi_vl: YiVL, text: str, *images: Any, **options: Any) -> Prompt:
    return yi_vl.engine.prepare([*options.get("before", ()), user_message(images, text)])


def assert_whatever_joins_or_leaves_changes_no_answer(
    yi_vl: YiVL, seed: int, num_steps: int, next_messages: Callable[[random.Random, Requests, Texts], list[Message]]
) -> None:
    """Requests arrive at random in the first `num_steps` steps, and some are cancelled; `next_messages` draws a
    conversation from what was asked and answered so far."""
    draw = random.Random(seed)
    engine = yi_vl.engine
    engine.max_batch_size = 4
    engine.core.prefill_pace = Pace(1.0, least=33, most=33, first=33)
    requests: Requests = {}
    texts: Texts = defaultdict(str)
    cancelled = set()
    for step in range(300):
        if step < num_steps and draw.random() < 0.6:
            messages = next_messages(draw, requests, texts)
            sampling = Sampling(draw.randint(1, 10), temperature=draw.choice([0.0, 0.0, 1.0]), seed=draw.randrange(9))
            prompt = engine.prepare(messages)
            requests[engine.admit(prompt, sampling)] = messages, prompt, sampling
        if requests and step < 40 and draw.random() < 0.1:
            cancelled.add(draw.choice([*requests]))
            engine.cancel(max(cancelled))
        for output in engine.step():
            assert output.error is None
            texts[output.request_id] += output.text
    assert not engine.wait_for_work(0)
    for request_id, (_, prompt, sampling) in requests.items():
        expected = alone(yi_vl, prompt, sampling)
        assert texts[request_id] == expected or (request_id in cancelled and expected.startswith(texts[request_id]))


def assert_rejected_drafts_change_no_answer(
    yi_vl: YiVL,
    prompts: list[Prompt],
    samplings: list[Sampling],
    max_draft_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, record = uncached(yi_vl).engine, PromptLookup.record
    drafts: list[tuple[int, int]] = []

    def watch(lookup: PromptLookup, num_drafted: int, num_accepted: int) -> None:
        drafts.append((num_drafted, num_accepted))
        record(lookup, num_drafted, num_accepted)

    monkeypatch.setattr(PromptLookup, "record", watch)
    monkeypatch.setattr(prompt_lookup, "_NGRAM_TOKENS", 1)  # many drafts, most of them wrong
    monkeypatch.setattr(prompt_lookup, "_PAUSE_TOKENS", 0)
    engine.max_draft_tokens = max_draft_tokens
    ids = [engine.admit(prompt, sampling) for prompt, sampling in zip(prompts, samplings)]
    texts: dict[int, str] = defaultdict(str)
    while engine.wait_for_work(0):
        for output in engine.step():
            texts[output.request_id] += output.text
    assert [texts[i] for i in ids] == [alone(yi_vl, p, s) for p, s in zip(prompts, samplings)]
    assert any(0 < accepted < drafted for drafted, accepted in drafts)
