"""int8 with a scale for each row: FBGEMM's kernel, or torch's where FBGEMM is missing or not exact.

FBGEMM quantizes x as it goes: for a whole model on two cores, 1.6 tokens/s where torch's kernel reaches 1.1. It is the
engine of torch's own quantized tensors, which torch plans to drop; hence the fallback. oneDNN's int8 product is as
fast, but leaves the quantization of x to some ten small operations. N output features, K input features, M rows.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packed import CHUNK_ROWS, PackedLinear


class Int8Linear(PackedLinear):
    """y = x W^T with W = `weight` (N, K) int8 times `weight_scale` (N,), one for each row.

    With FBGEMM the rows of x are quantized to 8 bits as well, each with its own scale; without it they are not.
    """

    weight_dtype = torch.int8
    max_kernel_rows = 12  # without FBGEMM; for more rows dequantizing is faster than torch's kernel

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like, (like.out_features, like.in_features), (like.out_features,))
        self._fbgemm: Any = None  # FBGEMM's packed weight, which is no tensor; `weight` is then empty

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return super().nbytes + (0 if self._fbgemm is None else self.in_features * self.out_features)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        scale = (_row_maximum(weight) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(self.dtype)
        rows = zip(weight.split(CHUNK_ROWS), scale.float().split(CHUNK_ROWS))
        chunks = [(w.float() / s[:, None]).round_().clamp_(-127, 127).to(torch.int8) for w, s in rows]
        return {"weight": torch.cat(chunks), "weight_scale": scale}

    def _packed(self) -> tuple[Tensor, Tensor]:
        if not _has_fbgemm():
            return self.weight, self.weight_scale
        self._fbgemm = _fbgemm_pack(self.weight, self.weight_scale)
        return self.weight.new_empty(0), self.weight_scale

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        return self.weight if self._fbgemm is None else _fbgemm_unpack(self._fbgemm), self.weight_scale

    def _matmul(self, rows: Tensor) -> Tensor:
        if self._fbgemm is not None:
            return _fbgemm_product(rows.float(), self._fbgemm).to(rows.dtype)
        if len(rows) <= self.max_kernel_rows:
            return torch._weight_int8pack_mm(rows, self.weight, self.weight_scale)
        y = rows.new_empty(len(rows), self.out_features)
        for first in range(0, self.out_features, CHUNK_ROWS):
            last = first + CHUNK_ROWS
            y[:, first:last] = F.linear(rows, self.weight[first:last].to(rows.dtype))
        return y * self.weight_scale


def _fbgemm_pack(weight: Tensor, scale: Tensor) -> Any:
    """int8 (N, K) and its rows' scales, packed by FBGEMM."""
    zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch will drop these tensors some day; `_has_fbgemm` then says so
            quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = before


def _fbgemm_unpack(packed: Any) -> Tensor:
    """(N, K) int8; slow."""
    weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0].int_repr()
    return weight


def _fbgemm_product(x: Tensor, packed: Any) -> Tensor:
    """(M, K) -> (M, N), float32. FBGEMM has one scale for all of x, so each row is divided by its maximum."""
    if len(x) == 1:
        y: Tensor = torch.ops.quantized.linear_dynamic(x, packed)
        return y
    maximum = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    y = torch.ops.quantized.linear_dynamic(x / maximum, packed)
    return y.mul_(maximum)


@cache
def _has_fbgemm() -> bool:
    """Whether FBGEMM is here and its sums are exact: on a processor without VNNI they overflow."""
    x = torch.full((1, 256), 255.0, device="cpu")
    weight = torch.full((64, 256), 127, dtype=torch.int8, device="cpu")
    try:
        y = _fbgemm_product(x, _fbgemm_pack(weight, torch.ones(64, device="cpu")))
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(y, torch.full_like(y, 255 * 127 * 256))


def _row_maximum(weight: Tensor) -> Tensor:
    """The largest magnitude in each row, without a copy of the matrix: (N, K) -> (N,) float32"""
    low, high = weight.aminmax(dim=1)
    return torch.maximum(-low, high).float()
