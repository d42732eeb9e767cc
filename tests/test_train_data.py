"""From raw members to batches: what is broken and what happens then, the loss mask, the common prefix, exact resume."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import caption_sample, chat_sample, png

from train.config import DataConfig, SourceConfig
from train.data.batch import IGNORE, collate, num_supervised
from train.data.encoder import SampleEncoder, TooLong
from train.data.loader import StepLoader
from train.schedule import BatchSizes
from yi_vl.image import YiVLImageProcessor
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

Writer = Callable[..., Path]


@pytest.fixture(scope="module")
def processor(toy_language_model: Path) -> YiVLProcessor:
    return YiVLProcessor(YiVLImageProcessor(28), prepare_tokenizer(str(toy_language_model)), patch_size=14)


def data_config(shards: str, sample_format: str = "chat", **settings: Any) -> DataConfig:
    return DataConfig(
        format=sample_format, sources=[SourceConfig(name="toys", shards=shards)], **{"workers": 0} | settings
    )


def encoder(processor: YiVLProcessor, sample_format: str = "chat", max_tokens: int = 400) -> SampleEncoder:
    return SampleEncoder(processor, data_config("", sample_format), max_tokens)


def raw(**members: bytes) -> dict[str, Any]:
    return {"__url__": "x.tar", "__key__": "k"} | {
        name.lstrip("_").replace("_", "."): data for name, data in members.items()
    }


def chat_json(*values: str) -> bytes:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return json.dumps({"conversations": turns}).encode()


def loader(processor: YiVLProcessor, data: DataConfig, *states: dict[str, Any], **layout: Any) -> StepLoader:
    defaults: dict[str, Any] = {"rank": 0, "world_size": 1, "samples_per_step": 6, "micro_batch": 4} | layout
    return StepLoader(processor, data, 400, 0, **defaults, states=states if states else None)


def test_a_caption_is_supervised_after_its_image(processor: YiVLProcessor) -> None:
    sample = encoder(processor, "caption").encode(raw(png=png("red"), txt=b"a red image\n"), 0)
    ids, mask = sample.encoded.input_ids, sample.encoded.loss_mask
    assert ids[:4] == [processor.image_token_id] * 4 and mask == [False] * 4 + [True] * (len(ids) - 4)
    assert processor.tokenizer.decode(ids[4:]) == "a red image\n"
    assert sample.images[0].shape == (28, 28, 3) and sample.images[0].dtype == torch.uint8


def test_a_caption_may_be_a_conversations_answer(processor: YiVLProcessor) -> None:
    captions = encoder(processor, "caption")
    plain = captions.encode(raw(png=png("red"), txt=b"a red image"), 0)
    from_conversation = captions.encode(raw(png=png("red"), json=chat_json("<image>\nDescribe it.", "a red image")), 0)
    assert from_conversation.encoded == plain.encoded, "the question is left out"
    beside = captions.encode(raw(png=png("red"), txt=b"a red image", json=b'{"width": 5, "url": "x"}'), 0)
    assert beside.encoded == plain.encoded, "img2dataset's metadata is no conversation"
    without_image = captions.encode(raw(json=chat_json("abc", "a red image")), 0).encoded
    learned = [token for token, is_supervised in zip(without_image.input_ids, without_image.loss_mask) if is_supervised]
    assert processor.tokenizer.decode(learned) == "a red image\n"
    assert processor.tokenizer.decode(without_image.input_ids) == "abca red image\n"
    for values in (("only a question",), ("a", "b", "c", "d"), ("a", "")):
        with pytest.raises(ValueError, match="answer"):
            captions.encode(raw(json=chat_json(*values)), 0)


def test_images_keep_their_order(processor: YiVLProcessor) -> None:
    text = chat_json("<image><image>\nWhich?", "Red, then blue.")
    sample = encoder(processor).encode(raw(_1_png=png("blue"), _0_png=png("red"), json=text), 0)
    first, second = (image[14, 14].tolist() for image in sample.images)
    assert first[0] > 200 > first[2] and second[2] > 200 > second[0]


@pytest.mark.parametrize(
    ("sample_format", "members", "reason"),
    [
        ("chat", {"png": b"no image", "json": chat_json("<image>\nWhat?", "Red.")}, "not an image"),
        ("chat", {"png": png("red")[:60], "json": chat_json("<image>\nWhat?", "Red.")}, "damaged|cannot be read"),
        ("chat", {"png": png("red"), "json": b"{"}, "Expecting"),
        ("chat", {"png": png("red"), "json": b'{"caption": "x"}'}, "no list of `conversations`"),
        ("chat", {"png": png("red"), "json": chat_json("What?", "Red.")}, "0 <image> in the text but 1 images"),
        ("chat", {"json": chat_json("<image>\nWhat?", "Red.")}, "1 <image> in the text but 0 images"),
        ("chat", {"_1_png": png("red"), "json": chat_json("<image>\nWhat?", "Red.")}, r"numbered \[1\]"),
        ("chat", {"json": chat_json("What?")}, "no answer"),
        ("chat", {"png": png("red")}, "no .json, only .png"),
        ("caption", {"png": png("red"), "txt": b" \n"}, ".txt is empty"),
        ("caption", {"png": png("red"), "txt": b"\xff\xfe"}, "utf-8"),
        ("caption", {"png": png("red"), "txt": b"x" * 100_000}, "tokens, max_tokens is 400"),
        ("chat", {"json": chat_json("y " * 50_000, "z")}, "tokens, max_tokens is 400"),
        ("chat", {"json": b"[" * 100_000}, "nested too deeply"),
        ("chat", {"json": chat_json("half of a pair: \ud800", "z")}, "surrogates not allowed"),
        ("chat", {"json": b'{"conversations": [{"from": 5, "value": null}]}'}, "needs `from`"),
        ("chat", {"png": png("red"), "json": chat_json("<image><image>\nWhat?", "Red.")}, "2 <image> .* 1 images"),
    ],
)
def test_what_is_broken_says_why(
    processor: YiVLProcessor, sample_format: str, members: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        encoder(processor, sample_format).encode(raw(**members), 0)


@pytest.mark.parametrize("text", ["a\0b", "".join(map(chr, range(1, 32))) + "x", "\u202e\ufeff\U0001f600"])
def test_odd_characters_are_text(processor: YiVLProcessor, text: str) -> None:
    encoded = encoder(processor).encode(raw(json=chat_json(text, "x")), 0).encoded
    assert text.strip() in processor.tokenizer.decode(encoded.input_ids)


def test_an_over_long_sample_is_never_cut(processor: YiVLProcessor) -> None:
    with pytest.raises(TooLong, match="max_tokens is 5"):
        encoder(processor, "caption", max_tokens=5).encode(raw(png=png("red"), txt=b"a red image"), 0)


def test_collate_pads_on_the_right_and_finds_the_common_prefix(processor: YiVLProcessor) -> None:
    texts = [("Hello!", "Hi."), ("<image>\nWhat colour is it?", "It is red.")]
    samples = [
        encoder(processor).encode(raw(json=chat_json(*texts[0])), 0),
        encoder(processor).encode(raw(png=png("red"), json=chat_json(*texts[1])), 0),
    ]
    batch = collate(samples, pad_id=0)
    for row, sample in enumerate(samples):
        length = len(sample.encoded.input_ids)
        assert batch.input_ids[row, :length].tolist() == sample.encoded.input_ids
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        assert ((batch.labels[row, :length] != IGNORE).tolist()) == sample.encoded.loss_mask
    assert num_supervised(batch.labels) == sum(sum(sample.encoded.loss_mask) for sample in samples)
    prefix = processor.tokenizer.decode(batch.input_ids[0, : batch.shared_prefix_length])
    assert prefix.startswith("This is a chat") and "###" in prefix
    assert (batch.input_ids[:, : batch.shared_prefix_length + 1] != processor.image_token_id).all()
    assert (batch.labels[:, : batch.shared_prefix_length + 1] == IGNORE).all()
    assert collate(samples[1:], 0).shared_prefix_length == samples[1].encoded.image_starts[0] - 1


def test_broken_samples_are_counted_and_named(processor: YiVLProcessor, tmp_path: Path, write_shard: Writer) -> None:
    samples = [chat_sample(i) for i in range(20)]
    samples[7] = ("q00007", samples[7][1] | {"png": b"rotten"})
    write_shard(tmp_path / "a.tar", samples)
    stream = loader(processor, data_config(f"{tmp_path}/a.tar"))
    reports = [line for _, batch in zip(range(3), stream) for line in batch.reports]
    assert stream.counts()["broken"] == 1 and stream.counts()["seen"] == 19
    assert len(reports) == 1 and "a.tar q00007: skipped" in reports[0] and "not an image" in reports[0]


def test_shards_that_cannot_be_read_are_counted_and_named(
    processor: YiVLProcessor, tmp_path: Path, write_shard: Writer
) -> None:
    good = write_shard(tmp_path / "good.tar", [caption_sample(i) for i in range(30)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(good[: len(good) // 2 + 700])
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("this is no tar")
    (tmp_path / "random.tar").write_bytes(bytes(i * 7919 % 251 for i in range(20_000)))
    stream = loader(processor, data_config(f"{tmp_path}/*.tar", "caption", max_broken_fraction=0.2, shuffle_buffer=1))
    reports = " ".join(line for _, batch in zip(range(12), stream) for line in batch.reports)
    for name in ("cut", "empty", "text", "random"):
        assert f"{name}.tar" in reports, f"{name}.tar is not named"
    (tmp_path / "good.tar").unlink()
    (tmp_path / "cut.tar").unlink()
    with pytest.raises(ValueError, match=r"hold no sample|are broken, more than"):
        next(iter(loader(processor, data_config(f"{tmp_path}/*.tar", "caption"))))


def test_too_many_broken_samples_stop_the_run(processor: YiVLProcessor, tmp_path: Path, write_shard: Writer) -> None:
    samples = [caption_sample(i) if i % 10 else (f"c{i:05d}", {"txt": b"no image", "png": b""}) for i in range(50)]
    write_shard(tmp_path / "a.tar", samples)
    data = data_config(f"{tmp_path}/a.tar", "caption", max_broken_fraction=0.05)
    steps = 0
    with pytest.raises(ValueError, match=r"10 of 100 samples are broken, more than data.max_broken_fraction 0.05"):
        for _ in loader(processor, data):
            steps += 1
    assert steps == 15  # 90 good ones


@pytest.mark.parametrize(("workers", "num_done"), [(0, 5), (2, 1), (2, 4)])
def test_a_loader_goes_on_where_it_stood(
    processor: YiVLProcessor, tmp_path: Path, write_shard: Writer, workers: int, num_done: int
) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", [chat_sample(20 * number + i) for i in range(20)])
    data = data_config(f"{tmp_path}/*.tar", workers=workers, shuffle_buffer=7)

    def names(stream: StepLoader, count: int) -> list[list[str]]:
        return [batch.names for _, batch in zip(range(count), stream)]

    whole = names(loader(processor, data), num_done + 5)
    first = loader(processor, data)
    assert names(first, num_done) == whole[:num_done]
    assert names(loader(processor, data, first.state_dict()), 5) == whole[num_done:]
    write_shard(tmp_path / "3.tar", [chat_sample(i) for i in range(20)])
    with pytest.raises(ValueError, match=r"data cursor is for .*3 shards.* this run has .*4 shards"):
        loader(processor, data, first.state_dict())


def test_another_seed_or_buffer_is_refused(processor: YiVLProcessor, tmp_path: Path, write_shard: Writer) -> None:
    write_shard(tmp_path / "0.tar", [chat_sample(i) for i in range(20)])
    stream = loader(processor, data_config(f"{tmp_path}/*.tar", shuffle_buffer=7))
    next(iter(stream))
    with pytest.raises(ValueError, match="shuffle_buffer 7, this run has 8, which changes the order"):
        loader(processor, data_config(f"{tmp_path}/*.tar", shuffle_buffer=8), stream.state_dict())
    with pytest.raises(ValueError, match="seed 1, this run has 0, which changes the order"):
        loader(processor, data_config(f"{tmp_path}/*.tar", shuffle_buffer=7), _with_seed(stream.state_dict(), 1))


def _with_seed(state: dict[str, Any], seed: int) -> dict[str, Any]:
    return state | {"layout": state["layout"] | {"seed": seed}}


def test_other_ranks_and_workers_go_on(processor: YiVLProcessor, tmp_path: Path, write_shard: Writer) -> None:
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", [caption_sample(12 * number + i) for i in range(12)])
    data = data_config(f"{tmp_path}/*.tar", "caption", workers=2, shuffle_buffer=5)
    first = [loader(processor, data, rank=rank, world_size=2) for rank in range(2)]
    seen = [name for stream in first for _, batch in zip(range(2), stream) for name in batch.names]
    states = torch_save_and_load([stream.state_dict() for stream in first])
    resumed = loader(processor, data_config(f"{tmp_path}/*.tar", "caption", shuffle_buffer=5), *states)
    assert (
        resumed.note is not None
        and "2 ranks x 2 workers, this run has 1 x 1" in resumed.note
        and "at most 4 samples" in resumed.note
    )
    seen += [name for _, batch in zip(range(5), resumed) for name in batch.names]  # 24 + 30, and 4 of 48 come again
    assert len(seen) == 54 and len(set(seen[:52])) == 48
    assert resumed.counts()["seen"] == 54


@pytest.mark.parametrize(("workers", "num_done"), [(0, 3), (2, 1), (2, 4), (1, 5)])
def test_sizes_and_weights_are_of_the_step(
    processor: YiVLProcessor, tmp_path: Path, write_shard: Writer, workers: int, num_done: int
) -> None:
    """Also of steps that workers make ahead, after a stop, and on other ranks and workers."""
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", [(f"{name}{i}", caption_sample(i)[1]) for i in range(60)])
    sources = [SourceConfig(name=name, shards=f"{tmp_path}/{name}.tar") for name in "ab"]
    sources[0].weight, sources[1].weight = [1.0, 0.0], [0.0, 1.0]
    data = DataConfig(format="caption", sources=sources, workers=workers, shuffle_buffer=7)
    expected = [6, 6, 4, 4, 4, 10, 10, 2]
    sizes = BatchSizes(6, ((2, 4), (5, 10), (7, 2)))

    def steps(stream: StepLoader, first: int) -> list[list[str]]:
        return [batch.names for _, batch in zip(range(8 - first), stream)]

    def resumed(data: DataConfig, first: int, *states: Any, **layout: Any) -> StepLoader:
        return loader(processor, data, *states, first_step=first, num_steps=8, samples_per_step=sizes, **layout)

    whole = steps(resumed(data, 0), 0)
    assert [len(names) for names in whole] == expected
    assert all(" a" in name for name in whole[0]) and all(" b" in name for name in whole[-1])
    assert sum(" b" in name for name in whole[5]) in (6, 7, 8), "five sevenths of ten"
    first = resumed(data, 0)
    assert [batch.names for _, batch in zip(range(num_done), first)] == whole[:num_done]
    state = torch_save_and_load(first.state_dict())
    assert steps(resumed(data, num_done, state), num_done) == whole[num_done:]
    elsewhere = [
        steps(resumed(replace(data, workers=1), num_done, state, rank=rank, world_size=2), num_done)
        for rank in range(2)
    ]  # each given the sizes of one rank
    for names in elsewhere:
        assert [len(step) for step in names] == expected[num_done:]
        assert all(" b" in name for name in names[-1])


def torch_save_and_load(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_ranks_and_workers_share_an_epoch(processor: YiVLProcessor, tmp_path: Path, write_shard: Writer) -> None:
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", [chat_sample(12 * number + i) for i in range(12)])
    data = data_config(f"{tmp_path}/*.tar", workers=2)
    seen: list[str] = []
    for rank in range(2):
        stream = loader(processor, data, rank=rank, world_size=2)
        seen += [name for _, batch in zip(range(4), stream) for name in batch.names]
    assert len(seen) == len(set(seen)) == 48
