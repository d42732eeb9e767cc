"""Memory of keys and values: a dense decoder, and one of windows and shared keys and values, as the context grows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from yi_vl.decoder.config import YiHybridConfig, layer_pattern, sharing_pattern
from yi_vl.decoder.model import YiHybridForCausalLM
from yi_vl.engine.kv_cache import layers_of, new_cache
from yi_vl.engine.prefix_cache import PrefixCache, PrefixKey
from yi_vl.engine.running_batch import forward

_NUM_WINDOWS = (1, 2, 4, 6, 8)
_CHUNK_TOKENS = 512
_MIB = 1 << 20


def compare_cache(num_layers: int, window: int, every: int, group: int) -> dict[str, Any]:
    """Bytes of real caches of small models with random weights, beside those of the formula.

    Args:
        every: one of so many layers sees all tokens, the others a window.
        group: so many consecutive full layers share keys and values.
    """
    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": num_layers}
    sizes |= {"max_position_embeddings": window * max(_NUM_WINDOWS) + 1, "pad_token_id": 0}
    layer_types = layer_pattern(num_layers, every)
    sources = sharing_pattern(layer_types, group)
    config = YiHybridConfig(**sizes, layer_types=layer_types, kv_source_layers=sources, sliding_window=window)
    models = {"dense": LlamaForCausalLM(LlamaConfig(**sizes)).eval(), "hybrid": YiHybridForCausalLM(config).eval()}
    variants = {}
    for num_windows in _NUM_WINDOWS:
        num_tokens = num_windows * window
        stored = {name: _stored_and_live(model, num_tokens) for name, model in models.items()}
        (dense, live_dense), (hybrid, live_hybrid) = stored["dense"], stored["hybrid"]
        formula = dense / (num_layers * num_tokens) * config.kv_tokens(num_tokens)
        variants[f"{num_windows} windows, {num_tokens} tokens"] = {
            "dense_MiB": dense / _MIB,
            "hybrid_MiB": hybrid / _MIB,
            "formula_MiB": formula / _MIB,
            "times_smaller": dense / hybrid,
            "live_dense_MiB": live_dense / _MIB,
            "live_hybrid_MiB": live_hybrid / _MIB,
            "live_times_smaller": live_dense / live_hybrid,
        }
    return {
        "what": f"keys and values of {num_layers} layers: one of {every} sees all tokens, and {group} of those share; "
        f"the others see {window} tokens",
        "variants": variants,
    }


@torch.inference_mode()
def _stored_and_live(model: PreTrainedModel, num_tokens: int) -> tuple[int, int]:
    """Bytes in the prefix cache of so many tokens, and of the cache that they and one more are in while decoding."""
    ids = torch.randint(1, model.config.vocab_size, (1, num_tokens + 1))
    cache, prefixes = new_cache(model.config), PrefixCache(1 << 40, model.config)
    for stop in [*range(_CHUNK_TOKENS, num_tokens, _CHUNK_TOKENS), num_tokens, num_tokens + 1]:
        start = cache.get_seq_length()
        position_ids = torch.arange(start, stop).unsqueeze(0)
        mask = torch.ones(1, stop, dtype=torch.bool)
        forward(model, cache, mask, position_ids, input_ids=ids[:, start:stop])
        if stop == num_tokens:
            prefixes.put(PrefixKey(ids[0, :num_tokens].numpy().astype(np.int64)), cache)
    return prefixes.num_bytes, _live_bytes(cache)


def _live_bytes(cache: Cache) -> int:
    storages = [keys.untyped_storage() for keys, _ in layers_of(cache).values()]  # values are in the same buffer
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
