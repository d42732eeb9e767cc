"""The curves of a run: loss.png, and experts.png of a language model of experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metrics import METRICS_FILE, read_metrics, training_rows, validation_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EXPERT_METRICS = {
    "experts_per_token": "experts per token",
    "max_load": "load of the busiest expert\n(1: all the same)",
    "unused_experts": "unused experts",
    "entropy": "entropy of the router (nats)",
    "auxiliary_loss": "auxiliary loss",
}


def draw_curves(run_dir: Path) -> None:
    """All curves that the run's metrics.jsonl has."""
    draw_loss_curve(run_dir)
    draw_expert_curves(run_dir)


def draw_loss_curve(run_dir: Path) -> None:
    """loss.png from metrics.jsonl: the loss, faintly that of each source, dashed those held out; below them the
    learning rate and the batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = run_dir / METRICS_FILE
    all_rows = read_metrics(path) if path.exists() else []
    rows = training_rows(all_rows)
    if not rows:
        return
    figure, (axes, below) = pyplot.subplots(
        2, 1, figsize=(8, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    names = sorted({name for row in rows for name in row["loss_per_source"]})
    for name in names if len(names) > 1 else ():
        points = [(row["step"], row["loss_per_source"][name]) for row in rows if name in row["loss_per_source"]]
        axes.plot(*zip(*points), linewidth=0.8, alpha=0.6, label=name)
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1.6, color="black", label="all")
    _draw_validation(axes, validation_rows(all_rows))
    axes.set_ylabel("loss per pair of answers" if "preference" in rows[-1] else "loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize="small", ncols=2)
    axes.set_title(str(run_dir))
    draw_schedule(below, rows)
    figure.savefig(run_dir / "loss.png", dpi=120)
    pyplot.close(figure)


def draw_schedule(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """The learning rate of each component, and on a second axis the batch size.

    Args:
        rows: with `step`, `lr` and, unless they are of an earlier version, `batch_size`.
    """
    steps = [row["step"] for row in rows]
    components = dict.fromkeys(name for row in rows for name in row["lr"])
    rates = {name: [row["lr"].get(name, math.nan) for row in rows] for name in components}
    for names, values in _equal_ones(rates):
        axes.plot(steps, values, linewidth=1.2, label=f"learning rate: {', '.join(names)}")
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    sizes = [row.get("batch_size", math.nan) for row in rows]
    right = axes.twinx()
    right.plot(steps, sizes, linewidth=1.2, color="grey", linestyle="--", drawstyle="steps-pre", label="batch size")
    right.set_ylabel("batch size")
    right.set_ylim(bottom=0)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(
        handles=lines, fontsize="small", ncols=len(lines), frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )


def _equal_ones(rates: dict[str, list[float]]) -> list[tuple[list[str], list[float]]]:
    """Components whose rates are equal at every step, with these rates."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, values in rates.items():
        groups.setdefault(tuple(values), []).append(name)
    return [(names, list(values)) for values, names in groups.items()]


def _draw_validation(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Held-out losses, dashed: their mean, and faintly each source."""
    names = list(rows[-1]["validation_loss_per_source"]) if rows else []
    for name in names if len(names) > 1 else ():
        losses = [row["validation_loss_per_source"].get(name) for row in rows]
        axes.plot([row["step"] for row in rows], losses, "--", linewidth=0.8, alpha=0.6, label=f"held out: {name}")
    if rows:
        losses = [row["validation_loss"] for row in rows]
        axes.plot([row["step"] for row in rows], losses, "o--", color="crimson", markersize=3, label="held out")


def draw_expert_curves(run_dir: Path) -> None:
    """experts.png from metrics.jsonl: a curve for each layer, dark to light from the first to the last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = run_dir / METRICS_FILE
    rows = [row for row in (read_metrics(path) if path.exists() else []) if "experts" in row]
    if not rows:
        return
    figure, panels = pyplot.subplots(
        len(_EXPERT_METRICS), 1, figsize=(8, 2 * len(_EXPERT_METRICS)), sharex=True, layout="constrained"
    )
    for axes, (name, label) in zip(panels, _EXPERT_METRICS.items()):
        layers = list(zip(*(row["experts"][name] for row in rows)))  # (L, rows)
        for number, values in enumerate(layers):
            colour = matplotlib.colormaps["viridis"](number / max(1, len(layers) - 1))
            axes.plot([row["step"] for row in rows], values, linewidth=1.2, color=colour, label=f"layer {number}")
        axes.set_ylabel(label, fontsize="small")
        axes.grid(alpha=0.3)
        if name == "unused_experts":
            axes.set_ylim(bottom=0)
    if len(panels[0].get_lines()) <= 12:
        panels[0].legend(fontsize="small", ncols=6, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    panels[-1].set_xlabel("step")
    panels[0].set_title(str(run_dir), pad=36)
    figure.savefig(run_dir / "experts.png", dpi=120)
    pyplot.close(figure)
