"""Which raw sample comes next: shards of several sources as one endless, shuffled, exactly resumable stream.

A run has S streams (ranks x workers). Every order is a pure function of (seed, epoch, ...), so a stream's place is a
few integers; loading them again gives the very next sample.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, overload

import numpy as np
from webdataset.shardlists import expand_urls

from ..config import SourceConfig
from .shard_reader import RawSample, read_shard


class Share(NamedTuple):
    """What one stream reads of a shard: its samples number `start`, `start + step`, `start + 2 step`, ..."""

    shard: int  # index into the source's shards
    start: int = 0
    step: int = 1

    def part(self, index: int, num_parts: int) -> Share:
        """One of several equal parts."""
        return Share(self.shard, self.start + self.step * index, self.step * num_parts)

    def behind(self, num_read: int) -> Share:
        """What is left of it."""
        return Share(self.shard, self.start + self.step * num_read, self.step)


@dataclass(frozen=True)
class Cursor:
    """A place in a source: the share being read, how many samples of it, and of the whole epoch, are read."""

    epoch: int = 0
    share: int = 0
    offset: int = 0
    taken: int = 0


@dataclass(frozen=True)
class Rest:
    """An epoch that other streams have begun: what is left for this one. See reshare.py."""

    epoch: int
    shares: list[Share]
    quota: int | None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "shares": [list(share) for share in self.shares], "quota": self.quota}


@dataclass(frozen=True)
class Epochs:
    """What one stream reads of a source in each epoch, a pure function of this."""

    seed: tuple[int, int]
    num_shards: int
    max_samples: int | None
    stream: int
    num_streams: int
    rest: Rest | None = None

    def shares(self, epoch: int) -> list[Share]:
        """In the order in which they are read."""
        if self.rest is not None and epoch == self.rest.epoch:
            return self.rest.shares
        order = np.random.default_rng((*self.seed, epoch)).permutation(self.num_shards).tolist()
        return share_out([Share(shard) for shard in order], self.stream, self.num_streams)

    def quota(self, epoch: int) -> int | None:
        """Samples after which the epoch ends; None when all are read."""
        if self.rest is not None and epoch == self.rest.epoch:
            return self.rest.quota
        return share_of(self.max_samples, self.stream, self.num_streams)


def expand_shards(source: SourceConfig) -> list[str]:
    """The source's shards in a fixed order: braces, globs, URLs and pipes.

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
                f"data.sources: {source.name!r} names {missing[0] if missing else url}, and there is no such shard "
                f"(looked from {os.getcwd()}); correct its `shards`."
            )
        shards += matches
    return shards


def share_out(pieces: Sequence[Share], stream: int, num_streams: int) -> list[Share]:
    """A stream's shares of some pieces: whole ones, and a part of one of those that do not divide evenly.

    Over all streams each sample belongs to exactly one share.
    """
    num_left = len(pieces) % num_streams
    num_whole = len(pieces) - num_left
    shares = list(pieces[stream:num_whole:num_streams])
    if num_left:
        readers = range(stream % num_left, num_streams, num_left)
        shares.append(pieces[num_whole + stream % num_left].part(stream // num_left, len(readers)))
    return shares


@overload
def share_of(number: int, stream: int, num_streams: int) -> int: ...
@overload
def share_of(number: int | None, stream: int, num_streams: int) -> int | None: ...
def share_of(number: int | None, stream: int, num_streams: int) -> int | None:
    """A stream's part of a number of things; all parts add up to it."""
    return None if number is None else len(range(stream, number, num_streams))


class SourceStream:
    """One source as one stream sees it, without end: shards shuffled per epoch, samples permuted in windows."""

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
        self._epochs = Epochs((seed, index), len(shards), max_samples, stream, num_streams)
        self._window_size = window
        self._start = Cursor()  # where the present window begins ...
        self._position = 0  # ... and how many of its samples are out
        self._next = Cursor()  # where the next window begins
        self._window: list[RawSample] | None = None
        self._reader: Iterator[RawSample] | None = None
        self.is_empty = self._epochs.quota(0) == 0

    @property
    def epoch(self) -> int:
        """The epoch of the sample given out last."""
        return self._start.epoch

    def next_sample(self) -> RawSample | None:
        """The next sample; None, and `is_empty`, when a whole epoch has nothing for this stream."""
        if self._window is None or self._position == len(self._window):
            self._fill()
        if self.is_empty:
            return None
        assert self._window is not None
        sample = self._window[self._position]
        self._window[self._position] = {}  # the window would hold the bytes until it is through
        self._position += 1
        return sample

    @property
    def epochs(self) -> Epochs:
        """What this stream reads."""
        return self._epochs

    def state_dict(self) -> dict[str, Any]:
        rest = self._epochs.rest
        return {
            "start": asdict(self._start),
            "next": asdict(self._next),
            "position": self._position,
            "window": len(self._window) if self._window is not None else 0,
            "is_empty": self.is_empty,
            "rest": rest.state_dict() if rest is not None and self._start.epoch <= rest.epoch else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._epochs = replace(self._epochs, rest=rest_of(state))
        self._next = Cursor(**state["start"])
        self._reader = None
        self._fill()
        self._position = state["position"]

    def _fill(self) -> None:
        """Read the next window. A window never reaches into the next epoch."""
        window: list[RawSample] = []
        self._position = 0
        empty_epochs = 0
        while not window and not self.is_empty:
            start = self._next
            shares, quota = self._epochs.shares(start.epoch), self._epochs.quota(start.epoch)
            while len(window) < self._window_size and self._next.share < len(shares) and self._next.taken != quota:
                if self._reader is None:
                    self._reader = self._read(shares[self._next.share], self._next.offset)
                sample = next(self._reader, None)
                if sample is None:
                    self._reader = None
                    self._next = replace(self._next, share=self._next.share + 1, offset=0)
                    continue
                window.append(sample)
                self._next = replace(self._next, offset=self._next.offset + 1, taken=self._next.taken + 1)
            if not window:
                empty_epochs += start.taken == 0
                self.is_empty = empty_epochs > 1
                self._reader = None
                self._next = Cursor(epoch=self._next.epoch + 1)
        self._start = start if window else self._next
        seed = (*self._epochs.seed, self._epochs.stream, start.epoch, start.taken)
        order = np.random.default_rng(seed).permutation(len(window))
        self._window = [window[i] for i in order]

    def _read(self, share: Share, offset: int) -> Iterator[RawSample]:
        left = share.behind(offset)
        return islice(read_shard(self._shards[left.shard]), left.start, None, left.step)


def rest_of(state: dict[str, Any]) -> Rest | None:
    """The `rest` of a stream's state as it was before it was saved."""
    if state["rest"] is None:
        return None
    return Rest(state["rest"]["epoch"], [Share(*share) for share in state["rest"]["shares"]], state["rest"]["quota"])


class Mixture:
    """The sources of one stream, mixed by weight: always the one that is furthest behind its share."""

    def __init__(
        self, sources: Sequence[SourceConfig], shuffle_buffer: int, seed: int, stream: int = 0, num_streams: int = 1
    ) -> None:
        weights = np.array([source.weight for source in sources])
        self._share = weights / weights.sum()
        self._drawn = np.zeros(len(sources), dtype=np.int64)
        self._phase = np.random.default_rng((seed, stream)).random(len(sources))  # so that streams do not draw in step
        self.sources = [
            SourceStream(
                index, source.name, expand_shards(source), source.max_samples,
                max(1, round(shuffle_buffer * float(self._share[index]))), seed, stream, num_streams,
            )
            for index, source in enumerate(sources)
        ]  # fmt: skip

    def next_sample(self) -> tuple[int, RawSample]:
        """The index of a source, and its next sample.

        Raises:
            ValueError: no source has a sample for this stream.
        """
        while not all(source.is_empty for source in self.sources):
            behind = self._share * (self._drawn.sum() + 1) + self._phase - self._drawn
            behind[[source.is_empty for source in self.sources]] = -np.inf
            index = int(behind.argmax())
            sample = self.sources[index].next_sample()
            if sample is not None:
                self._drawn[index] += 1
                return index, sample
        raise ValueError(
            "data.sources: " + ", ".join(source.name for source in self.sources) + " hold no sample for this worker; "
            "give more shards or samples, or fewer workers."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn.tolist(), "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = np.array(state["drawn"], dtype=np.int64)
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(source_state)
