"""Caches of what requests to come may share: KV caches of prefixes, and values by their key, both bounded in bytes.

T tokens, H key-value heads, E head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers.cache_utils import Cache

from .kv_cache import new_cache, row_of

Value = TypeVar("Value")
_BLOCK_TOKENS = 16
_MAX_COMPARED = 64


@dataclass(frozen=True)
class ImageKey:
    """An image in a prompt: a hash of its pixels, and the indices [start, end) of its tokens."""

    digest: bytes
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class PrefixKey:
    """What decides the keys and values of T tokens: their ids, and the images among them in reading order."""

    token_ids: npt.NDArray[np.int64]  # (T,)
    images: tuple[ImageKey, ...] = ()

    @cached_property
    def block_hashes(self) -> list[int]:
        """Hashes of the first 16, 32, ... tokens and of the images that begin among them."""
        hashes, current, num_images = [], 0, 0
        for end in range(_BLOCK_TOKENS, len(self) + 1, _BLOCK_TOKENS):
            digests = []
            while num_images < len(self.images) and self.images[num_images].start < end:
                digests.append(self.images[num_images].digest)
                num_images += 1
            current = hash((current, self.token_ids[end - _BLOCK_TOKENS : end].tobytes(), *digests))
            hashes.append(current)
        return hashes

    def __len__(self) -> int:
        return len(self.token_ids)

    def head(self, length: int) -> PrefixKey:
        """The key of the first `length` tokens."""
        return PrefixKey(self.token_ids[:length], tuple(image for image in self.images if image.start < length))

    def extended(self, tokens: Sequence[int]) -> PrefixKey:
        """The key of these and then so many text tokens."""
        return PrefixKey(np.concatenate([self.token_ids, np.array(tokens, dtype=np.int64)]), self.images)

    def reusable(self, length: int) -> int:
        """The longest prefix of at most `length` tokens that does not end within an image."""
        return next((image.start for image in self.images if image.start < length < image.end), length)

    def num_common(self, other: PrefixKey) -> int:
        """How many tokens both begin with."""
        length = min(len(self), len(other))
        different = np.flatnonzero(self.token_ids[:length] != other.token_ids[:length])
        ends = [int(different[0])] if len(different) else [length]
        ends += [image.start for image, another in zip(self.images, other.images) if image.digest != another.digest]
        return min(ends)


def shared_prefix_length(keys: Sequence[PrefixKey]) -> int:
    """How many tokens all prompts begin with; less than a whole prompt, whose last token has to be computed for its
    logits, and never a part of an image."""
    return keys[0].reusable(min([keys[0].num_common(key) for key in keys[1:]] + [len(key) - 1 for key in keys]))


class LRUCache(Generic[Value]):
    """Values by their key; the least recently used are dropped first. Safe to share between threads.

    Args:
        max_bytes: of all values together; a single larger one is not stored.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Value | None:
        """The value, which becomes the most recently used; None where there is none."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: Value, num_bytes: int) -> None:
        """Store a value of that size."""
        with self._lock:
            if key in self._values:
                self.num_bytes -= self._values.pop(key)[1]
            if num_bytes > self.max_bytes:
                return
            self._values[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True, eq=False)
class _Entry:
    key: PrefixKey
    layers: list[tuple[Tensor, Tensor]]  # keys and values of each layer, (1, H, T, E)
    num_bytes: int


class PrefixCache:
    """Keys and values of recent conversations, so that a common prefix is prefilled once. Safe between threads.

    Entries are copies without the reserve of a growing cache, and so are what `find` returns. They are found by hashes
    of blocks of 16 tokens; of those that share the most blocks with a prompt, the 64 newest are compared, so that a
    lookup does not take longer the more there are.

    Args:
        max_bytes: of all keys and values together; the least recently used are dropped first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by id, most recently used last
        self._by_hash: dict[int, list[_Entry]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def num_cached(self, key: PrefixKey) -> int:
        """How many tokens of `key` are stored; those of fewer than 16 are not found."""
        with self._lock:
            return self._longest(key)[0]

    def find(self, key: PrefixKey) -> Cache:
        """A cache of one row with the longest stored prefix of `key`; it may be empty."""
        cache = new_cache()
        with self._lock:
            length, entry = self._longest(key)
            if entry is None:
                return cache
            self._entries.move_to_end(id(entry))
        for index, (layer_keys, layer_values) in enumerate(entry.layers):
            cache.update(layer_keys[:, :, :length], layer_values[:, :, :length], index)
        return cache

    def put(self, key: PrefixKey, cache: Cache, row: int = 0, attention_mask: Tensor | None = None) -> None:
        """Store one row of a cache.

        Args:
            key: of the tokens in that row.
            attention_mask: (B, T) bool, of the whole cache; None where all of it are tokens.
        """
        layers = row_of(cache, row, attention_mask)
        num_tokens = layers[0][0].shape[2] if layers else 0
        assert num_tokens == len(key), f"{num_tokens} tokens cached, {len(key)} in the key"
        num_bytes = sum(part.nbytes for layer in layers for part in layer)
        if num_bytes > self.max_bytes:
            return
        with self._lock:
            length, longest = self._longest(key)
            if length == len(key):  # a stored one begins with it
                return
            if longest is not None and length == len(longest.key):  # it begins with a stored one
                self._remove(longest)
            entry = _Entry(key, [(keys.clone(), values.clone()) for keys, values in layers], num_bytes)
            self._entries[id(entry)] = entry
            for block_hash in key.block_hashes:
                self._by_hash.setdefault(block_hash, []).append(entry)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self._remove(next(iter(self._entries.values())))

    def _longest(self, key: PrefixKey) -> tuple[int, _Entry | None]:
        """The entry that has the most tokens in common with a key, and how many."""
        for block_hash in reversed(key.block_hashes):
            if entries := self._by_hash.get(block_hash):
                newest = entries[-_MAX_COMPARED:]
                lengths = [entry.key.num_common(key) for entry in newest]
                longest = max(lengths)
                return longest, newest[lengths.index(longest)]
        return 0, None

    def _remove(self, entry: _Entry) -> None:
        del self._entries[id(entry)]
        for block_hash in entry.key.block_hashes:
            entries = self._by_hash[block_hash]
            entries.remove(entry)
            if not entries:
                del self._by_hash[block_hash]
        self.num_bytes -= entry.num_bytes
