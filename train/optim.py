"""Trainable components, AdamW parameter groups named after them, and their learning rates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from yi_vl.decoder.cross_attention import CROSS_BLOCK
from yi_vl.decoder.gated import cross_blocks
from yi_vl.model import YiVLForConditionalGeneration

from .config import ScheduleConfig, TrainConfig
from .schedule import component_schedule, learning_rate_factor
from .trainable import select

LOW_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by precision: autocast's


def components(model: YiVLForConditionalGeneration) -> dict[str, list[nn.Module]]:
    """The modules of each component named in the config; a language model's blocks of cross-attention are the
    projector's."""
    inner = model.model
    joints = [inner.multi_modal_projector, *cross_blocks(inner.language_model)]
    return {
        "vision": [_trainable_copy(inner.vision_tower)],
        "projector": [_trainable_copy(module) for module in joints],
        "language": [inner.language_model, model.lm_head],
    }


def _trainable_copy(module: nn.Module) -> nn.Module:
    """The module itself, or its trainable copy beside adapters (PEFT's `modules_to_save`)."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies["default"]


def component_parameters(model: YiVLForConditionalGeneration) -> dict[str, list[nn.Parameter]]:
    """Each component's parameters; one that is in several (tied, or of a block) is listed once, in the first."""
    parameters: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, modules in components(model).items():
        by_identity = {id(p): p for module in modules for p in module.parameters() if id(p) not in seen}
        seen.update(by_identity)
        parameters[name] = list(by_identity.values())
    return parameters


def set_trainable_(model: YiVLForConditionalGeneration, config: TrainConfig) -> None:
    """Freeze what is not trained, and put it in eval mode: batch statistics are weights as well.

    A frozen language model with activation checkpointing stays in training mode, as transformers checkpoints nothing in
    eval mode; the language models have no dropout, so their layers compute the same in both.

    Raises:
        ValueError: an entry of `trainable.language` selects no parameter of this model.
    """
    model.train()
    for name, modules in reversed(components(model).items()):  # the language model before its blocks
        trainable = getattr(config.trainable, name)
        for module in modules:
            module.requires_grad_(trainable is True)
            module.train(bool(trainable) or (name == "language" and config.activation_checkpointing))
    if isinstance(config.trainable.language, list):
        parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied table by both its names
        for name in select(config.trainable.language, [name for name in parameters if CROSS_BLOCK not in name]):
            parameters[name].requires_grad_(True)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(True)
    tower = model.model.vision_tower
    for module in tower.visual.unused_modules(tower.config.feature_layer):
        module.requires_grad_(False)  # DDP would wait for their gradients


def cast_frozen_(model: YiVLForConditionalGeneration, precision: str) -> None:
    """Cast the matrices of frozen linear layers to autocast's dtype, at half the memory.

    Only matrices that this dtype represents exactly, as it does those of a model released in it, so neither steps nor
    saved weights change. Embedding tables stay in float32: they make the residual stream.
    """
    dtype = LOW_DTYPES.get(precision)
    if dtype is None:
        return
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and id(module.weight) not in tables:
            if not module.weight.is_floating_point():
                continue  # 4-bit, see qlora.py
            low = module.weight.to(dtype)
            if torch.equal(low.to(module.weight.dtype), module.weight):
                module.weight.data = low


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter of PEFT."""
    return ".lora_A." in parameter_name or ".lora_B." in parameter_name


def checkpoint_activations_(model: YiVLForConditionalGeneration) -> None:
    """Keep only the layers' inputs, and recompute the layers in the backward pass."""
    # the first name since transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # transformers gives the embeddings a gradient, which only reentrant checkpointing needs: the backward pass would
    # run through frozen layers below the lowest trained one
    model.disable_input_require_grads()


def parameter_groups(model: YiVLForConditionalGeneration, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups `<component>` and `<component>, no decay`, each with its peak learning rate `peak_lr`."""
    groups: list[dict[str, Any]] = []
    for name, parameters in component_parameters(model).items():
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        peak_lr = getattr(config.lr, name)
        for suffix, decay, members in (
            ("", config.optimizer.weight_decay, [p for p in trainable if p.ndim > 1]),
            (", no decay", 0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if members:
                groups.append(
                    {"name": name + suffix, "params": members, "weight_decay": decay, "peak_lr": peak_lr, "lr": 0.0}
                )
    return groups


def build_optimizer(model: YiVLForConditionalGeneration, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    first, second = config.optimizer.betas
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=0.0, betas=(first, second), eps=config.optimizer.eps, fused=True
    )


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The gradients' Euclidean norm of each trained component; all ranks take part."""
    squared_norms: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = group["name"].removesuffix(", no decay")
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squared_norms[name] = squared_norms.get(name, 0.0) + float(norm) ** 2
    return {name: math.sqrt(squared_norm) for name, squared_norm in squared_norms.items()}


def set_learning_rates_(optimizer: torch.optim.Optimizer, step: int, num_steps: int, schedule: ScheduleConfig) -> None:
    """Before step `step` of `num_steps` (from 0). The schedule has no state."""
    for group in optimizer.param_groups:
        adjusted = component_schedule(schedule, group["name"].removesuffix(", no decay"))
        group["lr"] = group["peak_lr"] * learning_rate_factor(step, num_steps, adjusted)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The current learning rate of each trained component."""
    return {group["name"].removesuffix(", no decay"): group["lr"] for group in optimizer.param_groups}
