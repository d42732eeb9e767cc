"""The configuration of the connector: how image features reach the language model."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

MLP, QFORMER, RESAMPLER, ABSTRACTOR = "mlp", "qformer", "resampler", "abstractor"
CROSS_ATTENTION = "cross_attention"

# Of the papers: BLIP-2 (arXiv 2301.12597), Idefics2 (2405.02246), Honeybee (2312.06742), Flamingo (2204.14198). What is
# None a connector of that type does not have; the resampler's width is the tower's.
_NOTHING: dict[str, int | None] = dict.fromkeys(("num_tokens", "hidden_size", "num_layers", "num_heads", "every"))
_DEFAULTS: dict[str, dict[str, int | None]] = {
    MLP: _NOTHING,
    QFORMER: _NOTHING | {"num_tokens": 32, "hidden_size": 768, "num_layers": 12, "num_heads": 12},
    RESAMPLER: _NOTHING | {"num_tokens": 64, "num_layers": 3, "num_heads": 16},
    ABSTRACTOR: _NOTHING | {"num_tokens": 144, "hidden_size": 1024, "num_layers": 3},
    CROSS_ATTENTION: _NOTHING | {"every": 4},
}
_FLAMINGO_RESAMPLER: dict[str, int | None] = {"num_tokens": 64, "num_layers": 6, "num_heads": 16}
TYPES = tuple(_DEFAULTS)


class ConnectorConfig(PreTrainedConfig):
    """Which connector, and its sizes; those that are not given are its paper's.

    Args:
        type: `mlp`, Yi-VL's projector of each patch; `qformer`, BLIP-2's; `resampler`, a perceiver as Idefics2's;
            `abstractor`, Honeybee's convolutions; `cross_attention`, Flamingo's: layers of the language model attend to
            the features of a projector, or of a resampler where `num_tokens` is given.
        num_tokens: features per image, and image tokens in the prompt but for `cross_attention`, which takes one; the
            projector has as many as the tower has patches.
        hidden_size: width inside the Q-Former, or of the abstractor's convolutions; a resampler has the tower's.
        num_layers: of the Q-Former or the resampler; of each of the abstractor's two stages.
        num_heads: of the Q-Former or the resampler.
        every: of so many layers of the language model, the last comes after a block of cross-attention.
    """

    model_type = "yi_vl_connector"
    base_config_key = "connector_config"

    type: str = MLP
    num_tokens: int | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    every: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.type not in _DEFAULTS:
            raise ValueError(f"The connector's type is {self.type!r}; expected one of {', '.join(TYPES)}.")
        for name, default in self._defaults.items():
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
    def _defaults(self) -> dict[str, int | None]:
        defaults = _DEFAULTS[self.type]
        return defaults | _FLAMINGO_RESAMPLER if self.has_resampler and self.is_cross_attention else defaults

    @property
    def is_cross_attention(self) -> bool:
        """Whether layers of the language model attend to the image, which then has one token in the prompt."""
        return self.type == CROSS_ATTENTION

    @property
    def has_resampler(self) -> bool:
        """Whether the features are a resampler's."""
        return self.type == RESAMPLER or (self.is_cross_attention and self.num_tokens is not None)

    @property
    def num_prompt_tokens(self) -> int | None:
        """Tokens per image in the prompt; None: one for each patch."""
        return 1 if self.is_cross_attention else self.num_tokens

    @property
    def is_projector(self) -> bool:
        """Whether it is Yi-VL's own: what the other layouts and engines can hold."""
        return self.type == MLP
