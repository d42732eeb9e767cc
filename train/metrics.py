"""What people see of a run: the start-up table, the progress bar, metrics.jsonl, samples-RANK.jsonl and the loss curve.

Called by loop.py.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from yi_vl.model import YiVLForConditionalGeneration

from .config import TrainConfig
from .optim import own_parameters
from .qlora import num_weights

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples-{}.jsonl"  # of a rank


def component_table(model: YiVLForConditionalGeneration, config: TrainConfig) -> Table:
    """Component, parameters, how many of them learn, and how fast."""
    table = Table(title=f"{config.run_dir}: what trains")
    for heading in ("component", "parameters", "trainable", "learning rate"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    for name, own in own_parameters(model).items():
        learning = sum(num_weights(parameter) for parameter in own if parameter.requires_grad)
        rate = f"{getattr(config.lr, name):g}" if learning else "frozen"
        table.add_row(name, f"{sum(map(num_weights, own)):,}", f"{learning:,}", rate)
    return table


class Reporter:
    """Progress and metrics of one run; silent on all ranks but the first.

    Args:
        done_steps: steps that an interrupted run has behind it; what it logged later is dropped.
    """

    def __init__(self, run_dir: Path, num_steps: int, done_steps: int, rank: int, console: Console) -> None:
        self._path = run_dir / METRICS_FILE
        self._samples_path = run_dir / SAMPLES_FILE.format(rank)
        is_main = self._is_main = rank == 0
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not is_main or not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=done_steps, numbers="")
        self._num_steps = num_steps
        self._started, self._done_at_start = time.monotonic(), done_steps
        if is_main:  # other ranks write after their first exchange with this one
            for path in (self._path, *run_dir.glob(SAMPLES_FILE.format("*"))):
                _drop_after(path, done_steps)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, metrics: dict[str, Any] | None) -> None:
        """Move the bar to `step`, and log metrics when there are any."""
        if metrics is None:
            self._bar.update(self._task, completed=step)
            return
        numbers = (
            f"loss {metrics['loss']:.4f}  {metrics['samples_per_second']:.1f} samples/s  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s"
        )
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if not self._console.is_terminal:
            per_step = (time.monotonic() - self._started) / max(1, step - self._done_at_start)
            left = time.strftime("%H:%M:%S", time.gmtime((self._num_steps - step) * per_step))
            self._console.print(
                f"step {step}/{self._num_steps}  {numbers}  {left} left", highlight=False, soft_wrap=True
            )

    def note(self, lines: Sequence[str]) -> None:
        """Lines that must not be lost, above the bar."""
        if self._is_main:
            for line in lines:
                self._console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def samples(self, step: int, names: Sequence[str]) -> None:
        """Write down what this rank's part of a step was made of."""
        with self._samples_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": names}, ensure_ascii=False) + "\n")


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or samples-RANK.jsonl; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_loss_curve(run_dir: Path) -> None:
    """loss.png from metrics.jsonl: the loss, and faintly that of each source."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = run_dir / METRICS_FILE
    rows = read_metrics(path) if path.exists() else []
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = sorted({name for row in rows for name in row["loss_per_source"]})
    for name in names if len(names) > 1 else ():
        points = [(row["step"], row["loss_per_source"][name]) for row in rows if name in row["loss_per_source"]]
        axes.plot(*zip(*points), linewidth=0.8, alpha=0.6, label=name)
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1.6, color="black", label="all")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(fontsize="small", ncols=2)
    axes.set_title(str(run_dir))
    figure.savefig(run_dir / "loss.png", dpi=120)
    pyplot.close(figure)
