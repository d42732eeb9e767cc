"""BLIP-2's connector (arXiv 2301.12597): learned queries that attend to each other and to the image features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from .base import Connector
from .config import ConnectorConfig


class QFormer(Connector):
    """Cross-attention in every second layer, then a linear layer. Without dropout, which the paper has as BERT."""

    def __init__(self, config: ConnectorConfig, vision_width: int, language_width: int) -> None:
        super().__init__()
        assert config.num_tokens and config.hidden_size and config.num_layers and config.num_heads
        self.queries = nn.Parameter(torch.empty(config.num_tokens, config.hidden_size))
        self.transformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=4 * config.hidden_size,
                encoder_hidden_size=vision_width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=config.initializer_range,
            )
        )
        self.linear = nn.Linear(config.hidden_size, language_width)
        self.std = config.initializer_range

    @torch.no_grad()
    def init_weights_(self) -> None:
        """The queries; the rest is initialized as transformers does."""
        init.normal_(self.queries, std=self.std)

    def forward(self, features: Tensor) -> Tensor:
        """(N, patches, Dv) -> (N, P, D)"""
        queries = self.queries.expand(len(features), -1, -1)  # (N, P, hidden)
        hidden = self.transformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.linear(hidden.to(self.linear.weight.dtype))
