"""The auxiliary losses of the experts: balance at three levels (arXiv 2412.01253), and entropy (arXiv 2403.07652).

They are computed outside the layers, from sums over tokens, so that activation checkpointing, packing and data
parallelism do not change them. E experts, G parts of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from .config import YiHybridConfig
from .experts import RouterSums


def router_loss(layers: Sequence[RouterSums], config: YiHybridConfig) -> Tensor:
    """The mean over layers of `router_losses`."""
    return router_losses(layers, config).mean()


def router_losses(layers: Sequence[RouterSums], config: YiHybridConfig) -> Tensor:
    """The weighted auxiliary losses of each of L layers, (L,).

    Balance at one level is E * sum_i f_i P_i: f_i is the fraction of tokens whose most probable expert is i, P_i the
    mean probability of i. It is 1 for a balanced router, up to E for one that always takes the same expert. The levels
    are all ranks' tokens, this rank's, and a mean over parts of these. Gradients of the first, averaged over ranks by
    their tokens, are those of all ranks' tokens.
    """
    parts = RouterSums(*map(torch.stack, zip(*layers)))  # (L, G), (L, G, E)
    rank = RouterSums(*(sums.sum(1, keepdim=True) for sums in parts))
    levels = [balance_loss(sums) for sums in (_over_ranks(rank), rank, parts)]  # (L,) each
    losses = sum(weight * level for weight, level in zip(config.router_balance_weights, levels))
    return losses + config.router_entropy_weight * mean_entropy(rank)


def balance_loss(sums: RouterSums) -> Tensor:
    """E * sum_i f_i P_i, a mean over those parts that have tokens: (..., G, E) -> (...)"""
    tokens = sums.tokens.clamp_min(1).unsqueeze(-1)  # (..., G, 1)
    num_experts = sums.probabilities.shape[-1]
    losses = num_experts * (sums.first_choices / tokens * (sums.probabilities / tokens)).sum(-1)  # (..., G)
    return losses.sum(-1) / (sums.tokens > 0).sum(-1).clamp_min(1)


def mean_entropy(sums: RouterSums) -> Tensor:
    """Of the router's probabilities, in nats per token: (..., G) -> (...)"""
    return sums.entropy.sum(-1) / sums.tokens.sum(-1).clamp_min(1)


def _over_ranks(rank: RouterSums) -> RouterSums:
    """The sums over all ranks' tokens, (L, 1, ...), with the gradient of this rank's mean probabilities."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rank
    local = rank.probabilities
    sums = torch.cat([rank.tokens.unsqueeze(-1), rank.first_choices, local.detach()], dim=-1)  # (L, 1, 1 + 2 E)
    distributed.all_reduce(sums)
    tokens, first_choices, probabilities = sums.split([1, local.shape[-1], local.shape[-1]], dim=-1)
    ratio = tokens / rank.tokens.clamp_min(1).unsqueeze(-1)
    gradient_alone = (local - local.detach()) * ratio
    return rank._replace(
        tokens=tokens.squeeze(-1), first_choices=first_choices, probabilities=probabilities + gradient_alone
    )
