"""The training loop: one for every stage of a recipe; the settings say what differs.

Called by `python -m train`; calls data.py, objective.py, optim.py, checkpoint.py, report.py and accelerate.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import Tensor

from . import checkpoint
from .config import TrainConfig, num_steps, to_yaml
from .cpu import keep_memory, use_short_attention_
from .data import MicroBatch, StepBatch, StepLoader, num_supervised
from .initial import initial_model
from .objective import Objective
from .optim import build_optimiser, learning_rates, set_learning_rates_, set_trainable_
from .report import Reporter, component_table, draw_loss_curve
from .stream import expand_shards

logger = logging.getLogger(__name__)

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def train(config: TrainConfig) -> Path:
    """Run a training run to its end, or go on with the one in its run_dir; returns the finished model's directory.

    Raises:
        ValueError: something the user can put right: data, weights, settings or disk.
    """
    run_dir, console = Path(config.run_dir), Console(stderr=True)
    final = run_dir / checkpoint.FINAL
    if not config.resume and (final.is_dir() or checkpoint.checkpoints(run_dir)):
        raise ValueError(f"{run_dir} holds an earlier run; delete it, take another run_dir, or go on with resume=true.")
    if final.is_dir():
        console.print(f"{final} is finished already; another run_dir trains anew.", markup=False)
        return final
    for source in config.data.sources:
        expand_shards(source)
    trainer = Trainer(config, console)
    trainer.run()
    trainer.save(final, with_state=False)
    if trainer.accelerator.is_main_process:
        draw_loss_curve(run_dir)
    trainer.accelerator.end_training()
    return final


class Trainer:
    """The state of a run: model, optimiser, data, and how many steps are done."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.console = console
        self.num_steps = num_steps(config)
        self.accelerator = _accelerator(config)
        set_seed(config.seed)  # the same fresh weights on every rank

        found = checkpoint.checkpoints(self.run_dir) if config.resume else []
        state = checkpoint.load_state(found[-1]) if found else None
        self.done_steps: int = state["step"] if state is not None else 0
        self.model, self.processor = checkpoint.load_model(found[-1]) if found else initial_model(config)
        set_trainable_(self.model, config)
        if self.accelerator.device.type == "cpu":
            keep_memory()
            use_short_attention_(self.model)
        if self.accelerator.is_main_process:
            console.print(component_table(self.model, config))
            if found:
                console.print(f"Going on from {found[-1]}, step {self.done_steps} of {self.num_steps}.", markup=False)

        optimiser = build_optimiser(self.model, config)
        if state is not None:
            optimiser.load_state_dict(state["optimiser"])
        self.objective, self.optimiser = self.accelerator.prepare(
            Objective(self.model, len(config.data.sources)), optimiser
        )
        if config.compile:
            for layer in self.model.model.language_model.layers:  # one by one: all share one compilation
                layer.compile(dynamic=True)
        self.loader = self._build_loader(state)
        self._restore(state)

    def run(self) -> None:
        """Train what is left of the run."""
        every = self.config.checkpoint.every_steps
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.accelerator.init_trackers("yi_vl", config={"config": to_yaml(self.config)})
        log = _Window(self.config, self.accelerator)
        with Reporter(
            self.run_dir, self.num_steps, self.done_steps, self.accelerator.is_main_process, self.console
        ) as reporter:
            for batch in self._steps():
                reporter.note(batch.reports)
                set_learning_rates_(self.optimiser, self.done_steps, self.num_steps, self.config.warmup_ratio)
                per_source, grad_norm = self.step(batch)
                self.done_steps += 1
                log.add(batch, per_source)
                is_last = self.done_steps == self.num_steps
                metrics = None
                if self.done_steps % self.config.log_every == 0 or is_last:
                    metrics = log.metrics(
                        self.done_steps, grad_norm, learning_rates(self.optimiser), self.loader.counts()
                    )
                    self.accelerator.log(_flat(metrics), step=self.done_steps)
                reporter.step(self.done_steps, metrics)
                if self.done_steps % every == 0 and not is_last:
                    self.save(checkpoint.checkpoint_path(self.run_dir, self.done_steps), with_state=True)

    def step(self, batch: StepBatch) -> tuple[Tensor, float]:
        """One optimiser step; returns (num_sources, 2) summed losses and supervised tokens per source, and the norm.

        The loss is normalised by the supervised tokens of the whole step on all ranks.
        """
        accelerator = self.accelerator
        mine = torch.tensor(sum(num_supervised(micro.labels) for micro in batch.micros), device=accelerator.device)
        total = int(accelerator.reduce(mine, "sum"))
        scale = accelerator.num_processes / total  # data parallelism averages gradients over ranks
        per_source = torch.zeros(len(self.config.data.sources), 2, device=accelerator.device)
        for index, micro in enumerate(batch.micros):
            is_last = index == len(batch.micros) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.objective):
                loss, losses = self.objective(**self._inputs(micro))
                accelerator.backward(loss * scale)
            per_source += losses
        clip = self.config.clip_norm
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), clip if clip is not None else math.inf)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return per_source, float(norm) if norm is not None else math.nan

    def save(self, directory: Path, with_state: bool) -> None:
        """Save a checkpoint; all ranks take part, the first one writes."""
        accelerator = self.accelerator
        ranks = gather_object([{"rng": checkpoint.rng_state(), "data": self.loader.state_dict()}])
        if accelerator.is_main_process:
            state = {"step": self.done_steps, "optimiser": self.optimiser.state_dict(), "ranks": ranks}
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            yaml = to_yaml(self.config)
            checkpoint.save_checkpoint(directory, self.model, self.processor, yaml, state if with_state else None)
            checkpoint.delete_old(self.run_dir, self.config.checkpoint.keep_last)
        accelerator.wait_for_everyone()

    def _steps(self) -> Iterator[StepBatch]:
        if self.done_steps >= self.num_steps:
            return
        for batch in self.loader:
            yield batch
            if self.done_steps >= self.num_steps:
                return

    def _inputs(self, micro: MicroBatch) -> dict[str, Any]:
        device = self.accelerator.device
        pixel_values = None
        if micro.images is not None:
            pixel_values = self.processor.image_processor.normalise(micro.images.to(device, non_blocking=True))
        return {
            "input_ids": micro.input_ids.to(device, non_blocking=True),
            "attention_mask": micro.attention_mask.to(device, non_blocking=True),
            "labels": micro.labels.to(device, non_blocking=True),
            "pixel_values": pixel_values,
            "sources": micro.sources.to(device, non_blocking=True),
            "prefix": micro.prefix,
        }

    def _build_loader(self, state: dict[str, Any] | None) -> StepLoader:
        config, world_size = self.config, self.accelerator.num_processes
        if config.global_batch % world_size:
            raise ValueError(f"global_batch {config.global_batch} does not divide by {world_size} ranks.")
        rank = self.accelerator.process_index
        data_state = None
        if state is not None:
            if len(state["ranks"]) != world_size:
                raise ValueError(f"The checkpoint is of {len(state['ranks'])} ranks, this run has {world_size}.")
            data_state = state["ranks"][rank]["data"]
        return StepLoader(
            self.processor, config.data, config.max_tokens, config.seed, rank, world_size,
            config.global_batch // world_size, config.micro_batch, data_state,
        )  # fmt: skip

    def _restore(self, state: dict[str, Any] | None) -> None:
        if state is None:
            set_seed(self.config.seed, device_specific=True)
            return
        checkpoint.set_rng_state(state["ranks"][self.accelerator.process_index]["rng"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


class _Window:
    """Sums between two log lines."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self._names = [source.name for source in config.data.sources]
        self._samples_per_step = config.global_batch
        self._accelerator = accelerator
        self._clear()

    def _clear(self) -> None:
        self._per_source = torch.zeros(len(self._names), 2)
        self._num_steps, self._num_tokens = 0, 0
        self._since = time.perf_counter()

    def add(self, batch: StepBatch, per_source: Tensor) -> None:
        self._per_source = self._per_source.to(per_source.device) + per_source
        self._num_tokens += sum(int(micro.attention_mask.sum()) for micro in batch.micros)
        self._num_steps += 1

    def metrics(self, step: int, grad_norm: float, lr: dict[str, float], counts: dict[str, int]) -> dict[str, Any]:
        """A log line, over all ranks. The window starts anew."""
        numbers = [self._num_tokens, counts["seen"], counts["broken"], counts["too_long"]]
        device = self._per_source.device
        tokens, seen, broken, too_long = self._accelerator.reduce(torch.tensor(numbers, device=device), "sum").tolist()
        per_source = self._accelerator.reduce(self._per_source, "sum").tolist()
        seconds = time.perf_counter() - self._since
        metrics = {
            "step": step,
            "loss": sum(loss for loss, _ in per_source) / sum(count for _, count in per_source),
            "loss_per_source": {name: loss / count for name, (loss, count) in zip(self._names, per_source) if count},
            "lr": lr,
            "grad_norm": grad_norm,
            "samples_per_second": self._num_steps * self._samples_per_step / seconds,
            "tokens_per_second": tokens / seconds,
            "samples_seen": seen,
            "samples_broken": broken,
            "samples_too_long": too_long,
        }
        self._clear()
        return metrics


def _accelerator(config: TrainConfig) -> Accelerator:
    available = [str(tracker) for tracker in get_available_trackers()]
    if missing := [name for name in config.trackers if name not in available]:  # accelerate would leave it out
        raise ValueError(f"trackers: {missing[0]!r} is not installed; there are {', '.join(available) or 'none'}.")
    accelerator = Accelerator(
        mixed_precision=_ACCELERATE_PRECISION[config.precision],
        log_with=config.trackers if config.trackers else None,
        project_dir=config.run_dir,
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}; this trainer knows one process and plain "
            "data parallelism (accelerate launch --multi_gpu)."
        )
    return accelerator


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return flat
