"""Requests that are decoded together: one slot each, one token per slot and step.

B requests, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .kv_cache import CACHE_ARGUMENT, gather
from .request import Request, StepOutput
from .sampling import Sampler


class RunningBatch:
    """The requests in the slots, their KV cache, and the logits of their next token, (B, V).

    Requests leave and join between steps; shorter ones are padded on the left, with their own position ids.
    """

    def __init__(
        self, model: PreTrainedModel, requests: Sequence[Request], cache: Cache, attention_mask: Tensor, logits: Tensor
    ) -> None:
        self.requests = list(requests)
        self.cache = cache
        self.attention_mask = attention_mask  # (B, T) bool, of the tokens in the cache
        self.logits = logits
        self._model = model
        self._tokens = logits.new_zeros(len(logits), dtype=torch.long)  # (B,) sampled, not in the cache yet

    def __len__(self) -> int:
        return len(self.requests)

    def sample(self, sampler: Sampler) -> list[StepOutput]:
        """The next token of every request; one that is done by then gets no more."""
        samplings = [request.sampling for request in self.requests]
        self._tokens = sampler(self.logits, samplings, [request.generator for request in self.requests])
        tokens = self._tokens.tolist()
        return [request.add(token) for request, token in zip(self.requests, tokens, strict=True) if not request.is_done]

    def decode(self) -> None:
        """Compute the logits after the tokens just sampled, whose keys and values are cached from now on."""
        self.step(self._tokens)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> None:
        """A forward pass over every request's newest token, (B,)."""
        position_ids = self.attention_mask.sum(1, keepdim=True)  # (B, 1)
        self.attention_mask = F.pad(self.attention_mask, (0, 1), value=True)
        input_ids = tokens.unsqueeze(1).to(position_ids.device)
        self.logits = forward(self._model, self.cache, self.attention_mask, position_ids, input_ids=input_ids)

    @torch.inference_mode()
    def select(self, slots: Sequence[int]) -> None:
        """Keep some of the requests."""
        self.requests = [self.requests[slot] for slot in slots]
        self.cache, self.attention_mask = gather([(self.cache, self.attention_mask, slots)])
        self.logits = self.logits[slots]
        self._tokens = self._tokens[slots]

    @torch.inference_mode()
    def extend(self, other: RunningBatch) -> None:
        """Add the requests of another batch; both have sampled, or both have not."""
        batches = (self, other)
        self.cache, self.attention_mask = gather(
            [(batch.cache, batch.attention_mask, range(len(batch))) for batch in batches]
        )
        self.logits = torch.cat([batch.logits for batch in batches])
        self._tokens = torch.cat([batch._tokens for batch in batches])
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
