"""How large a model is, from its configuration alone: parameters, tensors, memory.

Called by cli.py; calls config.py and model.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .config import YiVLConfig
from .model import YiVLForConditionalGeneration


@dataclass(frozen=True)
class Sizes:
    """What `measure` finds.

    The official release has neither the image token's row of the embedding tables nor the rows that pad them, and it
    keeps the tower's queries, keys and values apart. Its figures are None for a tower with a convolutional stem, which
    that layout cannot hold.
    """

    num_parameters: dict[str, int]  # by component
    num_tensors: int
    num_official_parameters: dict[str, int] | None
    num_official_tensors: int | None
    memory_bytes: dict[str, int]  # of the weights, by dtype; what is not quantised is bf16, scales are not counted


def tensor_shapes(config: YiVLConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every stored tensor, in our layout; the model is built without weights."""
    return {name: tuple(tensor.shape) for name, tensor in _without_weights(config).state_dict().items()}


def measure(config: YiVLConfig) -> Sizes:
    """Build the model without weights and count."""
    model = _without_weights(config)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    language = nn.ModuleList([model.model.language_model, model.lm_head])
    components = {"vision tower": tower, "projector": projector, "language model": language}
    counts = {name: _num_parameters(module) for name, module in components.items()}
    num_tensors = len(model.state_dict())

    official_counts = num_official_tensors = None
    if config.vision_config.is_plain:
        num_tables = 1 if config.tie_word_embeddings else 2
        num_added_rows = config.text_config.vocab_size - config.image_token_id
        added = num_added_rows * config.text_config.hidden_size * num_tables
        official_counts = counts | {"language model": counts["language model"] - added}
        num_official_tensors = num_tensors + 4 * config.vision_config.num_hidden_layers  # q, k, v: 6 for 2

    linears = [layer for layer in model.model.language_model.layers.modules() if isinstance(layer, nn.Linear)]
    num_quantised = sum(layer.weight.numel() for layer in linears)
    total = sum(counts.values())
    memory_bytes = {
        "fp32": 4 * total,
        "bf16": 2 * total,
        "int8, language model's layers": 2 * (total - num_quantised) + num_quantised,
        "int4, language model's layers": 2 * (total - num_quantised) + num_quantised // 2,
    }
    return Sizes(counts, num_tensors, official_counts, num_official_tensors, memory_bytes)


def _without_weights(config: YiVLConfig) -> YiVLForConditionalGeneration:
    with torch.device("meta"):
        return YiVLForConditionalGeneration(config)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
