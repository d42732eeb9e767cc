"""An epoch begun by some streams and ended by others: nothing is skipped, and repeated samples are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import caption_sample

from train.config import DataConfig, SourceConfig
from train.data.reshard import reshard
from train.data.stream import Mixture

Writer = Callable[..., Path]
SEED, BUFFER = 3, 8


def mixtures(data: DataConfig, num_streams: int) -> list[Mixture]:
    return [Mixture(data.sources, BUFFER, SEED, stream, num_streams) for stream in range(num_streams)]


def draw(streams: list[Mixture], counts: list[int]) -> list[str]:
    return [stream.next_sample()[1]["__key__"] for stream, count in zip(streams, counts) for _ in range(count)]


def go_on(streams: list[Mixture], num_streams: int, data: DataConfig) -> tuple[list[Mixture], int]:
    states = [{"mixture": stream.state_dict(), "counts": {}} for stream in streams]
    after, num_again = reshard(states, num_streams, data, SEED)
    new = mixtures(data, num_streams)
    for stream, state in zip(new, after):
        stream.load_state_dict(state["mixture"])
    return new, num_again


def up_to_epoch(streams: list[Mixture], last: int) -> list[str]:
    """What the streams give out up to the end of an epoch."""
    keys = []
    for stream in streams:
        key = stream.next_sample()[1]["__key__"]
        while stream.sources[0].epoch <= last:
            keys.append(key)
            key = stream.next_sample()[1]["__key__"]
    return keys


@pytest.fixture
def data(tmp_path: Path, write_shard: Writer) -> DataConfig:
    for number, size in enumerate((20, 31, 9, 14, 26)):
        write_shard(tmp_path / f"{number}.tar", [caption_sample(100 * number + i) for i in range(size)])
    return DataConfig(sources=[SourceConfig(name="toys", shards=f"{tmp_path}/*.tar")])


@pytest.mark.parametrize(
    ("drawn", "num_after"), [([5, 7], 1), ([30], 4), ([8, 16, 0], 2), ([3] * 7, 7), ([0], 2), ([30, 2], 16)]
)
def test_the_remainder_of_an_epoch_is_split(data: DataConfig, drawn: list[int], num_after: int) -> None:
    before = mixtures(data, len(drawn))
    seen = draw(before, drawn)
    after, num_again = go_on(before, num_after, data)
    assert num_again == sum(count % BUFFER for count in drawn)
    seen += up_to_epoch(after, 0)
    assert len(set(seen)) == 100 and len(seen) == 100 + num_again
    assert max(Counter(seen).values()) <= 2


def test_a_second_change_and_a_stop_in_between(data: DataConfig) -> None:
    streams = mixtures(data, 3)
    seen = draw(streams, [9, 4, 11])
    streams, again = go_on(streams, 2, data)
    seen += draw(streams, [10, 3])
    stopped = mixtures(data, 2)
    for stream, state in zip(stopped, [stream.state_dict() for stream in streams]):
        stream.load_state_dict(state)
    seen += draw(stopped, [7, 2])
    after, again_too = go_on(stopped, 4, data)
    seen += up_to_epoch(after, 0)
    assert len(set(seen)) == 100 and len(seen) == 100 + again + again_too
    whole_epoch = up_to_epoch(after, 1)  # the first sample of each stream's next epoch is drawn already
    assert len(whole_epoch) == len(set(whole_epoch)) == 100 - 4


def test_streams_that_are_epochs_apart_end_together(data: DataConfig) -> None:
    before = mixtures(data, 2)
    seen = draw(before, [16, 120])
    num_epochs = before[1].sources[0].epoch + 1
    assert num_epochs > 1
    after, num_again = go_on(before, 3, data)
    seen += up_to_epoch(after, num_epochs - 1)
    assert len(seen) == 100 * num_epochs + num_again
    assert min(Counter(seen).values()) == num_epochs


def test_caps_are_kept(data: DataConfig) -> None:
    data.sources[0].max_samples = 50
    before = mixtures(data, 3)
    seen = draw(before, [6, 12, 8])
    after, num_again = go_on(before, 2, data)
    seen += up_to_epoch(after, 0)
    assert len(seen) == 50 + num_again and len(set(seen)) >= 50


def test_weights_that_change_are_kept(tmp_path: Path, write_shard: Writer) -> None:
    """What other streams drew is behind: each new stream follows the weights of the steps that it makes."""
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [(f"{name}{i}", {"txt": b"x"}) for i in range(300)])
    sources = [SourceConfig(name=name, shards=f"{tmp_path}/{name}.tar") for name in "ab"]
    sources[0].weight, sources[1].weight = [3.0, 0.0], [0.0, 1.0]
    data = DataConfig(sources=sources)
    before = mixtures(data, 2)
    seen = [key["__key__"] for stream in before for key in (stream.next_sample(0.0)[1] for _ in range(20))]
    assert {key[0] for key in seen} == {"a"}
    after, _ = go_on(before, 3, data)
    for progress, expected in ((0.5, 20 * 3 / 4), (0.75, 20 / 2)):  # weights 1.5 and 0.5; 0.75 and 0.75
        for stream in after:
            drawn = Counter(stream.next_sample(progress)[0] for _ in range(20))
            assert drawn[0] == pytest.approx(expected, abs=1)
    assert {stream.next_sample(1.0)[0] for stream in after for _ in range(5)} == {1}
