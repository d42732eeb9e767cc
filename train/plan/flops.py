"""Model FLOPs of the batches of a run, which are never recomputed work or padding: what MFU counts.

A formula, for the trainer calls it at every step and counting (count.py) would add seconds to its start. A tower from
timm is taken as open_clip's own of its dimensions; the products of a convolutional stem and of LoRA's adapters are
left out.
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


def step_flops(model: YiVLConfig, trainable: TrainableConfig, row: Row) -> int:
    """Floating-point operations for one row with one image, forward and backward.

    A matrix takes 2 of them per weight and token forward, 2 for the gradient of its input where something before it
    is trained, 2 for its own if it is; attention 4 S Q per token forward and twice that backward, the causal half not
    taken off (Chowdhery et al. 2022, appendix B, count so). S tokens, Q width of the queries.
    """
    return _language_flops(model, trainable, row) + _image_flops(model, trainable)


def forward_flops(model: YiVLConfig, row: Row) -> int:
    """Of the forward pass alone: a third of a step's in which everything is trained, less the pixels' own gradient."""
    everything = TrainableConfig(vision=True, projector=True, language=True)
    return step_flops(model, everything, row) // 3


def batch_flops(
    model: YiVLConfig, trainable: TrainableConfig, attention_mask: Tensor, is_supervised: Tensor, num_images: int
) -> int:
    """Of the rows of a micro-batch, (B, S) each."""
    rows = zip(attention_mask.sum(1).tolist(), is_supervised.sum(1).tolist())
    flops = sum(_language_flops(model, trainable, Row(tokens, supervised)) for tokens, supervised in rows)
    return flops + num_images * _image_flops(model, trainable)


def num_blocks(model: YiVLConfig) -> int:
    """Blocks of the tower that run."""
    vision = model.vision_config
    return range(vision.num_hidden_layers)[vision.feature_layer] + 1


def _language_flops(model: YiVLConfig, trainable: TrainableConfig, row: Row) -> int:
    text = model.text_config
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    q_width, kv_width = head * text.num_attention_heads, head * text.num_key_value_heads
    layer = 2 * width * (2 * q_width + 2 * kv_width + 3 * text.intermediate_size) * row.tokens
    scores = 4 * row.tokens**2 * q_width
    logits = 2 * width * text.vocab_size * row.supervised
    flops: int = (text.num_hidden_layers * layer + logits) * (3 if trainable.language is True else 2)
    return flops + 3 * text.num_hidden_layers * scores


def _image_flops(model: YiVLConfig, trainable: TrainableConfig) -> int:
    vision, width = model.vision_config, model.text_config.hidden_size
    patches, tokens = vision.num_patches, vision.num_patches + 1
    block = 2 * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size) * tokens
    blocks = num_blocks(model) * (block + 4 * tokens**2 * vision.hidden_size)
    pixels = 2 * 3 * vision.patch_size**2 * vision.hidden_size * patches
    flops: int = blocks * (3 if trainable.vision else 1) + pixels * (2 if trainable.vision else 1)
    first, second = 2 * vision.hidden_size * width * patches, 2 * width**2 * patches
    flops += first * (1 + trainable.vision + trainable.projector)
    return flops + second * (1 + (trainable.vision or trainable.projector) + trainable.projector)
