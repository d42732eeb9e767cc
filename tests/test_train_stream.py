"""The order of the data: every sample once per epoch, mixed by weight, and a place in it that can be returned to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from train.config import SourceConfig
from train.data.stream import Mixture, ShardSlice, SourceStream, expand_shards, read_shard, split_slices

Writer = Callable[..., Path]


def text_shards(write_shard: Writer, folder: Path, name: str, sizes: list[int]) -> SourceConfig:
    for number, size in enumerate(sizes):
        samples = [(f"{name}-{number}-{i:03d}", {"txt": b"x"}) for i in range(size)]
        write_shard(folder / f"{name}-{number}.tar", samples)
    return SourceConfig(name=name, shards=str(folder / f"{name}-*.tar"))


def keys_of_epoch(source: SourceConfig, stream: int, num_streams: int, epoch: int, window: int = 5) -> list[str]:
    reader = SourceStream(0, source.name, expand_shards(source), source.max_samples, window, 3, stream, num_streams)
    keys = []
    while True:
        sample = reader.next_sample()
        if sample is None or reader.epoch > epoch:
            return keys
        if reader.epoch == epoch:
            keys.append(sample["__key__"])


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 5, 7, 9])
def test_every_sample_once_per_epoch_over_two_ranks_of_two_workers(
    tmp_path: Path, write_shard: Writer, num_shards: int
) -> None:
    sizes = [6 + number for number in range(num_shards)]
    source = text_shards(write_shard, tmp_path, "a", sizes)
    for epoch in (0, 1):
        per_stream = [keys_of_epoch(source, stream, 4, epoch) for stream in range(4)]
        keys = [key for stream_keys in per_stream for key in stream_keys]
        assert len(keys) == len(set(keys)) == sum(sizes)
        assert all(per_stream), "a worker has nothing to do"


def test_epochs_and_seeds_differ_in_order(tmp_path: Path, write_shard: Writer) -> None:
    source = text_shards(write_shard, tmp_path, "a", [8, 8, 8])
    first, second = keys_of_epoch(source, 0, 1, 0), keys_of_epoch(source, 0, 1, 1)
    assert first != second and sorted(first) == sorted(second)
    assert first == keys_of_epoch(source, 0, 1, 0)
    assert [key[:3] for key in first] != sorted(key[:3] for key in first), "shards are not mixed"


def test_max_samples_caps_an_epoch(tmp_path: Path, write_shard: Writer) -> None:
    source = text_shards(write_shard, tmp_path, "a", [10, 10])
    source.max_samples = 7
    lengths = [len(keys_of_epoch(source, stream, 2, 0)) for stream in range(2)]
    assert lengths == [4, 3]
    assert len(set(keys_of_epoch(source, 0, 1, 0)) | set(keys_of_epoch(source, 0, 1, 1))) > 7, "always the same seven"


def test_sources_are_mixed_by_weight(tmp_path: Path, write_shard: Writer) -> None:
    sources = [text_shards(write_shard, tmp_path, name, [5, 4]) for name in "abc"]
    sources[0].weight, sources[1].weight, sources[2].weight = 4.0, 1.0, 3.0
    mixture = Mixture(sources, shuffle_buffer=8, seed=0)
    drawn = [mixture.next_sample()[0] for _ in range(80)]
    assert Counter(drawn) == {0: 40, 1: 10, 2: 30}
    for start in range(0, 80, 16):  # in every stretch, not only in all
        assert abs(Counter(drawn[start : start + 16])[0] - 8) <= 2


@pytest.mark.parametrize("num_done", [0, 1, 7, 20, 53])
def test_a_loaded_place_goes_on_with_the_very_next_sample(tmp_path: Path, write_shard: Writer, num_done: int) -> None:
    sources = [text_shards(write_shard, tmp_path, "a", [5, 9, 3]), text_shards(write_shard, tmp_path, "b", [4])]
    sources[1].max_samples = 3

    def names(mixture: Mixture, count: int) -> list[str]:
        return [mixture.next_sample()[1]["__key__"] for _ in range(count)]

    whole = names(Mixture(sources, 6, seed=1, stream=1, num_streams=2), num_done + 40)
    first = Mixture(sources, 6, seed=1, stream=1, num_streams=2)
    names(first, num_done)
    second = Mixture(sources, 6, seed=1, stream=1, num_streams=2)
    second.load_state_dict(first.state_dict())
    assert names(second, 40) == whole[num_done:]


def changing_sources(write_shard: Writer, folder: Path) -> list[SourceConfig]:
    sources = [text_shards(write_shard, folder, name, [5, 4]) for name in "abc"]
    sources[0].weight, sources[1].weight, sources[2].weight = [3.0, 0.0], [0.0, 2.0], 1.0
    return sources


def test_counts_follow_weights_that_change(tmp_path: Path, write_shard: Writer) -> None:
    """At every sample within two of the sum of the fractions so far: one, and one for the order of the sources."""
    for stream in range(4):
        mixture = Mixture(changing_sources(write_shard, tmp_path), 8, seed=0, stream=stream, num_streams=4)
        targets, drawn = [0.0, 0.0, 0.0], [0, 0, 0]
        for number in range(401):
            weights = (3 - 3 * number / 400, 2 * number / 400, 1.0)
            source, _ = mixture.next_sample(number / 400)
            drawn[source] += 1
            targets = [target + weight / sum(weights) for target, weight in zip(targets, weights)]
            assert max(abs(count - target) for count, target in zip(drawn, targets)) < 2
            assert weights[source] > 0, "never of a source whose weight is 0"
        assert 80 < drawn[1] < 160


@pytest.mark.parametrize("num_done", [0, 1, 29, 60])
def test_weights_that_change_resume_exactly(tmp_path: Path, write_shard: Writer, num_done: int) -> None:
    sources = changing_sources(write_shard, tmp_path)

    def names(mixture: Mixture, first: int, last: int) -> list[str]:
        return [mixture.next_sample(number / 99)[1]["__key__"] for number in range(first, last)]

    whole = names(Mixture(sources, 6, seed=1), 0, 100)
    first, second = Mixture(sources, 6, seed=1), Mixture(sources, 6, seed=1)
    assert names(first, 0, num_done) == whole[:num_done]
    second.load_state_dict(first.state_dict())
    assert names(second, num_done, 100) == whole[num_done:]


def test_a_state_without_targets_is_of_weights_that_could_not_change(tmp_path: Path, write_shard: Writer) -> None:
    sources = [text_shards(write_shard, tmp_path, name, [5, 4]) for name in "abc"]
    sources[0].weight, sources[1].weight = 0.7, 0.9
    first, second = Mixture(sources, 6, seed=1), Mixture(sources, 6, seed=1)
    for _ in range(31):
        first.next_sample()
    state = first.state_dict()
    del state["target"]
    second.load_state_dict(state)
    assert [second.next_sample() for _ in range(60)] == [first.next_sample() for _ in range(60)]


def test_slices_of_many_streams_read_one_shard_more_at_most() -> None:
    slices = [ShardSlice(number) for number in range(1000)]
    parts = [split_slices(slices, stream, 512) for stream in range(512)]
    assert max(len(part) for part in parts) == 2
    pieces = [piece for part in parts for piece in part]
    read = Counter((piece.shard, index) for piece in pieces for index in range(piece.start, 60, piece.step))
    assert set(read.values()) == {1} and len(read) == 60_000


def test_braces_globs_and_pipes(tmp_path: Path, write_shard: Writer) -> None:
    text_shards(write_shard, tmp_path, "a", [2, 2, 2])
    braces = SourceConfig(name="a", shards=f"{tmp_path}/a-{{0..2}}.tar")
    assert expand_shards(braces) == expand_shards(SourceConfig(name="a", shards=f"{tmp_path}/*.tar"))
    pipes = expand_shards(SourceConfig(name="a", shards=f"pipe:cat {tmp_path}/a-{{0..1}}.tar"))
    assert [sample["__key__"] for url in pipes for sample in read_shard(url)] == [
        "a-0-000",
        "a-0-001",
        "a-1-000",
        "a-1-001",
    ]


@pytest.mark.parametrize("pattern", ["{0..1}.tar", "*.tar"])
def test_shards_that_are_not_there_are_named(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=r"'things' names .*tar, and there is no such shard"):
        expand_shards(SourceConfig(name="things", shards=f"{tmp_path}/{pattern}"))


def test_a_damaged_shard_gives_what_it_has_and_says_what_it_lacks(tmp_path: Path, write_shard: Writer) -> None:
    good = write_shard(tmp_path / "good.tar", [(f"k{i}", {"txt": b"x" * 2000}) for i in range(4)])
    (tmp_path / "cut.tar").write_bytes(good.read_bytes()[:6000])
    (tmp_path / "text.tar").write_text("this is no tar")
    cut = list(read_shard(str(tmp_path / "cut.tar")))
    assert [sample["__key__"] for sample in cut if "__error__" not in sample] == ["k0", "k1"]
    assert any("__error__" in sample for sample in cut)
    (error,) = read_shard(str(tmp_path / "text.tar"))
    assert "ReadError" in error["__error__"] and error["__url__"].endswith("text.tar")
    assert [("__error__" in sample) for sample in read_shard(str(tmp_path / "none.tar"))] == [True]


def test_a_source_without_samples_is_left_out(tmp_path: Path, write_shard: Writer) -> None:
    sources = [text_shards(write_shard, tmp_path, "a", [3]), text_shards(write_shard, tmp_path, "b", [0])]
    mixture = Mixture(sources, 4, seed=0)
    assert {mixture.next_sample()[0] for _ in range(10)} == {0}
    with pytest.raises(ValueError, match="b hold no sample"):
        Mixture(sources[1:], 4, seed=0).next_sample()


def test_the_others_keep_their_weights_beside_a_source_without_samples(tmp_path: Path, write_shard: Writer) -> None:
    sources = [text_shards(write_shard, tmp_path, name, sizes) for name, sizes in (("a", [3]), ("b", [0]), ("c", [9]))]
    sources[0].weight, sources[1].weight = 4.0, 5.0
    mixture = Mixture(sources, 4, seed=0)
    drawn = Counter(mixture.next_sample()[0] for _ in range(500))
    assert drawn[0] == pytest.approx(400, abs=2) and drawn[2] == pytest.approx(100, abs=2)
    sources[2].weight = [0.0, 0.0]
    only = Mixture([sources[1], sources[2]], 4, seed=0)
    assert {only.next_sample()[0] for _ in range(5)} == {1}, "better a source whose weight is 0 than none"


@pytest.mark.parametrize("num_done", [0, 1, 5, 40])
@pytest.mark.parametrize("max_samples", [None, 1])
def test_a_source_without_samples_resumes_exactly(
    tmp_path: Path, write_shard: Writer, num_done: int, max_samples: int | None
) -> None:
    """It has none at all, or none for the second stream, which is noticed when its turn comes, soon or late."""
    sources = [text_shards(write_shard, tmp_path, name, [9]) for name in "ac"]
    sources.insert(1, text_shards(write_shard, tmp_path, "b", [0 if max_samples is None else 4]))
    sources[0].weight, sources[1].weight, sources[1].max_samples = 3.7, 0.9, max_samples

    def names(mixture: Mixture, count: int) -> list[str]:
        return [mixture.next_sample()[1]["__key__"] for _ in range(count)]

    for seed in range(12):
        whole = names(Mixture(sources, 4, seed, stream=1, num_streams=2), 60)
        first, second, third = (Mixture(sources, 4, seed, stream=1, num_streams=2) for _ in range(3))
        assert names(first, num_done) == whole[:num_done]
        second.load_state_dict(first.state_dict())
        assert names(second, 60 - num_done) == whole[num_done:]
        third.load_state_dict(second.state_dict())
        assert names(third, 20) == names(second, 20)
