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
    """The weighted auxiliary losses, a mean over layers.

    Balance at one level is E * sum_i f_i P_i: f_i is the fraction of tokens whose most probable expert is i, P_i the
    mean probability of i. It is 1 for a balanced router, up to E for one that always takes the same expert. The levels
    are all ranks' tokens, this rank's, and a mean over parts of these. The gradient is that of this rank's tokens.
    """
    weights = config.router_balance_weights
    losses = []
    for sums in layers:
        whole = RouterSums(*(part.sum(0, keepdim=True) for part in sums))
        balance = [balance_loss(_over_ranks(whole)), balance_loss(whole), balance_loss(sums)]
        entropy = whole.entropy.sum() / whole.tokens.sum().clamp_min(1)
        losses.append(sum(w * loss for w, loss in zip(weights, balance)) + config.router_entropy_weight * entropy)
    return torch.stack(losses).mean()


def balance_loss(sums: RouterSums) -> Tensor:
    """E * sum_i f_i P_i, a mean over those parts that have tokens."""
    tokens = sums.tokens.clamp_min(1).unsqueeze(1)  # (G, 1)
    num_experts = sums.probabilities.shape[1]
    losses = num_experts * (sums.first_choices / tokens * (sums.probabilities / tokens)).sum(1)  # (G,)
    return losses.sum() / (sums.tokens > 0).sum().clamp_min(1)


def _over_ranks(sums: RouterSums) -> RouterSums:
    """The sums over all ranks' tokens, with the gradient of this rank's."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return sums
    counts = torch.cat([sums.tokens, sums.first_choices.flatten(), sums.probabilities.detach().flatten()])
    distributed.all_reduce(counts)
    num_experts = sums.probabilities.shape[1]
    tokens, first_choices, probabilities = counts.split([1, num_experts, num_experts])
    own = sums.probabilities
    everyone = probabilities.unsqueeze(0) + (own - own.detach())
    return sums._replace(tokens=tokens, first_choices=first_choices.unsqueeze(0), probabilities=everyone)
