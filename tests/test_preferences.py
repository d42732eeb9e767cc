"""Preferences: each common spelling is one pair, what cannot be used is named, and shards of them are made, checked,
previewed and given reference log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import RunApp, png
from preference_runs import configure_preferences, pair_sample, supervised
from toy_runs import losses, step_once, stop_after, trainer

from train.config import TrainConfig
from train.data.preferences import read_preference
from train.data.reference import WrongReferenceError
from train.data.samples import read_sample, read_versions
from train.data.shard_reader import read_shard
from train.preview import preview
from train.shards import reference as shards_reference
from train.shards.__main__ import app
from train.trainer import train
from yi_vl.chat import SYSTEM_PROMPT, to_text

Run = Callable[..., tuple[int, str, str]]
Configure = Callable[..., TrainConfig]
QUESTION, GOOD, BAD = "What is it?", "A red image.", "A cat."
PROMPT = f"{SYSTEM_PROMPT}\n\n### Human: <image_placeholder>\n{QUESTION}\n### Assistant:"


def user(text: str = f"<image>\n{QUESTION}") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


PARTS = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]}
SPELLINGS: dict[str, Any] = {
    "llama-factory": {
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}], "images": ["a.png"],
        "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
    "trl": {"prompt": [user()], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)], "images": ["a.png"]},
    "trl without a place for the image": {
        "prompt": [user(QUESTION)], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)], "images": ["a.png"]},
    "trl in parts": {
        "prompt": [PARTS], "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}], "images": ["a.png"]},
    "trl without a prompt": {
        "chosen": [user(), assistant(GOOD)], "rejected": [user(), assistant(BAD)], "images": ["a.png"]},
    "ultrafeedback": {
        "prompt": f"<image>\n{QUESTION}", "prompt_id": "7", "chosen": [user(), assistant(GOOD)], "score_chosen": 9.0,
        "rejected": [user(), assistant(BAD)], "score_rejected": 3.0, "image": "a.png"},
    "rlaif-v": {
        "ds_name": "RLAIF-V", "image": "a.png", "question": QUESTION, "chosen": GOOD, "rejected": BAD,
        "origin_dataset": "x", "origin_split": "{}", "idx": 1},
    "mmpr": {"id": 3, "image": "a.png", "question": f"<image>\n{QUESTION}", "chosen": GOOD, "rejected": BAD},
    "alpaca": {"instruction": QUESTION, "input": "", "chosen": GOOD, "rejected": BAD, "images": ["a.png"]},
    "ms-swift": {"messages": [user(), assistant(GOOD)], "rejected_response": BAD, "images": ["a.png"]},
    "povid": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": GOOD}],
        "rejected_conversations": [
            {"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": BAD}]},
}  # fmt: skip


@pytest.fixture
def run(run_app: RunApp, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `python -m train.shards` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    return partial(run_app, "train.shards", app)


def raw(record: Any, **members: bytes) -> dict[str, Any]:
    return {"__url__": "x.tar", "__key__": "k", "json": json.dumps(record).encode()} | members


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_are_one_pair(run: Run, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "x.json").write_text(json.dumps([SPELLINGS[spelling]]))
    code, _, err = run("llava", tmp_path / "x.json", tmp_path, tmp_path / "out", "--preference", "--max-broken", 0)
    assert code == 0, err
    (made,) = read_shard(str(tmp_path / "out/00000.tar"))
    for sample in (made, raw(SPELLINGS[spelling], png=png("red"))):  # and the same record in somebody else's shard
        versions, images = read_versions(sample, "preference")
        assert [to_text(segments) for segments in versions] == [f"{PROMPT} {GOOD}\n###", f"{PROMPT} {BAD}\n###"]
        assert [supervised(segments) for segments in versions] == [f" {GOOD}\n###", f" {BAD}\n###"]
        assert images == [png("red")] and read_sample(sample, "preference")[0] == versions[0]


def test_only_the_last_of_several_answers_is_supervised() -> None:
    record = {"prompt": [user(), assistant("One."), user("And this?")], "chosen": GOOD, "rejected": BAD}
    versions, _ = read_versions(raw(record, png=png("red")), "preference")
    assert [supervised(segments) for segments in versions] == [f" {GOOD}\n###", f" {BAD}\n###"]
    assert "### Assistant: One.\n###" in to_text(versions[1])


def test_several_images_without_a_place_come_first() -> None:
    record = {"question": QUESTION, "chosen": GOOD, "rejected": BAD}
    versions, images = read_versions(raw(record) | {"0.png": b"x", "1.png": b"y"}, "preference")
    assert to_text(versions[0]).count("<image_placeholder>") == 2 == len(images)
    assert read_preference(record).num_slots == 0, "without an image it is a text"


PAIR = {"prompt": f"<image>\n{QUESTION}", "chosen": GOOD, "rejected": BAD}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "it is a list; expected an object with a prompt"),
        ({"prompt": QUESTION, "chosen": GOOD}, "it has no `rejected` answer, only prompt, chosen"),
        ({"prompt": QUESTION, "rejected": BAD}, "it has no `chosen` answer, only prompt, rejected"),
        ({"messages": [user()], "rejected": BAD}, "it has no `chosen` answer"),
        ({"messages": [user(), assistant(GOOD), user()], "rejected": BAD}, "chosen version ends with .* user"),
        (PAIR | {"rejected": ""}, "it has no `rejected` answer"),
        (PAIR | {"rejected": " \n"}, "the answer in message 2 is empty"),
        (PAIR | {"chosen": [assistant("")]}, "the answer in message 2 is empty"),
        (PAIR | {"rejected": f" {GOOD}\n"}, "chosen and rejected answers are the same"),
        (PAIR | {"rejected": 3}, "its `rejected` is int; expected a text or messages"),
        (PAIR | {"prompt": 3}, "its `prompt` is int"),
        (PAIR | {"rejected": [user("x")]}, "Message 2|rejected version ends with a message of the user"),
        (PAIR | {"question": QUESTION}, "it has both `prompt` and `question`"),
        (PAIR | {"messages": [user()]}, "it has both `prompt` and `messages`"),
        ({"chosen": GOOD, "rejected": BAD}, "it has no prompt"),
        ({"chosen": [user("a"), assistant(GOOD)], "rejected": [user("b"), assistant(BAD)]}, "more than once"),
        (PAIR | {"chosen": [user("b"), assistant(GOOD)]}, "prompt is there more than once"),
        (PAIR | {"rejected": "A <image>."}, "rejected answer holds an <image>"),
        (PAIR | {"tools": "x"}, "its `tools` is not read"),
        (PAIR | {"images": ["a.png", "b.png"]}, "1 <image> in the text but 2 images are named"),
        (PAIR | {"prompt": [user("<image><image>")]}, "2 <image> in the text but 1 images beside it"),
        ({"instruction": "x", "input": "y", "chosen": GOOD, "rejected": BAD}, "its `input` is not read"),
        (PAIR | {"chosen": "\ud800"}, "surrogates not allowed"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_versions(raw(record, png=png("red")), "preference")


def test_a_pair_is_no_conversation_and_a_conversation_no_pair() -> None:
    with pytest.raises(ValueError, match="`chosen` is not read"):
        read_sample(raw({"messages": [user()], "chosen": GOOD, "rejected": BAD}, png=b"x"), "chat")
    with pytest.raises(ValueError, match="no `rejected` answer"):
        read_sample(raw({"messages": [user(), assistant(GOOD)]}, png=b"x"), "preference")
    with pytest.raises(ValueError, match=r"member \.ref\.json is not read"):
        read_sample(raw({"messages": [user(), assistant(GOOD)]}, png=b"x") | {"ref.json": b"{}"}, "chat")


@pytest.mark.parametrize("is_record", [False, True], ids=["rlaif-v", "rlhf-v"])
def test_parquet_of_columns_or_of_whole_records(run: Run, tmp_path: Path, is_record: bool) -> None:
    texts = [{"question": QUESTION, "chosen": GOOD, "rejected": bad} for bad in (BAD, GOOD)]
    image = {"bytes": png("red"), "path": "a.png"}
    columns = [{"image": image, "text": json.dumps(text)} if is_record else {"image": image} | text for text in texts]
    pq.write_table(pa.Table.from_pylist(columns), tmp_path / "x.parquet")
    names = ["text"] if is_record else ["question", "chosen", "rejected"]
    options = [word for name in names for word in ("--preference", name)]
    code, output, err = run("parquet", tmp_path / "x.parquet", tmp_path / "out", *options, "--max-broken", 1)
    assert code == 0 and "1 samples in 1 shards" in output, err
    assert "row 1: its chosen and rejected answers are the same" in err
    (made,) = read_shard(str(tmp_path / "out/00000.tar"))
    assert to_text(read_versions(made, "preference")[0][1]) == f"{PROMPT} {BAD}\n###"
    code, _, err = run("parquet", tmp_path / "x.parquet", tmp_path / "two", *options, "--caption", names[0])
    assert code == 2 and "--preference NAME" in err


@pytest.fixture
def pairs(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    return configure_preferences(configure, tmp_path, write_shard)


def test_check_counts_pairs_and_names_broken_ones(run: Run, tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    key, members = pair_sample(1)
    broken = members | {"json": members["json"].replace(b'"value"', b'"valeu"')}
    write_shard(tmp_path / "a/0.tar", [pair_sample(0), (key, members), ("bad", broken)])
    code, output, err = run("check", tmp_path / "a")
    assert code == 0 and "2 in the format preference" in output and "0 (.ref.json)" in output
    assert "cannot be used" in err and "bad" in err and "`valeu` is not read" in err


def test_preview_shows_both_answers(pairs: Configure) -> None:
    page = preview(pairs(), 3)
    assert page.count("<b>chosen: </b>") == 3 == page.count("<b>rejected: </b>")
    assert page.count("<span class=supervised>") == 1 + 6, "one answer in each text"
    assert page.count("tokens, ") >= 6 and "It is" in page


def with_references(run: Run, tmp_path: Path, *options: object) -> tuple[int, str, str]:
    return run(
        "reference",
        tmp_path / "pairs",
        tmp_path / "refs",
        "--model",
        tmp_path / "start",
        "--precision",
        "fp32",
        *options,
    )


def from_shards(pairs: Configure, tmp_path: Path, *overrides: str) -> TrainConfig:
    sources = f"data.sources=[{{name: pairs, shards: '{tmp_path}/refs/*.tar'}}]"
    return pairs("dpo.reference=shards", sources, f"run_dir={tmp_path}/from_shards", *overrides)


def test_references_in_shards_are_those_of_the_copy(run: Run, pairs: Configure, tmp_path: Path) -> None:
    config = pairs("data.shuffle_buffer=1")
    assert with_references(run, tmp_path)[0] == 0
    for path in sorted((tmp_path / "pairs").glob("*.tar")):
        before, after = (
            list(read_shard(str(folder / path.name))) for folder in (tmp_path / "pairs", tmp_path / "refs")
        )
        assert len(before) == 30
        for old, new in zip(before, after, strict=True):
            assert json.loads(new.pop("ref.json")).keys() == {
                "chosen",
                "rejected",
                "model",
                "image_size",
                "fast_pixels",
            }
            assert {k: v for k, v in new.items() if k != "__url__"} == {k: v for k, v in old.items() if k != "__url__"}
    code, output, _ = run("check", tmp_path / "refs")
    assert code == 0 and "60 (.ref.json)" in output and "agrees" in output
    first, second = (trainer(each) for each in (config, from_shards(pairs, tmp_path, "data.shuffle_buffer=1")))
    batches = [iter(run_.loader) for run_ in (first, second)]
    for _ in range(3):
        from_copy, from_files = (step_once(run_, batch)[0] for run_, batch in zip((first, second), batches))
        assert from_copy[0, 1] == 8 and from_copy[0, 3] == 0
        columns = [0, 1, 3, 4, 5, 6, 7]  # not the accuracy: margins are 0 but for rounding
        torch.testing.assert_close(from_files[:, columns], from_copy[:, columns], rtol=1e-3, atol=2e-3)


def test_a_run_on_references_in_shards_resumes_exactly(run: Run, pairs: Configure, tmp_path: Path) -> None:
    assert with_references(run, tmp_path)[0] == 0
    every = "checkpoint={every_steps: 2, keep_last: 1}"
    whole = from_shards(pairs, tmp_path, every, f"run_dir={tmp_path}/whole")
    train(whole)
    stopped = from_shards(pairs, tmp_path, every)
    stop_after(trainer(stopped), 5)
    train(stopped)
    assert losses(stopped) == losses(whole) and len(losses(whole)) == 6


def test_references_of_another_model_or_none_stop_the_run(run: Run, pairs: Configure, tmp_path: Path) -> None:
    assert with_references(run, tmp_path)[0] == 0
    other = train(pairs("steps=1"))
    start = f"init_from.checkpoint={other}"
    with pytest.raises(ValueError, match=r"refs/\d.tar p\d+: .*made with model \w{16}, this run starts with \w{16}"):
        train(from_shards(pairs, tmp_path, start))
    with pytest.raises(ValueError, match="made with image_size 28, this run starts with 56"):
        train(from_shards(pairs, tmp_path, "image_size=56"))
    with pytest.raises(ValueError, match="made with fast_pixels True, this run starts with False"):
        train(from_shards(pairs, tmp_path, "data.fast_pixels=false"))
    without = f"data.sources=[{{name: pairs, shards: '{tmp_path}/pairs/*.tar'}}]"
    with pytest.raises(ValueError, match=r"pairs/\d.tar p\d+: it has no .ref.json; make it .*or set dpo.reference"):
        train(from_shards(pairs, tmp_path, without))


@pytest.mark.parametrize(
    "content", [b"{}", b'{"chosen": null, "rejected": 1}', b"[1]", b'{"chosen": NaN, "rejected": 1}']
)
def test_a_reference_that_is_none_is_refused(content: bytes) -> None:
    from train.data.reference import ReferenceModel, read_member

    with pytest.raises(WrongReferenceError, match=r"ref\.json"):
        read_member({"ref.json": content}, ReferenceModel("m", 28, True))


def test_an_interrupted_reference_command_resumes(
    run: Run, pairs: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shards_reference.write_tar
    with monkeypatch.context() as patch:
        patch.setattr(
            shards_reference, "write_tar", lambda path, samples: _fail_at("1.tar", path) or real(path, samples)
        )
        with pytest.raises(KeyboardInterrupt):
            shards_reference.add_references(tmp_path / "pairs", tmp_path / "refs", scorer(tmp_path))
    first = (tmp_path / "refs/0.tar").stat().st_mtime_ns
    assert not (tmp_path / "refs/1.tar").exists()
    assert with_references(run, tmp_path)[0] == 0
    assert (tmp_path / "refs/0.tar").stat().st_mtime_ns == first and (tmp_path / "refs/1.tar").exists()
    assert with_references(run, tmp_path, "--image-size", 56)[0] == 2, "another reference"
    pairs_folder = tmp_path / "pairs"
    code, _, err = run("reference", pairs_folder, pairs_folder, "--model", tmp_path / "start", "--precision", "fp32")
    assert code == 2 and "take another folder" in err and err.count("\n") == 1


def _fail_at(name: str, path: Path) -> None:
    if path.name == name:
        raise KeyboardInterrupt


def scorer(tmp_path: Path) -> shards_reference.Scorer:
    return shards_reference.Scorer(str(tmp_path / "start"), None, True, "fp32", 8)
