"""What training on a CPU needs to be quick: memory that is kept, no padding, and attention fit for short sequences.

The rows of a micro-batch run as one sequence of T tokens: first the prefix that all share, once, then each row's own
tokens. Only attention tells rows apart. It is two matrix products and a softmax: torch's fused kernels are slow to go
backward on a CPU, and its plain ones copy keys and values for grouped heads and walk masks several times; this costs
half to a third of either (measured at nano's sizes).

B rows, p prefix tokens, R = T - p tokens of rows, M tokens of the longest row, H query heads, K key heads, L queries,
S keys, d head width, Dv tower width. Called by loop.py and objective.py; transformers' Llama and open_clip's tower then
call what is here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from yi_vl.model import YiVLForConditionalGeneration

PACKED = "yi_vl_packed"
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


@dataclass(frozen=True)
class Packing:
    """Where each token of a padded micro-batch lies in the one sequence."""

    prefix: int
    tokens: Tensor  # (T,) indices into (B*S,)
    positions: Tensor  # (1, T)
    shape: tuple[int, int]  # B, M
    padded: Tensor  # (R,) where each row token lies among B*M padded places ...
    packed: Tensor  # (B*M,) ... and which row token lies at each place, anything at ...
    padding: Tensor  # (number of pads,) ... these

    @classmethod
    def of(cls, attention_mask: Tensor, prefix: int) -> Packing:
        """That of rows padded on the right, (B, S), whose first `prefix` tokens are the same."""
        inside = attention_mask[:, prefix:].bool()
        inside = inside[:, : int(inside.sum(1).max())]  # (B, M)
        flat = inside.flatten()
        columns = torch.arange(prefix, prefix + inside.shape[1], device=inside.device).expand_as(inside)[inside]  # (R,)
        rows = torch.arange(inside.shape[0], device=inside.device).unsqueeze(1).expand_as(inside)[inside]  # (R,)
        shared = torch.arange(prefix, device=inside.device)
        return cls(
            prefix=prefix,
            tokens=torch.cat([shared, rows * attention_mask.shape[1] + columns]),
            positions=torch.cat([shared, columns]).unsqueeze(0),
            shape=(inside.shape[0], inside.shape[1]),
            padded=flat.nonzero().squeeze(1),
            packed=(flat.cumsum(0) - 1).clamp(min=0),
            padding=(~flat).nonzero().squeeze(1),
        )


class _Pad(torch.autograd.Function):
    """(R, width) -> (B*M, width), zeros on padding. Its backward is `_Unpad`: each token has one place."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return tokens.index_select(0, packing.packed).index_fill_(0, packing.padding, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.packing.padded), None


class _Unpad(torch.autograd.Function):
    """(B*M, width) -> (R, width)"""

    @staticmethod
    def forward(ctx: Any, places: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return places.index_select(0, packing.padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.packing.packed).index_fill_(0, ctx.packing.padding, 0), None


def use_short_attention_(model: YiVLForConditionalGeneration) -> None:
    """Make tower and language model attend this way; the language model then needs a `packing` with its inputs."""
    model.model.language_model.set_attn_implementation(PACKED)
    for block in model.model.vision_tower.visual.transformer.resblocks:
        block.attn.__class__ = ShortSelfAttention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    packing: Packing,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, H, T, d), (1, K, T, d), (1, K, T, d) -> (1, T, H, d); a row attends to the prefix and to itself, causally."""
    num_rows, longest = packing.shape
    shared, own = [], []
    for heads in (query, key, value):
        _one, num_heads, num_tokens, width = heads.shape
        tokens = heads.to(value.dtype).transpose(1, 2).reshape(num_tokens, num_heads * width)
        first, rest = tokens.split([packing.prefix, num_tokens - packing.prefix])
        shared.append(first.view(1, packing.prefix, num_heads, width).transpose(1, 2))
        own.append(_Pad.apply(rest, packing).view(num_rows, longest, num_heads, width).transpose(1, 2))
    keys, values = (torch.cat([s.expand(num_rows, -1, -1, -1), o], dim=2) for s, o in zip(shared[1:], own[1:]))
    output = _Unpad.apply(_causal(own[0], keys, values, scaling).flatten(2).flatten(0, 1), packing)  # (R, H*d)
    if packing.prefix:
        output = torch.cat([_causal(*shared, scaling).flatten(2).flatten(0, 1), output])  # (T, H*d)
    return output.view(1, query.shape[2], query.shape[1], query.shape[3]), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """(B, H, L, d), (B, K, S, d), (B, K, S, d) -> (B, L, H, d). The queries are those of the last L keys.

    The heads of a group are rows of one product.
    """
    batch, heads, length, width = query.shape
    groups, size = key.shape[1], key.shape[2]
    future = torch.full((length, size), -torch.inf, dtype=value.dtype, device=value.device).triu(size - length + 1)
    future = future.repeat(heads // groups, 1).expand(batch * groups, -1, -1)  # (B*K, H/K*L, S)
    rows = query.reshape(batch * groups, -1, width)  # (B*K, H/K*L, d)
    columns = key.reshape(batch * groups, size, width)
    scores = torch.baddbmm(future, rows, columns.transpose(1, 2), alpha=scaling)  # (B*K, H/K*L, S)
    output = torch.bmm(scores.softmax(-1), value.reshape(batch * groups, size, width))
    return output.view(batch, heads, length, width).transpose(1, 2).contiguous()


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


AttentionInterface.register(PACKED, packed_attention)
