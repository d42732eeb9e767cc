"""Shards of several sources as one endless, shuffled, exactly resumable stream of raw samples.

A run has ranks x workers streams. Every order is a pure function of (seed, epoch, ...), so a stream's state is a few
integers, from which it resumes with the next sample.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls

from ..config import SourceConfig, ValidationSourceConfig
from ..schedule import source_weights
from .shard_reader import RawSample, read_shard


class ShardSlice(NamedTuple):
    """The samples of a shard that one stream reads: `start`, `start + step`, `start + 2 step`, ..."""

    shard: int  # index into the source's shards
    start: int = 0
    step: int = 1

    def part(self, index: int, num_parts: int) -> ShardSlice:
        """One of `num_parts` interleaved parts."""
        return ShardSlice(self.shard, self.start + self.step * index, self.step * num_parts)

    def skip(self, num_read: int) -> ShardSlice:
        """Without its first `num_read` samples."""
        return ShardSlice(self.shard, self.start + self.step * num_read, self.step)


@dataclass(frozen=True)
class Cursor:
    """A position in a source: the index of the slice being read, and samples read of it and of the whole epoch."""

    epoch: int = 0
    slice_index: int = 0
    offset: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Remainder:
    """One stream's part of an epoch that another number of streams began; see reshard.py."""

    epoch: int
    slices: list[ShardSlice]
    quota: int | None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "slices": [list(piece) for piece in self.slices], "quota": self.quota}


@dataclass(frozen=True)
class EpochPlan:
    """What one stream reads of a source in each epoch, a pure function of these fields."""

    seed: tuple[int, int]
    num_shards: int
    max_samples: int | None
    stream: int
    num_streams: int
    remainder: Remainder | None = None

    def slices(self, epoch: int) -> list[ShardSlice]:
        """In reading order."""
        if self.remainder is not None and epoch == self.remainder.epoch:
            return self.remainder.slices
        order = np.random.default_rng((*self.seed, epoch)).permutation(self.num_shards).tolist()
        return split_slices([ShardSlice(shard) for shard in order], self.stream, self.num_streams)

    def quota(self, epoch: int) -> int | None:
        """Samples per epoch; None: all."""
        if self.remainder is not None and epoch == self.remainder.epoch:
            return self.remainder.quota
        return split_count(self.max_samples, self.stream, self.num_streams)


def expand_shards(source: SourceConfig | ValidationSourceConfig, key: str = "data.sources") -> list[str]:
    """The source's shards in a fixed order: braces, globs, URLs and pipes.

    Args:
        key: the setting that names the source, for errors.

    Raises:
        ValueError: a pattern matches nothing, or a local shard does not exist.
    """
    shards: list[str] = []
    for url in expand_urls(source.shards):
        if url.startswith("pipe:") or "://" in url:
            shards.append(url)
            continue
        matches = sorted(glob.glob(os.path.expanduser(url), recursive=True)) if glob.has_magic(url) else [url]
        missing = [path for path in matches if not os.path.isfile(os.path.expanduser(path))]
        if missing or not matches:
            raise ValueError(
                f"{key}: {source.name!r} names {missing[0] if missing else url}, and there is no such shard "
                f"(looked from {os.getcwd()}); correct its `shards`."
            )
        shards += matches
    return shards


def split_slices(slices: Sequence[ShardSlice], stream: int, num_streams: int) -> list[ShardSlice]:
    """A stream's part of some slices: whole ones, and a part of one of those that do not divide evenly.

    Over all streams each sample belongs to exactly one part.
    """
    num_uneven = len(slices) % num_streams
    num_whole = len(slices) - num_uneven
    own_slices = list(slices[stream:num_whole:num_streams])
    if num_uneven:
        readers = range(stream % num_uneven, num_streams, num_uneven)
        own_slices.append(slices[num_whole + stream % num_uneven].part(stream // num_uneven, len(readers)))
    return own_slices


@overload
def split_count(number: int, stream: int, num_streams: int) -> int: ...
@overload
def split_count(number: int | None, stream: int, num_streams: int) -> int | None: ...
def split_count(number: int | None, stream: int, num_streams: int) -> int | None:
    """A stream's part of a count; the parts of all streams add up to it."""
    return None if number is None else len(range(stream, number, num_streams))


class SourceStream:
    """One stream's endless samples of one source: shards shuffled per epoch, samples permuted in windows."""

    def __init__(
        self,
        index: int,
        name: str,
        shards: Sequence[str],
        max_samples: int | None,
        window: int,
        seed: int,
        stream: int,
        num_streams: int,
    ) -> None:
        self.name = name
        self._shards = list(shards)
        self._plan = EpochPlan((seed, index), len(shards), max_samples, stream, num_streams)
        self._window_size = window
        self._start = Cursor()  # start of the current window
        self._position = 0  # samples returned of it
        self._next = Cursor()  # start of the next window
        self._window: list[RawSample] | None = None
        self._reader: Iterator[RawSample] | None = None
        self.is_empty = self._plan.quota(0) == 0

    @property
    def epoch(self) -> int:
        """The epoch of the last sample returned."""
        return self._start.epoch

    def next_sample(self) -> RawSample | None:
        """The next sample; None, with `is_empty` set, when a whole epoch has none for this stream."""
        if self._window is None or self._position == len(self._window):
            self._fill()
        if self.is_empty:
            return None
        assert self._window is not None
        sample = self._window[self._position]
        self._window[self._position] = {}  # frees its bytes
        self._position += 1
        return sample

    @property
    def plan(self) -> EpochPlan:
        """What this stream reads in each epoch."""
        return self._plan

    def state_dict(self) -> dict[str, Any]:
        remainder = self._plan.remainder
        return {
            "start": asdict(self._start),
            "next": asdict(self._next),
            "position": self._position,
            "window": len(self._window) if self._window is not None else 0,
            "is_empty": self.is_empty,
            "remainder": remainder.state_dict() if remainder and self._start.epoch <= remainder.epoch else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plan = replace(self._plan, remainder=load_remainder(state))
        self.is_empty = state["is_empty"]
        if self.is_empty:
            return
        self._next = Cursor(**state["start"])
        self._reader = None
        self._fill()
        self._position = state["position"]
        self.is_empty = False  # until `next_sample` is called, as in a run that was not stopped

    def _fill(self) -> None:
        """Read the next window. A window never reaches into the next epoch."""
        window: list[RawSample] = []
        self._position = 0
        empty_epochs = 0
        while not window and not self.is_empty:
            start = self._next
            slices, quota = self._plan.slices(start.epoch), self._plan.quota(start.epoch)
            while (
                len(window) < self._window_size and self._next.slice_index < len(slices) and self._next.taken != quota
            ):
                if self._reader is None:
                    self._reader = self._read(slices[self._next.slice_index], self._next.offset)
                sample = next(self._reader, None)
                if sample is None:
                    self._reader = None
                    self._next = replace(self._next, slice_index=self._next.slice_index + 1, offset=0)
                    continue
                window.append(sample)
                self._next = replace(self._next, offset=self._next.offset + 1, taken=self._next.taken + 1)
            if not window:
                empty_epochs += start.taken == 0
                self.is_empty = empty_epochs > 1
                self._reader = None
                self._next = Cursor(epoch=self._next.epoch + 1)
        self._start = start if window else self._next
        seed = (*self._plan.seed, self._plan.stream, start.epoch, start.taken)
        order = np.random.default_rng(seed).permutation(len(window))
        self._window = [window[i] for i in order]

    def _read(self, shard_slice: ShardSlice, offset: int) -> Iterator[RawSample]:
        remaining = shard_slice.skip(offset)
        return islice(read_shard(self._shards[remaining.shard]), remaining.start, None, remaining.step)


def load_remainder(state: dict[str, Any]) -> Remainder | None:
    """The remainder in the state of a `SourceStream`."""
    if (saved := state["remainder"]) is None:
        return None
    return Remainder(saved["epoch"], [ShardSlice(*piece) for piece in saved["slices"]], saved["quota"])


class Mixture:
    """The sources of one stream, mixed by weight: the next sample is of the source furthest below its target.

    A source's target is the sum of its fractions of the weights at the samples drawn so far: weights may change.
    """

    def __init__(
        self, sources: Sequence[SourceConfig], shuffle_buffer: int, seed: int, stream: int = 0, num_streams: int = 1
    ) -> None:
        self._weights = [source.weights for source in sources]
        self._target = np.zeros(len(sources))
        self._drawn = np.zeros(len(sources), dtype=np.int64)
        self._phase = np.random.default_rng((seed, stream)).random(
            len(sources)
        )  # streams draw from sources in different orders
        mean_weights = source_weights(self._weights, 0.5)
        mean_fractions = mean_weights / mean_weights.sum()
        self.sources = [
            SourceStream(
                index, source.name, expand_shards(source), source.max_samples,
                max(1, round(shuffle_buffer * float(mean_fractions[index]))), seed, stream, num_streams,
            )
            for index, source in enumerate(sources)
        ]  # fmt: skip

    def next_sample(self, progress: float = 0.0) -> tuple[int, RawSample]:
        """A source's index, and its next sample.

        Args:
            progress: the part of the run that is done, which weights depend on; see `schedule.run_progress`.

        Raises:
            ValueError: no source has a sample for this stream.
        """
        index, sample = self.draw(lambda _: False, progress)
        assert sample is not None
        return index, sample

    def draw(self, is_ready: Callable[[int], bool], progress: float = 0.0) -> tuple[int, RawSample | None]:
        """The same for a source without anything ready: one with has its turn, and None instead of a sample.

        Raises:
            ValueError: no source has a sample for this stream.
        """
        while not all(source.is_empty for source in self.sources):
            fractions = self._fractions(progress)
            deficit = self._target + fractions + self._phase - self._drawn
            deficit[fractions == 0] = -np.inf
            index = int(deficit.argmax())
            has_turn = is_ready(index)
            sample = None if has_turn else self.sources[index].next_sample()
            if has_turn or sample is not None:
                self._target += fractions
                self._drawn[index] += 1
                return index, sample
        raise ValueError(
            "data.sources: " + ", ".join(source.name for source in self.sources) + " hold no sample for this worker; "
            "give more shards or samples, or fewer workers."
        )

    def _fractions(self, progress: float) -> NDArray[np.float64]:
        """(num_sources,) Of the weights of the sources that have samples; equal ones if all those weights are 0."""
        has_samples = np.array([not source.is_empty for source in self.sources], dtype=np.float64)
        weights = source_weights(self._weights, progress) * has_samples
        weights = weights if weights.any() else has_samples
        return np.asarray(weights / weights.sum())

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": self._drawn.tolist(),
            "target": self._target.tolist(),
            "sources": [source.state_dict() for source in self.sources],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = np.array(state["drawn"], dtype=np.int64)
        if "target" in state:
            self._target = np.array(state["target"])
        else:  # saved when weights could not change
            weights = source_weights(self._weights, 0.0)
            self._target = weights / weights.sum() * self._drawn.sum()
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(source_state)
