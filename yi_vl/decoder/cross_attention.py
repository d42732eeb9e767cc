"""The block of gated cross-attention, as Flamingo's (arXiv 2204.14198): tokens attend to the features of an image.

B rows, S new tokens, N images, P features per image, D width, R tokens that attend to an image, H key-value heads,
E head width; image_keys.py has the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .gated_config import YiGatedConfig
from .image_keys import ImageKeysLayer, ImageRuns

CROSS_BLOCK = "cross_block"  # in the names of the blocks' weights


class GatedCrossAttention(nn.Module):
    """`x + tanh(a) attention(norm(x), image)`, then `x + tanh(b) mlp(norm(x))`; nothing at first, as a and b are 0."""

    def __init__(self, config: YiGatedConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        self.num_kv_heads = config.num_key_value_heads or config.num_attention_heads
        width, bias = config.hidden_size, config.attention_bias
        self.input_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    @torch.compiler.disable  # its shapes are those of the batch's images
    def forward(
        self, hidden_states: Tensor, image_features: Tensor | None, runs: ImageRuns, layer: ImageKeysLayer | None
    ) -> Tensor:
        """(B, S, D) -> (B, S, D)

        Args:
            image_features: of new images, (N, P, D).
            layer: of the cache.
        """
        keys, values = self._image_keys(image_features, runs, layer)
        if not len(runs.tokens):
            return hidden_states
        flat = hidden_states.flatten(0, 1)
        tokens = flat[runs.tokens]  # (R, D)
        queries = self.q_proj(self.input_layernorm(tokens))
        attended = self.o_proj(self._attend(queries, keys, values, runs))
        changed = tokens + self.attention_gate.tanh() * attended
        changed = changed + self.mlp_gate.tanh() * self.mlp(self.post_attention_layernorm(changed))
        if not runs.is_used:
            changed = tokens.where(torch.ones_like(tokens, dtype=torch.bool), changed)  # which has a gradient of 0
        return flat.index_copy(0, runs.tokens, changed.to(flat.dtype)).view_as(hidden_states)

    def _image_keys(
        self, features: Tensor | None, runs: ImageRuns, layer: ImageKeysLayer | None
    ) -> tuple[Tensor, Tensor]:
        """Of the images in the cache and the new ones, (N, H, P, E) each."""
        if features is None:
            assert layer is not None and layer.keys is not None and layer.values is not None
            return layer.keys, layer.values
        keys, values = (
            projection(features).unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        return (keys, values) if layer is None else layer.update(keys, values, runs.last_images, runs.has_image)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, runs: ImageRuns) -> Tensor:
        """(R, heads * E), (N, H, P, E), (N, H, P, E) -> (R, heads * E)

        All queries attend to all keys of their image, so heads that share keys are queries of one product.
        """
        num_images, num_kv_heads, _, head_dim = keys.shape
        padded = queries[runs.padded].view(num_images, -1, num_kv_heads, queries.shape[1] // num_kv_heads)  # N, L
        rows = padded.transpose(1, 2).reshape(num_images, num_kv_heads, -1, head_dim)
        output = F.scaled_dot_product_attention(rows, keys.to(rows.dtype), values.to(rows.dtype))
        output = output.reshape(num_images, num_kv_heads, padded.shape[1], -1).transpose(1, 2)
        return output.reshape(-1, queries.shape[1])[runs.packed]
