"""What `yi-vl info` and `yi-vl upcycle` print of a hybrid decoder: windows, sharing, experts, and what they save."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .arguments import ranges
from .checkpoint.summary import language_parameters
from .config import YiVLConfig
from .decoder.config import FULL, SLIDING, YiHybridConfig

if TYPE_CHECKING:
    from rich.table import Table

_VALUE_BYTES = 2  # bf16


def hybrid_table(config: YiVLConfig) -> Iterator[Table]:
    """A table of `hybrid_rows`; none for another language model."""
    from rich.table import Table

    rows = list(hybrid_rows(config))
    if rows:
        table = Table(title="hybrid decoder", title_justify="left", show_header=False)
        for row in rows:
            table.add_row(*row)
        yield table


def hybrid_rows(config: YiVLConfig) -> Iterator[tuple[str, str]]:
    """Labels and texts; none for another language model."""
    text = config.text_config
    if not isinstance(text, YiHybridConfig):
        return
    yield "attention", _attention(text)
    yield "keys and values", _sharing(text)
    yield "KV cache", _cache(text)
    yield "feed-forward", _experts(text)
    total, active = language_parameters(config)
    most = "at most " if text.num_experts and text.router_top_p is not None else ""
    yield "parameters", f"{total:,} of the language model, {most}{active:,} active per token"


def _attention(text: YiHybridConfig) -> str:
    assert text.layer_types is not None
    full, sliding = (_layers(i for i, t in enumerate(text.layer_types) if t == name) for name in (FULL, SLIDING))
    if not sliding:
        return "full in all layers"
    windows = f"a window of {text.sliding_window:,} tokens in {sliding}"
    return f"full in {full}; {windows}" if full else windows


def _sharing(text: YiHybridConfig) -> str:
    assert text.kv_source_layers is not None
    groups = [
        "+".join(str(index) for index, source in enumerate(text.kv_source_layers) if source == shared)
        for shared in sorted(text.shared_layers)
    ]
    return f"shared by layers {', '.join(groups)}; all other layers have their own" if groups else "of each layer"


def _cache(text: YiHybridConfig) -> str:
    assert text.head_dim is not None
    num_heads = text.num_key_value_heads or text.num_attention_heads
    layer_bytes = 2 * num_heads * text.head_dim * _VALUE_BYTES  # of one token: a key and a value
    window, longest = text.sliding_window, text.max_position_embeddings
    growth = (text.kv_tokens(window + 1) - text.kv_tokens(window)) * layer_bytes
    total, dense = text.kv_tokens(longest) * layer_bytes, longest * text.num_hidden_layers * layer_bytes
    less = f", {dense / total:.1f} times less than without windows and sharing" if total < dense else ""
    beyond = " beyond the window" if SLIDING in (text.layer_types or ()) else ""
    return f"{growth:,} bytes per token{beyond} (bf16); {total / 1e6:,.1f} MB of {longest:,} tokens{less}"


def _experts(text: YiHybridConfig) -> str:
    if not text.num_experts:
        return f"dense, of width {text.intermediate_size:,}"
    experts = f"{text.num_experts} experts of width {text.intermediate_size:,} in each layer"
    if text.router_top_p is None:
        return f"{experts}, {text.num_experts_per_tok} per token (top-k)"
    return (
        f"{experts}; per token the most probable up to a sum of {text.router_top_p:g}, {text.max_experts_per_tok} at "
        "most (top-p)"
    )


def _layers(numbers: Iterator[int]) -> str:
    """Such as: layer 2; layers 0-1, 3; nothing for none."""
    parts = ranges(list(numbers))
    plural = "s" if len(parts) > 1 or any("-" in part for part in parts) else ""
    return f"layer{plural} {', '.join(parts)}" if parts else ""
