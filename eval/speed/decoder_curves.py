"""Time and memory over the length of the context: their table, their shape, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from yi_vl.decoder.config import FULL, SLIDING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHUNK_TOKENS = 256  # of a prefill
ALL = "all"
Forward = dict[str, float]  # seconds of a forward call: in all, and in attention by layer type
_DASHES = {FULL: "-", SLIDING: "--"}


@dataclass
class Curve:
    """What was measured of one model, at each length of the context.

    Args:
        contexts: in tokens.
        chunks: of a prefill, the first at the beginning of a prompt, the others after each context.
        decodes: of a token after each context.
    """

    contexts: Sequence[int]
    layer_types: list[str]
    chunks: list[Forward] = field(default_factory=list)
    decodes: list[Forward] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)

    def first_token_seconds(self, num_tokens: int) -> float:
        """The chunks of a prompt of so many tokens, those between two measured ones interpolated."""
        starts = np.arange(0, num_tokens, CHUNK_TOKENS)
        seconds = np.interp(starts, [0, *self.contexts], [chunk[ALL] for chunk in self.chunks])
        last = (num_tokens - starts[-1]) / CHUNK_TOKENS
        return float(seconds[:-1].sum() + seconds[-1] * last)

    def layer_ms(self, forwards: Sequence[Forward], layer_type: str) -> list[float]:
        """Milliseconds in the attention of one layer of a type."""
        num_layers = self.layer_types.count(layer_type)
        return [1000 * forward[layer_type] / num_layers for forward in forwards]

    def row(self, index: int, dense: Curve) -> dict[str, float]:
        """Of the table, at one context; relative to the dense model."""
        row = self._values(index)
        return row | {f"relative_{name}": value / dense._values(index)[name] for name, value in row.items()}

    def _values(self, index: int) -> dict[str, float]:
        return {
            "ms_per_token": 1000 * self.decodes[index][ALL],
            "ttft_seconds": self.first_token_seconds(self.contexts[index]),
            "kv_mb": self.kv_bytes[index] / 1e6,
        }

    def slope(self, forwards: Sequence[Forward]) -> float:
        """Seconds for each token more of context, by a line through the measurements (least squares)."""
        return float(np.polyfit(self.contexts, [forward[ALL] for forward in forwards], 1)[0])

    def describe(self, name: str, dense: Curve) -> list[str]:
        """How its times grow with the context, in words."""
        first, last = self.contexts[0], self.contexts[-1]
        full = self.layer_types.count(FULL)
        lines = [f"{name}: {full} of {len(self.layer_types)} layers see all tokens"]
        measured = (
            ("a token", self.decodes, dense.decodes),
            (f"a chunk of {CHUNK_TOKENS}", self.chunks[1:], dense.chunks[1:]),
        )
        for what, forwards, reference in measured:
            slope = self.slope(forwards)
            line = f"{name}: {what} takes {1e6 * slope:.3g} ms more for each 1,000 tokens of context"
            lines.append(f"{line}, {slope / dense.slope(reference):.2f} of dense's")
            for layer_type in dict.fromkeys(self.layer_types):
                layer = self.layer_ms(forwards, layer_type)
                lines.append(
                    f"{name}: {what}, attention of one {layer_type.split('_')[0]} layer: {layer[0]:.3g} ms after "
                    f"{first:,} tokens, {layer[-1]:.3g} ms after {last:,}"
                )
        return lines


def draw_curves(curves: Mapping[str, Curve], path: Path) -> None:
    """Time per token, TTFT, attention by layer type, and the KV cache, over the context.

    Raises:
        ValueError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for (name, curve), color in zip(curves.items(), ("black", "tab:blue", "tab:orange")):
        thousands = [num_tokens / 1000 for num_tokens in curve.contexts]
        values = [curve._values(index) for index in range(len(curve.contexts))]
        for panel, quantity in zip(axes.flat, ("ms_per_token", "ttft_seconds", "kv_mb")):
            panel.plot(thousands, [value[quantity] for value in values], "o-", color=color, label=name, markersize=3)
    hybrid = curves["hybrid"]
    for layer_type, dashes in _DASHES.items():
        layer = hybrid.layer_ms(hybrid.decodes, layer_type)
        axes[1, 1].plot(
            thousands, layer, f"o{dashes}", color="tab:blue", label=layer_type.replace("_", " "), markersize=3
        )
    titles = (
        "time per token, ms",
        "time to the first token, s",
        "KV cache, MB",
        "one layer's attention for a token, ms",
    )
    for panel, title in zip(axes.flat, titles):
        _finish(panel, title)
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the curves cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)


def _finish(panel: Axes, title: str) -> None:
    panel.set_title(title)
    panel.set_xlabel("thousand tokens of context")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
