"""The training loop: one for every stage of a recipe; the settings say what differs."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from rich.console import Console
from torch import Tensor

from . import checkpoint
from .attention.cpu import keep_memory, use_short_attention_
from .attention.packing import use_varlen_attention_
from .config import TrainConfig, num_steps, to_yaml
from .data.loader import IGNORE, MicroBatch, StepBatch, StepLoader, num_supervised
from .data.stream import expand_shards
from .distributed import build_accelerator, gather_optimiser, gather_weights, is_sharded, load_optimiser_, ranks_line
from .generations import HeldOut
from .init import check_positions, initial_model, load_float32
from .lora import add_adapters_, wants_adapters
from .loss import Objective
from .metrics import Reporter, component_table, draw_loss_curve
from .optim import (
    build_optimiser,
    checkpoint_activations_,
    gradient_norms,
    keep_frozen_low_,
    learning_rates,
    set_learning_rates_,
    set_trainable_,
)
from .plan.flops import batch_flops
from .resume import check_finished, check_resumed
from .signals import StopSignals
from .spike_guard import GradientGuard


def train(config: TrainConfig) -> Path:
    """Run a training run to its end, or go on with the one in its run_dir; returns the finished model's directory.

    Raises:
        ValueError: something the user can put right: data, weights, settings or disk.
        SystemExit: SIGTERM or Ctrl-C came, and a checkpoint was saved; the code is 128 and the signal's number.
    """
    run_dir, console = Path(config.run_dir), Console(stderr=True)
    final = run_dir / checkpoint.FINAL
    if not config.resume and (final.is_dir() or checkpoint.checkpoints(run_dir)):
        raise ValueError(f"{run_dir} holds an earlier run; delete it, take another run_dir, or go on with resume=true.")
    if final.is_dir():
        check_finished(final, config)
        console.print(f"{final} is finished already; another run_dir trains anew.", markup=False)
        return final
    for source in config.data.sources:
        expand_shards(source)
    trainer = Trainer(config, console)
    if stopped_by := trainer.run():
        trainer.accelerator.end_training()
        raise SystemExit(128 + stopped_by)
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
        self.accelerator = build_accelerator(config)
        self.guard = GradientGuard(config.bad_steps)
        self.log = _Window(config, self.accelerator)
        set_seed(config.seed)  # the same fresh weights on every rank

        found = self._newest_checkpoint() if config.resume else None
        is_main = self.accelerator.is_main_process
        state = checkpoint.load_state(found, lazily=not is_main) if found is not None else None
        self.done_steps: int = state["step"] if state is not None else 0
        self.is_checkpoint_due = False
        if found is not None:
            self._check_resumed(found)
        if found is None or wants_adapters(config):
            self.model, self.processor = initial_model(config, self.accelerator.device)
        else:
            self.model, self.processor = load_float32(found)
            check_positions(self.model, config)
        self.saved = add_adapters_(self.model, config, found) if wants_adapters(config) else self.model
        set_trainable_(self.model, config)
        keep_frozen_low_(self.model, config.precision)
        if config.activation_checkpointing:
            checkpoint_activations_(self.model)
        if self.accelerator.device.type == "cpu":
            keep_memory()
            use_short_attention_(self.model)
        else:
            use_varlen_attention_(self.model.model.language_model, config.precision)
        if is_main:
            console.print(component_table(self.model, config))
        if found is not None:
            self._say(f"Going on from {found}, step {self.done_steps} of {self.num_steps}.")

        self.objective, self.optimiser = self.accelerator.prepare(
            Objective(self.model, len(config.data.sources)), build_optimiser(self.model, config)
        )
        if self.accelerator.num_processes > 1:
            self._say(ranks_line(self.accelerator, self.objective))
        if config.compile:
            for layer in self.model.model.language_model.layers:  # one by one: all share one compilation
                layer.compile(dynamic=True)
        self.held_out = self._held_out()
        self.loader = self._build_loader(state)
        self._restore(state)

    def run(self) -> int:
        """Train what is left of the run. Returns 0, or the signal that stopped it, once a checkpoint is saved."""
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.accelerator.init_trackers("yi_vl", config={"config": to_yaml(self.config)})
        rank = self.accelerator.process_index
        try:
            with (
                StopSignals() as signals,
                Reporter(self.run_dir, self.num_steps, self.done_steps, rank, self.console) as reporter,
            ):
                for batch in self._steps():
                    self._train_on(batch, reporter)
                    stopped_by = self._largest(signals.received)
                    is_last = self.done_steps == self.num_steps
                    self.is_checkpoint_due |= self.done_steps % self.config.checkpoint.every_steps == 0
                    is_due = self.is_checkpoint_due and not self.guard.num_in_a_row  # else after the next good step
                    if not is_last and (is_due or stopped_by):
                        self.save(checkpoint.checkpoint_path(self.run_dir, self.done_steps), with_state=True)
                        self.is_checkpoint_due = False
                    if self.held_out is not None and (is_last or self.done_steps % self.held_out.every_steps == 0):
                        self._show_answers(self.held_out)
                    if not is_last and stopped_by:
                        name = signal.Signals(stopped_by).name
                        self._say(f"{name} at step {self.done_steps}: {self._last_good()}")
                        return stopped_by
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(
                f"A data worker died: {str(error).splitlines()[0]} If memory ran out, lower data.workers or "
                f"data.shuffle_buffer. {self._last_good()}"
            ) from error
        return 0

    def _train_on(self, batch: StepBatch, reporter: Reporter) -> None:
        """One step, and what is told of it."""
        reporter.note(batch.reports)
        set_learning_rates_(self.optimiser, self.done_steps, self.num_steps, self.config.warmup_ratio)
        per_source, norm = self.step(batch)
        self.done_steps += 1
        if self.config.log_samples:
            reporter.samples(self.done_steps, batch.names)
        if self.guard.num_in_a_row:
            reporter.note([f"step {self.done_steps} left out: the norm of its gradient is {norm:g}"])
        else:
            self.log.add(batch, per_source, norm, self._flops(batch))
        metrics = None
        if self._is_logged(self.done_steps) and self.log.num_steps:
            counts, skipped = self.loader.counts(), self.guard.num_skipped
            metrics = self.log.metrics(self.done_steps, learning_rates(self.optimiser), counts, skipped)
            self.accelerator.log(_flat(metrics), step=self.done_steps)
        reporter.step(self.done_steps, metrics)
        if self.guard.has_had_enough:
            raise ValueError(
                f"{self.guard.num_in_a_row} steps in a row had no gradient to learn from; the norm of the last is "
                f"{norm:g}, bad_steps.max_norm_ratio {self.config.bad_steps.max_norm_ratio}. Lower the learning rate, "
                f"or look at what these steps are made of (log_samples=true). {self._last_good()}"
            )

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
            exchanges = is_sharded(accelerator) or index == len(batch.micros) - 1  # else whole gradients would pile up
            with nullcontext() if exchanges else accelerator.no_sync(self.objective):
                loss, losses = self.objective(**self._inputs(micro))
                accelerator.backward(loss * scale)
            per_source += losses
        clip = self.config.clip_norm
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), clip if clip is not None else math.inf)
        if self._is_logged(self.done_steps + 1) and math.isfinite(norm):
            clipped_to = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
            norms = gradient_norms(self.optimiser)
            self.log.component_norms = {name: found / clipped_to for name, found in norms.items()}
        self._update(float(norm))
        return per_source, float(norm)

    def _flops(self, batch: StepBatch) -> int:
        return sum(
            batch_flops(
                self.model.config, self.config.trainable, micro.attention_mask, micro.labels[:, 1:] != IGNORE,
                0 if micro.images is None else len(micro.images),
            )
            for micro in batch.micros
        )  # fmt: skip

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.num_steps

    def _update(self, norm: float) -> None:
        """Change the weights, unless the gradient would spoil them."""
        scaler = self.accelerator.scaler
        is_overflow = scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1
        if is_overflow or self.guard.accepts(norm):
            self.optimiser.step()  # an overflow of fp16 is the scaler's to leave out, and to scale down for
        elif scaler is not None:
            scaler.update()
        self.optimiser.zero_grad()

    def _held_out(self) -> HeldOut | None:
        """What the first rank is to ask the model as it learns."""
        if self.config.answers is None:
            return None
        if is_sharded(self.accelerator):
            raise ValueError(
                "answers: a model that is spread over ranks cannot be asked; leave `answers` out with FSDP."
            )
        max_prompt_tokens = self.model.config.text_config.max_position_embeddings - 1  # an answer takes one at least
        held_out = HeldOut(self.config.answers, self.config.data, self.processor, self.run_dir, max_prompt_tokens)
        return held_out if self.accelerator.is_main_process else None

    def _show_answers(self, held_out: HeldOut) -> None:
        language = self.model.model.language_model
        attention = language.config._attn_implementation
        self.model.eval()
        language.set_attn_implementation("sdpa")  # the packed ones take whole micro-batches only
        with self.accelerator.autocast():
            answers = held_out.ask(self.model, self.processor)
        language.set_attn_implementation(attention)
        set_trainable_(self.model, self.config)  # and in training mode again
        held_out.record(self.done_steps, answers)
        for tracker in self.accelerator.trackers:
            held_out.track(tracker, self.done_steps, answers)

    def save(self, directory: Path, with_state: bool) -> None:
        """Save a checkpoint; all ranks take part, the first one writes.

        Raises:
            ValueError: on every rank, when the disk does not take it.
        """
        accelerator = self.accelerator
        mine = {"rng": checkpoint.rng_state(), "data": self.loader.state_dict(), "log": self.log.state_dict()}
        state: dict[str, Any] | None = None
        if with_state:
            state = {"step": self.done_steps, "guard": self.guard.state_dict(), "ranks": gather_object([mine])}
            state["optimiser"] = gather_optimiser(self.objective, self.optimiser)
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
        weights = gather_weights(accelerator, self.objective)
        error = ""
        if accelerator.is_main_process:
            try:
                checkpoint.save_checkpoint(directory, self.saved, weights, self.processor, to_yaml(self.config), state)
                checkpoint.delete_old(self.run_dir, self.config.checkpoint.keep_last)
            except ValueError as found:
                error = str(found)
        self._raise_together(error)

    def _steps(self) -> Iterator[StepBatch]:
        """This rank's batches; what ends the data of one rank ends all, with the same words."""
        batches = iter(self.loader)
        while self.done_steps < self.num_steps:
            error, batch = "", None
            try:
                batch = next(batches)
            except ValueError as found:
                error = str(found)
            self._raise_together(error)
            assert batch is not None
            yield batch

    def _raise_together(self, error: str) -> None:
        """Raise on every rank what one of them has to say, so that none waits for another; all wait here."""
        if self._largest(bool(error)):
            raise ValueError(next(found for found in gather_object([error]) if found))

    def _largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _newest_checkpoint(self) -> Path | None:
        """What to go on from, chosen by the first rank for all."""
        found: list[Any] = [None, []]
        error = ""
        if self.accelerator.is_main_process:
            try:
                found = list(checkpoint.newest_good(self.run_dir))
            except ValueError as none_good:
                error = str(none_good)
        self._raise_together(error)
        path, lines = broadcast_object_list(found)
        for line in lines:
            self._say(line)
        return path

    def _check_resumed(self, found: Path) -> None:
        error, lines = "", []
        if self.accelerator.is_main_process:
            try:
                lines = check_resumed(found, self.done_steps, self.config)
            except ValueError as refused:
                error = str(refused)
        self._raise_together(error)
        for line in lines:
            self._say(line)

    def _last_good(self) -> str:
        """Where the run can go on, for people."""
        found = checkpoint.checkpoints(self.run_dir)
        if not found:
            return "No checkpoint was saved yet; started again, the run begins anew."
        return f"The last good checkpoint is {found[-1]}; started again, the run goes on from it."

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _inputs(self, micro: MicroBatch) -> dict[str, Any]:
        device = self.accelerator.device
        pixel_values = None
        if micro.images is not None:
            pixel_values = self.processor.image_processor.to_pixel_values(micro.images.to(device, non_blocking=True))
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
        loader = StepLoader(
            self.processor, config.data, config.max_tokens, config.seed, rank, world_size,
            config.global_batch // world_size, config.micro_batch,
            [rank_state["data"] for rank_state in state["ranks"]] if state is not None else None,
        )  # fmt: skip
        if loader.note is not None:
            self._say(loader.note)
        return loader

    def _restore(self, state: dict[str, Any] | None) -> None:
        set_seed(self.config.seed + self.done_steps, device_specific=True)
        if state is None:
            return
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimiser.param_groups
        ]
        load_optimiser_(self.accelerator, self.objective, self.optimiser, state["optimiser"])
        for group, of_this_run in zip(self.optimiser.param_groups, settings, strict=True):
            group.update(of_this_run)  # the checkpoint's rates and decay would hold else
        self.guard.load_state_dict(state["guard"])
        if len(state["ranks"]) == self.accelerator.num_processes:
            mine = state["ranks"][self.accelerator.process_index]
            checkpoint.set_rng_state(mine["rng"])
            self.log.load_state_dict(mine["log"])
        if self.accelerator.scaler is not None and "scaler" in state:  # not when it was of another precision
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
        self._grad_norm: float | None = None
        self.component_norms: dict[str, float] = {}  # before clipping, of the step that is logged
        self.num_steps, self._num_timed_steps, self._num_tokens, self._flops = 0, 0, 0, 0
        self._since = time.perf_counter()

    def add(self, batch: StepBatch, per_source: Tensor, grad_norm: float, flops: int) -> None:
        self._per_source = self._per_source.to(per_source.device) + per_source
        self._grad_norm = grad_norm if math.isfinite(grad_norm) else None
        self._flops += flops
        self._num_tokens += sum(int(micro.attention_mask.sum()) for micro in batch.micros)
        self.num_steps += 1
        self._num_timed_steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs to log the loss of all steps since the last line."""
        return {"per_source": self._per_source.cpu(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._per_source, self.num_steps = state["per_source"], state["num_steps"]

    def metrics(self, step: int, lr: dict[str, float], counts: dict[str, int], steps_skipped: int) -> dict[str, Any]:
        """A log line, over all ranks. The window starts anew."""
        numbers = [self._num_tokens, self._flops, counts["seen"], counts["broken"], counts["too_long"]]
        device = self._per_source.device
        sums = self._accelerator.reduce(torch.tensor(numbers, device=device), "sum").tolist()
        tokens, flops, seen, broken, too_long = sums
        per_source = self._accelerator.reduce(self._per_source, "sum").tolist()
        seconds = time.perf_counter() - self._since
        metrics = {
            "step": step,
            "loss": sum(loss for loss, _ in per_source) / sum(count for _, count in per_source),
            "loss_per_source": {name: loss / count for name, (loss, count) in zip(self._names, per_source) if count},
            "lr": lr,
            "grad_norm": self._grad_norm,
            "grad_norm_per_component": self.component_norms,
            "samples_per_second": self._num_timed_steps * self._samples_per_step / seconds,
            "tokens_per_second": tokens / seconds,
            "tflops_per_device": flops / seconds / self._accelerator.num_processes / 1e12,
            "samples_seen": seen,
            "samples_broken": broken,
            "samples_too_long": too_long,
            "steps_skipped": steps_skipped,
        }
        if device.type == "cuda":
            metrics["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        self._clear()
        return metrics


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat
