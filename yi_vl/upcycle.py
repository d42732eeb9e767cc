"""What `yi-vl upcycle` does: write a dense checkpoint as one of the hybrid decoder, or change a hybrid one further.

N copies of a feed-forward layer, each cut in G slices, are N*G experts. D width, I that of the feed-forward layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import as_int
from .auto import YiHybridConfig
from .checkpoint import Checkpoint, holds_adapters, open_checkpoint
from .checkpoint.find import find
from .checkpoint.json_files import MAX_EXPERTS
from .checkpoint.key_map import LANGUAGE
from .checkpoint.load import fetch
from .checkpoint.read import LazyTensor
from .conversion import write
from .decoder.config import FULL, SLIDING, layer_pattern, sharing_pattern
from .decoder.gated_config import YiGatedConfig
from .hybrid_info import hybrid_rows, language_parameters

_LAYER_NAME = re.compile(re.escape(LANGUAGE) + r"layers\.(\d+)\.(.+)")
_KEYS_AND_VALUES = ("self_attn.k_proj.", "self_attn.v_proj.")
_MAX_SEED = (1 << 63) - 1
_NOT_ARGUMENTS = ("model_type", "architectures", "transformers_version")


@dataclass(frozen=True)
class Changes:
    """What is to be different; what is None, or 1 for experts and slices, stays as it is.

    Args:
        experts: N, copies of each feed-forward layer.
        slices: G, of each copy.
        every: full attention in the last of so many layers, and windows in the others.
        window: how many tokens a layer with a window sees.
        share: so many consecutive layers of full attention share keys and values; 2, if `every` is given.
        top_p, max_experts: `router_top_p` and `max_experts_per_tok` of the configuration.
        seed: of the routers' random weights.
    """

    experts: int = 1
    slices: int = 1
    every: int | None = None
    window: int | None = None
    share: int | None = None
    top_p: float | None = None
    max_experts: int | None = None
    seed: int = 0

    @property
    def num_experts(self) -> int:
        """Of each layer; 0: its feed-forward layer stays as it is."""
        total = self.experts * self.slices
        return total if total > 1 else 0

    @property
    def has_attention(self) -> bool:
        return (self.every, self.window, self.share) != (None, None, None)

    @property
    def has_routing(self) -> bool:
        return (self.top_p, self.max_experts) != (None, None)


def upcycle(source: Checkpoint, changes: Changes) -> Checkpoint:
    """The checkpoint with a hybrid decoder; no tensor is read yet.

    Experts alone keep the function (sparse upcycling, arXiv 2212.05055, with slices after arXiv 2401.06066): all slices
    of a copy have the same row in the router, so that a token gets one copy whole.

    Raises:
        ValueError: the checkpoint is quantized, or cannot be changed so.
    """
    _check(source, changes)
    text_config = _hybrid_config(source.config.text_config, changes)
    tensors = dict(_attention_tensors(source, text_config))
    if changes.num_experts:
        tensors = dict(_expert_tensors(tensors, text_config, changes))
    config = copy.deepcopy(source.config)
    config.text_config = text_config
    return replace(source, config=config, tensors=tensors)


def run_upcycling(source: str, target: Path, changes: Changes) -> None:
    """Upcycle `source` into the new folder `target`, in the native layout; print what it is now and how to train it.

    Raises:
        ValueError: the source holds adapters or is damaged; or as `upcycle` and `convert`.
    """
    folder = fetch(find(source), with_weights=True)
    if holds_adapters(folder):
        raise ValueError(
            f"{folder} holds adapters; merge them first (yi-vl convert {source} MERGED) and upcycle the merged model."
        )
    checkpoint = open_checkpoint(folder)
    upcycled = upcycle(checkpoint, changes)
    write(upcycled, target, "yi-vl", "f16")
    print(f"{target} is written.")
    for label, text in hybrid_rows(upcycled.config):
        print(f"  {label}: {text}")
    total, active = language_parameters(checkpoint.config)
    print(f"  before: {total:,} parameters of the language model, {active:,} active per token")
    for line in _advice(checkpoint, changes):
        print(line)


def _advice(source: Checkpoint, changes: Changes) -> Iterator[str]:
    """Whether the function is the same, and what to train."""
    if changes.has_attention or changes.has_routing:
        yield "It computes something else than before: heal it, that is, train it before use."
    else:
        yield "It computes what it did before."
    if changes.num_experts and changes.slices & (changes.slices - 1):
        dtype = source.tensors[f"{LANGUAGE}layers.0.mlp.down_proj.weight"].dtype
        if dtype.itemsize < torch.float32.itemsize:
            yield f"Output weights times {changes.slices} are rounded in {str(dtype).removeprefix('torch.')}."
    trained, parts = ("attention", "*.self_attn.*") if changes.has_attention else ("experts and routers", "*.mlp.*")
    yield f"To train {trained} alone, put into the training config:"
    yield f'trainable: {{vision: false, projector: false, language: ["{parts}"]}}'


def _check(source: Checkpoint, changes: Changes) -> None:
    """
    Raises:
        ValueError: the checkpoint is quantized or of another architecture, or cannot be changed so.
    """
    text = source.config.text_config
    if getattr(source.config, "quantization_config", None) is not None:
        raise ValueError(f"{source.folder} is quantised, and could not be trained further. Give the original.")
    if isinstance(text, YiGatedConfig):
        raise ValueError(
            f"{source.folder} has a language model of the type {text.model_type}, whose blocks of gated "
            "cross-attention a hybrid decoder cannot have. Upcycle a model with another connector."
        )
    as_int(changes.experts, "--experts", 1)
    as_int(changes.slices, "--slices", 1)
    as_int(changes.experts * changes.slices, "--experts times --slices", 1, MAX_EXPERTS)
    as_int(changes.seed, "--seed", 0, _MAX_SEED)
    if not (changes.num_experts or changes.has_attention or changes.has_routing):
        raise ValueError("Nothing is to change: give --experts and --slices, --every and --window, or --top-p.")
    num_experts = getattr(text, "num_experts", 0)
    if changes.num_experts and num_experts:
        raise ValueError(
            f"{source.folder} has {num_experts} experts in each layer already; leave --experts and --slices out."
        )
    if changes.num_experts and text.intermediate_size % changes.slices:
        raise ValueError(
            f"--slices is {changes.slices}; expected a divisor of {text.intermediate_size}, the width of the "
            "feed-forward layers."
        )
    if changes.num_experts and text.mlp_bias:
        raise ValueError(f"{source.folder} has biases in its feed-forward layers (mlp_bias); experts have none.")
    _check_routing(text, changes, changes.num_experts or num_experts)


def _check_routing(text: Any, changes: Changes, num_experts: int) -> None:
    if changes.has_routing and not num_experts:
        raise ValueError("--top-p and --max-experts are for a model with experts; add --experts and --slices.")
    if changes.top_p is not None and not 0 < changes.top_p <= 1:
        raise ValueError(f"--top-p is {changes.top_p}; expected more than 0 and at most 1.")
    if changes.max_experts is not None and not 1 <= changes.max_experts <= num_experts:
        raise ValueError(f"--max-experts is {changes.max_experts}; expected 1 to {num_experts}, the number of experts.")
    if changes.max_experts is not None and (changes.top_p or getattr(text, "router_top_p", None)) is None:
        raise ValueError("--max-experts is for routing by top-p; add --top-p.")


def _hybrid_config(text: Any, changes: Changes) -> YiHybridConfig:
    values = {name: value for name, value in text.to_dict().items() if name not in _NOT_ARGUMENTS}
    values |= _attention_settings(text, changes)
    if changes.num_experts:
        values |= {
            "num_experts": changes.num_experts,
            "num_experts_per_tok": changes.slices,
            "max_experts_per_tok": None,
            "norm_topk_prob": True,
            "intermediate_size": text.intermediate_size // changes.slices,
        }
    if changes.top_p is not None:
        values["router_top_p"] = changes.top_p
    if changes.max_experts is not None:
        values["max_experts_per_tok"] = changes.max_experts
    return YiHybridConfig(**values)


def _attention_settings(text: Any, changes: Changes) -> dict[str, Any]:
    """The layers' types, window, and sources of keys and values.

    Raises:
        ValueError: there are no such layers, the window is missing, or a layer lacks the keys and values it would need.
    """
    num_layers = text.num_hidden_layers
    types = getattr(text, "layer_types", None) or [FULL] * num_layers
    sources = getattr(text, "kv_source_layers", None) or list(range(num_layers))
    window = changes.window
    if window is not None and window < 2:
        raise ValueError(f"--window is {window}; expected a number of tokens of 2 or more.")
    if changes.every is not None:
        if not 1 <= changes.every <= num_layers:
            raise ValueError(f"--every is {changes.every}; expected 1 to {num_layers}, the number of layers.")
        if changes.every > 1 and window is None and SLIDING not in types:
            raise ValueError(
                f"--every {changes.every} leaves full attention in every layer of that number; say how many tokens the "
                "others see: --window W."
            )
        types = layer_pattern(num_layers, changes.every)
    if window is not None and SLIDING not in types:
        raise ValueError("--window is for layers without full attention; add --every E, of 2 or more.")
    if changes.every is not None or changes.share is not None:
        sources = _shared(sources, types, changes.share)
    settings = {"layer_types": types, "kv_source_layers": sources}
    return settings if window is None else settings | {"sliding_window": window}


def _shared(stored: list[int], types: list[str], share: int | None) -> list[int]:
    """The sources of keys and values for layers of these types; `stored` are those in the checkpoint."""
    num_full = types.count(FULL)
    if share is not None and not 1 <= share <= num_full:
        raise ValueError(f"--share is {share}; expected 1 to {num_full}, the number of layers with full attention.")
    sources = sharing_pattern(types, min(2, num_full) if share is None else share)
    if lost := [index for index, source in enumerate(sources) if source == index != stored[index]]:
        raise ValueError(
            f"Layer {lost[0]} would need keys and values of its own, and has shared those of layer {stored[lost[0]]} "
            "since an earlier upcycling. Begin with the model before that, or choose --every and --share so that it "
            "shares them still."
        )
    return sources


def _attention_tensors(source: Checkpoint, config: YiHybridConfig) -> Iterator[tuple[str, LazyTensor]]:
    """All tensors but the projections to keys and values of layers that share another's."""
    assert config.kv_source_layers is not None
    for name, tensor in source.tensors.items():
        match = _LAYER_NAME.fullmatch(name)
        is_unused = match is not None and config.kv_source_layers[int(match[1])] != int(match[1])
        if match is None or not (is_unused and match[2].startswith(_KEYS_AND_VALUES)):
            yield name, tensor


def _expert_tensors(
    tensors: dict[str, LazyTensor], config: YiHybridConfig, changes: Changes
) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors with routers and experts in the place of feed-forward layers.

    No noise is added to the copies: the routers' random rows give them different tokens, hence different gradients.
    """
    generator = torch.Generator("cpu").manual_seed(changes.seed)
    for name, tensor in tensors.items():
        match = _LAYER_NAME.fullmatch(name)
        if match is None or not match[2].startswith("mlp."):
            yield name, tensor
        elif match[2] == "mlp.gate_proj.weight":
            prefix = name.removesuffix("gate_proj.weight")
            up, down = (tensors[f"{prefix}{part}_proj.weight"] for part in ("up", "down"))
            num_experts, width = changes.num_experts, config.intermediate_size
            rows = torch.randn(changes.experts, config.hidden_size, generator=generator, device="cpu")
            rows *= config.initializer_range
            for part, shape, fill in (
                ("gate.weight", (num_experts, config.hidden_size), partial(_fill_router, rows=rows)),
                (
                    "experts.gate_up_proj",
                    (num_experts, 2 * width, config.hidden_size),
                    partial(_fill_gate_up, gate=tensor, up=up, num_slices=changes.slices),
                ),
                (
                    "experts.down_proj",
                    (num_experts, config.hidden_size, width),
                    partial(_fill_down, down=down, num_slices=changes.slices),
                ),
            ):
                yield prefix + part, LazyTensor(torch.Size(shape), tensor.dtype, (), change=fill)


def _fill_router(weight: Tensor, rows: Tensor) -> Tensor:
    """(N*G, D) <- (N, D): the slices of a copy have the same row"""
    weight.unflatten(0, (len(rows), -1)).copy_(rows.unsqueeze(1))
    return weight


def _fill_gate_up(weight: Tensor, gate: LazyTensor, up: LazyTensor, num_slices: int) -> Tensor:
    """(N*G, 2I/G, D) <- (I, D), twice"""
    for part, matrix in zip(weight.unflatten(0, (-1, num_slices)).chunk(2, dim=2), (gate, up)):  # (N, G, I/G, D)
        part.copy_(matrix[...].unflatten(0, (num_slices, -1)))
    return weight


def _fill_down(weight: Tensor, down: LazyTensor, num_slices: int) -> Tensor:
    """(N*G, D, I/G) <- (D, I), times G: a router gives each of a token's G slices the weight 1/G"""
    slices = down[...].unflatten(1, (num_slices, -1)).transpose(0, 1)  # (G, D, I/G)
    weight.unflatten(0, (-1, num_slices)).copy_(slices * num_slices)
    return weight
