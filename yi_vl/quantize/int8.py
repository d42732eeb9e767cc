"""int8 with a scale for each row: FBGEMM's kernel, or torch's where FBGEMM is missing, not exact or slower.

FBGEMM quantizes x as it goes: one row of a 2048 x 2048 matrix takes 0.21 ms on a core of an EPYC with VNNI, torch's
kernel 0.49, the bf16 product 0.86. It is the engine of torch's own quantized tensors, which torch plans to drop; hence
the fallback. oneDNN's int8 product takes 0.42 with the small operations that quantize x. N output features, K input
features, M rows.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autotune import fastest, least_seconds
from .packed import CHUNK_ROWS, PackedLinear, most_kernel_rows, random_linear

_NUM_MATRICES = 7  # of 4 MB, in each layout: more than most caches


class Int8Linear(PackedLinear):
    """y = x W^T with W = `weight` (N, K) int8 times `weight_scale` (N,), one for each row.

    With FBGEMM the rows of x are quantized to 8 bits as well, each with its own scale; without it they are not.
    """

    weight_dtype = torch.int8

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
        if not uses_fbgemm(self.dtype):
            return self.weight, self.weight_scale
        self._fbgemm = _fbgemm_pack(self.weight, self.weight_scale)
        return self.weight.new_empty(0), self.weight_scale

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        return self.weight if self._fbgemm is None else _fbgemm_unpack(self._fbgemm), self.weight_scale

    def _matmul(self, rows: Tensor) -> Tensor:
        if self._fbgemm is not None:
            return _fbgemm_product(rows.float(), self._fbgemm).to(rows.dtype)
        is_few = len(rows) <= max_kernel_rows(rows.dtype)
        return self._kernel_matmul(rows) if is_few else self._dequantized_matmul(rows)

    def _kernel_matmul(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(rows, self.weight, self.weight_scale)

    def _dequantized_matmul(self, rows: Tensor) -> Tensor:
        y = rows.new_empty(len(rows), self.out_features)
        for first in range(0, self.out_features, CHUNK_ROWS):
            last = first + CHUNK_ROWS
            y[:, first:last] = F.linear(rows, self.weight[first:last].to(rows.dtype))
        return y * self.weight_scale


@cache
def max_kernel_rows(dtype: torch.dtype) -> int:
    """Without FBGEMM, the most rows for which torch's kernel is measured to be faster than dequantizing."""
    layer = _random_layer(CHUNK_ROWS, 1024, dtype)
    return most_kernel_rows(layer._kernel_matmul, layer._dequantized_matmul, layer.in_features, dtype)


def uses_fbgemm(dtype: torch.dtype) -> bool:
    """Whether weights are packed by FBGEMM on this processor."""
    return _has_fbgemm() and _fbgemm_is_fastest(dtype)


@cache
def _fbgemm_is_fastest(dtype: torch.dtype) -> bool:
    """Whether FBGEMM multiplies one row faster than what there is without it."""
    layer = _random_layer(2048, 2048, dtype)
    weights = [layer.weight.clone() for _ in range(_NUM_MATRICES)]
    packed = [_fbgemm_pack(weight, layer.weight_scale) for weight in weights]
    x = torch.ones(1, layer.in_features, dtype=dtype, device="cpu")

    def product(index: int) -> Tensor:
        return torch._weight_int8pack_mm(x, weights[index % _NUM_MATRICES], layer.weight_scale)

    with torch.inference_mode():
        seconds = least_seconds(
            {
                "fbgemm": lambda index: _fbgemm_product(x.float(), packed[index % _NUM_MATRICES]).to(dtype),
                "kernel": product,
            }
        )
    return fastest(seconds) == "fbgemm"


def _random_layer(num_rows: int, num_columns: int, dtype: torch.dtype) -> Int8Linear:
    linear = random_linear(num_rows, num_columns, dtype)
    layer = Int8Linear(linear)
    layer.load_state_dict(layer.quantize(linear.weight))
    return layer


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
