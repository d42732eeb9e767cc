"""The training loop, the same for every stage of a recipe."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object, set_seed
from rich.console import Console
from torch import Tensor

from yi_vl.arguments import one_line

from . import checkpoint
from .config import TrainConfig, batch_sizes, num_steps
from .config_file import to_yaml
from .data.batch import MicroBatch, StepBatch
from .distributed import (
    build_accelerator,
    exchange,
    gather_optimizer,
    gather_weights,
    is_sharded,
    load_optimizer_,
    on_first_rank,
    raise_on_all_ranks,
    ranks_line,
)
from .experts import auxiliary_weights, experts_per_token, set_experts_
from .generations import HeldOut
from .loss_curve import draw_curves
from .metrics import MetricsWindow, Reporter, component_table, flatten
from .optim import build_optimizer, gradient_norms, learning_rates, set_learning_rates_
from .plan.flops import step_batch_flops
from .resume import check_finished, find_checkpoint
from .setup import build_held_out, build_loader, build_model, build_objective, check_shards, reference_model
from .signals import StopSignals
from .spike_guard import DivergedError, SpikeGuard
from .validation import Validation, build_validation, evaluation


def train(config: TrainConfig) -> Path:
    """Run a training run to its end, or resume the one in its run_dir; returns the finished model's directory.

    Raises:
        ValueError: data, weights, settings or disk need the user's attention.
        SystemExit: SIGTERM or Ctrl-C was received and a checkpoint saved; the code is 128 plus the signal's number.
    """
    run_dir, console = Path(config.run_dir), Console(stderr=True)
    final = run_dir / checkpoint.FINAL
    if not config.resume and (final.is_dir() or checkpoint.checkpoints(run_dir)):
        raise ValueError(f"{run_dir} holds an earlier run; delete it, take another run_dir, or set resume=true.")
    if final.is_dir():
        check_finished(final, config)
        console.print(f"{final} is finished already; to train again, take another run_dir.", markup=False)
        return final
    check_shards(config)
    trainer = Trainer(config, console)
    if stop_signal := trainer.run():
        trainer.accelerator.end_training()
        raise SystemExit(128 + stop_signal)
    trainer.save(final, with_state=False)
    if trainer.accelerator.is_main_process:
        draw_curves(run_dir)
    trainer.accelerator.end_training()
    return final


class Trainer:
    """The state of a run: model, optimizer, data, and the number of steps done."""

    def __init__(self, config: TrainConfig, console: Console) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.console = console
        self.num_steps, self.batch_sizes = num_steps(config), batch_sizes(config)
        self.accelerator = build_accelerator(config)
        self.guard = SpikeGuard(config.spike_guard)
        self.stop_signal = 0  # its number, once one was received by any rank
        self.is_checkpoint_due = False
        set_seed(config.seed)  # the same fresh weights on every rank

        directory, state = None, None
        if config.resume:
            directory, state, notes = find_checkpoint(self.accelerator, config)
            for note in notes:
                self._print(note)
        self.done_steps: int = state["step"] if state is not None else 0
        self._saved_steps = self.done_steps
        self.model, self.processor, self.saved = build_model(config, self.accelerator, directory)
        set_experts_(self.model.config.text_config, config.experts, max(0, self.done_steps - 1))
        if self.accelerator.is_main_process:
            console.print(component_table(self.model, config))
        if directory is not None:
            self._print(f"Resuming from {directory}, step {self.done_steps} of {self.num_steps}.")

        objective, memory_note = build_objective(config, self.accelerator, self.model, self.saved)
        if memory_note is not None:
            self._print(memory_note)
        self.log = MetricsWindow(config, self.accelerator, objective.metrics_name, objective.metric_names)
        self.objective, self.optimizer = self.accelerator.prepare(objective, build_optimizer(self.model, config))
        if self.accelerator.num_processes > 1:
            self._print(ranks_line(self.accelerator, self.objective))
        if config.compile:
            for layer in self.model.model.language_model.layers:  # one by one: all share one compilation
                layer.compile(dynamic=True)
        self.held_out = build_held_out(config, self.accelerator, self.model, self.processor)
        reference = reference_model(config)
        self.validation = build_validation(config, self.accelerator, self.processor, reference)
        self.loader = build_loader(config, self.accelerator, self.processor, state, reference)
        if self.loader.note is not None:
            self._print(self.loader.note)
        self._restore(state)

    def run(self) -> int:
        """Train the remaining steps. Returns 0, or the signal that stopped the run, once a checkpoint is saved."""
        if self.accelerator.is_main_process:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self.accelerator.init_trackers("yi_vl", config={"config": to_yaml(self.config)})
        rank = self.accelerator.process_index
        try:
            with (
                StopSignals() as signals,
                Reporter(self.config, self.done_steps, rank, self.console) as reporter,
            ):
                if self.validation is not None:
                    reporter.note(self.validation.reports)
                    self._validate(self.validation, reporter)  # the start, or what a killed run left out
                for batch, num_terms in self._batches(signals):
                    self._train_on(batch, num_terms, reporter)
                    self._after_step(reporter)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ValueError(
                f"A data worker died: {one_line(error)}. If memory ran out, lower data.workers or "
                f"data.shuffle_buffer. {checkpoint.last_checkpoint_line(self.run_dir)}"
            ) from error
        if self.stop_signal:
            name = signal.Signals(self.stop_signal).name
            self._print(f"{name} at step {self.done_steps}: {checkpoint.last_checkpoint_line(self.run_dir)}")
        return self.stop_signal

    def _batches(self, signals: StopSignals) -> Iterator[tuple[StepBatch, int]]:
        """This rank's batches, each with the number of terms of the step's loss on all ranks.

        Ends at the last step, or on all ranks when one received a signal, after saving a checkpoint. One exchange per
        step shares the signals, the errors and the token counts of all ranks.

        Raises:
            ValueError: on every rank, when the data of one cannot continue.
        """
        batches = iter(self.loader)
        while self.done_steps < self.num_steps:
            data_state = self.loader.state_dict()
            error, batch = "", None
            try:
                batch = next(batches)
            except ValueError as data_error:
                error = str(data_error)
            num_terms = batch.num_terms if batch is not None else 0
            rows = exchange(self.accelerator, [bool(error), signals.received, num_terms])
            has_error, self.stop_signal, _ = map(max, zip(*rows))
            if has_error:
                raise_on_all_ranks(error)
            if self.stop_signal:
                if self._saved_steps != self.done_steps:
                    self._save_step(data_state)  # without the batch that was just taken
                return
            assert batch is not None
            yield batch, sum(row[2] for row in rows)

    def _train_on(self, batch: StepBatch, num_terms: int, reporter: Reporter) -> None:
        """Do one step and log it."""
        reporter.note(batch.reports)
        set_learning_rates_(self.optimizer, self.done_steps, self.num_steps, self.config.schedule)
        set_experts_(self.model.config.text_config, self.config.experts, self.done_steps)
        per_source, norm = self.step(batch, num_terms)
        expert_sums = self.accelerator.unwrap_model(self.objective).take_expert_sums()
        self.done_steps += 1
        if self.config.log_samples:
            reporter.samples(self.done_steps, batch.names)
        if self.guard.num_consecutive:
            reporter.note([f"step {self.done_steps} skipped: its gradient norm is {norm:g}"])
        else:
            model_config, per_token = self.model.config, experts_per_token(expert_sums)
            flops = step_batch_flops(model_config, self.config.trainable, batch, per_token)
            self.log.add(batch, per_source, norm, flops, expert_sums)
        metrics = None
        if self._is_logged(self.done_steps) and self.log.num_steps:
            rates, size = learning_rates(self.optimizer), self.batch_sizes.size(self.done_steps - 1)
            counts, skipped = self.loader.counts(), self.guard.num_skipped
            metrics = self.log.metrics(self.done_steps, rates, size, counts, skipped)
            self.accelerator.log(flatten(metrics), step=self.done_steps)
        reporter.step(self.done_steps, metrics)
        if self.guard.should_stop:
            raise DivergedError(
                f"{self.guard.num_consecutive} consecutive steps were skipped; the gradient norm of the last is "
                f"{norm:g}, spike_guard.max_norm_ratio {self.config.spike_guard.max_norm_ratio}. Lower the learning "
                "rate, or look at the samples of these steps (log_samples=true). "
                f"{checkpoint.last_checkpoint_line(self.run_dir)}"
            )

    def _after_step(self, reporter: Reporter) -> None:
        """Save a checkpoint, measure the held-out loss and generate answers when they are due."""
        is_last = self.done_steps == self.num_steps
        self.is_checkpoint_due |= self.done_steps % self.config.checkpoint.every_steps == 0
        if self.is_checkpoint_due and not is_last and not self.guard.num_consecutive:  # else after the next good step
            self._save_step(self.loader.state_dict())
            self.is_checkpoint_due = False
        if self.validation is not None:
            self._validate(self.validation, reporter)
        if self.held_out is not None and (is_last or self.done_steps % self.held_out.every_steps == 0):
            self._generate(self.held_out)

    def step(self, batch: StepBatch, num_terms: int) -> tuple[Tensor, float]:
        """One optimizer step; its loss is normalized by the terms of the whole step on all ranks.

        Args:
            num_terms: what the loss of this step sums on all ranks: supervised tokens, or pairs of answers.

        Returns:
            (num_sources, 2 + M), what the objective sums per source on this rank, and the gradient norm.
        """
        accelerator = self.accelerator
        scale = accelerator.num_processes / num_terms  # data parallelism averages gradients over ranks
        per_source = self.log.zeros().to(accelerator.device)
        router_weights = auxiliary_weights(accelerator, self.model.config.text_config, batch, num_terms)
        for index, micro_batch in enumerate(batch.micro_batches):
            is_last = index == len(batch.micro_batches) - 1
            syncs = is_sharded(accelerator) or is_last  # FSDP always, or whole gradients would accumulate on each rank
            with nullcontext() if syncs else accelerator.no_sync(self.objective):
                loss, losses = self.objective(**self._inputs(micro_batch), router_weight=router_weights[index])
                accelerator.backward(loss * scale)
            per_source += losses
        clip = self.config.clip_norm
        norm = float(accelerator.clip_grad_norm_(self.objective.parameters(), clip if clip is not None else math.inf))
        if self._is_logged(self.done_steps + 1) and math.isfinite(norm):
            clip_factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
            norms = gradient_norms(self.optimizer)
            self.log.component_norms = {name: clipped / clip_factor for name, clipped in norms.items()}
        self._update(norm)
        return per_source, norm

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.num_steps

    def _update(self, norm: float) -> None:
        """Update the weights, unless the guard skips the step."""
        scaler = self.accelerator.scaler
        is_overflow = scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1
        if is_overflow or self.guard.accepts(norm):
            self.optimizer.step()  # the scaler skips an fp16 overflow itself, and lowers its scale
        elif scaler is not None:
            scaler.update()
        self.optimizer.zero_grad()

    def _validate(self, validation: Validation, reporter: Reporter) -> None:
        """Measure the held-out loss if it is due and not yet logged, and keep the checkpoint if it is the best."""
        step = self.done_steps
        if not validation.is_due(step, self.num_steps):
            return
        (row,) = broadcast_object_list([reporter.validation.get(step)])
        if row is None:
            with self.log.untimed():
                row = {"step": step} | validation.measure(self.accelerator, self.objective, self._inputs)
            self.accelerator.log(flatten(row), step=step)
            reporter.validated(row)
        if self.config.checkpoint.keep_best and step and not self.guard.num_consecutive:
            self._keep_if_best(row["validation_loss"], reporter)

    def _keep_if_best(self, loss: float | None, reporter: Reporter) -> None:
        is_best = checkpoint.is_best(self.run_dir, loss, reporter.validation)
        if broadcast_object_list([is_best])[0]:  # by the first rank, which has the rows
            if self._saved_steps != self.done_steps:
                self._save_step(self.loader.state_dict())
            keep_last = self.config.checkpoint.keep_last
            on_first_rank(self.accelerator, lambda: checkpoint.mark_best(self.run_dir, self.done_steps, keep_last))

    def _generate(self, held_out: HeldOut) -> None:
        with evaluation(self.objective), self.accelerator.autocast():
            texts = held_out.generate(self.model, self.processor)
        held_out.record(self.done_steps, texts)
        for tracker in self.accelerator.trackers:
            held_out.track(tracker, self.done_steps, texts)

    def _save_step(self, data_state: dict[str, Any]) -> None:
        self.save(checkpoint.checkpoint_path(self.run_dir, self.done_steps), with_state=True, data_state=data_state)
        self._saved_steps = self.done_steps

    def save(self, directory: Path, with_state: bool, data_state: dict[str, Any] | None = None) -> None:
        """Save a checkpoint; all ranks take part, the first one writes.

        Args:
            data_state: of the loader, to resume from; None: its present one.

        Raises:
            ValueError: on every rank, when the checkpoint cannot be written.
        """
        accelerator = self.accelerator
        state: dict[str, Any] | None = None
        if with_state:
            data_state = data_state if data_state is not None else self.loader.state_dict()
            rank_state = {"rng": checkpoint.rng_state(), "data": data_state, "log": self.log.state_dict()}
            state = {"step": self.done_steps, "guard": self.guard.state_dict(), "ranks": gather_object([rank_state])}
            state["optimizer"] = gather_optimizer(self.objective, self.optimizer)
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
        weights = gather_weights(accelerator, self.objective)

        def write() -> None:
            checkpoint.save_checkpoint(directory, self.saved, weights, self.processor, to_yaml(self.config), state)
            checkpoint.delete_old(self.run_dir, self.config.checkpoint.keep_last)

        on_first_rank(accelerator, write)

    def _print(self, line: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _inputs(self, micro_batch: MicroBatch) -> dict[str, Any]:
        """The arguments of `Objective.forward`, on this rank's device."""
        device = self.accelerator.device
        images, to_pixel_values = micro_batch.images, self.processor.image_processor.to_pixel_values
        pairs = {"image_index": micro_batch.image_index, "references": micro_batch.references}
        return {
            "input_ids": micro_batch.input_ids.to(device),
            "attention_mask": micro_batch.attention_mask.to(device),
            "labels": micro_batch.labels.to(device),
            "pixel_values": None if images is None else to_pixel_values(images.to(device)),
            "source_ids": micro_batch.source_ids.to(device),
            "shared_prefix_length": micro_batch.shared_prefix_length,
        } | (pairs if micro_batch.num_pairs else {})

    def _restore(self, state: dict[str, Any] | None) -> None:
        set_seed(self.config.seed + self.done_steps, device_specific=True)
        if state is None:
            return
        load_optimizer_(self.accelerator, self.objective, self.optimizer, state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        if len(state["ranks"]) == self.accelerator.num_processes:
            rank_state = state["ranks"][self.accelerator.process_index]
            checkpoint.set_rng_state(rank_state["rng"])
            self.log.load_state_dict(rank_state["log"])
        if self.accelerator.scaler is not None and "scaler" in state:  # absent if saved in another precision
            self.accelerator.scaler.load_state_dict(state["scaler"])
