"""Requests that are decoded together: one slot each, one token per slot and step.

B requests, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..versions import CACHE_ARGUMENT
from .kv_cache import gather, shift_row_, truncate_
from .request import Request, StepOutput
from .sampler import Sampler
from .sampling import Sampling

_MAX_PADDING = 1.25  # columns of the cache, to the tokens of its longest row


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
        self._tokens = sampler(self.logits, *self._sampling_options)
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
        self.logits = forward(self._model, self.cache, self.attention_mask, position_ids, input_ids=input_ids)[:, -1]

    @torch.inference_mode()
    def verify(self, drafts: Sequence[Sequence[int]], sampler: Sampler) -> list[StepOutput]:
        """A forward pass over every request's newest token and its draft: the tokens of the draft that it would have
        generated anyway, and the next one. Requests that are not greedy have empty drafts."""
        num_cached = self.attention_mask.shape[1]
        logits = self._forward_drafts(drafts)  # (B, 1 + K, V)
        sampled, greedy = sampler(logits[:, 0], *self._sampling_options).tolist(), sampler.greedy(logits).tolist()
        outputs, tokens, num_kept = [], [], []
        for slot, (request, draft) in enumerate(zip(self.requests, drafts, strict=True)):
            num_accepted = next((i for i, token in enumerate(draft) if token != greedy[slot][i]), len(draft))
            tokens.append(greedy[slot][num_accepted] if draft else sampled[slot])
            before = request.detokenizer.num_tokens
            if request.lookup and draft:
                request.lookup.record(len(draft), num_accepted)
            if not request.is_done:
                outputs.append(request.add(*draft[:num_accepted], tokens[-1]))
            num_kept.append(1 + min(num_accepted, request.detokenizer.num_tokens - before))
        self._tokens = torch.tensor(tokens, device=self._tokens.device)
        last = torch.tensor(num_kept, device=logits.device) - 1
        self.logits = logits[torch.arange(len(tokens), device=logits.device), last]
        self._keep_columns(num_cached, num_kept)
        return outputs

    def _forward_drafts(self, drafts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, 1 + K, V) after the newest tokens and the drafts, which are padded on the right."""
        device, num_drafted = self.attention_mask.device, max(map(len, drafts))  # K
        padded = torch.tensor([[*draft, *[0] * (num_drafted - len(draft))] for draft in drafts], device="cpu")
        input_ids = torch.cat([self._tokens.cpu().unsqueeze(1), padded], dim=1).to(device)  # (B, 1 + K)
        columns = torch.arange(1 + num_drafted, device=device)
        is_token = columns <= torch.tensor([len(draft) for draft in drafts], device=device).unsqueeze(1)
        position_ids = self.attention_mask.sum(1, keepdim=True) + columns
        mask = torch.cat([self.attention_mask, is_token], dim=1)
        return forward(self._model, self.cache, mask, position_ids, 1 + num_drafted, input_ids=input_ids)

    def _keep_columns(self, num_cached: int, num_kept: Sequence[int]) -> None:
        """Drop the keys and values of rejected tokens: all after the first `num_cached`, and so many of each row."""
        longest = max(num_kept)
        kept = torch.tensor(num_kept, device=self.attention_mask.device).unsqueeze(1)
        is_kept = torch.arange(longest, device=kept.device) < kept
        self.attention_mask = torch.cat([self.attention_mask, is_kept], dim=1)
        truncate_(self.cache, num_cached + longest)
        if any(self.cache.is_sliding):  # windows count columns, padding between tokens included
            for row, num in enumerate(num_kept):
                if num < longest:
                    shift_row_(self.cache, self.attention_mask, row, longest - num)
        if self.attention_mask.shape[1] > _MAX_PADDING * self.attention_mask.sum(1).max():
            self.select(range(len(self)))  # which leaves out what was rejected between the tokens of others

    @property
    def _sampling_options(self) -> tuple[list[Sampling], list[torch.Generator | None]]:
        return [request.sampling for request in self.requests], [request.generator for request in self.requests]

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
    model: PreTrainedModel,
    cache: Cache,
    attention_mask: Tensor,
    position_ids: Tensor,
    num_logits: int | Tensor = 1,
    **inputs: Any,
) -> Tensor:
    """Logits (B, num_logits, V) after the last of new tokens, whose keys and values are added to the cache.

    Args:
        attention_mask: (B, T) bool, of all tokens.
        position_ids: (B, S) of the new ones, as are `inputs`.
        num_logits: or the indices, (N,), of new tokens, for logits (B, N, V) after these.
    """
    outputs = model(
        **inputs,
        attention_mask=None if attention_mask.all() else attention_mask,  # attention is faster without a mask
        position_ids=position_ids,
        logits_to_keep=num_logits,
        **{CACHE_ARGUMENT: cache},
    )
    return outputs.logits if isinstance(num_logits, Tensor) else outputs.logits[:, -num_logits:]
