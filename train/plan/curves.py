"""Plots of what changes over runs, before they start: learning rates, batch sizes, the mixture of sources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import TrainConfig, batch_sizes, num_steps
from ..loss_curve import draw_schedule
from ..schedule import COMPONENTS, component_schedule, learning_rate_factor, run_progress, source_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_POINTS = 2000  # steps that are drawn


def draw_curves(configs: Mapping[str, TrainConfig], path: Path) -> None:
    """Draw each config in a column of its own.

    Raises:
        ValueError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, columns = pyplot.subplots(
        2, len(configs), figsize=(7 * len(configs), 5), sharex="col", squeeze=False, layout="constrained"
    )
    for (name, config), (above, below) in zip(configs.items(), columns.T):
        steps = num_steps(config)
        drawn = np.unique(np.linspace(0, steps - 1, min(steps, _MAX_POINTS)).round().astype(int)).tolist()
        above.set_title(name, pad=24)  # above the legend
        draw_schedule(above, [_row(config, step, steps) for step in drawn])
        above.set_xlabel("")
        _draw_mixture(below, config, drawn, steps)
    try:
        figure.savefig(path, dpi=80)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the curves cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)


def _row(config: TrainConfig, step: int, steps: int) -> dict[str, Any]:
    """What a row of metrics.jsonl says of it."""
    rates = {
        name: getattr(config.lr, name) * learning_rate_factor(step, steps, component_schedule(config.schedule, name))
        for name in COMPONENTS
        if getattr(config.trainable, name) is not False
    }
    return {"step": step + 1, "lr": rates, "batch_size": batch_sizes(config).size(step)}


def _draw_mixture(axes: Axes, config: TrainConfig, drawn: list[int], steps: int) -> None:
    sources = config.data.sources
    weights = np.array(
        [source_weights([source.weights for source in sources], run_progress(step, steps)) for step in drawn]
    )
    fractions = weights / weights.sum(1, keepdims=True)  # (steps, sources)
    axes.stackplot([step + 1 for step in drawn], fractions.T, labels=[source.name for source in sources], alpha=0.7)
    axes.set_xlabel("step")
    axes.set_ylabel("fraction of the samples")
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
