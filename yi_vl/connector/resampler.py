"""A perceiver resampler, as Flamingo's (arXiv 2204.14198) in Idefics2's form (2405.02246): latents attend to the image.

Keys and values are of the image features and of the latents themselves.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from .base import Connector
from .config import ConnectorConfig

_HEAD_DIM, _GROUPED_HEADS = 96, 4


class _Perceiver(Idefics2PerceiverResampler):
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.latents)  # transformers sets them to ones, and they would all stay equal


class Resampler(Connector):
    """At the tower's width, then a linear layer. The latents are drawn from N(0, 1)."""

    def __init__(self, config: ConnectorConfig, vision_width: int, language_width: int) -> None:
        super().__init__()
        assert config.num_tokens and config.num_layers and config.num_heads
        num_heads = config.num_heads
        self.perceiver = _Perceiver(
            Idefics2PerceiverConfig(
                hidden_size=vision_width,
                resampler_n_latents=config.num_tokens,
                resampler_depth=config.num_layers,
                resampler_n_heads=num_heads,
                resampler_head_dim=_HEAD_DIM,
                num_key_value_heads=num_heads // _GROUPED_HEADS if num_heads % _GROUPED_HEADS == 0 else num_heads,
                initializer_range=config.initializer_range,
            )
        )
        self.linear = nn.Linear(vision_width, language_width)

    def forward(self, features: Tensor) -> Tensor:
        """(N, patches, Dv) -> (N, P, D)"""
        latents = self.perceiver.latents.expand(len(features), -1, -1)  # (N, P, Dv)
        for layer in self.perceiver.layers:  # its own forward looks into a mask, which meta tensors do not have
            latents = layer(latents, features)
        return self.linear(self.perceiver.norm(latents))
