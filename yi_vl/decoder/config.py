"""The configuration of the hybrid decoder: which layers see a window, which share keys and values, and the experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

SLIDING, FULL = "sliding_attention", "full_attention"
BALANCE_WEIGHTS = (1e-6, 1e-4, 1e-3)  # of arXiv 2412.01253: whole batch, group, partition of a group


def layer_pattern(num_layers: int, every: int) -> list[str]:
    """`layer_types` with full attention in the last of `every` layers, and sliding windows in the others."""
    return [FULL if (index + 1) % every == 0 else SLIDING for index in range(num_layers)]


def sharing_pattern(layer_types: Sequence[str], group: int) -> list[int]:
    """`kv_source_layers` in which `group` consecutive full-attention layers share the first one's keys and values."""
    full_layers = [index for index, layer_type in enumerate(layer_types) if layer_type == FULL]
    source_of = {index: full_layers[number - number % group] for number, index in enumerate(full_layers)}
    return [source_of.get(index, index) for index in range(len(layer_types))]


class YiHybridConfig(LlamaConfig):
    """A decoder in the style of Yi-Lightning (arXiv 2412.01253). Its sizes are unpublished; the defaults are ours.

    Args:
        layer_types: "sliding_attention" or "full_attention" for each layer; None: full attention in every fourth layer.
        sliding_window: how many tokens a sliding layer sees, the present one included.
        kv_source_layers: for each layer the one whose keys and values it attends to: its own, or an earlier layer of
            full attention; None: two consecutive full-attention layers share.
        num_experts: of each layer; 0 for one dense feed-forward layer. `intermediate_size` is the width of one expert.
        num_experts_per_tok: experts of each token where they are chosen by top-k.
        router_top_p: each token gets the fewest experts whose probabilities reach this sum; None for top-k.
        max_experts_per_tok: the most experts that a token gets by top-p; None for a quarter of them.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        router_balance_weights: of the balance loss over the tokens of all ranks, of a rank, and of a part of a rank's.
        router_balance_parts: parts of a rank's tokens.
        router_entropy_weight: of the entropy of the router's probabilities; it makes routing by top-p decided.
    """

    model_type = "yi_hybrid"
    attribute_map = {"num_local_experts": "num_experts"}  # the name that transformers' experts read

    layer_types: list[str] | None = None
    sliding_window: int = 1024
    kv_source_layers: list[int] | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 2
    router_top_p: float | None = None
    max_experts_per_tok: int | None = None
    norm_topk_prob: bool = True
    router_balance_weights: list[float] | tuple[float, ...] = BALANCE_WEIGHTS
    router_balance_parts: int = 4
    router_entropy_weight: float = 1e-4

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = layer_pattern(self.num_hidden_layers, 4)
        if self.kv_source_layers is None:
            self.kv_source_layers = sharing_pattern(self.layer_types, 2)
        if self.max_experts_per_tok is None:
            self.max_experts_per_tok = max(self.num_experts_per_tok, self.num_experts // 4)
        super().__post_init__(**kwargs)
        self._check_layers()
        self._check_experts()

    @property
    def num_routed(self) -> int:
        """K: places for the experts of one token, which top-p need not fill."""
        assert self.max_experts_per_tok is not None
        return self.num_experts_per_tok if self.router_top_p is None else self.max_experts_per_tok

    @property
    def shared_layers(self) -> set[int]:
        """The layers whose keys and values others attend to as well."""
        assert self.kv_source_layers is not None
        return {source for index, source in enumerate(self.kv_source_layers) if source != index}

    def kv_tokens(self, num_tokens: int) -> int:
        """How many tokens' keys and values all layers together keep of a sequence of `num_tokens`."""
        assert self.layer_types is not None and self.kv_source_layers is not None
        kept = {FULL: num_tokens, SLIDING: min(num_tokens, self.sliding_window - 1)}
        owners = set(self.kv_source_layers)
        return sum(kept[layer_type] for index, layer_type in enumerate(self.layer_types) if index in owners)

    def _check_layers(self) -> None:
        types, sources, num_layers = self.layer_types, self.kv_source_layers, self.num_hidden_layers
        assert types is not None and sources is not None
        for name, values in (("layer_types", types), ("kv_source_layers", sources)):
            if len(values) != num_layers:
                raise ValueError(f"{name} has {len(values)} entries; expected {num_layers}, one for each layer.")
        if unknown := sorted({repr(value) for value in types} - {repr(SLIDING), repr(FULL)}):
            raise ValueError(f"layer_types has {', '.join(unknown)}; expected {SLIDING!r} or {FULL!r}.")
        if not _is_int(self.sliding_window) or self.sliding_window < 2:
            raise ValueError(f"sliding_window is {self.sliding_window!r}; expected a number of tokens of 2 or more.")
        for index, source in enumerate(sources):
            is_own = source == index
            if not _is_int(source) or not 0 <= source <= index or sources[source] != source:
                raise ValueError(
                    f"kv_source_layers[{index}] is {source!r}; expected {index}, or an earlier layer that has keys and "
                    "values of its own."
                )
            if not is_own and (types[index], types[source]) != (FULL, FULL):
                raise ValueError(
                    f"Layer {index} ({types[index]}) takes keys and values from layer {source} ({types[source]}); only "
                    f"{FULL} layers share them."
                )

    def _check_experts(self) -> None:
        if not _is_int(self.num_experts) or self.num_experts < 0 or self.num_experts == 1:
            raise ValueError(f"num_experts is {self.num_experts!r}; expected 2 or more, or 0 for a dense layer.")
        if not self.num_experts:
            return
        for name in ("num_experts_per_tok", "max_experts_per_tok"):
            value = getattr(self, name)
            if not _is_int(value) or not 1 <= value <= self.num_experts:
                raise ValueError(f"{name} is {value!r}; expected 1 to {self.num_experts}, the number of experts.")
        if not _is_int(self.router_balance_parts) or self.router_balance_parts < 1:
            raise ValueError(f"router_balance_parts is {self.router_balance_parts!r}; expected 1 or more.")
        if self.router_top_p is not None and not (_is_number(self.router_top_p) and 0 < self.router_top_p <= 1):
            raise ValueError(f"router_top_p is {self.router_top_p!r}; expected more than 0 and at most 1, or null.")
        weights = [*self.router_balance_weights, self.router_entropy_weight]
        if len(weights) != 4 or not all(_is_number(weight) and 0 <= weight < float("inf") for weight in weights):
            raise ValueError(
                f"router_balance_weights is {self.router_balance_weights!r} and router_entropy_weight "
                f"{self.router_entropy_weight!r}; expected three numbers and one of 0 or more."
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
