"""The plot of a comparison: accuracy against image tokens, skill by skill."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NUM_COLUMNS = 3
_MARKERS = "osD^vP*X"
_LEAST_TOP = 5.0  # percent: nothing correct is a line at the bottom


def draw_accuracy(results: dict[str, Any], path: Path) -> None:
    """A panel for each skill: each connector's mean accuracy with its standard error; dashed, a constant answer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    finished = {name: row for name, row in results["connectors"].items() if row["accuracy"]}
    skills = [skill for skill in results["constant_answer"] if skill != "all"]
    if not finished or not skills:
        return
    num_rows = math.ceil(len(skills) / _NUM_COLUMNS)
    size = (3.4 * _NUM_COLUMNS, 0.9 + 2.7 * num_rows)
    figure, grid = pyplot.subplots(
        num_rows, _NUM_COLUMNS, figsize=size, squeeze=False, sharex=True, layout="constrained"
    )
    for axes, skill in zip(grid.flat, sorted(skills)):
        _draw_skill(axes, finished, skill, results["constant_answer"][skill])
    for axes in list(grid.flat)[len(skills) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    handles, labels = [*handles[1:], handles[0]], [*labels[1:], labels[0]]  # the constant answer last
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    figure.supxlabel("image tokens per image")
    figure.supylabel("correct answers, %")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_skill(axes: Axes, finished: dict[str, dict[str, Any]], skill: str, constant: float) -> None:
    counts = sorted({row["tokens_per_image"] for row in finished.values()})
    seen: dict[int, int] = {}
    top = 100 * constant
    for index, (name, row) in enumerate(finished.items()):
        accuracy, count = row["accuracy"][skill], row["tokens_per_image"]
        mean, error = 100 * accuracy["mean"], 100 * (accuracy["standard_error"] or 0)
        top = max(top, mean + error)
        shift = 1.1 ** seen.get(count, 0)  # connectors with as many tokens stand beside each other
        seen[count] = seen.get(count, 0) + 1
        axes.errorbar(
            count * shift, mean, error or None, label=name, capsize=3, linestyle="none",
            marker=_MARKERS[index % len(_MARKERS)], markersize=6, color=f"C{index % 10}",
        )  # fmt: skip
    axes.axhline(100 * constant, color="grey", linestyle="--", linewidth=1, label="constant answer")
    top = max(_LEAST_TOP, top)
    axes.set_ylim(-0.05 * top, 1.08 * top)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlim(min(counts) / 1.6, max(counts) * 1.6)
    axes.set_title(skill, fontsize="medium")
    axes.grid(alpha=0.3)
