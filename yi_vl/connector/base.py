"""What all connectors have in common."""

from __future__ import annotations

from torch import Tensor, nn


class Connector(nn.Module):
    """Image features of the vision tower, (N, patches, Dv), into the language model's embeddings, (N, P, D)."""

    def init_weights_(self) -> None:
        """Initialize what transformers does not know how to, in those tensors that are not loaded."""

    def forward(self, features: Tensor) -> Tensor:
        """(N, patches, Dv) -> (N, P, D)"""
        raise NotImplementedError
