"""Linear layers that take one vector at the speed of the memory. Called by predict.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VectorLinear(nn.Linear):
    """`nn.Linear`, but one bf16 vector on a CPU is multiplied as a vector and not as a matrix of one row.

    The product, and so an answer's every step, then reads the weights at 25-27 GB/s on a machine whose limit is 27, and
    not at 18-20. Nothing else differs: other inputs, types and devices, and quantised weights, take `nn.Linear`'s way.
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


def use_vectors_(model: nn.Module) -> None:
    """Make every `nn.Linear` in the model a `VectorLinear`; it stays an `nn.Linear` to whoever looks for one."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = VectorLinear  # as parametrisations do: weights, hooks and names stay


def use_matrices_(model: nn.Module) -> None:
    """Undo `use_vectors_`."""
    for module in model.modules():
        if type(module) is VectorLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]
