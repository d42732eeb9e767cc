"""Floating-point operations of a training step, by arithmetic.

A tower from timm is reckoned as open_clip's own of its dimensions; left out are a convolutional stem's products, the
small ones of LoRA's adapters and the work of making an int4 base's matrices again.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from yi_vl.config import YiVLConfig

from ..config import TrainableConfig


@dataclass(frozen=True)
class Row:
    """A row of a micro-batch, with one image. `supervised` of its `tokens` are predicted."""

    tokens: int
    supervised: int


def step_flops(model: YiVLConfig, trains: TrainableConfig, row: Row, is_checkpointed: bool) -> int:
    """Floating-point operations for one row with one image, forward and backward.

    A matrix takes 2 of them per weight and token forward, 2 for the gradient of its input where something before it
    learns, 2 for its own if it learns; attention 4 S Q per token forward and twice that backward, the causal half not
    taken off (Chowdhery et al. 2022, appendix B, count so). Checkpointing runs all layers forward once more.
    """
    return language_flops(model, trains, row, is_checkpointed) + image_flops(model, trains, is_checkpointed)


def batch_flops(
    model: YiVLConfig, trains: TrainableConfig, attention_mask: Tensor, is_supervised: Tensor, num_images: int
) -> int:
    """What the rows of a micro-batch need, padding and recomputation left out: model FLOPs, as MFU counts them."""
    rows = zip(attention_mask.sum(1).tolist(), is_supervised.sum(1).tolist())
    flops = sum(language_flops(model, trains, Row(tokens, supervised), False) for tokens, supervised in rows)
    return flops + num_images * image_flops(model, trains, False)


def language_flops(model: YiVLConfig, trains: TrainableConfig, row: Row, is_checkpointed: bool) -> int:
    """`step_flops` of the language model."""
    text = model.text_config
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    q_width, kv_width = head * text.num_attention_heads, head * text.num_key_value_heads
    layer = 2 * width * (2 * q_width + 2 * kv_width + 3 * text.intermediate_size) * row.tokens
    layers, scores = text.num_hidden_layers * layer, text.num_hidden_layers * 4 * row.tokens**2 * q_width
    logits = 2 * width * text.vocab_size * row.supervised
    flops: int = (layers + logits) * (3 if trains.language is True else 2) + 3 * scores
    if is_checkpointed:
        flops += layers + scores - text.num_hidden_layers * 2 * width * text.intermediate_size * row.tokens
    return flops


def image_flops(model: YiVLConfig, trains: TrainableConfig, is_checkpointed: bool) -> int:
    """`step_flops` of tower and projector, for one image."""
    vision, width = model.vision_config, model.text_config.hidden_size
    patches, tokens = vision.num_patches, vision.num_patches + 1
    block = 2 * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size) * tokens
    blocks = num_blocks(model) * (block + 4 * tokens**2 * vision.hidden_size)
    pixels = 2 * 3 * vision.patch_size**2 * vision.hidden_size * patches
    flops: int = blocks * (3 if trains.vision else 1) + pixels * (2 if trains.vision else 1)

    first, second = 2 * vision.hidden_size * width * patches, 2 * width**2 * patches
    flops += first * (1 + trains.vision + trains.projector)
    flops += second * (1 + (trains.vision or trains.projector) + trains.projector)
    if is_checkpointed and trains.vision:
        last = 2 * vision.hidden_size * vision.intermediate_size * tokens
        flops += blocks - num_blocks(model) * last
    return flops


def num_blocks(model: YiVLConfig) -> int:
    """Blocks of the tower that run."""
    vision = model.vision_config
    return range(vision.num_hidden_layers)[vision.feature_layer] + 1
