"""Yi-VL: an image encoder, a projector and a language model joined the LLaVA way. THE file to read.

The contract everybody shares. B samples, S tokens, N images in the batch (of one with tiles its thumbnail and each of
these), P tokens per image, Dv vision width, D language width, V vocabulary.

| name           | shape, dtype          | made by           | note                                                    |
|----------------|-----------------------|-------------------|---------------------------------------------------------|
| input_ids      | (B, S) int64          | encode.py         | `image_token_id` at N*P positions, in reading order     |
| attention_mask | (B, S)                | engine, collate   | 1 on real tokens, images included                       |
| labels         | (B, S) int64          | collate           | unshifted, -100 off the loss mask                       |
| pixel_values   | (N, 3, H, W) float    | image/            | normalized; None when the batch has no image            |
| image features | (N, *, Dv)->(N, P, D)| vision, connector | one masked assignment; a mismatch names both counts     |

With a connector of cross-attention an image has one `image_token_id`, which marks its place; see decoder/gated.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .config import YiVLConfig
from .connector import Connector, build_connector
from .vision import OpenClipTower


@dataclass
class YiVLModelOutput(BaseModelOutputWithPast):
    """The language model's output, and the image features (N, P, D) that went into it; None without images."""

    image_hidden_states: Tensor | None = None
    router_sums: tuple[Any, ...] | None = None  # of a language model of experts in training; see decoder/losses.py


@dataclass
class YiVLCausalLMOutput(CausalLMOutputWithPast):
    """The same with logits (B, S, V) and the loss."""

    image_hidden_states: Tensor | None = None
    router_sums: tuple[Any, ...] | None = None


class YiVLPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about all Yi-VL classes."""

    config: YiVLConfig
    config_class = YiVLConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _no_split_modules = [
        "LlamaDecoderLayer",
        "HybridDecoderLayer",
        "GatedDecoderLayer",
        "ResidualAttentionBlock",
        "ConvStem",
    ]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Connector):
            module.init_weights_()


class YiVLModel(YiVLPreTrainedModel):
    """Tower, connector and language model, without the head over the vocabulary."""

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = OpenClipTower(config.vision_config)
        self.multi_modal_projector = build_connector(
            config.connector_config, config.vision_config.hidden_size, config.text_config.hidden_size
        )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) -> image features in the language model's space, (N, P, D)"""
        features = self.vision_tower(pixel_values).last_hidden_state  # (N, patches, Dv)
        return self.multi_modal_projector(features)  # (N, P, D)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """transformers' name for `encode_images`: `pooler_output` holds one (P, D) tensor per image.

        With cross-attention (1, P * D): transformers takes its rows for those of image tokens.
        """
        patches = self.vision_tower(pixel_values).last_hidden_state
        features = self.multi_modal_projector(patches)
        if self.config.connector_config.is_cross_attention:
            features = features.flatten(1).unsqueeze(1)
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=tuple(features))  # type: ignore[arg-type]

    def insert_images(self, inputs_embeds: Tensor, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Put features at the image tokens, in reading order: (B, S, D), (B, S), (N, P, D) -> (B, S, D)

        Raises:
            ValueError: the batch has another number of image tokens than of features.
        """
        is_image = input_ids == self.config.image_token_id  # (B, S)
        num_features = image_features.shape[0] * image_features.shape[1]
        # A compiled graph cannot branch on a count; compile only what was run once without.
        if not torch.compiler.is_compiling() and (num_tokens := int(is_image.sum())) != num_features:
            raise ValueError(
                f"{num_tokens} image tokens in input_ids but {num_features} image features "
                f"({image_features.shape[0]} images of {image_features.shape[1]} tokens); each image needs its "
                "placeholder tokens exactly once. Use the model's own processor."
            )
        features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> YiVLModelOutput:
        """The language model over text and images; see the table atop this file.

        Args:
            mm_encoder_outputs: transformers' way to hand over images that are encoded already.
            kwargs: for the language model, its cache among them (`cache`; before transformers 5.24 `past_key_values`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, S, D)

        image_features = None
        encoded = mm_encoder_outputs.get("image") if mm_encoder_outputs else None
        if encoded is not None:
            if features := tuple(encoded.pooler_output):  # type: ignore[arg-type]
                image_features = torch.stack(features)
                if self.config.connector_config.is_cross_attention:
                    image_features = image_features.reshape(-1, self.config.num_image_features, inputs_embeds.shape[-1])
        elif pixel_values is not None and len(pixel_values):
            image_features = self.encode_images(pixel_values)
        if self.config.connector_config.is_cross_attention:  # the language model attends to them; see decoder/gated.py
            is_image = input_ids == self.config.image_token_id if input_ids is not None else None
            kwargs |= {"image_features": image_features, "is_image": is_image}
        elif image_features is not None:
            if input_ids is None:
                raise ValueError("Images need input_ids: features go where the image tokens are.")
            inputs_embeds = self.insert_images(inputs_embeds, input_ids, image_features)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        return YiVLModelOutput(**outputs, image_hidden_states=image_features)


class _NeverToken(LogitsProcessor):
    """Makes one token impossible."""

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """(B, S), (B, V) -> (B, V)"""
        scores = scores.clone()
        scores[:, self._token_id] = -math.inf
        return scores


class YiVLForConditionalGeneration(YiVLPreTrainedModel, GenerationMixin):
    """Yi-VL with its language-model head: what `yi_vl.load` returns inside a `YiVL` and the trainer trains."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__(config)
        self.model = YiVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `YiVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def generate(
        self, inputs: Any = None, generation_config: Any = None, logits_processor: Any = None, *args: Any, **kwargs: Any
    ) -> Any:  # type: ignore[override]
        """As transformers does, but no image token is ever generated, nor drafted (prompt lookup copies the prompt)."""
        processors = LogitsProcessorList([*(logits_processor or ()), _NeverToken(self.config.image_token_id)])
        return super().generate(inputs, generation_config, processors, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> YiVLCausalLMOutput:
        """Logits (B, S, V), and the mean loss over supervised tokens when labels are given.

        Args:
            logits_to_keep: only the last so many positions' logits (0: all), or the positions given.
            kwargs: for the language model, its cache among them (`cache`; before transformers 5.24 `past_key_values`);
                `num_items_in_batch` normalises the loss by the supervised tokens of a whole step.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, S, D)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden if isinstance(keep, int) else hidden[:, keep])  # (B, S or kept, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        carried = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return YiVLCausalLMOutput(loss=loss, logits=logits, **carried)
