"""What learns, and how fast: components, AdamW groups named after them, and the learning-rate schedule.

Called by loop.py, report.py and costs.py; calls nothing of the project but the settings.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from yi_vl.model import YiVLForConditionalGeneration

from .config import TrainConfig

LOW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by precision: what products are computed in
COMPONENTS = ("vision", "projector", "language")


def components(model: YiVLForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules that each component of the settings means."""
    inner = model.model
    return {
        "vision": [_learning(inner.vision_tower)],
        "projector": [_learning(inner.multi_modal_projector)],
        "language": [inner.language_model, model.lm_head],
    }


def _learning(module: nn.Module) -> nn.Module:
    """The module itself, or the copy of it that learns beside adapters; see adapters.py."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies["default"]


def own_parameters(model: YiVLForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """Each component's parameters, each parameter once: tied tables are one, and the first component's."""
    own: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, modules in components(model).items():
        by_identity = {id(p): p for module in modules for p in module.parameters() if id(p) not in seen}
        seen.update(by_identity)
        own[name] = list(by_identity.values())
    return own


def set_trainable_(model: YiVLForConditionalGeneration, config: TrainConfig) -> None:
    """Freeze what does not learn. Frozen modules are put in eval mode too: batch statistics are weights as well.

    But for a frozen language model whose activations are checkpointed: in eval mode transformers checkpoints nothing.
    Its layers are the same in both modes, as Llama has no dropout.
    """
    model.train()
    for name, modules in components(model).items():
        learns = getattr(config.trainable, name)
        for module in modules:
            module.requires_grad_(learns is True)
            module.train(bool(learns) or (name == "language" and config.activation_checkpointing))
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(True)
    tower = model.model.vision_tower
    for never_run in tower.visual.unused_modules(tower.config.feature_layer):
        never_run.requires_grad_(False)  # stored only; with a gradient asked for, distributed training waits for it


def keep_frozen_low_(model: YiVLForConditionalGeneration, precision: str) -> None:
    """Keep the matrices of frozen linear layers in the dtype that autocast multiplies them in, at half the memory.

    Only those whose values it holds exactly, as it does those of a model that was released in it: so nothing of a step
    changes, nor of what is saved. A table of embeddings stays in float32, for it makes the residual stream.
    """
    dtype = LOW_DTYPES.get(precision)
    if dtype is None:
        return
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in tables:
            if not module.weight.is_floating_point():
                continue  # four bits, see int4.py
            low = module.weight.to(dtype)
            if torch.equal(low.to(module.weight.dtype), module.weight):
                module.weight.data = low


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter is one that PEFT's LoRA has added."""
    return ".lora_A." in parameter_name or ".lora_B." in parameter_name


def checkpoint_activations_(model: YiVLForConditionalGeneration) -> None:
    """Keep only the layers' inputs, and run the layers again in the backward pass."""
    # its name since transformers 5.23, and before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def parameter_groups(model: YiVLForConditionalGeneration, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups `<component>` and `<component>, no decay`, each with its peak learning rate `peak_lr`."""
    groups: list[dict[str, Any]] = []
    for name, own in own_parameters(model).items():
        learning = [parameter for parameter in own if parameter.requires_grad]
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


def gradient_norms(optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """The gradients' Euclidean norm of each component that learns, as they are now; all ranks take part."""
    squares: dict[str, float] = {}
    for group in optimiser.param_groups:
        name = group["name"].removesuffix(", no decay")
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares[name] = squares.get(name, 0.0) + float(norm) ** 2
    return {name: math.sqrt(square) for name, square in squares.items()}


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
