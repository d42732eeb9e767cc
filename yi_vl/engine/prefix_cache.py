"""Caches of what requests to come may share: KV caches of prefixes, and values by their key, both bounded in bytes.

T tokens, H key-value heads, E head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .kv_cache import load_, new_cache, row_of, window_of

Value = TypeVar("Value")
_BLOCK_TOKENS = 16
_MAX_COMPARED = 64
_MAX_ENDS = 3  # entries of one conversation, where windows are: up to an answer, the next prompt, and its answer


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

    @cached_property
    def reusable_head(self) -> PrefixKey:
        """What of a prompt may come from a cache: all but the last token, whose logits are needed, and no part of an
        image."""
        return self.head(self.reusable(len(self) - 1))

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
    layers: dict[int, tuple[Tensor, Tensor]]  # keys and values by layer, (1, H, T, E), or of a window's last tokens
    shortest: int  # tokens of the shortest prefix that it gives back: windows have dropped what others need
    is_shared: bool

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.layers)

    def num_reusable(self, key: PrefixKey) -> int:
        """How many of a prompt's first tokens it gives back."""
        num_common = self.key.num_common(key)
        return num_common if num_common >= self.shortest else 0


class PrefixCache:
    """Keys and values of recent conversations, so that a common prefix is prefilled once. Safe between threads.

    Entries are copies without the reserve of a growing cache, and so are what `find` returns. They are found by hashes
    of blocks of 16 tokens; of those that share the most blocks with a prompt, the 64 newest are compared, so that a
    lookup does not take longer the more there are.

    Where layers keep windows of W tokens, an entry of more gives back only prefixes of some length. So a prompt is
    stored at several ends (`ends`). An end soon after another is stored with it, as one entry that has up to W-1 more
    tokens of its windows, and gives back any prefix between the two. Of one conversation the last few entries are kept,
    beside those that others share.

    Args:
        max_bytes: of all keys and values together; the least recently used are dropped first.
        config: of the language model; see `new_cache`.
    """

    def __init__(self, max_bytes: int, config: PreTrainedConfig | None = None) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._config = config
        self._window = window_of(config)
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by id, most recently used last
        self._reusable = _BlockIndex()  # entries by the blocks at which prefixes end that they give back
        self._branching = _BlockIndex()  # those that do not give back all, by all of their blocks
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def num_cached(self, key: PrefixKey) -> int:
        """How many tokens of `key` are stored; those of fewer than 16 are not found."""
        with self._lock:
            return self._longest(key)[0]

    def find(self, key: PrefixKey) -> Cache:
        """A cache of one row with the longest stored prefix of `key`; it may be empty."""
        cache = new_cache(self._config)
        with self._lock:
            length, entry = self._longest(key)
            if entry is None:
                return cache
            self._entries.move_to_end(id(entry))
        load_(cache, entry.layers, len(entry.key), length, entry.key.images[-1:] == key.head(length).images[-1:])
        return cache

    def ends(self, key: PrefixKey) -> set[int]:
        """So many first tokens of a prompt are to be stored: all; where windows are, all but the last, which has to be
        computed when the prompt is asked again, those up to the end of the last image, and those that the prompt shares
        with a stored conversation."""
        if self._window is None:
            return {len(key)}
        with self._lock:
            branch = self._branching.longest(key, lambda entry: entry.key.num_common(key))[0]
        ends = {key.reusable(branch), len(key.reusable_head), *(image.end for image in key.images[-1:])}
        return {end for end in ends if 0 < end <= len(key.reusable_head)}

    def put(
        self,
        key: PrefixKey,
        cache: Cache,
        row: int = 0,
        attention_mask: Tensor | None = None,
        is_shared: bool = False,
    ) -> None:
        """Store the first tokens of one row of a cache.

        Args:
            key: of these tokens.
            attention_mask: (B, T) bool, of the whole cache; None where all of it are tokens.
            is_shared: by conversations that go on differently.
        """
        layers = row_of(cache, row, attention_mask, len(key))
        if _num_bytes(layers) > self.max_bytes:
            return
        with self._lock:
            length, longest = self._longest(key)
            if length == len(key):  # a stored one begins with it
                return
            entry = self._new_entry(key, layers, longest, length, is_shared)
            if longest is not None and length == len(longest.key) and entry.shortest <= longest.shortest:
                self._remove(longest)  # the new one begins with it, and gives back what it does
            self._add(entry)
            self._drop_old_ends(key)
            while self.num_bytes > self.max_bytes:
                self._remove(next(iter(self._entries.values())))

    def _new_entry(
        self,
        key: PrefixKey,
        layers: dict[int, tuple[Tensor, Tensor]],
        longest: _Entry | None,
        length: int,
        is_shared: bool,
    ) -> _Entry:
        """A copy; windows begin where those of `longest` do, which gives back `length` tokens, if it is near enough."""
        if longest is None or not self._is_near(key, longest, length):
            shortest = 0 if self._window is None or len(key) < self._window else len(key)
            copies = {index: (keys.clone(), values.clone()) for index, (keys, values) in layers.items()}
            return _Entry(key, copies, shortest, is_shared)
        copies = {}
        for index, (keys, values) in layers.items():
            old_keys, old_values = longest.layers[index]
            stop, num_new = old_keys.shape[2] - (len(longest.key) - length), len(key) - length
            is_full = keys.shape[2] == len(key)
            copies[index] = (
                keys.clone() if is_full else torch.cat([old_keys[:, :, :stop], keys[:, :, -num_new:]], dim=2),
                values.clone() if is_full else torch.cat([old_values[:, :, :stop], values[:, :, -num_new:]], dim=2),
            )
        is_shared = is_shared or (longest.is_shared and length == len(longest.key))
        return _Entry(key, copies, longest.shortest, is_shared)

    def _is_near(self, key: PrefixKey, longest: _Entry, length: int) -> bool:
        """Whether an entry's windows up to token `length` and the tokens of a key after it are few enough for one."""
        if self._window is None or len(key) < self._window:
            return False
        num_new, num_kept = len(key) - length, self._window - 1
        num_stored = min(keys.shape[2] for keys, _ in longest.layers.values()) - (len(longest.key) - length)
        return num_new <= num_kept and num_stored + num_new <= 2 * num_kept

    def _drop_old_ends(self, key: PrefixKey) -> None:
        """Of the entries that a conversation begins with, those that are neither shared nor the last few."""
        if self._window is not None:
            ends = [entry for entry in self._reusable.prefixes_of(key) if not entry.is_shared]
            for entry in ends[:-_MAX_ENDS]:
                self._remove(entry)

    def _longest(self, key: PrefixKey) -> tuple[int, _Entry | None]:
        """The entry that gives back the most tokens of a key, and how many."""
        return self._reusable.longest(key, lambda entry: entry.num_reusable(key))

    def _add(self, entry: _Entry) -> None:
        self._entries[id(entry)] = entry
        for index, hashes in self._indices_of(entry):
            index.add(entry, hashes)
        self.num_bytes += entry.num_bytes

    def _remove(self, entry: _Entry) -> None:
        del self._entries[id(entry)]
        for index, hashes in self._indices_of(entry):
            index.remove(entry, hashes)
        self.num_bytes -= entry.num_bytes

    def _indices_of(self, entry: _Entry) -> list[tuple[_BlockIndex, list[int]]]:
        hashes = entry.key.block_hashes
        reusable = self._reusable, hashes[max(0, entry.shortest // _BLOCK_TOKENS - 1) :]
        return [reusable, (self._branching, hashes)] if entry.shortest else [reusable]


class _BlockIndex:
    """Entries by hashes of blocks."""

    def __init__(self) -> None:
        self._entries: dict[int, list[_Entry]] = {}

    def add(self, entry: _Entry, hashes: Sequence[int]) -> None:
        for block_hash in hashes:
            self._entries.setdefault(block_hash, []).append(entry)

    def remove(self, entry: _Entry, hashes: Sequence[int]) -> None:
        for block_hash in hashes:
            entries = self._entries[block_hash]
            entries.remove(entry)
            if not entries:
                del self._entries[block_hash]

    def longest(self, key: PrefixKey, measure: Callable[[_Entry], int]) -> tuple[int, _Entry | None]:
        """The entry that has the most tokens of a key, and how many; `measure` counts them."""
        for block_hash in reversed(key.block_hashes):
            newest = self._entries.get(block_hash, [])[-_MAX_COMPARED:]
            lengths = [measure(entry) for entry in newest]
            if longest := max(lengths, default=0):
                return longest, newest[lengths.index(longest)]
        return 0, None

    def prefixes_of(self, key: PrefixKey) -> list[_Entry]:
        """The entries that a key begins with, the shortest first."""
        entries = {id(entry): entry for block_hash in key.block_hashes for entry in self._entries.get(block_hash, ())}
        return sorted((e for e in entries.values() if e.key.num_common(key) == len(e.key)), key=_length)


def _num_bytes(layers: dict[int, tuple[Tensor, Tensor]]) -> int:
    return sum(part.nbytes for layer in layers.values() for part in layer)


def _length(entry: _Entry) -> int:
    return len(entry.key)
