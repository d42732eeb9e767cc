"""The KV cache: one that grows in place, and rows gathered from several caches into one.

B rows, R rows gathered, H key-value heads, T tokens, E head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.cache_utils import Cache, DynamicLayer

# The name of a model's cache argument, which transformers 5.24 renamed.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
_RESERVE_TOKENS = 256  # few copies over an answer, and little memory that is never used


class GrowableLayer(DynamicLayer):
    """One layer's keys and values at the beginning of a larger buffer, so that a decode step copies only its own.

    transformers' layer copies all it holds at every step: 7% of a 1B's step on a CPU after 1100 tokens, 31% with eight
    rows. Its static layer has to know the length beforehand, and attention runs over all of it.
    """

    _buffer: Tensor | None = None  # (2, B, H, T and more, E): keys, values
    _returned: Tensor | None = None  # the last keys returned; if others (cropped, say) took their place, copy these

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, (B, H, new, E); returns all, (B, H, T, E)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_cached = self.get_seq_length()
        num_tokens = num_cached + key_states.shape[-2]
        if self._buffer is None or self._returned is not self.keys or num_tokens > self._buffer.shape[-2]:
            cached_keys, cached_values = self.keys, self.values
            self.reserve(key_states, len(key_states), num_tokens)
            if num_cached:
                self._write(0, cached_keys, cached_values)  # type: ignore[arg-type]
        else:
            self._set_length(num_tokens)
        self._write(num_cached, key_states, value_states)
        return self.keys, self.values  # type: ignore[return-value]

    def reserve(self, like: Tensor, num_rows: int, num_tokens: int) -> None:
        """Hold zeros for so many rows and tokens; `like` has the heads, their width, the dtype and the device."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        num_heads, width = like.shape[1], like.shape[3]
        self._buffer = like.new_zeros(2, num_rows, num_heads, num_tokens + _RESERVE_TOKENS, width)
        self._set_length(num_tokens)

    def _set_length(self, num_tokens: int) -> None:
        assert self._buffer is not None
        self.keys, self.values = self._buffer[:, :, :, :num_tokens]
        self._returned = self.keys

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        assert self._buffer is not None
        self._buffer[0, :, :, start : start + keys.shape[-2]] = keys
        self._buffer[1, :, :, start : start + keys.shape[-2]] = values


def new_cache() -> Cache:
    """An empty cache for any number of layers and rows."""
    return Cache(layer_class_to_replicate=GrowableLayer)


def layers_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (B, H, T, E); none for an empty cache."""
    layers = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        layers.append((layer.keys, layer.values))
    return layers


def row_of(cache: Cache, row: int, attention_mask: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """One row's keys and values of each layer, (1, H, T, E), without padding; views where there is none."""
    is_token = None if attention_mask is None or attention_mask[row].all() else attention_mask[row]
    layers = []
    for keys, values in layers_of(cache):
        keys, values = keys[row : row + 1], values[row : row + 1]
        if is_token is not None:
            is_token = is_token.to(keys.device)
            keys, values = keys[:, :, is_token], values[:, :, is_token]
        layers.append((keys, values))
    return layers


def gather(parts: Sequence[tuple[Cache, Tensor, Sequence[int]]]) -> tuple[Cache, Tensor]:
    """Rows of one or more caches in a new cache, padded on the left to the longest of them.

    Args:
        parts: caches, their attention masks (B, T) bool, and the rows to take.

    Returns:
        A cache of R rows, and its attention mask (R, T) bool.
    """
    device = parts[0][1].device
    rows = [row_of(cache, row, mask) for cache, mask, indices in parts for row in indices]
    num_tokens = [layers[0][0].shape[2] if layers else 0 for layers in rows]
    longest = max(num_tokens)
    positions, lengths = torch.arange(longest, device="cpu"), torch.tensor(num_tokens, device="cpu").unsqueeze(1)
    attention_mask = (positions >= longest - lengths).to(device)
    if not longest:
        return new_cache(), attention_mask
    widest = rows[num_tokens.index(longest)]
    gathered = [GrowableLayer() for _ in widest]
    for index, layer in enumerate(gathered):
        layer.reserve(widest[index][0], len(rows), longest)
        for slot, (layers, length) in enumerate(zip(rows, num_tokens, strict=True)):
            if length:
                layer.keys[slot, :, longest - length :] = layers[index][0][0]  # type: ignore[index]
                layer.values[slot, :, longest - length :] = layers[index][1][0]  # type: ignore[index]
    return Cache(layers=gathered), attention_mask  # type: ignore[arg-type]
