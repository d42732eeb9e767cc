"""int4 in groups, each with a scale and a zero, through torch's kernel. N output features, K input features, M rows."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import CHUNK_ROWS, PackedLinear, most_kernel_rows, random_linear

_ROW_MULTIPLE = 64  # rows are padded to it, so that torch packs all of them alike
_PACKED_ROWS = {"AVX512": 64, "AVX2": 32}  # rows that torch packs together on such a processor


class Int4Linear(PackedLinear):
    """y = x W^T with W = (q - 8) * scale + zero; q in 0..15, `weight_scale` (K/G, N, 2) holds scale and zero.

    In a state dict `weight` is (N, K/2) uint8: the low half of a byte is an even column, the high half the odd one
    after it. Packed, rows are padded to a multiple of 64.
    """

    weight_dtype = torch.uint8

    def __init__(self, like: nn.Linear, group_size: int) -> None:
        self.group_size = group_size
        num_groups = like.in_features // group_size
        super().__init__(like, (like.out_features, like.in_features // 2), (num_groups, like.out_features, 2))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scales, bytes_ = [], []
        for rows in weight.split(CHUNK_ROWS):
            grouped = rows.float().view(len(rows), -1, self.group_size)  # (n, K/G, G)
            low, high = grouped.aminmax(dim=-1, keepdim=True)
            scale = ((high - low) / 15).clamp_(min=1e-6).to(self.dtype)
            zero = (low + 8 * scale.float()).to(scale.dtype)
            q = ((grouped - zero.float()) / scale.float() + 8).round_().clamp_(0, 15).to(torch.uint8)
            scales.append(torch.cat((scale, zero), dim=-1))  # (n, K/G, 2)
            bytes_.append(_join_nibbles(q.view(len(rows), -1)))  # (n, K/2)
        return {"weight": torch.cat(bytes_), "weight_scale": torch.cat(scales).transpose(0, 1).contiguous()}

    def _packed(self) -> tuple[Tensor, Tensor]:
        missing = -self.out_features % _ROW_MULTIPLE
        weight = torch.cat([_pack(_split_nibbles(rows)) for rows in _row_chunks(self.weight)])
        return weight, F.pad(self.weight_scale, (0, 0, 0, missing)).contiguous()

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([_join_nibbles(_unpack(rows)) for rows in self.weight.split(CHUNK_ROWS)])
        return weight[: self.out_features], self.weight_scale[:, : self.out_features].contiguous()

    def _matmul(self, rows: Tensor) -> Tensor:
        is_few = len(rows) <= max_kernel_rows(rows.dtype)
        return (self._kernel_matmul(rows) if is_few else self._dequantized_matmul(rows))[:, : self.out_features]

    def _kernel_matmul(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size, self.weight_scale)
        return y

    def _dequantized_matmul(self, x: Tensor) -> Tensor:
        """Output columns are computed in packed order: the low nibbles of some rows' bytes, then the high ones."""
        half, num_groups = packed_rows() // 2, len(self.weight_scale)
        packed = self.weight.view(-1, self.in_features, half)  # (blocks, K, half)
        scales = self.weight_scale.view(num_groups, len(packed), 2, half, 2)
        y = x.new_empty(len(x), len(packed), 2, half)
        step = CHUNK_ROWS // half
        for first in range(0, len(packed), step):
            chosen = slice(first, first + step)
            bytes_ = packed[chosen].transpose(0, 1).contiguous()  # (K, n, half)
            for part, nibbles in enumerate((bytes_ & 15, bytes_ >> 4)):
                w = nibbles.view(torch.int8).sub_(8).to(x.dtype).view(num_groups, self.group_size, -1)
                scale, zero = (scales[:, chosen, part, :, i].reshape(num_groups, 1, -1) for i in range(2))
                torch.addcmul(zero, w, scale, out=w)
                y[:, chosen, part] = (x @ w.view(self.in_features, -1)).view(len(x), -1, half)
        return y.view(len(x), -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


@cache
def max_kernel_rows(dtype: torch.dtype) -> int:
    """The most rows for which torch's kernel is measured to be faster than dequantizing."""
    linear = random_linear(CHUNK_ROWS, 1024, dtype)
    layer = Int4Linear(linear, group_size=64)
    layer.load_state_dict(layer.quantize(linear.weight))
    layer.pack_()
    return most_kernel_rows(layer._kernel_matmul, layer._dequantized_matmul, layer.in_features, dtype)


def _row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Some rows at a time, so that copies take little memory; on the meta device they take none."""
    return (weight,) if weight.is_meta else weight.split(CHUNK_ROWS)


def _join_nibbles(q: Tensor) -> Tensor:
    """(N, K) of 0..15 -> (N, K/2) bytes"""
    return q[:, 0::2] | (q[:, 1::2] << 4)


def _split_nibbles(bytes_: Tensor) -> Tensor:
    """(N, K/2) bytes -> (N, K) of 0..15"""
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)


def _pack(q: Tensor) -> Tensor:
    """(N, K) of 0..15 -> (N padded, K/2) bytes as torch's kernel reads them"""
    padded = F.pad(q, (0, 0, 0, -len(q) % _ROW_MULTIPLE)).int()
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded, 1)
    return packed


def _unpack(packed: Tensor, rows: int | None = None) -> Tensor:
    """The reverse. A block's bytes are (K, half): their low halves are its first rows, their high halves the others."""
    rows = rows or packed_rows()
    blocks = packed.reshape(-1, packed.shape[1] * 2, rows // 2)  # (blocks, K, half)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).flatten(0, 1)  # (N, K)


@cache
def packed_rows() -> int:
    """The number of rows that torch packs together on this processor.

    Raises:
        ValueError: torch has no fast kernel for this processor, or packs in an unknown layout.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    rows = _PACKED_ROWS.get(capability)
    if rows is None:
        raise ValueError(
            f"int4 needs a processor with AVX2 or AVX512; torch finds {capability} here. Use quantize='int8'."
        )
    sample = torch.randint(
        16, (_ROW_MULTIPLE, 32), dtype=torch.uint8, device="cpu", generator=torch.Generator("cpu").manual_seed(0)
    )
    if not torch.equal(_unpack(_pack(sample), rows), sample):
        raise ValueError(f"torch {torch.__version__} packs int4 in a way that is not known here. Use quantize='int8'.")
    return rows
