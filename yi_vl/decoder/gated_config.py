"""The configuration of a Llama with gated cross-attention to images (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


def cross_pattern(num_layers: int, every: int) -> list[int]:
    """`cross_layers` with a block before the last of `every` layers: 3, 7, 11, ... of every 4."""
    return list(range(every - 1, num_layers, every))


class YiGatedConfig(LlamaConfig):
    """A Llama, some of whose layers come after a block of gated cross-attention to an image.

    Args:
        cross_layers: the layers, counted from 0, that a block comes before; None: every fourth.
    """

    model_type = "yi_gated"

    cross_layers: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.cross_layers is None:
            self.cross_layers = cross_pattern(self.num_hidden_layers, 4)
        super().__post_init__(**kwargs)
        layers, num_layers = self.cross_layers, self.num_hidden_layers
        is_known = isinstance(layers, (list, tuple)) and all(
            isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < num_layers for layer in layers
        )
        if not is_known or not layers or sorted(set(layers)) != list(layers):
            raise ValueError(
                f"cross_layers is {layers!r}; expected some of the layers 0 to {num_layers - 1}, in ascending order."
            )

    def image_key_bytes(self, num_features: int, value_bytes: int = 2) -> int:
        """Bytes of the keys and values of one image in the KV cache."""
        assert self.cross_layers is not None and self.head_dim is not None
        num_heads = self.num_key_value_heads or self.num_attention_heads
        return len(self.cross_layers) * 2 * num_heads * self.head_dim * num_features * value_bytes


def with_cross_layers(config: LlamaConfig, every: int) -> YiGatedConfig:
    """The same Llama with a block before the last of `every` layers.

    Raises:
        ValueError: there are fewer layers, or it is no Llama.
    """
    if config.model_type not in (LlamaConfig.model_type, YiGatedConfig.model_type):
        raise ValueError(f"Gated cross-attention goes into a llama, and the language model is a {config.model_type}.")
    if every > config.num_hidden_layers:
        raise ValueError(
            f"The connector's every is {every}, and the language model has {config.num_hidden_layers} layers; lower it."
        )
    return YiGatedConfig(**_values(config) | {"cross_layers": cross_pattern(config.num_hidden_layers, every)})


def without_cross_layers(config: YiGatedConfig) -> LlamaConfig:
    """The Llama alone."""
    return LlamaConfig(**_values(config))


def _values(config: LlamaConfig) -> dict[str, Any]:
    values = config.to_dict()
    for name in ("model_type", "cross_layers", "architectures", "transformers_version"):
        values.pop(name, None)
    return values
