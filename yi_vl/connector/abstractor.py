"""Honeybee's C-Abstractor (arXiv 2312.06742): convolutions around a pooling, which keep where things are."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn
from transformers import initialization as init

from .base import Connector
from .config import ConnectorConfig


class Abstractor(Connector):
    """A RegNet stage, average pooling to a smaller grid, a RegNet stage, and two linear layers.

    Without position embeddings, which tie the paper's to one image size; the tower's features have them.
    """

    def __init__(self, config: ConnectorConfig, vision_width: int, language_width: int) -> None:
        super().__init__()
        assert config.num_tokens and config.hidden_size and config.num_layers
        width, depth = config.hidden_size, config.num_layers

        def stage(in_width: int) -> RegStage:
            layers: dict[str, Any] = {"act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
            return RegStage(depth, in_width, width, stride=1, dilation=1, **layers)

        self.stage_1 = stage(vision_width)
        self.pool = nn.AdaptiveAvgPool2d(math.isqrt(config.num_tokens))
        self.stage_2 = stage(width)
        self.readout = nn.Sequential(
            nn.Linear(width, language_width), nn.SiLU(), nn.Linear(language_width, language_width)
        )

    @torch.no_grad()
    def init_weights_(self) -> None:
        """Convolutions as timm's RegNets, N(0, 2 / fan out): the image's scale passes through."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """(N, patches, Dv) -> (N, P, D)"""
        grid = math.isqrt(features.shape[1])
        image = features.transpose(1, 2).unflatten(2, (grid, grid))  # (N, Dv, grid, grid)
        pooled = self.stage_2(self.pool(self.stage_1(image)))  # (N, width, sqrt(P), sqrt(P))
        return self.readout(pooled.flatten(2).transpose(1, 2))
