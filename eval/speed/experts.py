"""The kernels of transformers' experts beside a dense feed-forward layer: `python -m eval speed experts`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from yi_vl.decoder.config import YiHybridConfig
from yi_vl.decoder.experts import SparseFeedForward

from .random_models import fill_
from .rounds import measure_rounds

_NUM_LAYERS = 3  # in turn, so that their weights come from memory
_KERNELS = ("eager", "batched_mm", "grouped_mm")
_MAX_GATHERED_BYTES = 2 << 30


def compare_experts(
    dense: LlamaConfig, copies: int, slices: int, rows: Sequence[int], dtype: torch.dtype
) -> dict[str, Any]:
    """Milliseconds of a layer of experts by kernel, in turns with a dense one that multiplies as much for each token.

    Args:
        copies, slices: the dense layer's width is divided by `slices`; there are `copies` times as many experts, of
            which each token gets `slices`.
        rows: how many tokens are computed at once, for each measurement.
    """
    config = YiHybridConfig(
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size // slices,
        num_hidden_layers=_NUM_LAYERS,
        num_experts=copies * slices,
        num_experts_per_tok=slices,
    )
    experts = [_filled(SparseFeedForward(config), dtype) for _ in range(_NUM_LAYERS)]
    layers = [_filled(LlamaMLP(dense), dtype) for _ in range(_NUM_LAYERS)]
    variants: dict[str, dict[str, float]] = {name: {} for name in ("dense", *_KERNELS)}
    not_measured, num_rounds = [], []
    for num_rows in rows:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(1, num_rows, dense.hidden_size, generator=generator).to(dtype)
        kernels = {"dense": partial(_seconds, layers, tokens)}
        kernels |= {name: partial(_expert_seconds, config, name, experts, tokens) for name in _KERNELS}
        gathered = num_rows * slices * 2 * config.intermediate_size * config.hidden_size * dtype.itemsize
        if gathered > _MAX_GATHERED_BYTES:
            not_measured.append(f"batched_mm of {num_rows} rows: it copies {gathered / 1e9:.3f} GB of weights")
            del kernels["batched_mm"]
        measured = measure_rounds(kernels)
        num_rounds.append(len(measured["dense"]))
        for name, variant in variants.items():
            seconds = measured.get(name)
            variant[f"{num_rows}_rows_ms"] = 1000 * statistics.median(seconds) if seconds else math.nan
    return {
        "what": f"{copies * slices} experts of {config.intermediate_size}, {slices} for each token",
        "variants": variants,
        "not_measured": not_measured,
        "rounds": num_rounds,
    }


def _filled(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    layer.to(dtype).eval()
    fill_(layer)
    return layer


def _expert_seconds(config: YiHybridConfig, kernel: str, layers: Sequence[nn.Module], tokens: Tensor) -> float:
    config._experts_implementation = kernel
    return _seconds(layers, tokens)


@torch.inference_mode()
def _seconds(layers: Sequence[nn.Module], tokens: Tensor) -> float:
    """Of one layer, on average."""
    started = time.perf_counter()
    for layer in layers:
        layer(tokens)
    return (time.perf_counter() - started) / len(layers)
