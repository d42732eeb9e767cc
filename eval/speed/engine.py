"""Speed of the engine: chats, single answers, batches and prefill, each beside a baseline or a limit."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.generation import BaseStreamer

from yi_vl import YiVL
from yi_vl.decoder.cross_attention import CROSS_BLOCK
from yi_vl.engine.sampling import Sampling
from yi_vl.hardware import matrix_rate, read_bandwidth, synchronized_seconds
from yi_vl.linear import kernels_of, tune_linears_, untune_linears_

from .rounds import measure_rounds, median_ratio, spread

Conversation = list[dict[str, Any]]


def compare_chat(model: YiVL, image: Path, turns: int, new_tokens: int) -> dict[str, Any]:
    """A chat about one image, with the prefix cache and with it cleared before each turn."""
    chats: dict[str, list[list[float]]] = {"whole prompt prefilled": [], "prefix cached": []}

    def last_turn(name: str) -> float:
        chats[name].append(_first_token_ms(model, image, turns, new_tokens, name != "prefix cached"))
        return chats[name][-1][-1]

    slow, fast = measure_rounds({name: partial(last_turn, name) for name in chats}).values()
    return {
        "what": f"time to the first token, about one image ({model.processor.tokens_per_image} of the prompt)",
        "variants": {
            name: {f"turn_{turn}_ms": statistics.median(times) for turn, times in enumerate(zip(*rounds), 1)}
            for name, rounds in chats.items()
        },
        "ratio": median_ratio(slow, fast),
        "rounds": len(slow),
    }


def _first_token_ms(model: YiVL, image: Path, turns: int, new_tokens: int, is_cleared: bool) -> list[float]:
    """Milliseconds to the first token at each turn of one chat."""
    model.clear_cache()
    messages: list[dict[str, Any]] = []
    milliseconds = []
    for turn in range(1, turns + 1):
        content: list[dict[str, Any]] = [{"type": "image", "image": image}] if turn == 1 else []
        messages.append(
            {"role": "user", "content": [*content, {"type": "text", "text": f"Question {turn}: what is it?"}]}
        )
        if is_cleared:
            model.clear_cache()
        started = synchronized_seconds(model.model.device)
        prompt = model.engine.prepare(messages)
        steps = model.engine.generate([prompt], Sampling(max_new_tokens=new_tokens))
        outputs = next(steps)
        milliseconds.append(1000 * (synchronized_seconds(model.model.device) - started))
        outputs += [output for step in steps for output in step]
        messages.append({"role": "assistant", "content": "".join(output.text for output in outputs) or "Yes."})
    return milliseconds


def compare_decode(model: YiVL, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The limit: every weight of the language model and its head is read once per token."""
    conversation = text_of(model, prompt_tokens)
    num_bytes = bytes_per_token(model)
    first_calls = _first_calls(model, conversation)
    rounds = measure_rounds(
        {
            "memory's bandwidth": lambda: read_bandwidth(model.model.device) / num_bytes,
            "transformers' generate": lambda: _generate_rate(model, conversation, new_tokens),
            "yi_vl": lambda: engine_rate(model, [conversation], new_tokens),
        }
    )
    limit = statistics.quantiles(rounds["memory's bandwidth"], n=4)[-1]  # other processes only lower it
    return {
        "what": f"{num_bytes / 1e9:.2f} GB of weights a token, {limit * num_bytes / 1e9:.1f} GB/s",
        "variants": {
            name: spread(rates, "tokens_per_second") | {"of_the_limit": statistics.median(rates) / limit}
            for name, rates in rounds.items()
        },
        "ratio": median_ratio(rounds["yi_vl"], rounds["transformers' generate"]),
        "rounds": len(rounds["yi_vl"]),
        "first_calls": first_calls,
        "kernels": describe_kernels(model),
    }


def compare_batch(model: YiVL, num_rows: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The same answers, one alone and several at once."""
    conversations = [text_of(model, prompt_tokens, str(row)) for row in range(num_rows)]
    engine_rate(model, conversations, 3)
    rounds = measure_rounds(
        {
            "one": lambda: engine_rate(model, conversations[:1], new_tokens),
            f"{num_rows} at once": lambda: engine_rate(model, conversations, new_tokens),
        }
    )
    single, batched = rounds.values()
    return {
        "what": f"{new_tokens} new tokens each",
        "variants": {name: spread(rates, "tokens_per_second") for name, rates in rounds.items()},
        "ratio": median_ratio(batched, single),
        "rounds": len(single),
        "kernels": describe_kernels(model),
    }


def compare_prefill(model: YiVL, num_tokens: int) -> dict[str, Any]:
    """Products of the layers' matrices and of attention count; softmax, norms and the one row of logits do not."""
    text = model.model.config.text_config
    conversation = text_of(model, min(num_tokens, text.max_position_embeddings - 16))
    num_tokens = len(model.engine.prepare(conversation))
    layers = model.model.model.language_model.layers
    per_token = sum(p.numel() for name, p in layers.named_parameters() if p.ndim > 1 and CROSS_BLOCK not in name)
    flops = 2 * per_token * num_tokens + 2 * num_tokens**2 * text.hidden_size * text.num_hidden_layers  # causal: half
    shape = num_tokens, text.hidden_size, text.intermediate_size
    first_seconds = first_token_seconds(model, conversation)
    rounds = measure_rounds(
        {
            "matrix products alone": lambda: matrix_rate(*shape, model.model.dtype, model.model.device) / 1e12,
            "yi_vl": lambda: flops / first_token_seconds(model, conversation) / 1e12,
        }
    )
    limit = max(rounds["matrix products alone"])
    seconds = flops / statistics.median(rounds["yi_vl"]) / 1e12
    return {
        "what": f"{num_tokens} tokens in {seconds:.2f} s",
        "variants": {
            name: spread(rates, "tflops") | {"of_the_limit": statistics.median(rates) / limit}
            for name, rates in rounds.items()
        },
        "rounds": len(rounds["yi_vl"]),
        "first_calls": f"{first_seconds:.2f} s, the first with this number of tokens",
    }


def describe_kernels(model: YiVL) -> list[str]:
    """The kernels chosen for each shape, and how fast each candidate read the weights on one thread."""
    lines = []
    for shape, kernels in kernels_of(model.model).items():
        for num_rows, kernel in kernels.by_rows.items():
            rates = {name: kernels.num_bytes / seconds / 1e9 for name, seconds in kernels.seconds[num_rows].items()}
            measured = ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
            lines.append(f"{shape}, {num_rows} row{'s' * (num_rows > 1)}: {kernel} (GB/s of a core: {measured})")
    return lines or ["F.linear for all"]


def _first_calls(model: YiVL, conversation: Conversation) -> str:
    """Time to the first token of the first call, whose kernels are compiled, and of the next."""
    first, second = (first_token_seconds(model, conversation) for _ in range(2))
    engine_rate(model, [conversation], 3)
    _generate_rate(model, conversation, 3)
    return f"{first:.2f} s to the first token in this process, then {second:.2f} s"


def bytes_per_token(model: YiVL) -> int:
    """Bytes of the weights that each token of one answer about no image reads: the language model's layers, without
    blocks of cross-attention, and its head."""
    parameters = [*model.model.model.language_model.named_parameters(), *model.model.lm_head.named_parameters()]
    unread = "embed_tokens", CROSS_BLOCK
    return sum(parameter.nbytes for name, parameter in parameters if not any(part in name for part in unread))


def text_of(model: YiVL, num_tokens: int, begin: str = "") -> Conversation:
    """A conversation without an image, of about this many tokens."""

    def messages(num_words: int) -> Conversation:
        return [{"role": "system", "content": "."}, {"role": "user", "content": f"{begin} " + "word " * num_words}]

    few, many = (len(model.engine.prepare(messages(words))) for words in (1, 11))
    return messages(max(1, 1 + round((num_tokens - few) * 10 / (many - few))))


def first_token_seconds(model: YiVL, conversation: Conversation) -> float:
    """From a tokenized prompt to the first token of the answer, with an empty prefix cache."""
    model.clear_cache()
    prompt = model.engine.prepare(conversation)
    started = synchronized_seconds(model.model.device)
    next(model.engine.generate([prompt], Sampling(max_new_tokens=2)))
    return synchronized_seconds(model.model.device) - started


def engine_rate(model: YiVL, conversations: list[Conversation], new_tokens: int) -> float:
    """Tokens per second once all answers have begun, without a stop token, and one token per step."""
    model.clear_cache()
    prompts = [model.engine.prepare(conversation) for conversation in conversations]
    max_draft_tokens, model.engine.max_draft_tokens = model.engine.max_draft_tokens, 0
    steps = model.engine.generate(prompts, Sampling(max_new_tokens=new_tokens), ignore_eos=True)
    begun: set[int] = set()
    while len(begun) < len(prompts):
        begun |= {output.request_id for output in next(steps)}
    started = synchronized_seconds(model.model.device)
    num_tokens = sum(map(len, steps))
    model.engine.max_draft_tokens = max_draft_tokens
    return num_tokens / (synchronized_seconds(model.model.device) - started)


def _generate_rate(model: YiVL, conversation: Conversation, new_tokens: int) -> float:
    """Tokens per second after the first, of transformers alone: its cache, and `nn.Linear` as it is."""
    prompt = model.engine.prepare(conversation)
    streamer = _TokenTimes()
    untune_linears_(model.model)
    try:
        model.model.generate(  # type: ignore[misc]  # transformers annotates `self` as a protocol that its own models do not fit
            **model.engine.model_inputs(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    finally:
        tune_linears_(model.model)
    first, *_, last = streamer.times[1:]  # the first is the prompt's
    return (new_tokens - 1) / (last - first)


class _TokenTimes(BaseStreamer):
    """When `generate` handed over the prompt, and then each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Required by `BaseStreamer`."""
