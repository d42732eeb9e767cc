"""Keys and values of what the model has read: a cache that grows in place, and rows that leave it and join it.

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

# What a model calls the cache that it takes; transformers 5.24 renamed it.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
_ROOM_TOKENS = 256  # so that little is copied over an answer, and little held that is never used


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room behind them: a step writes its own and copies nothing else.

    transformers' layer copies all it holds at every step: 7% of a 1B's step on a CPU after 1100 tokens, 31% with eight
    rows. Its static layer has to know the length beforehand, and attention runs over all of it.
    """

    _room: Tensor | None = None  # (2, B, H, T and more, E): keys, values
    _given: Tensor | None = (
        None  # the keys last given out: others in their place, cropped ones say, are not in the room
    )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values of new tokens, (B, H, new, E), behind the earlier ones; returns all, (B, H, T, E)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_known = self.get_seq_length()
        num_tokens = num_known + key_states.shape[-2]
        if self._room is None or self._given is not self.keys or num_tokens > self._room.shape[-2]:
            known_keys, known_values = self.keys, self.values
            self.make_room(key_states, len(key_states), num_tokens)
            if num_known:
                self._write(0, known_keys, known_values)  # type: ignore[arg-type]
        else:
            self._give(num_tokens)
        self._write(num_known, key_states, value_states)
        return self.keys, self.values  # type: ignore[return-value]

    def make_room(self, like: Tensor, num_rows: int, num_tokens: int) -> None:
        """Hold zeros for so many rows and tokens; `like` has the heads, their width, the type and the device."""
        if not self.is_initialized:
            self.lazy_initialization(like, like)
        num_heads, width = like.shape[1], like.shape[3]
        self._room = like.new_zeros(2, num_rows, num_heads, num_tokens + _ROOM_TOKENS, width)
        self._give(num_tokens)

    def _give(self, num_tokens: int) -> None:
        assert self._room is not None
        self.keys, self.values = self._room[:, :, :, :num_tokens]
        self._given = self.keys

    def _write(self, start: int, keys: Tensor, values: Tensor) -> None:
        assert self._room is not None
        self._room[0, :, :, start : start + keys.shape[-2]] = keys
        self._room[1, :, :, start : start + keys.shape[-2]] = values


def new_cache() -> Cache:
    """An empty cache for any number of layers and rows."""
    return Cache(layer_class_to_replicate=RoomyLayer)


def layers_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (B, H, T, E)."""
    found = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        found.append((layer.keys, layer.values))
    return found


def gather(parts: Sequence[tuple[Cache, Tensor, Sequence[int]]]) -> tuple[Cache, Tensor]:
    """Rows of one or more caches in a cache of their own, where only those shorter than the longest are padded.

    Args:
        parts: caches, which of their places are tokens and no padding, (B, T) bool, and the rows to take.

    Returns:
        A cache of R rows, and which of its places are tokens, (R, T) bool; padding is in front.
    """
    rows = [(layers_of(cache), is_token[row], row) for cache, is_token, indices in parts for row in indices]
    num_tokens = [int(is_token.sum()) for _, is_token, _ in rows]
    longest = max(num_tokens)
    gathered = [RoomyLayer() for _ in parts[0][0].layers]
    for index, layer in enumerate(gathered):
        layer.make_room(rows[0][0][index][0], len(rows), longest)
        for place, ((layers, is_token, row), length) in enumerate(zip(rows, num_tokens, strict=True)):
            keys, values = layers[index]
            is_taken = is_token.to(keys.device)
            layer.keys[place, :, longest - length :] = keys[row][:, is_taken]  # type: ignore[index]
            layer.values[place, :, longest - length :] = values[row][:, is_taken]  # type: ignore[index]
    places, lengths = torch.arange(longest, device="cpu"), torch.tensor(num_tokens, device="cpu").unsqueeze(1)
    return Cache(layers=gathered), (places >= longest - lengths).to(parts[0][1].device)  # type: ignore[arg-type]
