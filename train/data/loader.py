"""From raw samples to the batches of an optimizer step.

A worker makes whole steps: it encodes its rank's samples of a global batch, sorts them by length and splits them into
micro-batches, so that there is little padding while the step's gradient is that of the unsorted batch.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from yi_vl.processor import YiVLProcessor

from ..config import DataConfig, SourceConfig
from ..schedule import BatchSizes, run_progress
from .batch import Sample, StepBatch, collate
from .documents import Documents
from .encoder import Outcome, SampleEncoder, TooLong, draw_turn
from .reference import ReferenceModel, WrongReferenceError
from .reshard import reshard
from .samples import sample_name
from .shard_reader import RawSample
from .stream import Mixture, expand_shards

_MIN_SEEN = 100  # samples before a broken fraction means anything
_MAX_LONG_FRACTION = 0.5


class StepStream(IterableDataset[StepBatch]):
    """The endless steps of one stream; each DataLoader worker is a stream.

    Args:
        states: of this rank's streams, by worker; `first` is the worker whose turn is next, for step `first_step`.
    """

    def __init__(
        self, encoder: SampleEncoder, data: DataConfig, seed: int, rank: int, world_size: int,
        samples_per_step: BatchSizes, micro_batch: int, pad_id: int, states: dict[int, Any] | None = None,
        first: int = 0, first_step: int = 0, num_steps: int = 1,
    ) -> None:  # fmt: skip
        self._encoder, self._data, self._seed = encoder, data, seed
        self._rank, self._num_workers = rank, max(1, data.workers)
        self._num_streams = world_size * self._num_workers
        self._samples_per_step, self._micro_batch, self._pad_id = samples_per_step, micro_batch, pad_id
        self._states, self._first = states if states is not None else {}, first
        self._first_step, self._num_steps = first_step, num_steps
        self._noted: set[str] = set()  # shards whose note was reported
        self._last_broken = self._last_too_long = "before the run was stopped"

    def __iter__(self) -> Iterator[StepBatch]:
        turn = worker.id if (worker := get_worker_info()) else 0
        number = (turn + self._first) % self._num_workers
        stream = self._rank * self._num_workers + number
        mixture = Mixture(self._data.sources, self._data.shuffle_buffer, self._seed, stream, self._num_streams)
        counts: Counter[str] = Counter()
        try:
            documents = self._encoder.new_documents()
        except ValueError as error:
            yield StepBatch([], [], number, {}, [], error=str(error))
            return
        if number in self._states:
            mixture.load_state_dict(self._states[number]["mixture"])
            counts.update(self._states[number]["counts"])
            documents.load_state_dict(self._states[number].get("documents", {}))
        for step in itertools.count(self._first_step + turn, self._num_workers):
            reports: list[str] = []
            try:
                samples = self._gather(mixture, documents, step, counts, reports)
            except ValueError as error:
                yield StepBatch([], [], number, {}, reports, error=str(error))
                return
            names = [sample.name for sample in samples]
            samples.sort(key=lambda sample: sample.num_tokens)  # stable
            cuts = range(0, len(samples), self._micro_batch)
            micro_batches = [collate(samples[cut : cut + self._micro_batch], self._pad_id) for cut in cuts]
            state = {"mixture": mixture.state_dict(), "counts": dict(counts), "documents": documents.state_dict()}
            yield StepBatch(micro_batches, names, number, state, reports)

    def _gather(
        self, mixture: Mixture, documents: Documents, step: int, counts: Counter[str], reports: list[str]
    ) -> list[Sample]:
        """The samples of a step; broken ones are counted and reported.

        Raises:
            ValueError: too many are broken, there are none, or a reference is missing or wrong.
        """
        samples: list[Sample] = []
        num_samples, progress = self._samples_per_step.size(step), run_progress(step, self._num_steps)
        while len(samples) < num_samples:
            for _, raw, outcome in draw_turn(mixture, self._encoder, documents, progress):
                if raw is not None:
                    self._count(raw, outcome, counts, reports)
                if isinstance(outcome, Sample):
                    samples.append(outcome)
        return samples

    def _count(self, raw: RawSample, outcome: Outcome, counts: Counter[str], reports: list[str]) -> None:
        """
        Raises:
            ValueError: too many are broken, or a reference is missing or wrong.
        """
        if (note := raw.get("__note__")) is not None and raw["__url__"] not in self._noted:
            self._noted.add(raw["__url__"])
            reports.append(note)
        num_lost = raw.get("__lost__", 1)
        counts["seen"] += num_lost
        if isinstance(outcome, WrongReferenceError):
            raise ValueError(f"{sample_name(raw)}: {outcome}.") from outcome
        if isinstance(outcome, TooLong):
            counts["too_long"] += 1
            self._last_too_long = f"{sample_name(raw)}: skipped, {outcome}"
            reports.append(self._last_too_long)
        elif isinstance(outcome, ValueError):
            counts["broken"] += num_lost
            self._last_broken = f"{sample_name(raw)}: skipped, {outcome}"
            reports.append(self._last_broken)
        self._check(counts)

    def _check(self, counts: Counter[str]) -> None:
        seen, broken, too_long = counts["seen"], counts["broken"], counts["too_long"]
        if seen < _MIN_SEEN:
            return
        if broken > self._data.max_broken_fraction * seen or broken + too_long == seen > too_long:
            raise ValueError(
                f"{broken} of {seen} samples are broken, more than data.max_broken_fraction "
                f"{self._data.max_broken_fraction:g} allows; the last: {self._last_broken}"
            )
        if too_long > _MAX_LONG_FRACTION * seen:
            raise ValueError(
                f"{too_long} of {seen} samples are longer than max_tokens; the last: {self._last_too_long}. "
                "Raise max_tokens (an image alone takes (image_size / patch size)^2, and so does each of its tiles)."
            )


class StepLoader:
    """The steps of one rank, made by worker processes, with the cursor after the last one consumed.

    Args:
        samples_per_step: this rank's part of the global batch; a number: of every step.
        states: the `state_dict` of every rank to resume from.
        first_step, num_steps: the steps done before, and those of the whole run, over which weights change.
        reference: as of `SampleEncoder`.

    Attributes:
        note: the effects of resuming with another number of streams, for the user; or None.

    Raises:
        ValueError: the states are of other data.
    """

    def __init__(
        self, processor: YiVLProcessor, data: DataConfig, max_tokens: int, seed: int, rank: int, world_size: int,
        samples_per_step: int | BatchSizes, micro_batch: int, states: Sequence[dict[str, Any]] | None = None,
        first_step: int = 0, num_steps: int = 1,
        reference: ReferenceModel | None = None,
    ) -> None:  # fmt: skip
        num_workers = max(1, data.workers)
        self._layout: dict[str, Any] = {
            "workers": num_workers, "world_size": world_size, "sources": _layout(data.sources),
            "seed": seed, "shuffle_buffer": data.shuffle_buffer,
        }  # fmt: skip
        self.note: str | None = None
        self._states: dict[int, Any] = {}
        self._first = 0
        if states is not None:
            before = states[0]["layout"]
            if before["sources"] != self._layout["sources"]:
                raise ValueError(
                    f"The checkpoint's data cursor is for {before['sources']}, this run has {self._layout['sources']} "
                    "(name, shards, weight, max_samples, what the shards are); continue with the same data, or start "
                    "a new run (another run_dir)."
                )
            for key in ("seed", "shuffle_buffer"):
                if key in before and before[key] != self._layout[key]:
                    raise ValueError(
                        f"The checkpoint's data cursor is for {key} {before[key]}, this run has {self._layout[key]}, "
                        "which changes the order of the data; set it back, or start a new run (another run_dir)."
                    )
            if all(before[key] == self._layout[key] for key in ("workers", "world_size")):
                self._states, self._first = dict(states[rank]["streams"]), states[rank]["first"]
            else:
                old = [state["streams"].get(worker) for state in states for worker in range(before["workers"])]
                new, num_repeated = reshard(old, world_size * num_workers, data, seed)
                self._states = dict(enumerate(new[rank * num_workers : (rank + 1) * num_workers]))
                self.note = (
                    f"The checkpoint is of {before['world_size']} ranks x {before['workers']} workers, this run has "
                    f"{world_size} x {num_workers}: the remaining epoch is split again; at most {num_repeated} samples "
                    f"are repeated, from shuffle buffers of {data.shuffle_buffer}, and none is skipped."
                )
        pad_id = processor.tokenizer.pad_token_id
        sizes = samples_per_step if isinstance(samples_per_step, BatchSizes) else BatchSizes(samples_per_step)
        dataset = StepStream(
            SampleEncoder(processor, data, max_tokens, reference), data, seed, rank, world_size, sizes, micro_batch,
            pad_id if pad_id is not None else 0, dict(self._states), self._first, first_step, num_steps,
        )  # fmt: skip
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=data.workers,
            # forkserver's workers would outlive a trainer that is killed
            multiprocessing_context="fork" if data.workers and sys.platform == "linux" else None,
            worker_init_fn=_end_with_trainer,
            generator=torch.Generator(),  # not torch's default, which dropout uses: a resume would differ
        )

    def __iter__(self) -> Iterator[StepBatch]:
        """
        Raises:
            ValueError: a worker cannot continue; see `StepBatch.error`.
            RuntimeError: a worker was killed; the message begins with "DataLoader worker".
        """
        for batch in self._received():
            if batch.error is not None:
                raise ValueError(batch.error)
            self._states[batch.stream] = batch.state
            self._first = (batch.stream + 1) % self._layout["workers"]
            yield batch

    def _received(self) -> Iterator[StepBatch]:
        try:
            yield from self._loader
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            if not self._loader.num_workers:
                raise
            time.sleep(1)  # torch's SIGCHLD handler raises here, and names the worker and its signal
            raise RuntimeError("DataLoader worker: it was lost while it sent a batch.") from error

    def state_dict(self) -> dict[str, Any]:
        """The streams' state after the last batch returned."""
        return {"layout": self._layout, "streams": dict(self._states), "first": self._first}

    def counts(self) -> Counter[str]:
        """Samples seen, broken and too long up to the last batch returned."""
        return sum((Counter(state["counts"]) for state in self._states.values()), Counter())


def _end_with_trainer(_worker: int) -> None:
    """Leave it to the trainer to end this worker: the current step needs it when a stop signal reaches all processes.

    Ctrl-C goes to the whole process group, SIGTERM of a cluster's scheduler to every process.
    """
    os.setpgrp()
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_if_told_by, args=(os.getppid(),), daemon=True).start()


def _exit_if_told_by(parent: int) -> None:
    """Take SIGTERM from the parent process alone; torch sends it to a worker that does not end in time."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _layout(sources: Sequence[SourceConfig]) -> list[tuple[str, str, float | list[float], int | None, str]]:
    """The settings that a cursor is only valid for."""
    return [
        (source.name, source.shards, source.weight, source.max_samples, _fingerprint(expand_shards(source)))
        for source in sources
    ]


def _fingerprint(shards: Sequence[str]) -> str:
    return f"{len(shards)} shards, {zlib.crc32(chr(10).join(shards).encode()):08x}"
