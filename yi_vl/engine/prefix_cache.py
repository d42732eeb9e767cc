"""What was computed lately and may be needed again, within a limit of bytes. Called by predict.py; calls cache.py.

T tokens, H key-value heads, E head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers.cache_utils import Cache

from .kv_cache import layers_of, new_cache

Keys = npt.NDArray[np.int64]  # (T,): what decides a token's keys and values: its id, or picture and patch

Value = TypeVar("Value")


class LeastRecentlyUsed(Generic[Value]):
    """A bounded store: when it is full, what was used longest ago goes first. Safe to share between threads.

    Args:
        max_bytes: of all values together; a single larger one is not kept.
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
        """Keep a value of that size, and let go of old ones until all fit."""
        with self._lock:
            if key in self._values:
                self.num_bytes -= self._values.pop(key)[1]
            if num_bytes > self.max_bytes:
                return
            self._values[key] = (value, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._values.popitem(last=False)[1][1]


@dataclass(frozen=True)
class _Known:
    keys: Keys
    layers: list[tuple[Tensor, Tensor]]  # keys and values of each layer, (1, H, T, E)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)


class PrefixCache:
    """Keys and values of conversations read lately, so that what begins alike is read once. Safe between threads.

    What goes in and what comes out are copies, without the room that a growing cache has: nobody writes to what is
    kept, and its size is what it takes.

    Args:
        max_bytes: of all keys and values together; what was used longest ago goes first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._known: list[_Known] = []  # most recently used last
        self._lock = Lock()

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return sum(known.num_bytes for known in self._known)

    def find(self, keys: Keys) -> Cache:
        """A cache of one row with the longest known beginning of `keys`; it may be empty."""
        cache = new_cache()
        with self._lock:
            length, best = max(
                ((_num_common(known.keys, keys), index) for index, known in enumerate(self._known)), default=(0, 0)
            )
            if not length:
                return cache
            found = self._known.pop(best)
            self._known.append(found)
        for index, (layer_keys, layer_values) in enumerate(found.layers):
            cache.update(layer_keys[:, :, :length], layer_values[:, :, :length], index)
        return cache

    def put(self, keys: Keys, cache: Cache) -> None:
        """Keep a row's cache; `keys` are those of the tokens that it holds."""
        assert cache.get_seq_length() == len(keys), f"{cache.get_seq_length()} tokens cached, {len(keys)} keys"
        layers = layers_of(cache)
        if sum(part.nbytes for layer in layers for part in layer) > self.max_bytes:
            return
        with self._lock:
            if any(_num_common(known.keys, keys) == len(keys) for known in self._known):
                return
            self._known = [known for known in self._known if _num_common(known.keys, keys) < len(known.keys)]
            self._known.append(
                _Known(keys, [(layer_keys.clone(), layer_values.clone()) for layer_keys, layer_values in layers])
            )
            while self.num_bytes > self.max_bytes:
                self._known.pop(0)


def num_common(rows: list[Keys]) -> int:
    """How many keys all rows begin with, less one where that is a whole row: its last token is to be read anew."""
    return min([_num_common(rows[0], row) for row in rows[1:]] + [len(row) - 1 for row in rows])


def _num_common(first: Keys, second: Keys) -> int:
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length
