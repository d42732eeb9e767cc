"""Attention of one new token on a CPU: keys and values of grouped heads are read once, and not copied for each head.

torch's fused kernel for CPUs takes no grouped heads. transformers asks for them where there is no mask, and torch then
multiplies copies of the keys and values: after 1,500 tokens of a 1B that takes six times as long, after 32,000 ten.

B rows, H query heads, K key-value heads, T tokens, E head width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..model import YiVLForConditionalGeneration

GROUPED = "yi_vl_grouped"


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`sdpa` of transformers, except that one token's query heads are rows of the head whose keys they share.

    Args:
        query: (B, H, S, E).
        key, value: (B, K, T, E).
        attention_mask: (B, 1, S, T), or None.

    Returns:
        (B, S, H, E), and no attention weights.
    """
    num_rows, num_heads, num_new, width = query.shape
    if num_new > 1 or kwargs.get("dropout") or (attention_mask is not None and attention_mask.shape[1] > 1):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    grouped = query.reshape(num_rows, key.shape[1], -1, width)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return output.reshape(num_rows, 1, num_heads, width), None


def use_grouped_attention_(model: YiVLForConditionalGeneration) -> None:
    """On a CPU, in place of torch's attention where the language model has that; nothing changes elsewhere."""
    language_model = model.model.language_model
    if model.device.type == "cpu" and language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(GROUPED)


AttentionInterface.register(GROUPED, grouped_attention)  # type: ignore[arg-type]
AttentionMaskInterface.register(GROUPED, sdpa_mask)
