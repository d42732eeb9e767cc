"""Attention of the hybrid decoder: over a window or all tokens, to the layer's own keys and values or an earlier one's.

B rows, S new tokens, T all of them, H query heads, K key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .config import SLIDING, YiHybridConfig


class HybridAttention(nn.Module):
    """A layer whose keys and values are another's has no projections for them."""

    def __init__(self, config: YiHybridConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None and config.kv_source_layers is not None and config.head_dim is not None
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        num_kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == SLIDING else None
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        if config.kv_source_layers[layer_idx] == layer_idx:
            self.k_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=bias)
            self.v_proj = nn.Linear(width, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), and the keys and values attended to, (B, K, T, E).

        Args:
            keys, values: of the source layer, (B, K, T, E); None where the layer has its own.
        """
        queries = self._heads(self.q_proj(hidden_states))
        if keys is None or values is None:
            keys, values = self._heads(self.k_proj(hidden_states)), self._heads(self.v_proj(hidden_states))
            queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
            if cache is not None:
                keys, values = cache.update(keys, values, self.layer_idx)
        else:
            queries, _ = apply_rotary_pos_emb(queries, queries, *position_embeddings)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attend(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), keys, values  # vLLM's has no rows

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, S, heads*E) -> (B, heads, S, E)"""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
