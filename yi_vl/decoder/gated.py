"""A Llama with gated cross-attention to images, as Flamingo's (arXiv 2204.14198): no image is among its embeddings.

Each token attends to the last image before it in its row; a token that stands at the image's place marks where that is,
and attends to it already. What is before the first image is computed as by the Llama alone, to the bit.

B rows, S new tokens, N images, P features per image, D width, R tokens that attend to an image, H key-value heads,
E head width; image_keys.py has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ..versions import CACHE_ARGUMENT
from .cross_attention import CROSS_BLOCK, GatedCrossAttention
from .gated_config import YiGatedConfig
from .image_keys import ImageKeysLayer, ImageRuns, image_layers, images_of_tokens


class GatedDecoderLayer(LlamaDecoderLayer):
    """A layer of the Llama, perhaps with a block before it: one unit for FSDP and activation checkpointing."""

    def __init__(self, config: YiGatedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        assert config.cross_layers is not None
        has_block = layer_idx in config.cross_layers
        self.cross_index = config.cross_layers.index(layer_idx) if has_block else None  # among the blocks
        self.cross_block = GatedCrossAttention(config) if has_block else None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        image_features: Tensor | None = None,
        image_runs: ImageRuns | None = None,
        image_cache: Sequence[ImageKeysLayer] = (),
        **kwargs: Any,
    ) -> Tensor:
        """(B, S, D) -> (B, S, D)"""
        if self.cross_block is not None and self.cross_index is not None and image_runs is not None:
            layer = image_cache[self.cross_index] if image_cache else None
            hidden_states = self.cross_block(hidden_states, image_features, image_runs, layer)
        return super().forward(hidden_states, **kwargs)


def cross_blocks(language_model: nn.Module) -> list[nn.Module]:
    """The blocks of a language model, in the order of its layers; none of another than this."""
    blocks = (getattr(layer, CROSS_BLOCK, None) for layer in language_model.layers)  # type: ignore[union-attr]
    return [block for block in blocks if block is not None]


class YiGatedPreTrainedModel(LlamaPreTrainedModel):
    """What transformers needs to know about all classes of this model."""

    config: YiGatedConfig
    config_class = YiGatedConfig
    _no_split_modules = ["GatedDecoderLayer"]
    _can_compile_fullgraph = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedCrossAttention):
            init.zeros_(module.attention_gate)
            init.zeros_(module.mlp_gate)


class YiGatedModel(YiGatedPreTrainedModel, LlamaModel):
    """The decoder without the head over the vocabulary."""

    def __init__(self, config: YiGatedConfig) -> None:
        super(LlamaModel, self).__init__(config)  # LlamaModel's own would make its layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([GatedDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        is_image: Tensor | None = None,
        previous_images: Sequence[Tensor | None] | None = None,
        unused_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states (B, S, D).

        Args:
            image_features: of the images that the new tokens mark, in reading order, (N, P, D).
            is_image: (B, S) bool, the tokens that mark an image; None for none.
            previous_images: for each row, the features (P, D) of the last image before the new tokens; None for that
                in the cache, if any. It replaces what is in the cache.
            unused_features: (1, P, D), where there is no image: each block computes with them, and drops the result.
                Under DDP and FSDP all ranks must use all parameters.
            kwargs: of a Llama, the cache among them (`cache`; before transformers 5.24 `past_key_values`). Layers of
                image keys are added to it. Where it is empty or there is none, a row may hold several samples, which
                begin where `position_ids` do not go on; none sees another's image.

        Raises:
            ValueError: there is another number of markers than of images, or of previous images than of rows.
        """
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        use_cache = kwargs.get("use_cache")
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache(config=self.config)
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None, "give input_ids or inputs_embeds"
        _check_count(is_image, image_features)
        if previous_images is not None and len(previous_images) != len(tokens):
            raise ValueError(f"{len(previous_images)} previous images of {len(tokens)} rows; give None where is none.")
        if is_image is None:
            is_image = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        layers = image_layers(cache, len(self.layers), len(self._cross_layers)) if cache is not None else []
        features, runs = self._image_runs(is_image, image_features, previous_images, cache, layers, position_ids)
        if runs is None and unused_features is not None:
            features, runs = unused_features, ImageRuns.unused(len(is_image), is_image.device)
        return super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            image_features=features,
            image_runs=runs,
            image_cache=layers if runs is None or runs.is_used else (),
            **{CACHE_ARGUMENT: cache},
            **kwargs,
        )

    @property
    def _cross_layers(self) -> list[int]:
        assert self.config.cross_layers is not None
        return self.config.cross_layers

    def _image_runs(
        self,
        is_image: Tensor,
        image_features: Tensor | None,
        previous_images: Sequence[Tensor | None] | None,
        cache: Cache | None,
        layers: Sequence[ImageKeysLayer],
        position_ids: Tensor | None,
    ) -> tuple[Tensor | None, ImageRuns | None]:
        """Features of all images that are not in the cache, and which tokens attend to which; None where none does."""
        num_rows, device = len(is_image), is_image.device
        stored = layers[0].has_image if layers else None
        has_previous = any(features is not None for features in previous_images or ())
        if stored is not None and image_features is None and not has_previous:
            return None, ImageRuns.of_rows(stored.to(device), is_image.shape[1])
        num_stored = num_rows if stored is not None else 0
        first_images = torch.full((num_rows,), -1, dtype=torch.long, device=device)
        if stored is not None:
            first_images = torch.arange(num_rows, device=device).where(stored.to(device), -1)
        new: list[Tensor] = []
        for row, features in enumerate(previous_images or ()):
            if features is not None:
                first_images[row] = num_stored + len(new)
                new.append(features.unsqueeze(0))
        num_before = num_stored + len(new)
        if image_features is not None:
            new.append(image_features)
        num_images = num_stored + sum(map(len, new))
        if not num_images:
            return None, None
        is_start = cache is None or not cache.get_seq_length()
        positions = position_ids.expand_as(is_image) if position_ids is not None and is_start else None
        images, last_images = images_of_tokens(is_image, first_images, num_before, positions)
        runs = ImageRuns.of(images, num_images, last_images)
        return torch.cat(new) if new else None, runs


def _check_count(is_image: Tensor | None, image_features: Tensor | None) -> None:
    num_markers = int(is_image.sum()) if is_image is not None else 0
    num_images = len(image_features) if image_features is not None else 0
    if num_markers != num_images:
        raise ValueError(
            f"{num_markers} image tokens in input_ids but {num_images} images; each image needs its placeholder token "
            "exactly once. Use the model's own processor."
        )


class YiGatedForCausalLM(YiGatedPreTrainedModel, LlamaForCausalLM):
    """The decoder with its head: a language model alone."""

    def __init__(self, config: YiGatedConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # LlamaForCausalLM's own would make a Llama
        self.model = YiGatedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
