"""What training on a CPU needs to be quick: memory that is kept, and attention fit for short sequences.

Attention here is two matrix products and a softmax. torch's fused kernels are slow to go backward on a CPU, and its plain
ones copy keys and values for grouped heads and walk masks several times; this costs half to a third of either (measured at
nano's sizes). B rows, H query heads, K key heads, L queries, S keys, d head
width, Dv tower width. Called by loop.py; transformers' Llama and open_clip's tower then call what is here.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from yi_vl.model import YiVLForConditionalGeneration

_NAME = "yi_vl_grouped"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Let the allocator keep what it frees: handing each large tensor back to the system cost a tenth of the time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)


def use_short_attention_(model: YiVLForConditionalGeneration) -> None:
    """Make tower and language model attend this way; weights and their names stay."""
    model.model.language_model.set_attn_implementation(_NAME)
    for block in model.model.vision_tower.visual.transformer.resblocks:
        block.attn.__class__ = ShortSelfAttention


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """(B, H, L, d), (B, K, S, d), (B, K, S, d) -> (B, L, H, d). The queries are those of the last L keys.

    Padding must be on the right, where causality keeps it out; the heads of a group are rows of one product.
    """
    batch, heads, length, width = query.shape
    groups, size = key.shape[1], key.shape[2]
    future = torch.full((length, size), -torch.inf, dtype=value.dtype, device=value.device).triu(size - length + 1)
    future = future.repeat(heads // groups, 1).expand(batch * groups, -1, -1)  # (B*K, H/K*L, S)
    rows = query.to(value.dtype).reshape(batch * groups, -1, width)  # (B*K, H/K*L, d)
    columns = key.to(value.dtype).reshape(batch * groups, size, width)
    scores = torch.baddbmm(future, rows, columns.transpose(1, 2), alpha=scaling)  # (B*K, H/K*L, S)
    output = torch.bmm(scores.softmax(-1), value.reshape(batch * groups, size, width))
    return output.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


class ShortSelfAttention(nn.MultiheadAttention):
    """open_clip's attention within an image, all patches to all patches."""

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """(N, L, Dv) -> (N, L, Dv)"""
        num_images, length, _width = query.shape
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        split = projected.view(num_images, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        rows, columns, values = split.reshape(3, num_images * self.num_heads, length, self.head_dim)
        scores = torch.bmm(rows * self.head_dim**-0.5, columns.transpose(1, 2))  # (N*H, L, L)
        output = torch.bmm(scores.softmax(-1).to(values.dtype), values)
        output = output.view(num_images, self.num_heads, length, self.head_dim).transpose(1, 2)
        return self.out_proj(output.reshape(num_images, length, -1)), None


AttentionInterface.register(_NAME, grouped_attention)
