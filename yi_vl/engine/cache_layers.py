"""Layers of the KV cache: one that grows in place, one that holds a window, and one that holds an image.

B rows, R rows gathered, H key-value heads, T tokens, P features per image, E head width, W tokens of a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..decoder.image_keys import ImageKeysLayer


class EngineLayer(Protocol):
    """What the engine does with a layer of its cache; see `GrowableLayer` for what each method is."""

    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool

    def new_empty(self) -> EngineLayer: ...
    def truncate(self, num_tokens: int) -> None: ...
    def row(self, row: int, columns: Tensor) -> tuple[Tensor, Tensor]: ...
    def load_(self, keys: Tensor, values: Tensor, num_stored: int, num_tokens: int) -> None: ...
    def gather_(self, sources: Sequence[SourceRows], index: int, num_tokens: int) -> None: ...
    def shift_row_(self, row: int, num_columns: int) -> None: ...


class SourceRows:
    """Some rows of a cache: `mask` (R, num_tokens) is theirs once all padding is on the left.

    Args:
        mask: (B, T) bool, of the whole cache.
    """

    def __init__(self, cache: Cache, mask: Tensor, rows: Sequence[int]) -> None:
        self.rows = list(rows)
        self._layers = cast(list[EngineLayer], cache.layers)
        mask = mask[self.rows]
        counts = mask.sum(1, keepdim=True)
        self.num_tokens = int(counts.max())
        self.mask = torch.arange(self.num_tokens, device=mask.device) >= self.num_tokens - counts
        self.num_columns = mask.shape[1]
        self.columns = [row.nonzero()[:, 0] for row in mask.cpu()] if has_gaps(mask) else None  # of tokens

    def __len__(self) -> int:
        return len(self.rows)

    def layer(self, index: int) -> EngineLayer | None:
        """A layer of the whole cache; None if nothing is in it."""
        layer = self._layers[index] if index < len(self._layers) else None
        return layer if layer is not None and layer.is_initialized else None

    def of(self, tensor: Tensor) -> Tensor:
        """These rows (R, ...) of (B, ...); a view where they are all."""
        return tensor if self.rows == list(range(len(tensor))) else tensor[self.rows]


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

    def row(self, row: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """One row's keys and values, (1, H, T, E), of as many of its last tokens as are needed.

        Args:
            columns: (T,), where its tokens are.

        Returns:
            Views, unless padding is in between.
        """
        assert self.keys is not None and self.values is not None
        kept = columns[len(columns) - self.num_kept(len(columns)) :] - self.num_dropped
        assert not len(kept) or kept[0] >= 0, f"a window has dropped {-int(kept[0])} of the tokens asked for"
        indices = _slice_of(kept)
        return self.keys[row : row + 1, :, indices], self.values[row : row + 1, :, indices]

    def load_(self, keys: Tensor, values: Tensor, num_stored: int, num_tokens: int) -> None:
        """Fill the empty layer with the first `num_tokens` tokens of one row.

        Args:
            keys, values: (1, H, T, E) up to token `num_stored`; in a window the last ones that `num_tokens` need.
        """
        stop, num_kept = keys.shape[2] - (num_stored - num_tokens), self.num_kept(num_tokens)
        assert stop >= num_kept, f"a window has dropped {num_kept - stop} of the tokens asked for"
        self.update(keys[:, :, stop - num_kept : stop], values[:, :, stop - num_kept : stop])
        self.num_dropped = num_tokens - self.num_stored

    def gather_(self, sources: Sequence[SourceRows], index: int, num_tokens: int) -> None:
        """Fill the empty layer with rows of layer `index` of some caches, padded on the left to so many tokens."""
        layers = [source.layer(index) for source in sources]
        like = next((layer.keys for layer in layers if layer is not None), None)
        if like is None:
            return
        num_columns = self.num_kept(num_tokens)
        self.reserve(like, sum(map(len, sources)), num_columns)
        self.num_dropped = num_tokens - num_columns
        end = 0
        for source, layer in zip(sources, layers, strict=True):
            start, end = end, end + len(source)
            for position, target in enumerate((self.keys, self.values)):
                stored = None if layer is None else (layer.keys, layer.values)[position]
                self._copy(source, stored, target[start:end])  # type: ignore[index]

    def shift_row_(self, row: int, num_columns: int) -> None:
        """Move so many columns of padding that are behind a row's tokens in front of them."""
        for part in (self.keys, self.values):
            part[row, :, num_columns:] = part[row, :, :-num_columns].clone()  # type: ignore[index]

    def _copy(self, source: SourceRows, stored: Tensor | None, target: Tensor) -> None:
        """Write rows behind padding: (B, H, T, E) -> (R, H, tokens that this layer stores, E)"""
        if stored is None:
            target.zero_()  # what is masked must be finite
        elif source.columns is None:
            num_padding = max(0, self.num_stored - source.num_tokens)
            target[:, :, :num_padding] = 0
            rows = source.of(stored)
            target[:, :, num_padding:] = rows[:, :, rows.shape[2] - self.num_stored + num_padding :]
        else:
            for slot, (row, columns) in enumerate(zip(source.rows, source.columns, strict=True)):
                kept = columns[-self.num_stored :] - (source.num_columns - stored.shape[2])
                target[slot, :, : self.num_stored - len(kept)] = 0
                target[slot, :, self.num_stored - len(kept) :] = stored[row][:, _slice_of(kept)]

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


class ImageLayer(ImageKeysLayer):
    """A layer of cross-attention: keys and values of each row's last image, (B, H, P, E).

    No token adds to them, so padding and rejected tokens do not matter. Nothing is written in place: what `row` gives,
    and what `load_` takes, may be shared.
    """

    def new_empty(self) -> ImageLayer:
        return ImageLayer()

    def truncate(self, num_tokens: int) -> None:
        """Nothing: tokens that are dropped have no images."""

    def row(self, row: int, columns: Tensor) -> tuple[Tensor, Tensor]:
        """One row's keys and values, (1, H, P, E), or (1, H, 0, E) if it has no image."""
        assert self.keys is not None and self.values is not None and self.has_image is not None
        num_features = self.keys.shape[2] if self.has_image[row] else 0
        return self.keys[row : row + 1, :, :num_features], self.values[row : row + 1, :, :num_features]

    def load_(self, keys: Tensor, values: Tensor, num_stored: int, num_tokens: int) -> None:
        """Fill the empty layer with what `row` gave."""
        if keys.shape[2]:
            self.set(keys, values, torch.ones(1, dtype=torch.bool, device=keys.device))

    def gather_(self, sources: Sequence[SourceRows], index: int, num_tokens: int) -> None:
        """Fill the empty layer with rows of layer `index` of some caches; it stays empty if none has an image."""
        layers = [cast("ImageLayer | None", source.layer(index)) for source in sources]
        like = next((layer.keys for layer in layers if layer is not None), None)
        if like is None:
            return
        parts = zip(*(_image_rows(source, layer, like) for source, layer in zip(sources, layers, strict=True)))
        keys, values, has_image = (torch.cat(part) if len(part) > 1 else part[0] for part in parts)
        if has_image.any():
            self.set(keys, values, has_image)

    def shift_row_(self, row: int, num_columns: int) -> None:
        """Nothing: there are no columns of tokens."""


def _image_rows(source: SourceRows, layer: ImageLayer | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values, (R, H, P, E) each, and which rows have an image, (R,) bool."""
    if layer is None:
        nothing = like.new_zeros(len(source), *like.shape[1:])
        return nothing, nothing, nothing.new_zeros(len(source), dtype=torch.bool)
    assert layer.keys is not None and layer.values is not None and layer.has_image is not None
    return source.of(layer.keys), source.of(layer.values), source.of(layer.has_image)


def has_gaps(attention_mask: Tensor) -> bool:
    """Whether there is padding between tokens, or behind them."""
    return bool((attention_mask[:, :-1] & ~attention_mask[:, 1:]).any())


def _slice_of(columns: Tensor) -> slice | Tensor:
    """Ascending indices as a slice, where none is left out."""
    if not len(columns):
        return slice(0, 0)
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == len(columns) else columns
