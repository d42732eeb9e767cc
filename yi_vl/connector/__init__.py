"""Connectors: image features of the vision tower, (N, patches, Dv), into the language model's embeddings, (N, P, D)."""

from __future__ import annotations

from importlib import import_module

from .base import Connector as Connector
from .config import ABSTRACTOR, MLP, QFORMER, RESAMPLER, ConnectorConfig

# Imported when they are made: what they are built on takes time to import.
_CLASSES = {
    MLP: ("mlp", "Projector"),
    QFORMER: ("qformer", "QFormer"),
    RESAMPLER: ("resampler", "Resampler"),
    ABSTRACTOR: ("abstractor", "Abstractor"),
}


def build_connector(config: ConnectorConfig, vision_width: int, language_width: int) -> Connector:
    """The connector of that configuration, with fresh weights. Before cross-attention it is a projector or a resampler;
    the blocks are the language model's."""
    type_ = config.type
    if config.is_cross_attention:
        type_ = RESAMPLER if config.has_resampler else MLP
    module, name = _CLASSES[type_]
    connector = getattr(import_module(f".{module}", __name__), name)
    if type_ == MLP:
        return connector(vision_width, language_width)
    return connector(config, vision_width, language_width)
