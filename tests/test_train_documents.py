"""Texts longer than max_tokens: no token is lost, and a run resumes in the middle of a document."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import caption_sample
from toy_runs import losses, stop_after, trainer

from train.config import DataConfig, SourceConfig, TrainConfig
from train.data.batch import Sample
from train.data.encoder import SampleEncoder
from train.data.loader import StepLoader
from train.data.shard_reader import read_shard
from train.preview import preview
from train.trainer import train
from yi_vl.image import YiVLImageProcessor
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

Configure = Callable[..., TrainConfig]
Writer = Callable[..., Path]
MAX_TOKENS = 50


@pytest.fixture(scope="module")
def processor(toy_language_model: Path) -> YiVLProcessor:
    return YiVLProcessor(YiVLImageProcessor(28), prepare_tokenizer(str(toy_language_model)), patch_size=14)


def text_of(number: int, num_words: int) -> str:
    return " ".join(f"{number}.{index} 红" for index in range(num_words))


LENGTHS = (3, 40, 1, 120, 7, 16, 5, 90, 2, 30)  # words; a word takes several tokens


@pytest.fixture
def texts(tmp_path: Path, write_shard: Writer) -> SourceConfig:
    """Documents of a few to a thousand tokens in two shards."""
    for shard in range(2):
        samples = [
            (f"d{10 * shard + number}", {"txt": text_of(10 * shard + number, length).encode()})
            for number, length in enumerate(LENGTHS)
        ]
        write_shard(tmp_path / f"texts/{shard}.tar", samples)
    return SourceConfig(name="texts", shards=f"{tmp_path}/texts/*.tar", format="text")


def data_of(source: SourceConfig, long_text: str, *others: SourceConfig, **settings: Any) -> DataConfig:
    return DataConfig("chat", [source, *others], long_text, **{"workers": 0, "shuffle_buffer": 4} | settings)


def documents(processor: YiVLProcessor, source: SourceConfig) -> dict[str, list[int]]:
    """The token ids of every document, by its key."""
    encoder = SampleEncoder(processor, data_of(source, "skip"), 100_000)
    names = [f"{Path(source.shards).parent}/{shard}.tar" for shard in range(2)]
    raws = [raw for name in names for raw in read_shard(name)]
    return {raw["__key__"]: encoder.encode(raw, 0).encoded.input_ids for raw in raws}


def rows_of(
    processor: YiVLProcessor, data: DataConfig, num_steps: int, state: Any = None, **layout: int
) -> tuple[list[list[int]], list[str], StepLoader]:
    """The rows of some steps of 3 samples each, in the order that they were made, and their names."""
    defaults = {"rank": 0, "world_size": 1, "samples_per_step": 3, "micro_batch": 1} | layout
    loader = StepLoader(processor, data, MAX_TOKENS, 0, **defaults, states=state)
    rows, names = [], []
    for _, batch in zip(range(num_steps), loader):
        names += batch.names
        for micro in batch.micro_batches:
            rows.append(micro.input_ids[0].tolist())
            assert (micro.labels == micro.input_ids).all(), "everything is supervised"
    return rows, names, loader


def epoch_rows(processor: YiVLProcessor, data: DataConfig) -> list[Sample]:
    """The rows of all documents of source 0, in the order of the shards."""
    encoder = SampleEncoder(processor, data, MAX_TOKENS)
    waiting = encoder.new_documents()
    rows: list[Sample] = []
    for shard in range(2):
        for raw in read_shard(data.sources[0].shards.replace("*", str(shard))):
            assert encoder.outcome(raw, 0, waiting) is None
            while waiting.is_ready(0):
                rows.append(encoder.next_row(0, waiting))
    return rows


def test_the_pieces_of_a_document_are_the_document(processor: YiVLProcessor, texts: SourceConfig) -> None:
    whole = documents(processor, texts)
    pieces: dict[str, list[list[int]]] = {}
    for row in epoch_rows(processor, data_of(texts, "split")):
        key = row.name.split(".tar ")[1].split(" ")[0]
        pieces.setdefault(key, []).append(row.encoded.input_ids)
    assert {key: [token for part in parts for token in part] for key, parts in pieces.items()} == whole
    assert max(len(parts) for parts in pieces.values()) > 10 and min(map(len, pieces.values())) == 1
    for key, parts in pieces.items():
        lengths = list(map(len, parts))
        assert max(lengths) <= MAX_TOKENS and max(lengths) - min(lengths) <= 1
        assert len(parts) == -(-len(whole[key]) // MAX_TOKENS), "no more pieces than needed"


def test_packed_rows_are_all_documents_with_a_separator(processor: YiVLProcessor, texts: SourceConfig) -> None:
    rows = epoch_rows(processor, data_of(texts, "pack"))
    assert {len(row.encoded.input_ids) for row in rows} == {MAX_TOKENS}
    assert all(all(row.encoded.loss_mask) for row in rows)
    end = processor.tokenizer.eos_token_id
    stream = [token for ids in documents(processor, texts).values() for token in [*ids, end]]
    packed = [token for row in rows for token in row.encoded.input_ids]
    assert packed == stream[: len(packed)] and len(stream) - len(packed) < MAX_TOKENS
    assert any(" documents)" in row.name and " to " in row.name for row in rows)


def test_long_texts_are_skipped_and_counted_unless_asked(processor: YiVLProcessor, texts: SourceConfig) -> None:
    short = [key for key, ids in documents(processor, texts).items() if len(ids) <= MAX_TOKENS]
    data = data_of(texts, "skip", max_broken_fraction=1)
    _, names, loader = rows_of(processor, data, 4)
    assert {name.split()[-1] for name in names} <= set(short) and loader.counts()["too_long"] > 0
    for long_text in ("split", "pack"):
        _, _, loader = rows_of(processor, data_of(texts, long_text), 20)
        assert loader.counts()["too_long"] == loader.counts()["broken"] == 0


@pytest.mark.parametrize("long_text", ["split", "pack"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_done", [1, 4, 9])
def test_a_loader_resumes_inside_a_document(
    processor: YiVLProcessor, tmp_path: Path, write_shard: Writer, texts: SourceConfig, long_text: str,
    workers: int, num_done: int,
) -> None:  # fmt: skip
    write_shard(tmp_path / "short.tar", [(f"s{number}", {"txt": b"a short text"}) for number in range(20)])
    short = SourceConfig(name="short", shards=f"{tmp_path}/short.tar", format="text")
    data = data_of(texts, long_text, short, workers=workers)
    whole, names, _ = rows_of(processor, data, num_done + 6)
    first, first_names, loader = rows_of(processor, data, num_done)
    assert first == whole[: 3 * num_done]
    file = io.BytesIO()
    torch.save(loader.state_dict(), file)
    file.seek(0)
    second, second_names, _ = rows_of(processor, data, 6, [torch.load(file, weights_only=True)])
    assert first + second == whole and first_names + second_names == names


@pytest.mark.parametrize("long_text", ["split", "pack"])
def test_a_weight_is_a_share_of_the_rows(
    processor: YiVLProcessor, tmp_path: Path, write_shard: Writer, texts: SourceConfig, long_text: str
) -> None:
    write_shard(tmp_path / "captions.tar", [caption_sample(number) for number in range(20)])
    captions = SourceConfig(name="captions", shards=f"{tmp_path}/captions.tar", weight=2.0, format="caption")
    loader = StepLoader(processor, data_of(texts, long_text, captions), MAX_TOKENS, 0, 0, 1, 6, 1)
    for _, batch in zip(range(10), loader):
        assert sum("captions.tar" in name for name in batch.names) in (3, 4, 5)


@pytest.mark.parametrize("long_text", ["split", "pack"])
def test_other_ranks_and_workers_lose_no_token(processor: YiVLProcessor, texts: SourceConfig, long_text: str) -> None:
    """Once all documents of the epoch are read, each token is in a row or waits to be in one."""
    data = data_of(texts, long_text, shuffle_buffer=1)
    first = [rows_of(processor, data, 2, rank=rank, world_size=2) for rank in range(2)]
    states = [loader.state_dict() for _, _, loader in first]
    tokens = Counter(token for rows, _, _ in first for row in rows for token in row)
    resumed = StepLoader(processor, data, MAX_TOKENS, 0, 0, 1, 1, 1, states=states)
    assert resumed.note is not None and sum(waiting(states)) > 0
    assert sum(waiting([resumed.state_dict()])) == sum(waiting(states))
    for batch in resumed:
        tokens += Counter(batch.micro_batches[0].input_ids[0].tolist())
        if resumed.counts()["seen"] >= 20:
            break
    end = [processor.tokenizer.eos_token_id] if long_text == "pack" else []
    expected = Counter(token for ids in documents(processor, texts).values() for token in [*ids, *end])
    assert not expected - (tokens + Counter(waiting([resumed.state_dict()])))


def waiting(states: list[dict[str, Any]]) -> list[int]:
    """The tokens of documents that are not used up, over all streams of some ranks."""
    chunks = [chunk for state in states for stream in state["streams"].values() for chunk in stream["documents"][0]]
    return [token for _, content in chunks for token in np.frombuffer(content, dtype=np.int32).tolist()]


def test_a_run_over_documents_is_stopped_and_goes_on(configure: Configure, texts: SourceConfig, tmp_path: Path) -> None:
    settings = [
        f"data.sources=[{{name: texts, shards: '{texts.shards}', format: text}}, "
        f"{{name: chats, shards: '{tmp_path}/chats/*.tar'}}]",
        "data.long_text=split", "max_tokens=200", "checkpoint={every_steps: 2, keep_last: 1}", "global_batch=4",
    ]  # fmt: skip
    whole, stopped = configure(f"run_dir={tmp_path}/whole", *settings), configure(*settings)
    train(whole)
    stop_after(trainer(stopped), 5)
    with pytest.raises(ValueError, match=r"data\.long_text split, this run has pack, which changes the order"):
        train(configure(*settings, "data.long_text=pack"))
    train(stopped)
    assert losses(stopped) == losses(whole)


def test_the_preview_shows_rows(configure: Configure, texts: SourceConfig) -> None:
    sources = f"data.sources=[{{name: texts, shards: '{texts.shards}', format: text}}]"
    settings = (sources, "max_tokens=50", "data.shuffle_buffer=1")
    config = configure(*settings, "data.long_text=pack")
    # the toy model's processor is that of its language model, as for a run that starts from parts
    config.init_from.tower.name = "ViT-B-16"  # type: ignore[union-attr]
    page = preview(config, 6)
    assert page.count("<article>") == 6 and "50 tokens, 50 supervised" in page and "skipped:" not in page


def test_validation_measures_rows(configure: Configure, texts: SourceConfig) -> None:
    validation = f"validation={{sources: [{{name: held, shards: '{texts.shards}', format: text}}], samples: 7}}"
    run = trainer(configure(validation, "max_tokens=50", "data.long_text=pack", "data.format=chat"))
    assert run.validation is not None and not run.validation.reports
    assert [batch.input_ids.shape[1] for batch in run.validation._batches] == [50] * 7


def test_what_is_no_document_is_counted(processor: YiVLProcessor, tmp_path: Path, write_shard: Writer) -> None:
    samples: list[tuple[str, dict[str, bytes]]] = [(f"d{number}", {"txt": b"some text"}) for number in range(30)]
    samples[3] = ("empty", {"txt": b" "})
    samples[4] = ("huge", {"txt": b"x" * 4_000_001})
    write_shard(tmp_path / "a.tar", samples)
    source = SourceConfig(name="texts", shards=f"{tmp_path}/a.tar", format="text")
    _, _, loader = rows_of(processor, data_of(source, "pack", shuffle_buffer=1, max_broken_fraction=1), 2)
    assert loader.counts()["broken"] == 1 and loader.counts()["too_long"] == 1


def test_settings_that_cannot_be_are_refused(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"data\.long_text is 'cut'; expected one of skip, split, pack"):
        configure("data.long_text=cut")
    with pytest.raises(ValueError, match=r"max_tokens is 3; data\.long_text: pack needs 4 or more"):
        configure("data.long_text=pack", "max_tokens=3")
