"""The KV cache: one that grows in place, and rows gathered from several caches into one.

B rows, R rows gathered, H key-value heads, T tokens, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer

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
        """Hold so many rows and tokens, yet to be written; `like` has the heads, their width, dtype and device."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        num_heads, width = like.shape[1], like.shape[3]
        self._buffer = like.new_empty(2, num_rows, num_heads, num_tokens + _RESERVE_TOKENS, width)
        self._set_length(num_tokens)

    def truncate(self, num_tokens: int) -> None:
        """`crop` to the first tokens in place: the next ones are written over what was returned before."""
        assert self._buffer is not None and self._returned is self.keys
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
    """One row's keys and values of each layer, (1, H, T, E), without padding; views, unless padding is in between."""
    columns: slice | Tensor = slice(None)
    if attention_mask is not None:
        mask = attention_mask[row]
        num_tokens = int(mask.sum())
        columns = slice(len(mask) - num_tokens, None)
        if not mask[columns].all():
            columns = mask
    layers = []
    for keys, values in layers_of(cache):
        indices = columns.to(keys.device) if isinstance(columns, Tensor) else columns
        layers.append((keys[row : row + 1, :, indices], values[row : row + 1, :, indices]))
    return layers


def gather(parts: Sequence[tuple[Cache, Tensor, Sequence[int]]]) -> tuple[Cache, Tensor]:
    """Rows of one or more caches in a new cache, padded on the left to the longest of them.

    Args:
        parts: caches, their attention masks (B, T) bool, and the rows to take.

    Returns:
        A cache of R rows, and its attention mask (R, T) bool.
    """
    sources = [_Source(cache, mask[list(rows)], list(rows)) for cache, mask, rows in parts]
    longest = max(source.num_tokens for source in sources)
    attention_mask = torch.cat([F.pad(source.mask, (longest - source.num_tokens, 0)) for source in sources])
    gathered = [GrowableLayer() for _ in max((source.layers for source in sources), key=len)]
    for index, layer in enumerate(gathered):
        like = next(source.layers[index][0] for source in sources if source.layers)
        layer.reserve(like, len(attention_mask), longest)
        end = 0
        for source in sources:
            start, end = end, end + len(source.rows)
            source.copy(index, layer, start, longest)
    return Cache(layers=gathered) if gathered else new_cache(), attention_mask  # type: ignore[arg-type]


class _Source:
    """Some rows of a cache: `mask` (R, num_tokens) is theirs once all padding is on the left."""

    def __init__(self, cache: Cache, mask: Tensor, rows: list[int]) -> None:
        self.rows = rows
        self.layers = layers_of(cache)
        self.num_tokens = int(mask.sum(1).max())
        self._indices: Tensor | None = None  # (R, num_tokens) of the columns to take; None: the last ones
        first = mask.shape[1] - self.num_tokens
        if (mask[:, :-1] & ~mask[:, 1:]).any():  # padding between tokens
            self._indices = mask.int().argsort(dim=1, stable=True)[:, first:]
            self.mask = mask.gather(1, self._indices)
        else:
            self.mask = mask[:, first:]

    def copy(self, index: int, layer: GrowableLayer, start: int, longest: int) -> None:
        """Write the rows of one layer from row `start` on, behind padding up to `longest` tokens."""
        stop, num_padding = start + len(self.rows), longest - self.num_tokens
        is_all = bool(self.layers) and self.rows == list(range(len(self.layers[index][0])))
        for position, target in enumerate((layer.keys, layer.values)):
            target = target[start:stop]  # type: ignore[index]
            target[:, :, :num_padding] = 0  # what is masked must be finite
            if not self.layers:
                continue
            source = self.layers[index][position]
            rows = source if is_all else source[self.rows]
            if self._indices is None:
                target[:, :, num_padding:] = rows[:, :, rows.shape[2] - self.num_tokens :]
            else:
                indices = self._indices.to(source.device)[:, None, :, None]
                target[:, :, num_padding:] = rows.gather(2, indices.expand(-1, rows.shape[1], -1, rows.shape[3]))
