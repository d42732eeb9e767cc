"""What learns, and how fast: components, AdamW groups named after them, and the learning-rate schedule.

Called by loop.py; calls nothing of the project but the settings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from yi_vl.model import YiVLForConditionalGeneration

from .config import TrainConfig

COMPONENTS = ("vision", "projector", "language")


def components(model: YiVLForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules that each component of the settings means."""
    inner = model.model
    return {
        "vision": [inner.vision_tower],
        "projector": [inner.multi_modal_projector],
        "language": [inner.language_model, model.lm_head],
    }


def set_trainable_(model: YiVLForConditionalGeneration, config: TrainConfig) -> None:
    """Freeze what does not learn. Frozen modules are put in eval mode too: batch statistics are weights as well."""
    model.train()
    for name, modules in components(model).items():
        learns = getattr(config.trainable, name)
        for module in modules:
            module.requires_grad_(learns)
            module.train(learns)
    tower = model.model.vision_tower
    for never_run in tower.visual.never_run(tower.config.feature_layer):
        never_run.requires_grad_(False)  # stored only; with a gradient asked for, distributed training waits for it


def parameter_groups(model: YiVLForConditionalGeneration, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups `<component>` and `<component>, no decay`, each with its peak learning rate `peak_lr`."""
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()  # tied tables are one parameter
    for name, modules in components(model).items():
        learning = [p for module in modules for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(id(parameter) for parameter in learning)
        peak_lr = getattr(config.lr, name)
        for suffix, decay, members in (
            ("", config.optimiser.weight_decay, [p for p in learning if p.ndim > 1]),
            (", no decay", 0.0, [p for p in learning if p.ndim <= 1]),
        ):
            if members:
                groups.append(
                    {"name": name + suffix, "params": members, "weight_decay": decay, "peak_lr": peak_lr, "lr": 0.0}
                )
    return groups


def build_optimiser(model: YiVLForConditionalGeneration, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    first, second = config.optimiser.betas
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=0.0, betas=(first, second), eps=config.optimiser.eps, fused=True
    )


def set_learning_rates_(optimiser: torch.optim.Optimizer, step: int, num_steps: int, warmup_ratio: float) -> None:
    """Before step `step` of `num_steps` (from 0): linear warm-up, then cosine to 0. The schedule has no state."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * schedule(step, num_steps, warmup_ratio)


def schedule(step: int, num_steps: int, warmup_ratio: float) -> float:
    """The factor on the peak learning rate; 1 at the end of warm-up, 0 after the last step."""
    num_warmup = int(num_steps * warmup_ratio)
    if step < num_warmup:
        return (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def learning_rates(optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """The present learning rate of each component that learns."""
    return {group["name"].removesuffix(", no decay"): group["lr"] for group in optimiser.param_groups}
