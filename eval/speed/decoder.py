"""The hybrid decoder beside a dense Llama as the context grows: `python -m eval speed decoder | experts`.

All models have random weights, and share those of the layers that they have in common. T tokens of context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from yi_vl.decoder.config import FULL, SLIDING, YiHybridConfig
from yi_vl.decoder.experts import SparseFeedForward
from yi_vl.decoder.model import YiHybridForCausalLM
from yi_vl.engine.attention import GROUPED
from yi_vl.engine.cache_layers import GrowableLayer
from yi_vl.versions import CACHE_ARGUMENT

from .decoder_curves import ALL, CHUNK_TOKENS, Curve, Forward, draw_curves
from .full_size import peak_bytes
from .random_models import fill_

COPIES, SLICES = 4, 4  # of the dense feed-forward layer, as experts
_DECODED_TOKENS = 4  # of one measurement
_SEED = 0


def compare_decoder(
    dense: LlamaConfig, contexts: Sequence[int], window: int, num_rounds: int, dtype: torch.dtype, image: Path | None
) -> dict[str, Any]:
    """Time per token, TTFT and KV cache of a dense Llama and two hybrids, in turns at each length of the context.

    The caches hold random keys and values. TTFT is the sum over the chunks of a prompt: those that begin at 0 and at
    the given lengths are measured, and the ones between them interpolated.

    Raises:
        ValueError: the image cannot be written.
    """
    if image is not None and not image.parent.is_dir():
        raise ValueError(f"{image}: there is no folder {image.parent}.")
    contexts = sorted(set(contexts))
    models = make_models(dense, window, dtype)
    curves = {name: Curve(contexts, layer_types_of(model.config)) for name, model in models.items()}
    for num_tokens in (0, *contexts):
        runs = {name: _Run(model, random_cache(model, num_tokens, dtype)) for name, model in models.items()}
        for name, forward in _in_turns({name: run.chunk for name, run in runs.items()}, num_rounds).items():
            curves[name].chunks.append(forward)
        if not num_tokens:
            continue
        for name, forward in _in_turns({name: run.decode for name, run in runs.items()}, num_rounds).items():
            curves[name].decodes.append(forward)
            curves[name].kv_bytes.append(held_bytes(runs[name].cache))
        del runs
    if image is not None:
        draw_curves(curves, image)
    return {
        "what": f"{dense.num_hidden_layers} layers, window {window}; prefill in chunks of {CHUNK_TOKENS}",
        "variants": {
            f"{num_tokens}, {name}": curve.row(index, curves["dense"])
            for index, num_tokens in enumerate(contexts)
            for name, curve in curves.items()
        },
        "shape": [line for name, curve in curves.items() for line in curve.describe(name, curves["dense"])],
        "rounds": num_rounds,
        "peak_memory": f"{peak_bytes() / 1e9:.1f} GB of the process",
    }


def make_models(dense: LlamaConfig, window: int, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """A dense Llama of random weights, and hybrids that have its modules, so that they hold little of their own."""
    dense = LlamaConfig.from_dict(dense.to_dict())
    dense.max_position_embeddings = 1 << 20
    width = dense.intermediate_size // SLICES
    experts = {"num_experts": COPIES * SLICES, "num_experts_per_tok": SLICES, "intermediate_size": width}
    shared = {name: value for name, value in dense.to_dict().items() if name not in ("model_type", "architectures")}
    shared |= {"sliding_window": window, "layer_types": None}
    original = _new(LlamaForCausalLM, dense, dtype)
    models: dict[str, PreTrainedModel] = {"dense": original}
    for name, changed in (("hybrid", {}), ("hybrid, experts", experts)):
        with torch.device("meta"):
            model: PreTrainedModel = YiHybridForCausalLM(YiHybridConfig(**shared | changed))
        model.to(dtype)  # type: ignore[arg-type]  # wrapped by transformers as if it were no method
        models[name] = _with_modules_of(model, original)
    for model in models.values():
        model.set_attn_implementation(GROUPED)
    return models


def _new(model_class: type[PreTrainedModel], config: LlamaConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        model = model_class(config)
    model.to(dtype)  # type: ignore[arg-type]  # wrapped by transformers as if it were no method
    model.to_empty(device="cpu").eval()
    fill_(model)
    return model


def _with_modules_of(model: PreTrainedModel, dense: PreTrainedModel) -> PreTrainedModel:
    """Take the dense model's layers of linear products, norms and tables; what it has none of is filled."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseFeedForward):
            module.to_empty(device="cpu")
            fill_(module)
        elif not list(module.children()) and not name.startswith(_expert_names(model)):
            model.set_submodule(name, dense.get_submodule(name))
    return model.eval()


def _expert_names(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if isinstance(module, SparseFeedForward))


def layer_types_of(config: PreTrainedConfig) -> list[str]:
    """Of each layer; a Llama's are all full."""
    return getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers


def new_cache(config: PreTrainedConfig) -> Cache:
    """An empty cache in which window layers keep their window, and the others all tokens."""
    window: int = getattr(config, "sliding_window", 0)
    layers = [
        DynamicSlidingWindowLayer(sliding_window=window) if layer_type == SLIDING else GrowableLayer()
        for layer_type in layer_types_of(config)
    ]
    return Cache(layers=layers)  # type: ignore[arg-type]


def random_cache(model: PreTrainedModel, num_tokens: int, dtype: torch.dtype) -> Cache:
    """A cache of random keys and values, as after a prompt of so many tokens."""
    config = model.config
    cache = new_cache(config)
    if not num_tokens:
        return cache
    sources = getattr(config, "kv_source_layers", None) or range(config.num_hidden_layers)
    generator = torch.Generator().manual_seed(_SEED)
    states = torch.randn(1, config.num_key_value_heads, num_tokens, config.head_dim, generator=generator).to(dtype)
    for index in sorted(set(sources)):
        cache.update(states, states, index)
        layer = cache.layers[index]
        if layer.is_sliding:  # not a view of all tokens
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # type: ignore[union-attr]
    return cache


def held_bytes(cache: Cache) -> int:
    """Of the keys and values of a cache."""
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)


@dataclass
class _Run:
    """A model with a cache, which is as before after every measurement."""

    model: PreTrainedModel
    cache: Cache

    def chunk(self) -> Forward:
        """Of the next chunk of a prompt."""
        return self._forward([CHUNK_TOKENS])

    def decode(self) -> Forward:
        """Of one token."""
        seconds = self._forward([1] * _DECODED_TOKENS)
        return {name: value / _DECODED_TOKENS for name, value in seconds.items()}

    @torch.inference_mode()
    def _forward(self, lengths: Sequence[int]) -> Forward:
        generator = torch.Generator().manual_seed(_SEED)
        before = [vars(layer).copy() for layer in self.cache.layers]
        inputs = [torch.randint(self.model.config.vocab_size, (1, n), generator=generator) for n in lengths]
        with attention_seconds(self.model) as seconds:
            started = time.perf_counter()
            for input_ids in inputs:
                self.model(input_ids=input_ids, logits_to_keep=1, **{CACHE_ARGUMENT: self.cache})
            seconds[ALL] = time.perf_counter() - started
        for layer, attributes in zip(self.cache.layers, before):
            vars(layer).clear()
            vars(layer).update(attributes)
        return seconds


@contextmanager
def attention_seconds(model: PreTrainedModel) -> Iterator[Forward]:
    """Time spent in the attention modules, by layer type."""
    layer_types = layer_types_of(model.config)
    seconds: Forward = dict.fromkeys(layer_types, 0.0)
    started = 0.0

    def enter(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def leave(layer_type: str, *_: object) -> None:
        seconds[layer_type] += time.perf_counter() - started

    layers: Any = model.get_decoder().layers
    hooks = [layer.self_attn.register_forward_pre_hook(enter) for layer in layers]
    hooks += [
        layer.self_attn.register_forward_hook(partial(leave, layer_type))
        for layer, layer_type in zip(layers, layer_types, strict=True)
    ]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _in_turns(variants: dict[str, Callable[[], Forward]], num_rounds: int) -> dict[str, Forward]:
    """The medians of all variants, which take turns in every round."""
    measured: dict[str, list[Forward]] = {name: [] for name in variants}
    for _ in range(num_rounds):
        for name, variant in variants.items():
            measured[name].append(variant())
    return {
        name: {part: statistics.median(forward[part] for forward in forwards) for part in forwards[0]}
        for name, forwards in measured.items()
    }
