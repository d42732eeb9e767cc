"""int8 and int4 beside bfloat16: `python -m eval speed quantize | load`.

All three are read from the same checkpoint; two of them are in memory at a time.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import yi_vl
from yi_vl import YiVL
from yi_vl.checkpoint.load import find
from yi_vl.hardware import synchronized_seconds
from yi_vl.quantize import SCHEMES, Scheme, describe_quantized_kernels, num_bytes

from .engine import describe_kernels, engine_rate, first_token_seconds, text_of
from .full_size import peak_bytes
from .random_models import Preset, make
from .rounds import measure_rounds, median_ratio, spread

_VARIANTS: dict[str, Scheme | None] = {"bf16": None, **{scheme: scheme for scheme in SCHEMES}}


@contextmanager
def checkpoint_of(preset: Preset) -> Iterator[Path]:
    """A folder with a preset's weights in bfloat16; those of random ones are gone afterwards."""
    if preset == "nano":
        yield Path(find(None))
        return
    with TemporaryDirectory() as folder:
        make(preset, device="cpu").save(Path(folder) / "model")
        yield Path(folder) / "model"


def compare_quantize(folder: Path, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Speed and size of the language model, and how far its predictions move: the KL divergence from bfloat16's.

    Raises:
        ValueError: a scheme cannot work on this machine.
    """
    original = yi_vl.load(folder, dtype=torch.bfloat16)
    conversation = text_of(original, prompt_tokens)
    exact = _log_probabilities(original, conversation)
    engine_rate(original, [conversation], 3)
    variants: dict[str, dict[str, float]] = {"bf16": {}}
    for scheme in SCHEMES:
        model = yi_vl.load(folder, dtype=torch.bfloat16, quantize=scheme)
        quantized = _log_probabilities(model, conversation)
        engine_rate(model, [conversation], 3)
        rates = _rates({"bf16": original, scheme: model}, conversation, new_tokens)
        for name, variant in (("bf16", original), (scheme, model)):
            if not variants.get(name):
                kl = 0.0 if variant is original else float((exact.exp() * (exact - quantized)).sum(-1).mean())
                variants[name] = _columns(rates, name, "bf16") | {"kl": kl, **_memory(variant, original)}
        del model
    is_on_cpu = original.model.device.type == "cpu"
    return {
        "what": f"{new_tokens} new tokens after {prompt_tokens}",
        "variants": variants,
        "kernels": describe_kernels(original) + (describe_quantized_kernels(torch.bfloat16) if is_on_cpu else []),
    }


def _rates(
    models: dict[str, YiVL], conversation: list[dict[str, Any]], new_tokens: int
) -> dict[tuple[str, str], list[float]]:
    """Tokens per second and seconds of prefill, round by round, by the model's name."""

    def rate(model: YiVL) -> float:
        return engine_rate(model, [conversation], new_tokens)

    def seconds(model: YiVL) -> float:
        return first_token_seconds(model, conversation)

    decode = measure_rounds({name: partial(rate, model) for name, model in models.items()})
    prefill = measure_rounds({name: partial(seconds, model) for name, model in models.items()})
    return {("decode", n): v for n, v in decode.items()} | {("prefill", n): v for n, v in prefill.items()}


def _columns(rates: dict[tuple[str, str], list[float]], name: str, baseline: str) -> dict[str, float]:
    """Medians with quartiles, and the median of the rounds' ratios to the baseline."""
    decode, prefill = rates["decode", name], rates["prefill", name]
    return spread(decode, "tokens_per_second") | {
        "prefill_seconds": statistics.median(prefill),
        "relative_speed": median_ratio(decode, rates["decode", baseline]),
        "relative_prefill_time": median_ratio(prefill, rates["prefill", baseline]),
    }


def _memory(model: YiVL, baseline: YiVL) -> dict[str, float]:
    num_bytes = _language_bytes(model)
    return {"language_model_gb": num_bytes / 1e9, "relative_memory": num_bytes / _language_bytes(baseline)}


def compare_load(folder: Path) -> dict[str, Any]:
    """Seconds and the process's peak memory of loading, each in a process of its own, in turns.

    Raises:
        ValueError: a scheme cannot work on this machine, or a process was killed.
    """
    loads: dict[str, list[dict[str, float]]] = {name: [] for name in _VARIANTS}

    def seconds(name: str) -> float:
        loads[name].append(_load_in_a_process(folder, name))
        return loads[name][-1]["seconds"]

    measure_rounds({name: partial(seconds, name) for name in _VARIANTS})
    variants = {
        name: {column: statistics.median(result[column] for result in results) for column in results[0]}
        for name, results in loads.items()
    }
    for variant in variants.values():
        variant["relative_peak"] = variant["peak_gb"] / variants["bf16"]["peak_gb"]
    return {
        "what": "loading, and the peak memory that it adds to Python and its libraries",
        "variants": variants,
        "rounds": len(loads["bf16"]),
    }


def _load_in_a_process(folder: Path, name: str) -> dict[str, float]:
    """What `measure_load` sends."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=measure_load, args=(folder, _VARIANTS[name], sending))
    process.start()
    sending.close()
    try:
        result: dict[str, float] | str = receiving.recv()
    except EOFError:
        result = "the process was killed; was there enough memory?"
    process.join()
    if isinstance(result, str):
        raise ValueError(f"{folder}, {name}: {result}")
    return result


def measure_load(folder: Path, scheme: Scheme | None, results: Any) -> None:
    """Send what loading takes of this process, or why it cannot be done."""
    try:
        before = peak_bytes()
        started = time.perf_counter()
        model = yi_vl.load(folder, dtype=torch.bfloat16, quantize=scheme)
        device = model.model.device
        seconds = synchronized_seconds(device) - started
        peak = peak_bytes(device) - (0 if device.type == "cuda" else before)
        results.send({"seconds": seconds, "weights_gb": num_bytes(model.model) / 1e9, "peak_gb": peak / 1e9})
    except ValueError as error:
        results.send(str(error))


def _log_probabilities(model: YiVL, conversation: list[dict[str, Any]]) -> Tensor:
    """Of the next token at every place of a prompt, (S, V)."""
    prompt = model.engine.prepare(conversation)
    with torch.inference_mode():
        logits = model.model(**model.engine.model_inputs(prompt)).logits[0]
    return logits.float().log_softmax(-1)


def _language_bytes(model: YiVL) -> int:
    """Of its embedding table, layers and head."""
    return num_bytes(model.model.model.language_model) + num_bytes(model.model.lm_head)
