"""Settings of a training run for a hybrid language model: routing and losses of its experts, and distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class ExpertsConfig:
    """Routing and auxiliary losses of a language model of experts (yi_vl/decoder); null: as the model has them.

    What they are at the last step is saved with the trained model.

    top_p: each token gets the fewest experts whose probabilities reach this sum.
    top_p_from_step: until so many steps are done, the model's number of experts for each token instead (top-k), with
        weights divided by their sum.
    norm_topk_prob: whether weights are divided by their sum with `top_p`, too; arXiv 2403.07652 does not.
    max_experts: the most experts that a token gets by top-p.
    balance_weights: of the balance loss over a micro-batch of all ranks, of one rank, and of a part of a rank's tokens.
    balance_parts: parts of a rank's micro-batch.
    entropy_weight: of the entropy of the router's probabilities.
    """

    top_p: float | None = None
    top_p_from_step: int = 0
    norm_topk_prob: bool = True
    max_experts: int | None = None
    balance_weights: list[float] | None = None
    balance_parts: int | None = None
    entropy_weight: float | None = None


@dataclass
class DistillConfig:
    """Distillation from another Yi-VL (arXiv 1503.02531), such as the dense model that a hybrid one is made from.

    The loss of a supervised token is (1 - weight) x cross entropy + weight x temperature^2 x KL(teacher | model).

    teacher: a folder or hub id that `yi_vl.load` reads, of the same tokens; null: no distillation.
    temperature: both models' logits are divided by it.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 1.0


def check_routing(experts: ExpertsConfig, require: Callable[[bool, str], None]) -> None:
    """Refuse values that are out of range, or contradict each other."""
    top_p, start = experts.top_p, experts.top_p_from_step
    require(top_p is None or 0 < top_p <= 1, f"experts.top_p is {top_p}; expected more than 0, to 1.")
    require(start >= 0, f"experts.top_p_from_step is {start}; it must not be negative.")
    for key, value, default in (("top_p_from_step", start, 0), ("norm_topk_prob", experts.norm_topk_prob, True)):
        require(
            top_p is not None or value == default,
            f"experts.{key} is {str(value).lower()}, but there is no experts.top_p; give it, or leave both out.",
        )
    for key in ("max_experts", "balance_parts"):
        value = getattr(experts, key)
        require(value is None or value > 0, f"experts.{key} is {value}; it must be positive.")
    weights = experts.balance_weights
    require(
        weights is None or (len(weights) == 3 and min(weights) >= 0),
        f"experts.balance_weights is {weights}; expected three numbers of 0 or more: of the balance over all ranks, "
        "over one, and over a part of one's tokens.",
    )
    weight = experts.entropy_weight
    require(weight is None or weight >= 0, f"experts.entropy_weight is {weight}; it must not be negative.")
