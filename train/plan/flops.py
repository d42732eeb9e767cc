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
from yi_vl.decoder.config import FULL, SLIDING

from ..config import LORA, TrainableConfig
from ..data.batch import IGNORE, StepBatch
from ..experts import has_experts
from ..trainable import language_names, select

_MLP = ("gate", "up", "down")
_SEEING = ("q", "o", *_MLP)  # of a block of cross-attention, what multiplies the tokens


@dataclass(frozen=True)
class Row:
    """A row of a micro-batch, with one image or a text alone. `supervised` of its `tokens` are predicted.

    image_inputs: how often the tower sees the image: more than once with tiles.
    """

    tokens: int
    supervised: int
    has_image: bool = True
    image_inputs: int = 1

    @property
    def num_inputs(self) -> int:
        """Of the tower; 0 of a text."""
        return self.image_inputs if self.has_image else 0


def step_flops(model: YiVLConfig, trainable: TrainableConfig, row: Row) -> int:
    """Floating-point operations for one row, forward and backward.

    A matrix takes 2 of them per weight and token forward, 2 for the gradient of its input where something before it
    is trained, 2 for its own if it is; attention 4 S Q per token forward and twice that backward, the causal half not
    taken off (Chowdhery et al. 2022, appendix B, count so). S tokens, or a layer's window of them; Q width of the
    queries. Of experts, those that a token gets.
    """
    num_seeing = row.tokens if row.has_image else 0
    flops = _language_flops(model, trainable, [row], row.num_inputs, num_seeing)
    return flops + row.num_inputs * _image_flops(model, trainable)


def forward_flops(model: YiVLConfig, row: Row) -> int:
    """Of the forward pass alone: a third of a step's in which everything is trained, less the pixels' own gradient."""
    everything = TrainableConfig(vision=True, projector=True, language=True)
    return step_flops(model, everything, row) // 3


def batch_flops(
    model: YiVLConfig, trainable: TrainableConfig, attention_mask: Tensor, is_supervised: Tensor, num_images: int,
    experts_per_token: float | None = None, num_seeing: int = 0,
) -> int:  # fmt: skip
    """Of the rows of a micro-batch, (B, S) each.

    Args:
        num_seeing: tokens that have an image before them, which a block of cross-attention computes with.
    """
    rows = [Row(*counts) for counts in zip(attention_mask.sum(1).tolist(), is_supervised.sum(1).tolist())]
    flops = _language_flops(model, trainable, rows, num_images, num_seeing, experts_per_token)
    return flops + num_images * _image_flops(model, trainable)


def step_batch_flops(
    model: YiVLConfig, trainable: TrainableConfig, batch: StepBatch, experts_per_token: float | None = None
) -> int:
    """Of one rank's part of a step.

    Args:
        experts_per_token: the mean over tokens and layers; None: the most.
    """
    return sum(
        batch_flops(
            model, trainable, micro.attention_mask, micro.labels[:, 1:] != IGNORE,
            0 if micro.images is None else len(micro.images), experts_per_token,
            int(((micro.input_ids == model.image_token_id).cumsum(1) * micro.attention_mask).count_nonzero()),
        )
        for micro in batch.micro_batches
    )  # fmt: skip


def num_blocks(model: YiVLConfig) -> int:
    """Blocks of the tower that run."""
    vision = model.vision_config
    return range(vision.num_hidden_layers)[vision.feature_layer] + 1


@dataclass(frozen=True)
class _Layers:
    """What of a language model decides which products there are."""

    num_layers: int
    attention_bias: bool
    mlp_bias: bool
    is_tied: bool
    kv_sources: tuple[int, ...]  # as in `language_names`
    has_window: tuple[bool, ...]
    has_experts: bool
    cross_layers: tuple[int, ...]  # after a block of cross-attention

    @classmethod
    def of(cls, model: YiVLConfig) -> _Layers:
        text = model.text_config
        types = getattr(text, "layer_types", None) or [FULL] * text.num_hidden_layers
        return cls(
            text.num_hidden_layers, bool(text.attention_bias), bool(text.mlp_bias), bool(model.tie_word_embeddings),
            tuple(getattr(text, "kv_source_layers", ())), tuple(layer_type == SLIDING for layer_type in types),
            has_experts(text), tuple(getattr(text, "cross_layers", ())),
        )  # fmt: skip


def _language_flops(
    model: YiVLConfig, trainable: TrainableConfig, rows: Iterable[Row], num_images: int, num_seeing: int,
    experts_per_token: float | None = None,
) -> int:  # fmt: skip
    text = model.text_config
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    q_width, kv_width = head * text.num_attention_heads, head * text.num_key_value_heads
    selection = tuple(trainable.language) if isinstance(trainable.language, list) else trainable.language
    layers = _Layers.of(model)
    from_images = num_images > 0 and (trainable.vision or trainable.projector)
    has_gradient = trainable.language == LORA or (from_images and not layers.cross_layers)
    cross = (trainable.projector, from_images) if layers.cross_layers and num_images else None
    passes = _passes(layers, selection, has_gradient, cross)
    hidden = text.intermediate_size
    if layers.has_experts:
        hidden *= experts_per_token if experts_per_token is not None else text.num_routed
    sizes = {"q": q_width, "k": kv_width, "v": kv_width, "o": q_width} | dict.fromkeys(_MLP, hidden)
    sizes["router"] = text.num_experts if layers.has_experts else 0
    per_token = 2 * width * sum(size * passes[matrix] for matrix, size in sizes.items())
    per_pair = 2 * q_width * passes["attention"]
    per_window_pair = 2 * q_width * passes["window"]
    per_logits = 2 * width * text.vocab_size * passes["head"]
    window = text.sliding_window if any(layers.has_window) else 0
    of_rows = sum(
        row.tokens * (per_token + per_pair * row.tokens + per_window_pair * min(row.tokens, window))
        + per_logits * row.supervised
        for row in rows
    )
    num_features = model.num_image_features
    per_seeing = 2 * width * sum(sizes[matrix] * passes[f"cross {matrix}"] for matrix in _SEEING)
    per_seeing += 2 * q_width * num_features * passes["cross attention"]
    per_image = 2 * width * kv_width * num_features * (passes["cross k"] + passes["cross v"])
    return round(of_rows) + num_seeing * per_seeing + num_images * per_image


@lru_cache
def _passes(
    layers: _Layers,
    selection: bool | str | tuple[str, ...],
    has_gradient: bool,
    cross: tuple[bool, bool] | None,
) -> Counter[str]:
    """How often the product of each matrix is computed in all layers: forward, for its input's gradient, for its own.

    Args:
        selection: `trainable.language`.
        has_gradient: whether the gradient of the first layer's input is needed, for what is trained before it.
        cross: whether blocks of cross-attention are trained, and whether the features that they attend to have a
            gradient; None where there are no blocks, or no images.
    """
    names = language_names(
        layers.num_layers, layers.attention_bias, layers.mlp_bias, layers.kv_sources, layers.has_experts
    )
    trained = set(names) if selection is True else select(selection, names) if isinstance(selection, tuple) else set()
    if layers.is_tied and trained & {EMBEDDING, HEAD}:
        trained = trained | {EMBEDDING, HEAD}
    passes: Counter[str] = Counter()

    def multiply(matrix: str, weight: str, has_gradient: bool) -> bool:
        """Count the passes of a product whose input has a gradient; whether its output has."""
        passes[matrix] += 1 + has_gradient + (weight in trained)
        return has_gradient or weight in trained or f"{weight.removesuffix('weight')}bias" in trained

    has_gradient = has_gradient or EMBEDDING in trained
    keys_and_values: dict[int, tuple[bool, bool]] = {}  # of each layer, whether they have a gradient
    for number in range(layers.num_layers):
        layer = f"{LANGUAGE}layers.{number}"
        if cross is not None and number in layers.cross_layers:
            has_gradient = _add_block(passes, has_gradient, *cross)
        source = layers.kv_sources[number] if layers.kv_sources else number
        normed = has_gradient or f"{layer}.input_layernorm.weight" in trained
        query = multiply("q", f"{layer}.self_attn.q_proj.weight", normed)
        if source == number:
            key, value = (multiply(matrix, f"{layer}.self_attn.{matrix}_proj.weight", normed) for matrix in "kv")
            keys_and_values[number] = key, value
        key, value = keys_and_values[source]
        pairs = "window" if layers.has_window[number] else "attention"
        passes[pairs] += 1 + query + key  # the scores
        passes[pairs] += 1 + (query or key) + value  # the mixture of the values by them
        attended = multiply("o", f"{layer}.self_attn.o_proj.weight", query or key or value)
        has_gradient = has_gradient or attended
        normed = has_gradient or f"{layer}.post_attention_layernorm.weight" in trained
        mlp = f"{layer}.mlp"
        if layers.has_experts:
            routed = multiply("router", f"{mlp}.gate.weight", normed)
            gate, up = (multiply(matrix, f"{mlp}.experts.gate_up_proj", normed) for matrix in ("gate", "up"))
            has_gradient = multiply("down", f"{mlp}.experts.down_proj", gate or up) or routed or has_gradient
        else:
            gate, up = (multiply(matrix, f"{mlp}.{matrix}_proj.weight", normed) for matrix in ("gate", "up"))
            has_gradient = multiply("down", f"{mlp}.down_proj.weight", gate or up) or has_gradient
    multiply("head", HEAD, has_gradient or f"{LANGUAGE}norm.weight" in trained)
    return passes


def _add_block(passes: Counter[str], has_gradient: bool, is_trained: bool, features_have_gradient: bool) -> bool:
    """Count the passes of a block of cross-attention; whether its output has a gradient."""

    def multiply(matrix: str, has_gradient: bool) -> bool:
        passes[f"cross {matrix}"] += 1 + has_gradient + is_trained
        return has_gradient or is_trained

    query = multiply("q", has_gradient or is_trained)
    key, value = multiply("k", features_have_gradient), multiply("v", features_have_gradient)
    passes["cross attention"] += 1 + query + key  # the scores
    passes["cross attention"] += 1 + (query or key) + value  # the mixture of the values by them
    has_gradient = multiply("o", query or key or value) or has_gradient
    gate, up = multiply("gate", has_gradient or is_trained), multiply("up", has_gradient or is_trained)
    return multiply("down", gate or up) or has_gradient


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
