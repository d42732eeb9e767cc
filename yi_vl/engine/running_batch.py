"""Requests that are decoded together: prompts in, one slot each, one token per slot and step.

B requests, S prompt tokens, T tokens so far, V vocabulary, N images, D language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .detokenizer import FinishReason, IncrementalDetokenizer
from .kv_cache import CACHE_ARGUMENT, gather
from .prefix_cache import PrefixKey
from .sampling import Sampler


@dataclass(frozen=True)
class Prompts:
    """Inputs of the model, one row per prompt; see the table atop model.py."""

    input_ids: Tensor  # (B, S) int64, padded on the left
    attention_mask: Tensor  # (B, S) int64
    images_uint8: Tensor | None  # (N, H, W, 3) uint8, on the CPU, in reading order
    prefix_keys: list[PrefixKey]

    @property
    def num_tokens(self) -> list[int]:
        """Of each prompt, images included."""
        return self.attention_mask.sum(1).tolist()

    @property
    def position_ids(self) -> Tensor:
        """(B, S) int64: 0 for a prompt's first token and for padding."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    def is_at(self, start: int, stop: int | None = None) -> Tensor:
        """(B, S) bool: tokens at the positions [start, stop) of their prompt."""
        position_ids, is_token = self.position_ids, self.attention_mask.bool()
        is_in_range = position_ids >= start if stop is None else (position_ids >= start) & (position_ids < stop)
        return is_token & is_in_range


@dataclass(frozen=True)
class Request:
    """A request that occupies a slot.

    Args:
        index: the caller's number for it.
        generator: for sampling; None if it is greedy.
    """

    index: int
    detokenizer: IncrementalDetokenizer
    generator: torch.Generator | None


@dataclass(frozen=True)
class StepOutput:
    """What one step gave a request: its new text (often none), and whether and why it is finished."""

    request_index: int
    text: str
    finish_reason: FinishReason | None
    num_tokens: int  # generated so far


class RunningBatch:
    """The requests in the slots, their KV cache, and the logits of their next token, (B, V).

    Requests leave and join between steps; shorter ones are padded on the left, with their own position ids.
    """

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[Request], cache: Cache, attention_mask: Tensor, logits: Tensor
    ) -> None:
        self.requests = list(requests)
        self.cache = cache
        self.logits = logits
        self._model = model
        self._attention_mask = attention_mask  # (B, T) bool
        self._tokens: Tensor | None = None  # (B,) sampled, not in the cache yet

    def __len__(self) -> int:
        return len(self.requests)

    def sample(self, sampler: Sampler) -> list[StepOutput]:
        """The next token of every request."""
        self._tokens = sampler(self.logits, [request.generator for request in self.requests])
        outputs = []
        for request, token in zip(self.requests, self._tokens.tolist(), strict=True):
            detokenizer = request.detokenizer
            text = detokenizer.add(token)
            outputs.append(StepOutput(request.index, text, detokenizer.finish_reason, detokenizer.num_tokens))
        return outputs

    def decode(self) -> None:
        """Release the slots of finished requests, and compute the others' logits after the tokens just sampled."""
        assert self._tokens is not None
        slots = [slot for slot, request in enumerate(self.requests) if not request.detokenizer.finish_reason]
        tokens = self._tokens[slots]
        if not slots:
            self.requests = []
            return
        if len(slots) < len(self):
            self.select(slots)
        self.step(tokens)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        """A forward pass over every request's newest token, (B,)."""
        position_ids = self._attention_mask.sum(1, keepdim=True)  # (B, 1)
        self._attention_mask = F.pad(self._attention_mask, (0, 1), value=True)
        input_ids = tokens.unsqueeze(1).to(position_ids.device)
        self.logits = forward(self._model, self.cache, self._attention_mask, position_ids, input_ids=input_ids)

    @torch.inference_mode()
    def select(self, slots: Sequence[int]) -> None:
        """Keep some of the requests."""
        self.requests = [self.requests[slot] for slot in slots]
        self.cache, self._attention_mask = gather([(self.cache, self._attention_mask, slots)])
        self.logits = self.logits[slots]

    @torch.inference_mode()
    def extend(self, other: RunningBatch) -> None:
        """Add the requests of another batch."""
        batches = (self, other)
        self.cache, self._attention_mask = gather(
            [(batch.cache, batch._attention_mask, range(len(batch))) for batch in batches]
        )
        self.logits = torch.cat([batch.logits for batch in batches])
        self.requests += other.requests


def forward(
    model: PreTrainedModel, cache: Cache, attention_mask: Tensor, position_ids: Tensor, **inputs: Tensor
) -> Tensor:
    """Logits (B, V) after the last of new tokens, whose keys and values are added to the cache.

    `attention_mask`: (B, T) bool, of all tokens; `position_ids` and `inputs` are of the new ones.
    """
    outputs = model(
        **inputs,
        attention_mask=None if attention_mask.all() else attention_mask,  # attention is faster without a mask
        position_ids=position_ids,
        logits_to_keep=1,
        **{CACHE_ARGUMENT: cache},
    )
    return outputs.logits[:, -1]  # (B, V)
