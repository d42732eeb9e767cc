"""The base class of quantized linear layers for CPUs. N output features, K input features, M rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..autotune import least_seconds

CHUNK_ROWS = 512  # dequantized at once: they stay in the processor's cache


_MEASURED_ROWS = (1, 8, 16, 32, 64, 128)
Product = Callable[[Tensor], Tensor]  # (M, K) -> (M, N)


def random_linear(num_rows: int, num_columns: int, dtype: torch.dtype) -> nn.Linear:
    """A layer to measure kernels with."""
    with torch.device("meta"):
        linear = nn.Linear(num_columns, num_rows, bias=False, dtype=dtype)
    weight = torch.randn(num_rows, num_columns, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return linear


@torch.inference_mode()
def most_kernel_rows(kernel: Product, dequantized: Product, num_columns: int, dtype: torch.dtype) -> int:
    """The number of rows up to which a kernel is faster than a product with dequantized weights: 0 if it never is."""
    most = 0
    for num_rows in _MEASURED_ROWS:
        x = torch.ones(num_rows, num_columns, dtype=dtype, device="cpu")
        seconds = least_seconds({"dequantized": lambda _, x=x: dequantized(x), "kernel": lambda _, x=x: kernel(x)})  # type: ignore[misc]
        if seconds["kernel"] > seconds["dequantized"]:
            break
        most = num_rows
    return most


class PackedLinear(nn.Module):
    """The base of both schemes' layers: buffers `weight` and `weight_scale`, packed for this processor's kernel.

    A state dict holds them as `quantize` returns them, the same on every processor.
    """

    weight_dtype: torch.dtype

    def __init__(self, like: nn.Linear, weight_shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        self.dtype, device = like.weight.dtype, like.weight.device
        self.register_buffer("weight", torch.empty(weight_shape, dtype=self.weight_dtype, device=device))
        self.register_buffer("weight_scale", torch.empty(scale_shape, dtype=self.dtype, device=device))
        self.weight: Tensor
        self.weight_scale: Tensor
        self.is_packed = False

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return self.weight.nbytes + self.weight_scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """A matrix (N, K) as this layer's buffers, not yet packed."""
        raise NotImplementedError

    def pack_(self) -> None:
        """Bring the weights into the layout that this processor's kernel reads."""
        if not self.is_packed:
            self.weight, self.weight_scale = self._packed()
            self.is_packed = True

    def _packed(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _matmul(self, rows: Tensor) -> Tensor:
        """(M, K) -> (M, N)"""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        assert self.is_packed
        y = self._matmul(x.reshape(-1, self.in_features).contiguous())
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = self._unpacked()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loaded weights are packed again."""
        was_packed, self.is_packed = self.is_packed, False
        if was_packed:
            self.weight, self.weight_scale = self._unpacked()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_packed:
            self.pack_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
