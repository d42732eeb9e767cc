"""`python -m train.nano tiles`: its pages, and a comparison that resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image

from train.config_file import load_config
from train.data.shard_reader import read_shard
from train.nano.data.art import Art
from train.nano.data.compose import Composer
from train.nano.data.sample import Item, Sample, Truth
from train.nano.measure.evaluate import read_questions
from train.nano.tiles import compare, pages
from train.run_series import Ended


@pytest.fixture(scope="module")
def composer() -> Composer:
    fonts = sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf"))
    return Composer(Art({}, {}, {"train": fonts[:2], "test": fonts[2:3]}))


def test_pages_are_reproducible_and_ask_about_what_is_there(composer: Composer, tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        pages.build_pages(composer, folder, 6, 2)
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.*"))}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 1 + 1 + 4
    questions = read_questions(tmp_path / "one/heldout")
    assert [(question.skill, question.lang) for question in questions[:4]] == [
        ("one word", "en"), ("one word", "zh"), ("four words", "en"), ("four words", "zh"),
    ]  # fmt: skip
    for question in questions:
        assert Image.open(question.images[0]).size == (pages.PAGE_PX, pages.PAGE_PX)
        assert re.search(r"[A-Z]{2,8}", question.accepted[0])
    raw = list(read_shard(str(tmp_path / "one/pages/00000.tar")))
    turns = [json.loads(sample["json"])["conversations"] for sample in raw]
    assert all(turn[0]["value"].startswith("<image>\n") for turn in turns) and {len(turn) for turn in turns} & {8}


def test_the_corner_that_is_asked_about_has_the_word(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int, int]] = []

    def compose(rng: np.random.Generator, category: str, size_px: int, split: str) -> Any:
        drawn.append((200, len(drawn), 7))
        letters = tuple(Item("letter", letter, (0, 0, 1, 1)) for letter in f"w{'abcd'[len(drawn) - 1]}")
        return Sample((Image.new("RGB", (size_px, size_px), drawn[-1]),), Truth("word", letters), (None,) * 2)

    monkeypatch.setattr(composer, "compose", compose)
    image, truths = pages.page(np.random.default_rng(0), composer, 4, "test")
    half = pages.PAGE_PX // 2
    for index, corner in enumerate(("top left", "top right", "bottom left", "bottom right")):
        quarter = image.crop((index % 2 * half, index // 2 * half, (index % 2 + 1) * half, (index // 2 + 1) * half))
        colours = {colour for _, colour in quarter.getcolors(1 << 20)} & set(drawn)
        assert colours == {drawn[index]}
        question, answer = pages._ask(np.random.default_rng(index), truths, index, "en")
        assert corner in question["value"] and f'"W{"ABCD"[index]}"' in answer["value"]


def test_the_comparison_is_resumed_where_it_stopped(
    composer: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    scores = {"one word": {"en": 0.5, "both": 0.5, "count": 4}, "all": {"en": 0.5, "both": 0.5, "count": 4}}

    def result(arm: compare.Arm, out: Path, steps: int, seed: int) -> Any:
        trained.append(f"{arm.title} {seed}")
        return {"scores": scores, "samples_per_second": 2.5 + seed if arm.is_trained else None, "image_tokens": 64}

    monkeypatch.setattr(compare, "_result", result)
    monkeypatch.setattr(compare, "build_pages", lambda *_: None)
    monkeypatch.setattr(compare, "load_art", lambda _: composer.art)
    table = compare.compare(tmp_path, tmp_path, 4, 10, 2)
    assert len(trained) == 2 + 4 and "| one word (4 questions) | 50% | 50% | 50% | 50% |" in table
    assert "| samples/s in training | – | – | 3 ± 0.7 | 3 ± 0.7 |" in table
    assert (tmp_path / "table.md").read_text() == table
    assert list(json.loads((tmp_path / "results.json").read_text())["arms"]) == [arm.title for arm in compare.arms(4)]


def test_a_result_that_is_there_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "load", lambda *_, **__: pytest.fail("loaded"))
    arm, folder = compare.arms(4)[0], tmp_path / "runs/nano-tiles-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"scores": {}}))
    assert compare._result(arm, tmp_path, 10, 0) == {"scores": {}}


def test_a_comparisons_run_that_fails_or_diverges_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(ValueError, match=r"run tiles-4-steps-10-seed-0: data\.sources.*no such shard.*\(log: "):
        compare._result(compare.arms(4)[3], tmp_path, 10, 0)
    monkeypatch.setattr(compare, "train_in_series", lambda *_: Ended(1.0, has_diverged=True))
    with pytest.raises(ValueError, match="tiles-4-steps-10-seed-0 diverged; lower lr"):
        compare._result(compare.arms(4)[3], tmp_path, 10, 0)


def test_the_config_of_the_comparison_is_read() -> None:
    config = load_config(Path(__file__).parents[1] / compare.CONFIG)
    assert config.image.tiles == 4 and config.init_from.checkpoint == "yi_vl/nano"


def test_a_single_word_lies_within_a_tile(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    red = (255, 0, 0)

    def compose(rng: np.random.Generator, category: str, size_px: int, split: str) -> Sample:
        return Sample((Image.new("RGB", (size_px, size_px), red),), Truth("word", ()), ())

    monkeypatch.setattr(composer, "compose", compose)
    quarters = set()
    for seed in range(40):
        image, truths = pages.page(np.random.default_rng(seed), composer, 1, "test")
        rows, columns = np.nonzero((np.asarray(image) == red).all(-1))
        tiles = {
            (int(y), int(x))
            for y in np.unique(rows * 2 // pages.PAGE_PX)
            for x in np.unique(columns * 2 // pages.PAGE_PX)
        }
        assert len(tiles) == len(truths) == 1
        quarters |= tiles
    assert len(quarters) == 4
