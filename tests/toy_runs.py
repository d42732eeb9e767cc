"""Helpers of the trainer's tests: a silent run, one step of it, and its logged losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from train.config import TrainConfig
from train.data.batch import StepBatch
from train.metrics import read_metrics, training_rows
from train.trainer import Trainer


def trainer(config: TrainConfig) -> Trainer:
    return Trainer(config, Console(quiet=True))


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in training_rows(read_metrics(Path(config.run_dir) / "metrics.jsonl"))]


def step_once(run: Trainer, batches: Iterator[StepBatch] | None = None) -> tuple[Tensor, float]:
    """One step of a run of one process, on the next of its batches."""
    batch = next(batches if batches is not None else iter(run.loader))
    return run.step(batch, batch.num_terms)


def stop_after(run: Trainer, num_steps: int) -> None:
    """Run, and be interrupted after so many steps."""
    real_step = run.step

    def step(batch: Any, num_supervised: int) -> Any:
        if run.done_steps == num_steps:
            raise KeyboardInterrupt
        return real_step(batch, num_supervised)

    run.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.run()
