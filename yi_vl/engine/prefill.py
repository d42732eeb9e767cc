"""Prefill: the keys and values of prompts, computed together and in chunks, but for prefixes that are cached.

B prompts, R remaining tokens of the longest of them, T tokens in the cache, V vocabulary, P features per image, D
language width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..model import YiVLForConditionalGeneration
from .cache_layers import has_gaps
from .image_features import ImageFeatures
from .kv_cache import gather, lacks_image
from .prefill_inputs import NewTokens, PrefillInputs, prefill_inputs
from .prefix_cache import PrefixCache, PrefixKey, shared_prefix_length
from .request import Request
from .running_batch import RunningBatch, forward


class Prefill:
    """Prompts on their way into the KV cache. A prefix that all of them share is computed once, and cached; then each
    takes the longest prefix that is cached.

    Call `encode_images` until nothing is missing, then `step` until it returns a batch.
    """

    def __init__(
        self,
        model: YiVLForConditionalGeneration,
        features: ImageFeatures,
        prefixes: PrefixCache,
        requests: Sequence[Request],
        device: torch.device,
    ) -> None:
        self.requests = list(requests)
        self.num_computed = 0  # tokens so far, padding included
        self._model, self._features, self._prefixes, self._device = model, features, prefixes, device
        self._images = {
            image.digest: pixels
            for request in requests
            for image, pixels in zip(request.prompt.key.images, request.prompt.images_uint8)
        }
        self._keys = [request.prompt.key for request in requests]
        num_shared = shared_prefix_length(self._keys) if len(requests) > 1 else 0
        self._shared_key = self._keys[0].head(num_shared)
        self._rows = self._shared_rows() or self._all_rows()

    @property
    def num_remaining(self) -> int:
        """Tokens of the longest prompt that are still to be computed."""
        return self._rows.num_remaining

    @property
    def missing_images(self) -> list[bytes]:
        """Digests of the images to encode before the next step."""
        return self._rows.missing_images

    def encode_images(self, digests: Sequence[bytes]) -> None:
        """Encode some of the missing images."""
        images = {digest: self._images[digest] for digest in digests}
        self._rows.features |= self._features.encode(images, self._device)

    def step(self, max_tokens: int) -> RunningBatch | None:
        """Compute the next chunk, of at most so many tokens, and one of each prompt at least.

        Returns:
            When everything is computed, the requests in their slots; their first tokens are to be sampled.
        """
        rows = self._rows
        num_columns = max(1, max_tokens // len(rows.keys))
        self.num_computed += len(rows.keys) * min(num_columns, rows.num_remaining)
        before = rows.num_tokens
        rows.step(self._model, num_columns)
        self._store(rows, before)
        if not rows.num_remaining and rows.keys is not self._keys:
            self._rows = self._all_rows(rows.cache)
            return None
        rows.compact()
        if rows.num_remaining:
            return None
        return RunningBatch(self._model, self.requests, rows.cache, rows.attention_mask, rows.logits)

    def _store(self, rows: _PaddedPrompts, before: Sequence[int]) -> None:
        """Cache prefixes that end among the tokens just computed; `before` are each row's tokens before these."""
        for row, (key, start, stop) in enumerate(zip(rows.keys, before, rows.num_tokens, strict=True)):
            for end in sorted(end for end in rows.ends[row] if start < end <= stop):
                is_shared = rows.keys is not self._keys or end < max(rows.ends[row])
                self._prefixes.put(key.head(end), rows.cache, row, rows.attention_mask, is_shared)

    def _shared_rows(self) -> _PaddedPrompts | None:
        """What all prompts share, as one row; None where it is cached, or nothing is shared."""
        cached = self._prefixes.find(self._shared_key)
        if cached.get_seq_length() == len(self._shared_key):
            return None
        ends = self._prefixes.ends(self._shared_key) | {len(self._shared_key)}
        return _PaddedPrompts([self._shared_key], [cached], [ends], self._features, self._device)

    def _all_rows(self, shared: Cache | None = None) -> _PaddedPrompts:
        """All prompts, each after its own longest cached prefix."""
        prefixes = [self._prefixes.find(key.reusable_head) for key in self._keys]
        if shared is not None:  # it may have been too large to be cached
            length = shared.get_seq_length()
            prefixes = [prefix if prefix.get_seq_length() >= length else shared for prefix in prefixes]
        ends = [self._prefixes.ends(key) for key in self._keys]
        return _PaddedPrompts(self._keys, prefixes, ends, self._features, self._device)


class _PaddedPrompts:
    """B prompts, or what they share, each after its own prefix; padded on the left.

    Where windows, which count columns, would be too short for padding between a prefix and what follows, the latter is
    padded on the right instead, and `compact` is to be called after each step.

    Args:
        prefixes: a KV cache of one row for each.
        ends: for each, numbers of first tokens that are to be stored.
    """

    def __init__(
        self,
        keys: list[PrefixKey],
        prefixes: Sequence[Cache],
        ends: list[set[int]],
        features: ImageFeatures,
        device: torch.device,
    ) -> None:
        self.keys = keys
        self.ends = ends
        self._device = device
        self._rows = [_new_tokens(key, prefix) for key, prefix in zip(keys, prefixes, strict=True)]
        masks = [torch.ones(1, row.start, dtype=torch.bool, device="cpu") for row in self._rows]
        if len(keys) == 1:
            self.cache, mask = prefixes[0], masks[0]
        else:
            self.cache, mask = gather([(prefix, mask, [0]) for prefix, mask in zip(prefixes, masks, strict=True)])
        self.attention_mask = mask.to(device)  # (B, T) bool
        self._digests = dict.fromkeys(digest for row in self._rows for digest in row.digests)
        self.features = features.cached(list(self._digests))  # digest -> (P, D)
        self._num_done = 0
        lengths = [len(row) for row in self._rows]
        self._num_columns = max(lengths)  # R
        padding = [0 if any(self.cache.is_sliding) else self._num_columns - length for length in lengths]
        self._first_columns, self._last_columns = padding, [p + n - 1 for p, n in zip(padding, lengths)]
        self._logits: dict[int, Tensor] = {}  # (V,) after the last token of each row
        self._inputs: PrefillInputs | None = None

    @property
    def num_remaining(self) -> int:
        return self._num_columns - self._num_done

    @property
    def num_tokens(self) -> list[int]:
        """Of each row, in the cache."""
        return self.attention_mask.sum(1).tolist()

    @property
    def logits(self) -> Tensor:
        """(B, V), after all tokens."""
        return torch.stack([self._logits[row] for row in range(len(self.keys))])

    @property
    def missing_images(self) -> list[bytes]:
        return [digest for digest in self._digests if digest not in self.features]

    def step(self, model: YiVLForConditionalGeneration, num_columns: int) -> None:
        """Compute the next chunk, of so many tokens of each row."""
        if self._inputs is None:
            self._inputs = prefill_inputs(model, self._rows, self._first_columns, self.features, self._device)
        start, stop = self._num_done, min(self._num_done + num_columns, self._num_columns)
        mask, position_ids = self._positions(start, stop)
        self.attention_mask = torch.cat([self.attention_mask, mask], dim=1)
        column_of = {row: last - start for row, last in enumerate(self._last_columns) if start <= last < stop}
        columns = sorted(set(column_of.values())) or [stop - start - 1]
        indices = torch.tensor(columns, device=self._device)
        inputs = self._inputs.chunk(start, stop)
        logits = forward(model, self.cache, self.attention_mask, position_ids, indices, **inputs)
        self._logits |= {row: logits[row, columns.index(column)] for row, column in column_of.items()}
        self._num_done = stop

    def compact(self) -> None:
        """Move padding that is not in front of a row's tokens there, for windows."""
        if any(self.cache.is_sliding) and has_gaps(self.attention_mask):
            self.cache, self.attention_mask = gather([(self.cache, self.attention_mask, range(len(self.keys)))])

    def _positions(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of some columns: which are tokens (B, stop - start) bool, and their position ids (B, stop - start)."""
        columns = torch.arange(start, stop, device=self._device)
        first, last, starts = (
            torch.tensor(values, device=self._device).unsqueeze(1)
            for values in (self._first_columns, self._last_columns, [row.start for row in self._rows])
        )
        is_token = (columns >= first) & (columns <= last)
        return is_token, (columns - first + starts).masked_fill(~is_token, 0)


def _new_tokens(key: PrefixKey, prefix: Cache) -> NewTokens:
    """What follows a cached prefix, which may lack the keys of its last image."""
    start = prefix.get_seq_length()
    images = key.head(start).images
    is_needed = bool(images) and lacks_image(prefix) and all(image.start != start for image in key.images)
    return NewTokens(key, start, images[-1].digest if is_needed else None)
