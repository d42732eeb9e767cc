"""Training speed on a CPU: memory that is not returned to the system, packed rows, and attention for short sequences.

A micro-batch is one sequence of T tokens: the shared prefix once, then the other tokens of each row. Attention is two
matrix products and a softmax per group of rows: a half to a third of the time of torch's fused kernels (slow backward)
and math kernels (they copy keys and values of grouped heads), measured at nano's sizes.

oneDNN compiles a kernel for every new shape of a matrix product, so lengths are rounded up to few different ones.
Without that a step of nano's language model takes 1.5 times as long.

B rows, R tokens of a group of rows, M of its longest (rounded up), H query heads, K key heads, L queries, S keys,
d head width.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.vision_blocks import SelfAttention

from .packing import Packing

PACKED = "yi_vl_packed"
_GROUP_ROWS = 8  # rows come sorted by length
_ROW_TOKENS, _ALL_TOKENS = 16, 128  # M and T are multiples of these
_NUM_KERNELS = 16384  # oneDNN's cache; the default of 1024 is less than one step with two image sizes needs
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_memory() -> None:
    """Keep freed memory (returning it to the system costs 10% of the time) and all of oneDNN's kernels."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_NUM_KERNELS))  # read at the first matrix product
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)


@dataclass(frozen=True)
class Group:
    """Rows of about the same length, which attend in one product, padded to M tokens each."""

    shape: tuple[int, int]  # B, M
    padded: Tensor  # (R,) each token's index in the B*M padded ones
    packed: Tensor  # (B*M,) the inverse, arbitrary at padding
    padding: Tensor  # (number of pads,) indices of padding in the B*M

    @classmethod
    def of(cls, lengths: Tensor) -> Group:
        """From the rows' lengths, (B,)."""
        longest = round_up(int(lengths.max()), _ROW_TOKENS)
        inside = (torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)).flatten()  # (B*M,)
        return cls(
            shape=(len(lengths), longest),
            padded=inside.nonzero().squeeze(1),
            packed=(inside.cumsum(0) - 1).clamp(min=0),
            padding=(~inside).nonzero().squeeze(1),
        )


@dataclass(frozen=True)
class GroupedPacking(Packing):
    """A packing whose rows attend in groups, after their shared prefix."""

    shared_prefix_length: int
    groups: list[Group]

    @classmethod
    def of(cls, attention_mask: Tensor, shared_prefix_length: int) -> GroupedPacking:
        """From the mask of rows padded on the right, (B, S), whose first `shared_prefix_length` tokens are the same."""
        prefix = shared_prefix_length
        rows, columns = attention_mask[:, prefix:].nonzero().unbind(1)  # (R,) each
        shared = torch.arange(prefix, device=rows.device)
        position_ids = torch.cat([shared, columns + prefix])
        num_pads = round_up(len(position_ids), _ALL_TOKENS) - len(position_ids)
        return cls(
            tokens=torch.cat([shared, rows * attention_mask.shape[1] + columns + prefix]),
            position_ids=F.pad(position_ids, (0, num_pads)).unsqueeze(0),
            num_pads=num_pads,
            shared_prefix_length=prefix,
            groups=[Group.of(lengths) for lengths in (attention_mask.sum(1) - prefix).split(_GROUP_ROWS)],
        )

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """The model's inputs, and `packing` for `packed_attention`."""
        return super().inputs(input_ids) | {"packing": self}

    def num_rows(self, attention_mask: Tensor) -> Tensor:
        """As of `Packing`: the shared prefix stands in all rows."""
        counts = super().num_rows(attention_mask)
        counts[:, : self.shared_prefix_length] = len(attention_mask)
        return counts


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Pad(torch.autograd.Function):
    """(R, width) -> (B*M, width), zeros on padding. Its backward is `_Unpad`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tokens.index_select(0, group.packed).index_fill_(0, group.padding, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.group.padded), None


class _Unpad(torch.autograd.Function):
    """(B*M, width) -> (R, width)"""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return padded.index_select(0, group.padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.group.packed).index_fill_(0, ctx.group.padding, 0), None


def use_short_attention_(model: YiVLForConditionalGeneration) -> None:
    """Use this attention in tower and language model; the latter then needs a `packing` among its inputs."""
    model.model.language_model.set_attn_implementation(PACKED)
    for module in model.model.vision_tower.modules():
        if isinstance(module, SelfAttention):
            module.attend = short_attention


@torch.compiler.disable  # fused by the compiler, its gathers would run element by element
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    packing: GroupedPacking,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, H, T, d), (1, K, T, d), (1, K, T, d) -> (1, T, H, d); a row attends causally to the prefix and itself.

    Args:
        sliding_window: the most tokens that one attends to, itself included; None: all before it.
    """
    width = query.shape[3]
    sizes = [packing.shared_prefix_length, *(len(group.padded) for group in packing.groups), packing.num_pads]
    parts = [_to_tokens(heads.to(value.dtype)).split(sizes) for heads in (query, key, value)]  # (size, heads*d) each
    shared = [_to_heads(part[0], (1, packing.shared_prefix_length), width) for part in parts]
    outputs = [_to_tokens(_causal(*shared, scaling, sliding_window))] if packing.shared_prefix_length else []  # type: ignore[call-arg,arg-type]  # three of them
    for index, group in enumerate(packing.groups, start=1):
        queries, keys, values = (_to_heads(_Pad.apply(part[index], group), group.shape, width) for part in parts)
        if packing.shared_prefix_length:
            prefix_keys, prefix_values = (heads.expand(group.shape[0], -1, -1, -1) for heads in shared[1:])
            keys, values = torch.cat([prefix_keys, keys], dim=2), torch.cat([prefix_values, values], dim=2)
        outputs.append(_Unpad.apply(_to_tokens(_causal(queries, keys, values, scaling, sliding_window)), group))
    outputs.append(query.new_zeros(packing.num_pads, query.shape[1] * width, dtype=value.dtype))
    return torch.cat(outputs).view(1, -1, query.shape[1], width), None


def _to_tokens(heads: Tensor) -> Tensor:
    """(B, H, L, d) -> (B*L, H*d)"""
    batch, num_heads, length, width = heads.shape
    return heads.transpose(1, 2).reshape(batch * length, num_heads * width)


def _to_heads(tokens: Tensor, shape: tuple[int, int], width: int) -> Tensor:
    """(B*L, H*d) -> (B, H, L, d)"""
    return tokens.view(*shape, tokens.shape[1] // width, width).transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
    """(B, H, L, d), (B, K, S, d), (B, K, S, d) -> (B, H, L, d). The queries belong to the last L keys.

    The query heads that share a key head are rows of one product.
    """
    batch, heads, length, width = query.shape
    groups, size = key.shape[1], key.shape[2]
    unseen = torch.full((length, size), -torch.inf, dtype=value.dtype, device=value.device)
    mask = unseen.triu(size - length + 1)
    if sliding_window is not None:
        mask = mask + unseen.tril(size - length - sliding_window)
    mask = mask.repeat(heads // groups, 1).expand(batch * groups, -1, -1)  # (B*K, H/K*L, S)
    rows = query.reshape(batch * groups, -1, width)  # (B*K, H/K*L, d)
    columns = key.reshape(batch * groups, size, width)
    scores = torch.baddbmm(mask, rows, columns.transpose(1, 2), alpha=scaling)  # (B*K, H/K*L, S)
    output = torch.bmm(scores.softmax(-1), value.reshape(batch * groups, size, width))
    return output.view(batch, heads, length, width)


def short_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The tower's attention among few tokens: (N, heads, L, head_dim), three times -> (N, heads, L, head_dim)"""
    rows, columns, values = (part.flatten(0, 1) for part in (query, key, value))
    scores = torch.bmm(rows * query.shape[-1] ** -0.5, columns.transpose(1, 2))  # (N*heads, L, L)
    return torch.bmm(scores.softmax(-1).to(values.dtype), values).view(query.shape)


AttentionInterface.register(PACKED, packed_attention)
