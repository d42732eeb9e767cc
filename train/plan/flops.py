"""Model FLOPs of the batches of a run, which are never recomputed work or padding: what MFU counts.

A formula, for the trainer calls it at every step and counting (count.py) would add seconds to its start. A tower from
timm is taken as open_clip's own of its dimensions; the products of a convolutional stem and of LoRA's adapters are
left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from yi_vl.checkpoint.key_map import EMBEDDING, HEAD, LANGUAGE
from yi_vl.config import YiVLConfig
from yi_vl.connector import build_connector
from yi_vl.connector.config import ConnectorConfig

from ..config import LORA, TrainableConfig
from ..data.batch import IGNORE, StepBatch
from ..trainable import language_names, select

_MLP = ("gate", "up", "down")


@dataclass(frozen=True)
class Row:
    """A row of a micro-batch, with one image or a text alone. `supervised` of its `tokens` are predicted."""

    tokens: int
    supervised: int
    has_image: bool = True


def step_flops(model: YiVLConfig, trainable: TrainableConfig, row: Row) -> int:
    """Floating-point operations for one row, forward and backward.

    A matrix takes 2 of them per weight and token forward, 2 for the gradient of its input where something before it
    is trained, 2 for its own if it is; attention 4 S Q per token forward and twice that backward, the causal half not
    taken off (Chowdhery et al. 2022, appendix B, count so). S tokens, Q width of the queries.
    """
    flops = _language_flops(model, trainable, [row], num_images=int(row.has_image))
    return flops + (_image_flops(model, trainable) if row.has_image else 0)


def forward_flops(model: YiVLConfig, row: Row) -> int:
    """Of the forward pass alone: a third of a step's in which everything is trained, less the pixels' own gradient."""
    everything = TrainableConfig(vision=True, projector=True, language=True)
    return step_flops(model, everything, row) // 3


def batch_flops(
    model: YiVLConfig, trainable: TrainableConfig, attention_mask: Tensor, is_supervised: Tensor, num_images: int
) -> int:
    """Of the rows of a micro-batch, (B, S) each."""
    rows = [Row(*counts) for counts in zip(attention_mask.sum(1).tolist(), is_supervised.sum(1).tolist())]
    return _language_flops(model, trainable, rows, num_images) + num_images * _image_flops(model, trainable)


def step_batch_flops(model: YiVLConfig, trainable: TrainableConfig, batch: StepBatch) -> int:
    """Of one rank's part of a step."""
    return sum(
        batch_flops(
            model, trainable, micro.attention_mask, micro.labels[:, 1:] != IGNORE,
            0 if micro.images is None else len(micro.images),
        )
        for micro in batch.micro_batches
    )  # fmt: skip


def num_blocks(model: YiVLConfig) -> int:
    """Blocks of the tower that run."""
    vision = model.vision_config
    return range(vision.num_hidden_layers)[vision.feature_layer] + 1


def _language_flops(model: YiVLConfig, trainable: TrainableConfig, rows: Iterable[Row], num_images: int) -> int:
    text = model.text_config
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    q_width, kv_width = head * text.num_attention_heads, head * text.num_key_value_heads
    selection = tuple(trainable.language) if isinstance(trainable.language, list) else trainable.language
    has_gradient = trainable.language == LORA or (num_images > 0 and (trainable.vision or trainable.projector))
    traits = bool(text.attention_bias), bool(text.mlp_bias), bool(model.tie_word_embeddings)
    passes = _passes(text.num_hidden_layers, *traits, selection, has_gradient)
    sizes = {"q": q_width, "k": kv_width, "v": kv_width, "o": q_width} | dict.fromkeys(_MLP, text.intermediate_size)
    per_token = 2 * width * sum(size * passes[matrix] for matrix, size in sizes.items())
    per_pair = 2 * q_width * (passes["scores"] + passes["mixture"])
    per_logits = 2 * width * text.vocab_size * passes["head"]
    return sum(per_token * row.tokens + per_pair * row.tokens**2 + per_logits * row.supervised for row in rows)


@lru_cache
def _passes(
    num_layers: int, attention_bias: bool, mlp_bias: bool, is_tied: bool, selection: bool | str | tuple[str, ...],
    has_gradient: bool,
) -> Counter[str]:  # fmt: skip
    """How often the product of each matrix is computed in all layers: forward, for its input's gradient, for its own.

    Args:
        selection: `trainable.language`.
        has_gradient: whether the gradient of the first layer's input is needed, for what is trained before it.
    """
    names = language_names(num_layers, attention_bias, mlp_bias)
    trained = set(names) if selection is True else select(selection, names) if isinstance(selection, tuple) else set()
    if is_tied and trained & {EMBEDDING, HEAD}:
        trained = trained | {EMBEDDING, HEAD}
    modules = {name.rpartition(".")[0] for name in trained}  # by their weight or their bias
    passes: Counter[str] = Counter()

    def multiply(matrix: str, module: str, has_gradient: bool) -> bool:
        """Count the passes of a product whose input has a gradient; whether its output has."""
        passes[matrix] += 1 + has_gradient + (f"{module}.weight" in trained)
        return has_gradient or module in modules

    has_gradient = has_gradient or EMBEDDING in trained
    for number in range(num_layers):
        layer = f"{LANGUAGE}layers.{number}"
        normed = has_gradient or f"{layer}.input_layernorm" in modules
        query, key, value = (multiply(matrix, f"{layer}.self_attn.{matrix}_proj", normed) for matrix in "qkv")
        passes["scores"] += 1 + query + key
        passes["mixture"] += 1 + (query or key) + value  # of the values, by the scores
        attended = multiply("o", f"{layer}.self_attn.o_proj", query or key or value)
        has_gradient = has_gradient or attended
        normed = has_gradient or f"{layer}.post_attention_layernorm" in modules
        gate, up = (multiply(matrix, f"{layer}.mlp.{matrix}_proj", normed) for matrix in ("gate", "up"))
        has_gradient = multiply("down", f"{layer}.mlp.down_proj", gate or up) or has_gradient
    multiply("head", HEAD.removesuffix(".weight"), has_gradient or f"{LANGUAGE}norm" in modules)
    return passes


def _image_flops(model: YiVLConfig, trainable: TrainableConfig) -> int:
    vision, width = model.vision_config, model.text_config.hidden_size
    patches, tokens = vision.num_patches, vision.num_patches + 1
    block = 2 * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size) * tokens
    blocks = num_blocks(model) * (block + 4 * tokens**2 * vision.hidden_size)
    pixels = 2 * 3 * vision.patch_size**2 * vision.hidden_size * patches
    flops: int = blocks * (3 if trainable.vision else 1) + pixels * (2 if trainable.vision else 1)
    if not model.connector_config.is_projector:
        passes = 1 + (trainable.vision or trainable.projector) + trainable.projector
        return flops + passes * _connector_flops(
            model.connector_config.to_json_string(), vision.hidden_size, width, patches
        )
    first, second = 2 * vision.hidden_size * width * patches, 2 * width**2 * patches
    flops += first * (1 + trainable.vision + trainable.projector)
    return flops + second * (1 + (trainable.vision or trainable.projector) + trainable.projector)


@lru_cache
def _connector_flops(config: str, vision_width: int, language_width: int, num_patches: int) -> int:
    """Of one image's forward pass, counted.

    Args:
        config: of the connector, as JSON.
    """
    connector_config = ConnectorConfig.from_dict(json.loads(config))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_connector(connector_config, vision_width, language_width)(torch.empty(1, num_patches, vision_width))
    return counter.get_total_flops()
