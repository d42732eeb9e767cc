"""A language model in the style of Yi-Lightning: hybrid attention, shared keys and values, and experts by top-p.

Its attention and its experts are in attention.py and experts.py; everything else is Llama's. B rows, S tokens, D width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..versions import CACHE_ARGUMENT
from .attention import HybridAttention
from .config import FULL, SLIDING, YiHybridConfig
from .experts import Experts, Router, RouterSums, SparseFeedForward
from .losses import router_loss


@dataclass
class YiHybridModelOutput(BaseModelOutputWithPast):
    """The hidden states, and in training mode the sums of each layer's router; None without experts."""

    router_sums: tuple[RouterSums, ...] | None = None


@dataclass
class YiHybridCausalLMOutput(CausalLMOutputWithPast):
    """Logits (B, S, V), and the loss with the auxiliary ones added."""

    router_sums: tuple[RouterSums, ...] | None = None


class HybridDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward. Keys and values that others share come and go as arguments and results: a place on
    the side would hold another layer's when activation checkpointing computes a layer again."""

    def __init__(self, config: YiHybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = HybridAttention(config, layer_idx)
        self.mlp = SparseFeedForward(config) if config.num_experts else LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_shared = layer_idx in config.shared_layers

    def forward(
        self,
        hidden_states: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """(B, S, D) -> (B, S, D); then keys and values if others share them, and the router's sums in training."""
        attended, keys, values = self.self_attn(
            self.input_layernorm(hidden_states), keys, values, cache=kwargs.pop(CACHE_ARGUMENT, None), **kwargs
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        sums = None
        if isinstance(self.mlp, SparseFeedForward):
            output, sums = self.mlp(normed, token_mask)
        else:
            output = self.mlp(normed)
        shared = (keys, values) if self.is_shared else (None, None)
        return hidden_states + output, *shared, *(sums or ())


class YiHybridPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about all classes of this model."""

    config: YiHybridConfig
    config_class = YiHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": HybridDecoderLayer}

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for a decorator in this file, which stands in Mixtral's

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class YiHybridModel(YiHybridPreTrainedModel):
    """The decoder without the head over the vocabulary."""

    def __init__(self, config: YiHybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HybridDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Any] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> YiHybridModelOutput:
        """Hidden states (B, S, D).

        Args:
            attention_mask: (B, T) of the cached and the new tokens, or masks by layer type.
            token_mask: (B, S), which tokens the router's sums count; None: those of `attention_mask`, or all.
            kwargs: the cache among them (`cache`; before transformers 5.24 `past_key_values`).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = kwargs.pop(CACHE_ARGUMENT, None)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        num_new = inputs_embeds.shape[1]
        if position_ids is None:
            num_cached = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(num_cached, num_cached + num_new, device=inputs_embeds.device).unsqueeze(0)
        if token_mask is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            token_mask = attention_mask[:, -num_new:]
        masks = self._masks(attention_mask, inputs_embeds, position_ids, cache)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = inputs_embeds
        shared: dict[int, tuple[Tensor, Tensor]] = {}  # by source layer
        router_sums = []
        assert self.config.layer_types is not None and self.config.kv_source_layers is not None
        for index, layer in enumerate(self.layers):
            hidden_states, keys, values, *sums = layer(
                hidden_states,
                *shared.get(self.config.kv_source_layers[index], (None, None)),
                token_mask=token_mask,
                attention_mask=masks[self.config.layer_types[index]],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **{CACHE_ARGUMENT: cache},
                **kwargs,
            )
            if keys is not None:
                shared[index] = keys, values
            if sums:
                router_sums.append(RouterSums(*sums))
        return YiHybridModelOutput(
            last_hidden_state=self.norm(hidden_states),
            router_sums=tuple(router_sums) or None,
            **{CACHE_ARGUMENT: cache},
        )

    def _masks(
        self, attention_mask: Tensor | dict[str, Any] | None, embeddings: Tensor, position_ids: Tensor, cache: Any
    ) -> dict[str, Any]:
        """By layer type, in the form that the attention implementation takes."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments = {
            "config": self.config,
            "inputs_embeds": embeddings,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE_ARGUMENT: cache,
        }
        makers = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}
        assert self.config.layer_types is not None
        return {layer_type: makers[layer_type](**arguments) for layer_type in set(self.config.layer_types)}


class YiHybridForCausalLM(YiHybridPreTrainedModel, GenerationMixin):
    """The decoder with its head: a language model alone."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: YiHybridConfig) -> None:
        super().__init__(config)
        self.model = YiHybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> YiHybridCausalLMOutput:
        """Logits (B, S, V); with labels, the mean loss of supervised tokens, plus the auxiliary losses in training."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.router_sums is not None:
                loss = loss + router_loss(outputs.router_sums, self.config)
        carried = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return YiHybridCausalLMOutput(loss=loss, logits=logits, **carried)
