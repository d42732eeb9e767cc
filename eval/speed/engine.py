"""Speed of the engine: chats, single answers, batches and prefill, each beside a baseline or a limit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers.generation import BaseStreamer

from yi_vl import YiVL
from yi_vl.engine.gemv import use_gemm_, use_gemv_
from yi_vl.engine.sampling import Sampling
from yi_vl.hardware import matrix_rate, read_bandwidth, synchronized_seconds

Conversation = list[dict[str, Any]]


def compare_chat(model: YiVL, image: Path, turns: int, new_tokens: int) -> dict[str, Any]:
    """A chat about one image, with the prefix cache and with it cleared before each turn."""
    variants: dict[str, dict[str, float]] = {}
    for name, is_cleared in (("whole prompt prefilled", True), ("prefix cached", False)):
        model.clear_cache()
        messages: list[dict[str, Any]] = []
        seconds = {}
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
            seconds[f"turn_{turn}_ms"] = 1000 * (synchronized_seconds(model.model.device) - started)
            outputs += [output for step in steps for output in step]
            messages.append({"role": "assistant", "content": "".join(output.text for output in outputs) or "Yes."})
        variants[name] = seconds
    slow, fast = (variant[f"turn_{turns}_ms"] for variant in variants.values())
    return {
        "what": f"time to the first token, about one image of {model.processor.patches_per_image} tokens",
        "variants": variants,
        "ratio": slow / fast,
    }


def compare_decode(model: YiVL, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The limit: every weight of the language model and its head is read once per token."""
    conversation = text_of(model, prompt_tokens)
    num_bytes = bytes_per_token(model)
    engine_rate(model, [conversation], 3)
    _generate_rate(model, conversation, 3)
    rounds = [  # alternating, as other processes may slow any of them
        (
            read_bandwidth(model.model.device),
            _generate_rate(model, conversation, new_tokens),
            engine_rate(model, [conversation], new_tokens),
        )
        for _ in range(3)
    ]
    bandwidth, baseline, measured = (max(rates) for rates in zip(*rounds, strict=True))
    limit = bandwidth / num_bytes
    variants = {
        "memory's bandwidth": {"tokens_per_second": limit, "of_the_limit": 1.0},
        "transformers' generate": _shares(baseline, limit),
        "yi_vl": _shares(measured, limit),
    }
    return {
        "what": f"{num_bytes / 1e9:.2f} GB of weights a token, {bandwidth / 1e9:.1f} GB/s",
        "variants": variants,
        "ratio": variants["yi_vl"]["tokens_per_second"] / variants["transformers' generate"]["tokens_per_second"],
    }


def compare_batch(model: YiVL, num_rows: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The same answers, one alone and several at once."""
    conversations = [text_of(model, prompt_tokens, str(row)) for row in range(num_rows)]
    engine_rate(model, conversations, 3)
    rounds = [[engine_rate(model, some, new_tokens) for some in (conversations[:1], conversations)] for _ in range(3)]
    single, batched = (max(rates) for rates in zip(*rounds, strict=True))
    variants = {"one": {"tokens_per_second": single}, f"{num_rows} at once": {"tokens_per_second": batched}}
    return {"what": f"{new_tokens} new tokens each", "variants": variants, "ratio": batched / single}


def compare_prefill(model: YiVL, num_tokens: int) -> dict[str, Any]:
    """Products of the layers' matrices and of attention count; softmax, norms and the one row of logits do not."""
    text = model.model.config.text_config
    conversation = text_of(model, min(num_tokens, text.max_position_embeddings - 16))
    num_tokens = len(model.engine.prepare(conversation))
    layers = model.model.model.language_model.layers
    per_token = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    flops = 2 * per_token * num_tokens + 2 * num_tokens**2 * text.hidden_size * text.num_hidden_layers  # causal: half
    shape = num_tokens, text.hidden_size, text.intermediate_size
    rounds = [
        (matrix_rate(*shape, model.model.dtype, model.model.device), first_token_seconds(model, conversation))
        for _ in range(3)
    ]
    rate, seconds = max(rate for rate, _ in rounds), min(seconds for _, seconds in rounds)
    variants = {
        "matrix products alone": {"tflops": rate / 1e12, "of_the_limit": 1.0},
        "yi_vl": {"tflops": flops / seconds / 1e12, "of_the_limit": flops / seconds / rate},
    }
    return {"what": f"{num_tokens} tokens in {seconds:.2f} s", "variants": variants}


def bytes_per_token(model: YiVL) -> int:
    """Bytes of the weights that each token of one answer reads: the language model's layers and its head."""
    layers = [p for name, p in model.model.model.language_model.named_parameters() if "embed_tokens" not in name]
    return sum(parameter.nbytes for parameter in (*layers, model.model.lm_head.weight))


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
    use_gemm_(model.model)
    try:
        model.model.generate(  # type: ignore[misc]  # transformers annotates `self` as a protocol that its own models do not fit
            **model.engine.model_inputs(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            streamer=streamer,
        )
    finally:
        use_gemv_(model.model.model.language_model)
        use_gemv_(model.model.lm_head)
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


def _shares(rate: float, limit: float) -> dict[str, float]:
    return {"tokens_per_second": rate, "of_the_limit": rate / limit}
