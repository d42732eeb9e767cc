"""What tests of the trainer share: a run that prints nothing, and the losses that it logged."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from train.config import TrainConfig
from train.metrics import read_metrics
from train.trainer import Trainer


def trainer(config: TrainConfig) -> Trainer:
    return Trainer(config, Console(quiet=True))


def losses(config: TrainConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(config.run_dir) / "metrics.jsonl")]
