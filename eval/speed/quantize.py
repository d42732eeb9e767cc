"""int8 and int4 beside bfloat16: `python -m eval speed quantize | load`.

All three are read from the same checkpoint; two of them are in memory at a time.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import yi_vl
from yi_vl import YiVL
from yi_vl.checkpoint.load import find
from yi_vl.hardware import synchronized_seconds
from yi_vl.quantize import SCHEMES, Scheme, num_bytes

from .engine import engine_rate, first_token_seconds, text_of
from .full_size import peak_bytes
from .random_models import Preset, make

_NUM_ROUNDS = 5
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
        rounds = [  # in turns, as another process may slow any of them
            [
                (engine_rate(m, [conversation], new_tokens), first_token_seconds(m, conversation))
                for m in (original, model)
            ]
            for _ in range(_NUM_ROUNDS)
        ]
        baseline, scheme_result = (
            {
                "tokens_per_second": max(rate for rate, _ in measured),
                "prefill_seconds": min(seconds for _, seconds in measured),
                "language_model_gb": _language_bytes(m) / 1e9,
            }
            for m, measured in zip((original, model), zip(*rounds, strict=True), strict=True)
        )
        variants["bf16"] = variants["bf16"] or baseline | {"kl": 0.0, **_ratios(baseline, baseline)}
        variants[scheme] = scheme_result | {
            "kl": float((exact.exp() * (exact - quantized)).sum(-1).mean()),
            **_ratios(scheme_result, baseline),
        }
        del model
    return {"what": f"{new_tokens} new tokens after {prompt_tokens}", "variants": variants}


def _ratios(result: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """Ratios to bfloat16 as measured in the same rounds."""
    return {
        "relative_speed": result["tokens_per_second"] / baseline["tokens_per_second"],
        "relative_prefill_time": result["prefill_seconds"] / baseline["prefill_seconds"],
        "relative_memory": result["language_model_gb"] / baseline["language_model_gb"],
    }


def compare_load(folder: Path) -> dict[str, Any]:
    """Seconds and the process's peak memory of loading, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    variants = {}
    for name, scheme in _VARIANTS.items():
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=measure_load, args=(folder, scheme, sending))
        process.start()
        sending.close()
        try:
            result = receiving.recv()
        except EOFError:
            result = "the process was killed; was there enough memory?"
        process.join()
        if isinstance(result, str):
            raise ValueError(f"{folder}, {name}: {result}")
        variants[name] = result
    for variant in variants.values():
        variant["relative_peak"] = variant["peak_gb"] / variants["bf16"]["peak_gb"]
    return {"what": "loading, and the peak memory that it adds to Python and its libraries", "variants": variants}


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
