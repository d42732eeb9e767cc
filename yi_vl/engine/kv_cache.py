"""The KV cache: one that grows in place, and rows gathered from several caches into one.

B rows, R rows gathered, H key-value heads, T tokens, E head width, W tokens of a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from ..decoder.config import SLIDING, YiHybridConfig


class GrowableLayer(DynamicLayer):
    """One layer's keys and values in a larger buffer, so that a decode step copies only its own.

    transformers' layer copies all it holds at every step: 7% of a 1B's step on a CPU after 1100 tokens, 31% with eight
    rows. Its static layer has to know the length beforehand, and attention runs over all of it.
    """

    num_reserved = 256  # tokens: few copies over an answer, and little memory that is never used
    num_dropped = 0  # tokens before the first that `keys` has
    _first = 0  # of the tokens in the buffer, the first that `keys` has
    _buffer: Tensor | None = None  # (2, B, H, T and more, E): keys, values
    _returned: Tensor | None = None  # the last keys returned; if others (cropped, say) took their place, copy these

    @property
    def num_stored(self) -> int:
        """How many tokens `keys` has."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0  # type: ignore[union-attr]

    def num_kept(self, num_tokens: int) -> int:
        """How many tokens' keys and values are needed after so many."""
        return num_tokens

    def new_empty(self) -> GrowableLayer:
        """An empty layer of the same kind."""
        return GrowableLayer()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, (B, H, new, E); returns all, (B, H, T, E), or what a window needs."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_cached = self.num_kept(self.num_stored)
        num_tokens = num_cached + key_states.shape[-2]
        num_unneeded = self.num_stored - num_cached
        if self._must_move(num_unneeded, num_tokens):
            cached_keys, cached_values = self.keys, self.values
            self.reserve(key_states, len(key_states), num_tokens)
            if num_cached:
                self._write(0, cached_keys[:, :, num_unneeded:], cached_values[:, :, num_unneeded:])  # type: ignore[index]
        else:
            self._first += num_unneeded
            self._set_length(num_tokens)
        self.num_dropped += num_unneeded
        self._write(num_cached, key_states, value_states)
        return self.keys, self.values  # type: ignore[return-value]

    def _must_move(self, num_unneeded: int, num_tokens: int) -> bool:
        """Whether the buffer is not there, is not what `keys` is in, is too small, or much too large for a window."""
        if self._buffer is None or self._returned is not self.keys:
            return True
        size = self._buffer.shape[-2]
        return self._first + num_unneeded + num_tokens > size or (
            bool(num_unneeded) and size > num_tokens + 2 * self.num_reserved
        )

    def reserve(self, like: Tensor, num_rows: int, num_tokens: int) -> None:
        """Hold so many rows and tokens, yet to be written; `like` has the heads, their width, dtype and device."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        num_heads, width = like.shape[1], like.shape[3]
        self._buffer = like.new_empty(2, num_rows, num_heads, num_tokens + self.num_reserved, width)
        self._first = 0
        self._set_length(num_tokens)

    def truncate(self, num_tokens: int) -> None:
        """`crop` to the first tokens in place: the next ones are written over what was returned before."""
        num_stored = num_tokens - self.num_dropped
        assert self._buffer is not None and self._returned is self.keys and num_stored >= self.num_kept(num_tokens)
        self._set_length(num_stored)

    def _set_length(self, num_stored: int) -> None:
        assert self._buffer is not None
        self.keys, self.values = self._buffer[:, :, :, self._first : self._first + num_stored]
        self._returned = self.keys

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Behind the first `start` tokens stored."""
        assert self._buffer is not None
        start += self._first
        self._buffer[0, :, :, start : start + keys.shape[-2]] = keys
        self._buffer[1, :, :, start : start + keys.shape[-2]] = values


class WindowLayer(GrowableLayer):
    """A layer of sliding-window attention: the W-1 tokens before those of the last forward pass, and these.

    Tokens are dropped at the update after, so that until then those of the last pass can be truncated, or stored.
    """

    is_sliding = True
    is_croppable = False  # but for `truncate`, within the last pass
    num_reserved = 64  # tokens: a window is copied once in so many steps

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def num_kept(self, num_tokens: int) -> int:
        return min(num_tokens, self.window - 1)

    def new_empty(self) -> WindowLayer:
        return WindowLayer(self.window)

    def get_seq_length(self) -> int:
        """Tokens seen, those that were dropped included."""
        return self.num_dropped + self.num_stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` returns with so many new ones, and how many tokens are before the first of them."""
        num_cached = self.num_kept(self.num_stored)
        return num_cached + query_length, self.get_seq_length() - num_cached


def new_cache(config: PreTrainedConfig | None = None) -> Cache:
    """An empty cache for any number of rows.

    Args:
        config: of the language model. Layers that slide keep their window, and those that attend to another's keys and
            values nothing; without it all layers keep all.
    """
    if not isinstance(config, YiHybridConfig):
        return Cache(layer_class_to_replicate=GrowableLayer)
    assert config.layer_types is not None
    return Cache(
        layers=[
            WindowLayer(config.sliding_window) if layer_type == SLIDING else GrowableLayer()
            for layer_type in config.layer_types
        ]
    )


def window_of(config: PreTrainedConfig | None) -> int | None:
    """W; None where all layers keep all tokens."""
    has_windows = isinstance(config, YiHybridConfig) and SLIDING in (config.layer_types or ())
    return config.sliding_window if has_windows else None  # type: ignore[union-attr]


def layers_of(cache: Cache) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values that are stored, (B, H, T, E), by layer; layers that have none are left out."""
    layers = {}
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        if layer.is_initialized:
            assert layer.keys is not None and layer.values is not None
            layers[index] = layer.keys, layer.values
    return layers


def row_of(
    cache: Cache, row: int, attention_mask: Tensor | None = None, num_tokens: int | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """One row's keys and values of each layer, (1, H, T, E), without padding, of as many tokens as the layer keeps.

    Args:
        attention_mask: (B, T) bool, of the whole cache; None where all of it are tokens.
        num_tokens: the first so many tokens of the row; None for all. A window must not have dropped what comes before.

    Returns:
        Views, unless padding is in between.
    """
    if attention_mask is None:
        columns = torch.arange(cache.get_seq_length(), device="cpu")
    else:
        columns = attention_mask[row].cpu().nonzero()[:, 0]
    columns = columns[:num_tokens]
    layers = {}
    for index, (keys, values) in layers_of(cache).items():
        layer = cache.layers[index]
        assert isinstance(layer, GrowableLayer)
        kept = columns[len(columns) - layer.num_kept(len(columns)) :] - layer.num_dropped
        assert not len(kept) or kept[0] >= 0, f"a window has dropped {-int(kept[0])} of the tokens asked for"
        indices = _slice_of(kept)
        layers[index] = keys[row : row + 1, :, indices], values[row : row + 1, :, indices]
    return layers


def load_(cache: Cache, layers: dict[int, tuple[Tensor, Tensor]], num_stored: int, num_tokens: int) -> None:
    """Fill an empty cache of one row.

    Args:
        layers: keys and values up to token `num_stored`; where windows are, the last ones that `num_tokens` need.
        num_tokens: how many tokens the cache is to have.
    """
    for index, (keys, values) in layers.items():
        stop = keys.shape[2] - (num_stored - num_tokens)
        num_kept = cache.layers[index].num_kept(num_tokens) if index < len(cache) else num_tokens  # type: ignore[union-attr]
        assert stop >= num_kept, f"a window has dropped {num_kept - stop} of the tokens asked for"
        cache.update(keys[:, :, stop - num_kept : stop], values[:, :, stop - num_kept : stop], index)
        layer = cache.layers[index]
        assert isinstance(layer, GrowableLayer)
        layer.num_dropped = num_tokens - layer.num_stored


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
    template = max((cache for cache, _, _ in parts), key=len)
    if not len(template):
        return new_cache(), attention_mask
    gathered = []
    for index, layer in enumerate(template.layers):
        assert isinstance(layer, GrowableLayer)
        gathered.append(layer.new_empty())
        like = next((source.layers[index][0] for source in sources if index in source.layers), None)
        if like is None:
            continue
        num_columns = layer.num_kept(longest)
        gathered[index].reserve(like, len(attention_mask), num_columns)
        gathered[index].num_dropped = longest - num_columns
        end = 0
        for source in sources:
            start, end = end, end + len(source.rows)
            source.copy(index, gathered[index], start)
    return Cache(layers=gathered), attention_mask  # type: ignore[arg-type]


def shift_row_(cache: Cache, attention_mask: Tensor, row: int, num_columns: int) -> None:
    """Move padding that is behind a row's tokens in front of them, in the cache and in its mask (B, T)."""
    for keys, values in layers_of(cache).values():
        for part in (keys, values):
            part[row, :, num_columns:] = part[row, :, :-num_columns].clone()
    attention_mask[row] = F.pad(attention_mask[row, :-num_columns], (num_columns, 0))


def has_gaps(attention_mask: Tensor) -> bool:
    """Whether there is padding between tokens, or behind them."""
    return bool((attention_mask[:, :-1] & ~attention_mask[:, 1:]).any())


def _slice_of(columns: Tensor) -> slice | Tensor:
    """Ascending indices as a slice, where none is left out."""
    if not len(columns):
        return slice(0, 0)
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns


class _Source:
    """Some rows of a cache: `mask` (R, num_tokens) is theirs once all padding is on the left."""

    def __init__(self, cache: Cache, mask: Tensor, rows: list[int]) -> None:
        self.rows = rows
        self.layers = layers_of(cache)
        counts = mask.sum(1, keepdim=True)
        self.num_tokens = int(counts.max())
        self.mask = torch.arange(self.num_tokens, device=mask.device) >= self.num_tokens - counts
        self._num_columns = mask.shape[1]
        self._columns = [row.nonzero()[:, 0] for row in mask.cpu()] if has_gaps(mask) else None  # of tokens

    def copy(self, index: int, layer: GrowableLayer, start: int) -> None:
        """Write the rows of one layer from row `start` on, behind padding up to the tokens that `layer` stores."""
        stop = start + len(self.rows)
        for position, target in enumerate((layer.keys, layer.values)):
            target = target[start:stop]  # type: ignore[index]
            source = self.layers[index][position] if index in self.layers else None
            if source is None:
                target.zero_()  # what is masked must be finite
            elif self._columns is None:
                num_padding = max(0, layer.num_stored - self.num_tokens)
                target[:, :, :num_padding] = 0
                rows = source if self.rows == list(range(len(source))) else source[self.rows]
                target[:, :, num_padding:] = rows[:, :, rows.shape[2] - layer.num_stored + num_padding :]
            else:
                for slot, (row, columns) in enumerate(zip(self.rows, self._columns, strict=True)):
                    kept = columns[-layer.num_stored :] - (self._num_columns - source.shape[2])
                    target[slot, :, : layer.num_stored - len(kept)] = 0
                    target[slot, :, layer.num_stored - len(kept) :] = source[row][:, _slice_of(kept)]
