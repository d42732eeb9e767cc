"""Experts in training: the routing of each step, and the experts of each layer in metrics.jsonl.

Routing is a pure function of the step, so a resumed run continues exactly. L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from yi_vl.decoder.experts import Router, RouterSums

from .config import LORA, TrainConfig, num_steps
from .config_decoder import ExpertsConfig
from .data.batch import StepBatch
from .distributed import exchange

_NUM_SUMS = 3  # of a layer, before those of its experts


def has_experts(text_config: Any) -> bool:
    """Whether a language model's feed-forward layers are experts."""
    return bool(getattr(text_config, "num_experts", 0))


def trains_routers(model: nn.Module) -> bool:
    """Whether a router has weights that are trained: frozen ones get no auxiliary loss."""
    return any(module.weight.requires_grad for module in model.modules() if isinstance(module, Router))


def check_experts(text_config: Any, config: TrainConfig, model: str) -> None:
    """
    Args:
        model: its name, for errors.

    Raises:
        ValueError: the language model has no experts, or too few for the settings of `experts`; or it has experts,
            which `lora.base` would leave as they are.
    """
    experts = config.experts
    if has_experts(text_config) and config.lora.base is not None:
        raise ValueError(
            f"lora.base: {config.lora.base} stores linear layers in four bits, but most of {model} are experts, which "
            "are no linear layers and would stay as they are; set lora.base to null."
        )
    if experts == ExpertsConfig():
        return
    if not has_experts(text_config):
        raise ValueError(f"experts has settings, but {model} has no experts; leave them out, or make some (upcycle).")
    if experts.max_experts is not None and experts.max_experts > text_config.num_experts:
        raise ValueError(
            f"experts.max_experts is {experts.max_experts}, but each layer of {model} has {text_config.num_experts} "
            "experts."
        )
    if experts.max_experts is not None and experts.top_p is None and text_config.router_top_p is None:
        raise ValueError(
            f"experts.max_experts is {experts.max_experts}, but {model} routes by top-k, "
            f"{text_config.num_experts_per_tok} for each token; give experts.top_p, or leave it out."
        )


def set_experts_(text_config: Any, experts: ExpertsConfig, step: int) -> None:
    """Set the routing and the losses of a step, numbered from 0, where they differ from the model's."""
    if experts.top_p is not None:
        is_top_p = step >= experts.top_p_from_step
        text_config.router_top_p = experts.top_p if is_top_p else None
        text_config.norm_topk_prob = experts.norm_topk_prob or not is_top_p
    for key, value in (
        ("max_experts_per_tok", experts.max_experts),
        ("router_balance_weights", experts.balance_weights),
        ("router_balance_parts", experts.balance_parts),
        ("router_entropy_weight", experts.entropy_weight),
    ):
        if value is not None:
            setattr(text_config, key, value)


def auxiliary_weights(accelerator: Accelerator, text_config: Any, batch: StepBatch, num_terms: int) -> list[float]:
    """What the auxiliary loss of each micro-batch of this rank counts in the micro-batch's summed loss.

    Divided by the step's terms like that sum, the auxiliary loss of the step is the mean over the micro-batches of all
    ranks, weighted by their tokens.

    Args:
        num_terms: of the step on all ranks.
    """
    counts = [int(micro_batch.attention_mask.sum()) for micro_batch in batch.micro_batches]
    if not has_experts(text_config):
        return [0.0] * len(counts)
    total = sum(rank_total for (rank_total,) in exchange(accelerator, [sum(counts)]))
    return [num_terms * count / total for count in counts]


def describe_experts(model: nn.Module, text_config: Any, config: TrainConfig) -> list[str]:
    """Lines for the start-up table: the routing over the run, the losses, and what adapters leave out."""
    if not has_experts(text_config):
        return []
    top_k, top_p, most = text_config.num_experts_per_tok, text_config.router_top_p, text_config.max_experts_per_tok
    start = config.experts.top_p_from_step
    routing = f"top {top_k} for each token"
    if config.experts.top_p is not None or top_p is not None:
        limit = config.experts.top_p if config.experts.top_p is not None else top_p
        by_top_p = f"as few for each token as reach {limit:g}, {most} at most"
        routing = f"{routing} for {start:,} steps, then {by_top_p}" if start else by_top_p
        routing += " (top_p_from_step is after the end)" if start >= num_steps(config) else ""
    lines = [f"experts: {text_config.num_experts} in each layer, {routing}"]
    if config.trainable.language == LORA:
        lines.append("experts: without adapters, which are on linear layers; attention alone is adapted")
    if not trains_routers(model):
        return [*lines, "experts: the routers are frozen, so there is no auxiliary loss"]
    weights = ", ".join(f"{weight:g}" for weight in text_config.router_balance_weights)
    return [
        *lines,
        f"experts: balance losses {weights} over ranks, one rank and its {text_config.router_balance_parts} parts; "
        f"entropy {text_config.router_entropy_weight:g}",
    ]


@torch.no_grad()
def layer_sums(layers: Sequence[RouterSums], losses: Tensor) -> Tensor:
    """Sums over tokens that add up over micro-batches, ranks and steps: (L, 3 + E) float64.

    Of each layer the tokens, their entropy and their auxiliary loss, and the tokens that get each expert.

    Args:
        losses: (L,), the auxiliary losses.
    """
    sums = RouterSums(*(torch.stack(parts).double().sum(1) for parts in zip(*layers)))
    return torch.cat([torch.stack([sums.tokens, sums.entropy, sums.tokens * losses], dim=1), sums.routed], dim=1)


def experts_per_token(sums: Tensor | None) -> float | None:
    """The mean over tokens and layers, from `layer_sums`; None without them."""
    return None if sums is None else float(sums[:, _NUM_SUMS:].sum() / sums[:, 0].sum().clamp_min(1))


def expert_metrics(sums: Tensor) -> dict[str, list[float]]:
    """What metrics.jsonl says of each layer, from sums of `layer_sums`."""
    tokens, entropy, losses = sums[:, :_NUM_SUMS].unbind(1)  # (L,)
    routed = sums[:, _NUM_SUMS:]  # (L, E)
    tokens = tokens.clamp_min(1)
    return {
        "experts_per_token": (routed.sum(1) / tokens).tolist(),
        "max_load": (routed.max(1).values / routed.mean(1).clamp_min(1e-9)).tolist(),
        "unused_experts": (routed == 0).sum(1).tolist(),
        "entropy": (entropy / tokens).tolist(),
        "auxiliary_loss": (losses / tokens).tolist(),
    }
