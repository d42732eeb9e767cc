"""The configuration of the connector: how image features reach the language model."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

MLP, QFORMER, RESAMPLER, ABSTRACTOR = "mlp", "qformer", "resampler", "abstractor"

# Of the papers: BLIP-2 (arXiv 2301.12597), Idefics2 (2405.02246), Honeybee (2312.06742). None: the tower's width.
_DEFAULTS: dict[str, dict[str, int | None]] = {
    MLP: {"num_tokens": None, "hidden_size": None, "num_layers": None, "num_heads": None},
    QFORMER: {"num_tokens": 32, "hidden_size": 768, "num_layers": 12, "num_heads": 12},
    RESAMPLER: {"num_tokens": 64, "hidden_size": None, "num_layers": 3, "num_heads": 16},
    ABSTRACTOR: {"num_tokens": 144, "hidden_size": 1024, "num_layers": 3, "num_heads": None},
}
TYPES = tuple(_DEFAULTS)


class ConnectorConfig(PreTrainedConfig):
    """Which connector, and its sizes; those that are not given are its paper's.

    Args:
        type: `mlp`, Yi-VL's projector of each patch; `qformer`, BLIP-2's; `resampler`, a perceiver as Idefics2's;
            `abstractor`, Honeybee's convolutions.
        num_tokens: image tokens per image; the projector has as many as the tower has patches.
        hidden_size: width inside the Q-Former, or of the abstractor's convolutions; a resampler has the tower's.
        num_layers: of the Q-Former or the resampler; of each of the abstractor's two stages.
        num_heads: of the Q-Former or the resampler.
    """

    model_type = "yi_vl_connector"
    base_config_key = "connector_config"

    type: str = MLP
    num_tokens: int | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.type not in _DEFAULTS:
            raise ValueError(f"The connector's type is {self.type!r}; expected one of {', '.join(TYPES)}.")
        for name, default in _DEFAULTS[self.type].items():
            value = getattr(self, name)
            if value is None:
                setattr(self, name, default)
            elif default is None:
                raise ValueError(f"A connector of type {self.type} has no {name}; leave it out.")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"The connector's {name} is {value!r}; expected a whole number of 1 or more.")
        super().__post_init__(**kwargs)
        if self.type == ABSTRACTOR and math.isqrt(self.num_tokens or 0) ** 2 != self.num_tokens:
            raise ValueError(f"The abstractor's num_tokens is {self.num_tokens}; expected a square, such as 64 or 144.")
        if self.type == QFORMER and (self.hidden_size or 0) % (self.num_heads or 1):
            raise ValueError(
                f"The Q-Former's hidden_size is {self.hidden_size}; expected a multiple of its {self.num_heads} heads."
            )

    @property
    def is_projector(self) -> bool:
        """Whether it is Yi-VL's own: what the other layouts and engines can hold."""
        return self.type == MLP
