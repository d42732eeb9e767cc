"""The projector: Yi-VL's own connector, of each image feature into the language model's embedding space."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Connector


class Projector(Connector):
    """Linear, LayerNorm, exact GELU, Linear, LayerNorm: Yi-VL's `mlp2x_gelu_Norm`.

    The norms are what distinguishes it from LLaVA's: they keep image features at the scale of text embeddings.
    """

    def __init__(self, vision_width: int, language_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, language_width)
        self.norm_1 = nn.LayerNorm(language_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(language_width, language_width)
        self.norm_2 = nn.LayerNorm(language_width)

    def forward(self, features: Tensor) -> Tensor:
        """(N, P, Dv) -> (N, P, D)"""
        hidden = self.act(self.norm_1(self.linear_1(features)))  # (N, P, D)
        return self.norm_2(self.linear_2(hidden))  # (N, P, D)
