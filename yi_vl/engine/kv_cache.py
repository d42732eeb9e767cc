"""The KV cache as a whole: made, filled with a row, and rows gathered from several caches into one.

B rows, R rows gathered, H key-value heads, T tokens, E head width, W tokens of a sliding window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..decoder.config import SLIDING, YiHybridConfig
from ..decoder.gated_config import YiGatedConfig
from .cache_layers import EngineLayer, GrowableLayer, ImageLayer, SourceRows, WindowLayer


def new_cache(config: PreTrainedConfig | None = None) -> Cache:
    """An empty cache for any number of rows.

    Args:
        config: of the language model. Layers that slide keep their window, and those that attend to another's keys and
            values nothing; layers of cross-attention come behind all others, with the keys of an image. Without it all
            layers keep all.
    """
    if isinstance(config, YiGatedConfig):
        assert config.cross_layers is not None
        images = [ImageLayer() for _ in config.cross_layers]
        return Cache(layers=[*(GrowableLayer() for _ in range(config.num_hidden_layers)), *images])
    if not isinstance(config, YiHybridConfig):
        return Cache(layer_class_to_replicate=GrowableLayer)
    assert config.layer_types is not None
    return Cache(
        layers=[
            WindowLayer(config.sliding_window) if layer_type == SLIDING else GrowableLayer()
            for layer_type in config.layer_types
        ]
    )


def window_of(config: PreTrainedConfig | None) -> int | None:
    """W; None where all layers keep all tokens."""
    has_windows = isinstance(config, YiHybridConfig) and SLIDING in (config.layer_types or ())
    return config.sliding_window if has_windows else None  # type: ignore[union-attr]


def engine_layers(cache: Cache) -> list[EngineLayer]:
    """The layers of a cache that `new_cache` or `gather` made."""
    return cast(list[EngineLayer], cache.layers)


def layers_of(cache: Cache) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values that are stored, (B, H, T, E), by layer; layers that have none are left out."""
    layers = {}
    for index, layer in enumerate(engine_layers(cache)):
        if layer.is_initialized:
            assert layer.keys is not None and layer.values is not None
            layers[index] = layer.keys, layer.values
    return layers


def row_of(
    cache: Cache, row: int, attention_mask: Tensor | None = None, num_tokens: int | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """One row's keys and values of each layer, (1, H, T, E), without padding, of as many tokens as the layer keeps.

    Args:
        attention_mask: (B, T) bool, of the whole cache; None where all of it are tokens.
        num_tokens: the first so many tokens of the row; None for all. A window must not have dropped what comes before.

    Returns:
        Views, unless padding is in between.
    """
    if attention_mask is None:
        columns = torch.arange(cache.get_seq_length(), device="cpu")
    else:
        columns = attention_mask[row].cpu().nonzero()[:, 0]
    columns = columns[:num_tokens]
    layers = enumerate(engine_layers(cache))
    return {index: layer.row(row, columns) for index, layer in layers if layer.is_initialized}


def load_(
    cache: Cache,
    layers: dict[int, tuple[Tensor, Tensor]],
    num_stored: int,
    num_tokens: int,
    has_last_image: bool = True,
) -> None:
    """Fill an empty cache of one row.

    Args:
        layers: keys and values up to token `num_stored`; where windows are, the last ones that `num_tokens` need.
        num_tokens: how many tokens the cache is to have.
        has_last_image: whether the last image of those stored is among these. If not, layers of images stay empty.
    """
    cache.layers += [GrowableLayer() for _ in range(len(cache), max(layers, default=-1) + 1)]
    for index, (keys, values) in layers.items():
        layer = engine_layers(cache)[index]
        if has_last_image or not isinstance(layer, ImageLayer):
            layer.load_(keys, values, num_stored, num_tokens)


def lacks_image(cache: Cache) -> bool:
    """Whether layers of images are empty, in a cache of one row."""
    return any(isinstance(layer, ImageLayer) and not layer.is_initialized for layer in cache.layers)


def gather(parts: Sequence[tuple[Cache, Tensor, Sequence[int]]]) -> tuple[Cache, Tensor]:
    """Rows of one or more caches in a new cache, padded on the left to the longest of them.

    Args:
        parts: caches, their attention masks (B, T) bool, and the rows to take.

    Returns:
        A cache of R rows, and its attention mask (R, T) bool.
    """
    sources = [SourceRows(*part) for part in parts]
    longest = max(source.num_tokens for source in sources)
    attention_mask = torch.cat([F.pad(source.mask, (longest - source.num_tokens, 0)) for source in sources])
    template = max((cache for cache, _, _ in parts), key=len)
    if not len(template):
        return new_cache(), attention_mask
    gathered = [layer.new_empty() for layer in engine_layers(template)]
    for index, layer in enumerate(gathered):
        layer.gather_(sources, index, longest)
    return Cache(layers=gathered), attention_mask  # type: ignore[arg-type]


def truncate_(cache: Cache, num_tokens: int) -> None:
    """Drop all tokens but the first so many; of windows, only those of the last pass can be dropped."""
    for layer in engine_layers(cache):
        if layer.is_initialized:
            layer.truncate(num_tokens)


def shift_row_(cache: Cache, attention_mask: Tensor, row: int, num_columns: int) -> None:
    """Move padding that is behind a row's tokens in front of them, in the cache and in its mask (B, T)."""
    for layer in engine_layers(cache):
        if layer.is_initialized:
            layer.shift_row_(row, num_columns)
    attention_mask[row] = F.pad(attention_mask[row, :-num_columns], (num_columns, 0))
