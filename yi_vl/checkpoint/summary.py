"""The size of a model, without reading a weight: parameters, tensors, memory."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from ..config import YiVLConfig
from ..model import YiVLForConditionalGeneration
from ..quantize import (
    SCHEMES,
    Int4Linear,
    make_packed_config,
    num_bytes,
    packed_config,
    packed_layers,
    replace_linears_,
)
from .key_map import PROJECTOR, TOWER
from .weight_files import Entry, WeightFiles


@dataclass(frozen=True)
class Sizes:
    """The result of `measure`.

    The official release has neither the image token's row of the embedding tables nor the rows that pad them, and it
    keeps the tower's queries, keys and values apart. Its figures are None for a tower with a convolutional stem or a
    hybrid decoder, which that layout cannot hold.
    """

    num_parameters: dict[str, int]  # by component
    num_tensors: int
    num_official_parameters: dict[str, int] | None
    num_official_tensors: int | None
    memory_bytes: dict[str, int]  # of the weights, by dtype or scheme; what is not quantised is bf16


@dataclass(frozen=True)
class QuantizedSizes:
    """The result of `measure_quantized`."""

    num_parameters: dict[str, int]  # by component, as many as before it was quantised
    num_tensors: int  # stored, scales included
    memory_bytes: dict[str, int]  # by component, scales included


def tensor_shapes(config: YiVLConfig, folder: Path | None) -> dict[str, tuple[int, ...]]:
    """The name and shape of every stored tensor, in the native layout; the model is built without weights.

    Args:
        folder: of the model; needed only where another library quantised it.

    Raises:
        ValueError: the weight files are missing or damaged.
    """
    if _is_foreign(config):
        return {name: entry.shape for name, entry in _entries(folder).items()}
    return {name: tuple(tensor.shape) for name, tensor in _as_stored(config).state_dict().items()}


def measure(config: YiVLConfig) -> Sizes:
    """Build the model without weights and count."""
    model = _without_weights(config)
    counts = {name: _num_parameters(module) for name, module in _components(model).items()}
    num_tensors = len(model.state_dict())

    official_counts = num_official_tensors = None
    is_yi_vl = config.vision_config.is_plain and config.connector_config.is_projector
    if is_yi_vl and config.text_config.model_type == "llama":
        num_tables = 1 if config.tie_word_embeddings else 2
        num_added_rows = config.text_config.vocab_size - config.image_token_id
        added = num_added_rows * config.text_config.hidden_size * num_tables
        official_counts = counts | {"language model": counts["language model"] - added}
        num_official_tensors = num_tensors + 4 * config.vision_config.num_hidden_layers  # q, k, v: 6 for 2

    total = sum(counts.values())
    memory_bytes = {"fp32": 4 * total, "bf16": 2 * total}
    for scheme in SCHEMES:
        with suppress(ValueError):  # not with such layers
            quantized = _without_weights(config)
            quantized.to(torch.bfloat16)  # type: ignore[arg-type]  # wrapped by transformers as if it were no method
            replace_linears_(quantized, make_packed_config(scheme, config.text_config))
            _pack_int4_(quantized)
            memory_bytes[scheme] = num_bytes(quantized)
    return Sizes(counts, num_tensors, official_counts, num_official_tensors, memory_bytes)


def language_parameters(config: YiVLConfig) -> tuple[int, int]:
    """The parameters of the language model, and how many of them a token uses: not those of experts beyond its own."""
    text = config.text_config
    total = _num_parameters(_components(_without_weights(config))["language model"])
    num_idle = text.num_experts - text.num_routed if getattr(text, "num_experts", 0) else 0
    return total, total - num_idle * text.num_hidden_layers * 3 * text.hidden_size * text.intermediate_size


def measure_quantized(config: YiVLConfig, folder: Path | None) -> QuantizedSizes:
    """The sizes, as it is loaded, of a model that was saved quantised.

    Args:
        folder: as for `tensor_shapes`, whose errors are these, too.
    """
    counts = {name: _num_parameters(module) for name, module in _components(_without_weights(config)).items()}
    if _is_foreign(config):
        entries = _entries(folder)
        return QuantizedSizes(counts, len(entries), _stored_bytes(entries))
    model = _as_stored(config)
    num_tensors = len(model.state_dict())
    _pack_int4_(model)
    return QuantizedSizes(counts, num_tensors, {name: num_bytes(part) for name, part in _components(model).items()})


def scheme_of(config: YiVLConfig) -> str | None:
    """A description of how a model was quantised; None when it was not."""
    match _quantization(config):
        case None:
            return None
        case {"quant_method": "yi_vl", "bits": bits, "group_size": int(group_size)}:
            return f"int{bits}, a scale and a zero for every {group_size} weights"
        case {"quant_method": "yi_vl", "bits": bits}:
            return f"int{bits}, a scale for every row"
        case {"quant_method": method, "quant_type": {"default": {"_type": scheme}}}:
            return f"{scheme} of {method}"
        case values:
            return f"by {values.get('quant_method')}"


def _pack_int4_(model: nn.Module) -> None:
    """Pack int4 layers as loading does, which pads their rows; int8 layers take no more memory when packed."""
    for _, layer in packed_layers(model):
        if isinstance(layer, Int4Linear):
            layer.pack_()


def _without_weights(config: YiVLConfig) -> YiVLForConditionalGeneration:
    with torch.device("meta"):
        return YiVLForConditionalGeneration(config)


def _as_stored(config: YiVLConfig) -> YiVLForConditionalGeneration:
    """Without weights, but in the dtype and with the layers that config.json names."""
    with torch.device("meta"):
        model: YiVLForConditionalGeneration = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)
        if packed := packed_config(_quantization(config)):
            replace_linears_(model, packed)
    return model


def _is_foreign(config: YiVLConfig) -> bool:
    """Whether another library quantised the model."""
    return _quantization(config) is not None and packed_config(_quantization(config)) is None


def _quantization(config: YiVLConfig) -> dict[str, Any] | None:
    return getattr(config, "quantization_config", None)


def _entries(folder: Path | None) -> dict[str, Entry]:
    assert folder is not None, "a quantized configuration was read from a folder"
    return WeightFiles.find(folder).entries


def _stored_bytes(entries: dict[str, Entry]) -> dict[str, int]:
    totals = {"vision tower": 0, "projector": 0, "language model": 0}
    for name, entry in entries.items():
        is_tower, is_projector = name.startswith(TOWER), name.startswith(PROJECTOR)
        component = "vision tower" if is_tower else "projector" if is_projector else "language model"
        totals[component] += math.prod(entry.shape) * entry.dtype.itemsize
    return totals


def _components(model: YiVLForConditionalGeneration) -> dict[str, nn.Module]:
    return {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language model": nn.ModuleList([model.model.language_model, model.lm_head]),
    }


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
