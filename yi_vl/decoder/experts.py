"""A feed-forward layer of experts, chosen for each token by top-k or top-p, and sums over tokens for its losses.

T tokens, E experts, K places for the experts of a token, G parts of the tokens, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ..versions import EXPERTS_SKIP_FREE_PLACES
from .config import YiHybridConfig


class RouterSums(NamedTuple):
    """Sums over the tokens of each of G parts, from which the losses and the metrics of one layer are computed."""

    tokens: Tensor  # (G,)
    probabilities: Tensor  # (G, E)
    entropy: Tensor  # (G,) in nats
    first_choices: Tensor  # (G, E) tokens whose most probable expert it is
    routed: Tensor  # (G, E) tokens that get the expert


class Router(nn.Module):
    """Chooses the experts of each token, by the settings of the config as they are at the time of the call."""

    def __init__(self, config: YiHybridConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> probabilities (T, E) in fp32, and of each token's experts the ids (T, K) and weights (T, K).

        Places that top-p leaves free have the id E and the weight 0.
        """
        config = self.config
        with _no_autocast(hidden_states.device.type):  # in 16 bits probabilities would tie
            probabilities = F.linear(hidden_states.float(), self.weight.float()).softmax(-1)  # (T, E)
        weights, ids = probabilities.topk(config.num_routed, dim=-1)  # (T, K), the most probable first
        if config.router_top_p is not None:
            is_free = weights.cumsum(-1) - weights >= config.router_top_p  # the sum before it suffices
            weights = weights.masked_fill(is_free, 0.0)
            ids = ids.masked_fill(is_free, config.num_experts)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return probabilities, ids, weights


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class Experts(MixtralExperts):
    """transformers' experts, which skip free places: expert parallelism marks those of other ranks in the same way."""

    def __init__(self, config: YiHybridConfig) -> None:
        super().__init__(config)  # type: ignore[arg-type]  # it reads names that both configs have
        self._is_expert_parallel = True

    def forward(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """(T, D), and ids and weights (T, K) of each token's experts -> (T, D).

        Under autocast in its dtype, which grouped products are not cast to.
        """
        if not EXPERTS_SKIP_FREE_PLACES:
            ids = torch.where(ids == self.num_experts, ids[:, :1], ids)  # the first expert once more, of weight 0
        device = hidden_states.device.type
        is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else self.down_proj.dtype
        if self.down_proj.dtype == dtype:
            return super().forward(hidden_states, ids, weights)
        low = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        return functional_call(self, low, (hidden_states.to(dtype), ids, weights))  # type: ignore[no-any-return]


class SparseFeedForward(nn.Module):
    """A router and its experts, in place of a dense feed-forward layer."""

    def __init__(self, config: YiHybridConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, RouterSums | None]:
        """(B, S, D) -> (B, S, D), and in training mode the sums over tokens, weighted by `token_mask`, (B, S)."""
        tokens = hidden_states.flatten(0, -2)  # (T, D)
        probabilities, ids, weights = self.gate(tokens)
        output = self.experts(tokens, ids, weights.to(tokens.dtype)).view_as(hidden_states)
        if not self.training:
            return output, None
        return output, router_sums(probabilities, ids, token_mask, self.config.router_balance_parts)


def router_sums(probabilities: Tensor, ids: Tensor, token_mask: Tensor | None, num_parts: int) -> RouterSums:
    """Of contiguous parts of about the same number of tokens: (T, E) probabilities, (T, K) ids -> `RouterSums`.

    Args:
        token_mask: (B, S), how often each token counts: 0 for padding, and more than once if it stands for several.
    """
    num_tokens, num_experts = probabilities.shape
    device = probabilities.device
    counts = torch.ones(num_tokens, device=device) if token_mask is None else token_mask.flatten().float()
    before = counts.cumsum(0) - counts
    part = (before * num_parts).div(counts.sum().clamp_min(1), rounding_mode="floor").long().clamp_max(num_parts - 1)

    def sum_parts(values: Tensor) -> Tensor:
        """(T, ...) -> (G, ...)"""
        weighted = values * counts.view(-1, *[1] * (values.ndim - 1))
        return weighted.new_zeros(num_parts, *values.shape[1:]).index_add(0, part, weighted)

    def count_parts(choices: Tensor) -> Tensor:
        """(T, n) ids of experts, or E for none -> (G, E)"""
        bins = (part.unsqueeze(1) * (num_experts + 1) + choices).flatten()
        weights = counts.unsqueeze(1).expand_as(choices).flatten()
        totals = counts.new_zeros(num_parts * (num_experts + 1)).index_add(0, bins, weights)
        return totals.view(num_parts, num_experts + 1)[:, :num_experts]

    return RouterSums(
        tokens=sum_parts(torch.ones_like(counts)),
        probabilities=sum_parts(probabilities),
        entropy=sum_parts(-(probabilities * probabilities.clamp_min(1e-20).log()).sum(-1)),
        first_choices=count_parts(probabilities.argmax(-1, keepdim=True)),
        routed=count_parts(ids),
    )
