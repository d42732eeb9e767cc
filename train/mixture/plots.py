"""The plots of a search, from what results.json holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

matplotlib.use("Agg")
_NUM_COLUMNS = 4
_BASELINES = ("equal-", "size", "present")


def draw_design(results: dict[str, Any]) -> Figure:
    """The shares of every short run, the best run on top."""
    from matplotlib import pyplot

    runs = sorted(_short_runs(results), key=lambda run: -run["loss"])
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.25 * len(runs)), layout="constrained")
    starts = [0.0] * len(runs)
    labels = [f"{run['name']}  {run['loss']:.4f}" for run in runs]
    for name in results["sources"]:
        shares = [run["settings"]["shares"][name] for run in runs]
        axes.barh(range(len(runs)), shares, left=starts, label=name, height=0.8)
        starts = [start + share for start, share in zip(starts, shares)]
    axes.set_yticks(range(len(runs)), labels, fontsize="small")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(runs) - 0.4)
    axes.set_xlabel("share of the samples")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.25 / (1 + 0.1 * len(runs))), ncols=8)
    return figure


def draw_losses_by_share(results: dict[str, Any]) -> Figure:
    """For each source: every short run's held-out loss, and that of the source itself, against its share."""
    from matplotlib import pyplot

    runs = _short_runs(results)
    names = [name for name in results["sources"] if name not in results["fixed"]]
    columns = min(_NUM_COLUMNS, len(names))
    num_rows = math.ceil(len(names) / columns)
    figure, grid = pyplot.subplots(
        num_rows, columns, figsize=(1 + 3 * columns, 0.6 + 2.6 * num_rows), squeeze=False, layout="constrained"
    )
    for axes, name in zip(grid.flat, names):
        shares = [run["settings"]["shares"][name] for run in runs]
        axes.scatter(shares, [run["loss"] for run in runs], s=14, color="black", label="mean of all")
        losses = [run["loss_per_source"].get(name) for run in runs]
        if any(loss is not None for loss in losses):
            axes.scatter(shares, [math.nan if loss is None else loss for loss in losses], s=14, label="of this source")
        axes.set_xscale("log", base=2)
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("share of the samples")
    figure.supylabel("held-out loss")
    return figure


def draw_predictions(results: dict[str, Any]) -> Figure:
    """Each run's loss against its prediction by the others, with the noise as a band."""
    from matplotlib import pyplot

    regression, noise = results["regression"], results["noise"]["standard_deviation"]
    figure, axes = pyplot.subplots(figsize=(5.5, 5), layout="constrained")
    measured, predicted = regression["measured"], regression["predicted"]
    low, high = min(measured + predicted), max(measured + predicted)
    below, above = ([end + distance for end in (low, high)] for distance in (-2 * noise, 2 * noise))
    axes.fill_between([low, high], below, above, alpha=0.15, label="two standard deviations")
    axes.plot([low, high], [low, high], color="gray", linewidth=0.8)
    for name, x, y in zip(regression["names"], predicted, measured):
        is_baseline = name.startswith(_BASELINES)
        axes.scatter(x, y, s=22, color="crimson" if is_baseline else "black")
        if is_baseline:
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize="small")
    axes.set_xlabel("predicted without this run")
    axes.set_ylabel("measured held-out loss")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def draw_rank_check(results: dict[str, Any]) -> Figure:
    """The loss of long runs against that of short ones with the same mixture."""
    from matplotlib import pyplot

    check = results["rank_check"]
    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    axes.scatter(check["short"], check["long"], s=22, color="black")
    axes.set_xlabel(f"held-out loss after {check['steps'][0]:,} steps")
    axes.set_ylabel(f"after {check['steps'][1]:,} steps")
    axes.grid(alpha=0.3)
    return figure


def draw_verdict(results: dict[str, Any]) -> Figure:
    """The losses of the judged runs, with the mean and two standard errors of each group; a line joins one seed's."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    groups: dict[str, dict[str, float]] = {}  # name -> seed -> loss
    for run in results["runs"]:
        if run["name"].startswith("verdict-") and run["loss"] is not None:
            name, _, seed = run["name"].removeprefix("verdict-").partition("-seed-")
            groups.setdefault(name, {})[seed] = run["loss"]
    for position, losses in enumerate(groups.values()):
        _draw_group(axes, position, list(losses.values()))
    for seed in set.intersection(*map(set, groups.values())) if groups else ():  # all runs may have diverged
        axes.plot(range(len(groups)), [losses[seed] for losses in groups.values()], color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylabel("loss on the second held-out set")
    axes.grid(alpha=0.3)
    return figure


def _draw_group(axes: Axes, position: int, losses: list[float]) -> None:
    mean = sum(losses) / len(losses)
    variance = sum((loss - mean) ** 2 for loss in losses) / max(1, len(losses) - 1)
    axes.scatter([position] * len(losses), losses, s=18, color="black")
    error = 2 * math.sqrt(variance / len(losses))
    axes.errorbar(position + 0.12, mean, error, fmt="o", capsize=5, color="crimson")


def _short_runs(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the first held-out set and a proxy's length, without those that diverged."""
    steps = min(run["settings"]["steps"] for run in results["runs"])
    return [
        run
        for run in results["runs"]
        if run["settings"]["steps"] == steps and run["settings"]["held_out"] == "validation" and run["loss"] is not None
    ]
