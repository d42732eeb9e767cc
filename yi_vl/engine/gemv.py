"""Linear layers that multiply one vector at the speed of the memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GemvLinear(nn.Linear):
    """`nn.Linear`, but one bf16 vector on a CPU is multiplied as a vector (GEMV), not as a matrix of one row (GEMM).

    A decode step then reads the weights at 25-27 GB/s on a machine whose limit is 27, instead of 18-20. Other inputs,
    dtypes and devices, and quantized weights, are multiplied as by `nn.Linear`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        weight = self.weight
        if (
            input.numel() == self.in_features
            and input.dtype == weight.dtype == torch.bfloat16
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter
            and self.bias is None
        ):
            return torch.mv(weight, input.flatten()).view(*input.shape[:-1], self.out_features)
        return super().forward(input)


def use_gemv_(model: nn.Module) -> None:
    """Make every `nn.Linear` in the model a `GemvLinear`, which is a subclass."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = GemvLinear  # as parametrizations do: weights, hooks and names stay


def use_gemm_(model: nn.Module) -> None:
    """Undo `use_gemv_`."""
    for module in model.modules():
        if type(module) is GemvLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
