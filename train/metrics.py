"""Logging of a run: the start-up table, the progress bar, metrics.jsonl and samples-RANK.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from yi_vl.files import read_json_lines, write_json_lines
from yi_vl.model import YiVLForConditionalGeneration

from .config import TrainConfig, batch_sizes, num_steps
from .data.batch import StepBatch
from .describe import describe_batches, schedule_lines
from .experts import describe_experts, expert_metrics
from .optim import component_parameters
from .qlora import num_weights

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples-{}.jsonl"  # of a rank


def component_table(model: YiVLForConditionalGeneration, config: TrainConfig) -> Table:
    """Each component's parameters, trainable parameters and peak learning rate; below it, which parts of the language
    model are trained, and what changes over the run."""
    language = config.trainable.language
    below = [f"of the language model: {', '.join(language)}"] if isinstance(language, list) else []
    below += describe_experts(model, model.config.text_config, config)
    below += [describe_batches(config), *schedule_lines(config)]
    caption = escape("\n".join(below))
    table = Table(title=f"{config.run_dir}: trainable parameters", caption=caption, caption_justify="left")
    for heading in ("component", "parameters", "trainable", "learning rate"):
        table.add_column(heading, justify="left" if heading == "component" else "right")
    for name, parameters in component_parameters(model).items():
        trainable = sum(num_weights(parameter) for parameter in parameters if parameter.requires_grad)
        rate = f"{getattr(config.lr, name):g}" if trainable else "frozen"
        table.add_row(name, f"{sum(map(num_weights, parameters)):,}", f"{trainable:,}", rate)
    return table


class MetricsWindow:
    """Sums over the steps since the last row of metrics.jsonl.

    Args:
        metrics_name: of the metrics in a row.
        metric_names: what the objective sums besides the loss.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, metrics_name: str = "", metric_names: Sequence[str] = ()
    ) -> None:
        self._metrics_name, self._metric_names = metrics_name, metric_names
        self._names = [source.name for source in config.data.sources]
        self._accelerator = accelerator
        self._clear()

    def _clear(self) -> None:
        self._per_source = self.zeros()
        self._expert_sums: Tensor | None = None  # of a language model of experts, see experts.py
        self._grad_norm: float | None = None
        self.component_norms: dict[str, float] = {}  # before clipping, of the step that is logged
        self.num_steps, self._num_samples, self._num_tokens, self._flops = 0, 0, 0, 0  # the last three: timed steps'
        self._since = time.perf_counter()

    def zeros(self) -> Tensor:
        """The shape of what the objective sums per source."""
        return torch.zeros(len(self._names), 2 + len(self._metric_names))

    def add(
        self, batch: StepBatch, per_source: Tensor, grad_norm: float, flops: int, expert_sums: Tensor | None = None
    ) -> None:
        self._per_source = self._per_source.to(per_source.device) + per_source
        if expert_sums is not None:
            before = self._expert_sums
            self._expert_sums = expert_sums if before is None else before.to(expert_sums.device) + expert_sums
        self._grad_norm = grad_norm if math.isfinite(grad_norm) else None
        self._flops += flops
        self._num_tokens += sum(int(micro.attention_mask.sum()) for micro in batch.micro_batches)
        self._num_samples += sum(len(micro.input_ids) for micro in batch.micro_batches)
        self.num_steps += 1

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Leave the time of the block out of the throughput."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to log the loss of all steps since the last row."""
        experts = self._expert_sums.cpu() if self._expert_sums is not None else None
        return {"per_source": self._per_source.cpu(), "num_steps": self.num_steps, "expert_sums": experts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._per_source, self.num_steps = state["per_source"], state["num_steps"]
        self._expert_sums = state.get("expert_sums")  # absent from checkpoints of earlier versions

    def metrics(
        self, step: int, lr: dict[str, float], batch_size: int, counts: dict[str, int], steps_skipped: int
    ) -> dict[str, Any]:
        """A row of metrics.jsonl, over all ranks; clears the window.

        Args:
            lr, batch_size: of the step that is logged.
        """
        numbers = [
            self._num_samples, self._num_tokens, self._flops, counts["seen"], counts["broken"], counts["too_long"]
        ]  # fmt: skip
        device = self._per_source.device
        sums = self._accelerator.reduce(torch.tensor(numbers, device=device), "sum").tolist()
        samples, tokens, flops, seen, broken, too_long = sums
        per_source = self._accelerator.reduce(self._per_source, "sum").tolist()
        seconds = time.perf_counter() - self._since
        total, num_terms, *sums_of_metrics = map(sum, zip(*per_source))
        metrics = {
            "step": step,
            "loss": total / num_terms,
            "loss_per_source": {name: row[0] / row[1] for name, row in zip(self._names, per_source) if row[1]},
            "lr": lr,
            "batch_size": batch_size,
            "grad_norm": self._grad_norm,
            "grad_norm_per_component": self.component_norms,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": flops / seconds / self._accelerator.num_processes / 1e12,
            "samples_seen": seen,
            "samples_broken": broken,
            "samples_too_long": too_long,
            "steps_skipped": steps_skipped,
        }
        if self._expert_sums is not None:
            metrics["experts"] = expert_metrics(self._accelerator.reduce(self._expert_sums, "sum"))
        if self._metric_names:
            metrics[self._metrics_name] = {
                name: value / num_terms for name, value in zip(self._metric_names, sums_of_metrics)
            }
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        self._clear()
        return metrics


def flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics by slash-separated names, as trackers take them."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list):  # of layers
            flat |= flatten({str(index): number for index, number in enumerate(value)}, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat


class Reporter:
    """Progress and metrics of one run; only the first rank prints.

    Args:
        done_steps: steps done when the run resumes; rows of later steps are dropped.

    Attributes:
        validation: the row of each step with a held-out loss; of the first rank.
    """

    def __init__(self, config: TrainConfig, done_steps: int, rank: int, console: Console) -> None:
        run_dir = Path(config.run_dir)
        self._num_steps, self._batch_sizes = num_steps(config), batch_sizes(config)
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
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not is_main or not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=self._num_steps, completed=done_steps, numbers="", left="")
        self._started, self._done_at_start = time.monotonic(), done_steps
        if is_main:  # other ranks write after their first exchange with this one
            for path in (self._path, *run_dir.glob(SAMPLES_FILE.format("*"))):
                _drop_after(path, done_steps)
        rows = read_metrics(self._path) if is_main and self._path.exists() else []
        self.validation = {row["step"]: row for row in validation_rows(rows)}

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, step: int, metrics: dict[str, Any] | None) -> None:
        """Move the bar to `step`, and log metrics if given."""
        left = self._time_left(step)
        self._bar.update(self._task, completed=step, left=left)
        if metrics is None:
            return
        numbers = (
            f"loss {metrics['loss']:.4f}  {metrics['samples_per_second']:.1f} samples/s  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s"
        )
        if preference := metrics.get("preference"):
            numbers += f"  accuracy {preference['accuracy']:.2f}  margin {preference['reward_margin']:.2f}"
        if experts := metrics.get("experts"):
            numbers += f"  experts per token {mean(experts['experts_per_token']):.2f}"
        self._bar.update(self._task, numbers=numbers)
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._num_steps}  {numbers}  {left}", highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """As in `1 day, 0:03:12 left`, at the samples per second since the start."""
        at_start, done, total = map(self._batch_sizes.num_samples, (self._done_at_start, step, self._num_steps))
        seconds = (time.monotonic() - self._started) * (total - done) / max(1, done - at_start)
        return f"{timedelta(seconds=round(seconds))} left"

    def validated(self, row: dict[str, Any]) -> None:
        """Log a row with a held-out loss."""
        if not self._is_main:
            return
        self.validation[row["step"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        per_source = ", ".join(f"{name} {_shown(loss)}" for name, loss in row["validation_loss_per_source"].items())
        line = f"step {row['step']}/{self._num_steps}  validation loss {_shown(row['validation_loss'])}  ({per_source})"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def note(self, lines: Sequence[str]) -> None:
        """Print lines above the progress bar."""
        if self._is_main:
            for line in lines:
                self._console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def samples(self, step: int, names: Sequence[str]) -> None:
        """Log the names of this rank's samples of a step."""
        with self._samples_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "samples": names}, ensure_ascii=False) + "\n")


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    write_json_lines(path, [row for row in read_metrics(path) if row["step"] <= step])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl or samples-RANK.jsonl; a last line cut off by a kill is skipped."""
    return read_json_lines(path, drops_partial=True)


def training_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl about training steps: `MetricsWindow.metrics`."""
    return [row for row in rows if "loss" in row]


def validation_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl with a held-out loss: `step`, and what `Validation.measure` returns."""
    return [row for row in rows if "validation_loss" in row]


def _shown(loss: float | None) -> str:
    return "NaN/Inf" if loss is None else f"{loss:.4f}"
