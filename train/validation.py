"""Held-out loss during training: the same number on any number of ranks, with any micro-batch and any workers.

Every sample is a forward pass of its own, so its loss depends on the weights alone, and the losses are summed exactly.
Samples are read once, at the start, and divided among the ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule

from yi_vl.processor import YiVLProcessor

from .config import SourceConfig, TrainConfig, ValidationSourceConfig
from .data.encoder import Sample, SampleEncoder, TooLong
from .data.loader import MicroBatch, collate, num_supervised
from .data.samples import sample_name
from .data.shard_reader import read_shard
from .data.stream import expand_shards
from .distributed import is_sharded, raise_on_all_ranks

VALIDATION_KEY = "validation.sources"
_NUM_REPORTS = 10  # skipped samples of a source that are named


class Validation:
    """The held-out samples of a run, of which each rank keeps its part.

    Attributes:
        reports: lines for the user about the samples, the skipped ones among them.

    Raises:
        ValueError: shards are missing, or a source has no sample that can be used.
    """

    def __init__(self, config: TrainConfig, processor: YiVLProcessor, rank: int = 0, world_size: int = 1) -> None:
        assert config.validation is not None
        self._sources = config.validation.sources
        self._every_steps = config.validation.every_steps
        self.reports: list[str] = []
        self.names: list[str] = []  # of all samples
        self._source_ids: list[int] = []  # likewise
        self._num_supervised: list[int] = []  # likewise
        pad_id = processor.tokenizer.pad_token_id
        batches: list[MicroBatch | None] = []
        for index, source in enumerate(self._sources):
            for sample in self._read(source, config, processor):
                batch = collate([sample], pad_id if pad_id is not None else 0)
                batches.append(batch if len(batches) % world_size == rank else None)
                self.names.append(sample.name)
                self._source_ids.append(index)
                self._num_supervised.append(num_supervised(batch.labels))
                last = batch
        self._batches = [batch for batch in batches if batch is not None]
        if len(self._batches) < -(-len(self.names) // world_size):
            self._batches.append(last)  # all ranks need the same number of forward passes; not counted

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether the loss is measured after `step` of `num_steps` steps."""
        return step % self._every_steps == 0 or step == num_steps

    def measure(
        self, accelerator: Accelerator, objective: nn.Module, to_inputs: Callable[[MicroBatch], dict[str, Any]]
    ) -> dict[str, Any]:
        """`validation_loss` and `validation_loss_per_source`, on every rank; all take part. No random state is used.

        A source's loss is the mean over its supervised tokens, and `validation_loss` the mean over sources; None
        where it is NaN or infinite.

        Args:
            to_inputs: the arguments of the objective for a micro-batch.
        """
        # DDP's own forward pass would count as one of training; FSDP's gathers the weights.
        forward = objective if is_sharded(accelerator) else accelerator.unwrap_model(objective)
        if accelerator.num_processes > 1:
            for buffer in forward.buffers():  # batch statistics are the ranks' own until the next step
                torch.distributed.broadcast(buffer, 0)
        with evaluation(objective):
            losses = torch.stack([forward(**to_inputs(batch))[0].float() for batch in self._batches])
        per_rank: list[list[float]] = gather_object([losses.tolist()])
        return self._means([per_rank[i % len(per_rank)][i // len(per_rank)] for i in range(len(self.names))])

    def _means(self, losses: list[float]) -> dict[str, Any]:
        """From the summed loss of every sample."""
        per_source = {}
        for index, source in enumerate(self._sources):
            members = [i for i, source_id in enumerate(self._source_ids) if source_id == index]
            is_finite = all(math.isfinite(losses[i]) for i in members)
            total = math.fsum(losses[i] for i in members) if is_finite else math.nan  # exact, in any order
            per_source[source.name] = total / sum(self._num_supervised[i] for i in members)
        return {
            "validation_loss": _finite(math.fsum(per_source.values()) / len(per_source)),
            "validation_loss_per_source": {name: _finite(loss) for name, loss in per_source.items()},
        }

    def _read(self, source: ValidationSourceConfig, config: TrainConfig, processor: YiVLProcessor) -> list[Sample]:
        """The first samples of a source that can be used; a line about each other one before them, and a summary."""
        assert config.validation is not None
        data = replace(config.data, sources=[SourceConfig(source.name, source.shards, format=source.format)])
        encoder = SampleEncoder(processor, data, config.max_tokens)
        limit = min(config.validation.samples, source.max_samples or config.validation.samples)
        shards = expand_shards(source, VALIDATION_KEY)
        documents = encoder.new_documents()
        samples: list[Sample] = []
        counts: Counter[str] = Counter()
        for raw in (raw for shard in shards for raw in read_shard(shard)):
            if len(samples) == limit:
                break
            outcome = encoder.outcome(raw, 0, documents)
            if isinstance(outcome, Sample):
                samples.append(outcome)
            elif outcome is not None:
                counts["too long" if isinstance(outcome, TooLong) else "broken"] += raw.get("__lost__", 1)
                if counts.total() <= _NUM_REPORTS:
                    self.reports.append(f"validation: {sample_name(raw)}: skipped, {outcome}")
            while documents.is_ready(0) and len(samples) < limit:
                samples.append(encoder.next_row(0, documents))
        skipped = "".join(f", {count:,} {reason}" for reason, count in sorted(counts.items()))
        if not samples:
            raise ValueError(f"{VALIDATION_KEY}: {source.name!r} has no sample that can be used{skipped}.")
        trained_on = {shard for trained in config.data.sources for shard in expand_shards(trained)}
        if skipped or len(samples) < limit:
            self.reports.append(f"validation: {source.name}: {len(samples):,} of {limit:,} samples{skipped}.")
        if not trained_on.isdisjoint(shards):
            self.reports.append(f"validation: {source.name}: its shards are trained on too, so it is not held out.")
        return samples


def build_validation(config: TrainConfig, accelerator: Accelerator, processor: YiVLProcessor) -> Validation | None:
    """The run's held-out samples; None without `validation`.

    Raises:
        ValueError: on every rank, when the samples of one cannot be used or are not those of the others.
    """
    if config.validation is None:
        return None
    error, validation = "", None
    try:
        validation = Validation(config, processor, accelerator.process_index, accelerator.num_processes)
    except ValueError as data_error:
        error = str(data_error)
    raise_on_all_ranks(error)
    assert validation is not None
    if any(names != validation.names for names in gather_object([validation.names])):
        raise ValueError("validation: the ranks read different samples; give all of them the same shards.")
    return validation


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, uncompiled; afterwards each submodule is in the mode that it was in."""
    in_training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        # Compiling once more for eval mode would take longer than a measurement.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for submodule in in_training:
            submodule.training = True
        for submodule in module.modules():
            if isinstance(submodule, FSDPModule):
                submodule.reshard()  # as after a training step; its backward pass does this otherwise


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
