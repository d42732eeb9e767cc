"""`train.shards filter`: which samples are kept, that their bytes are the same, and that it resumes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import caption_sample, chat_sample
from tiny import tiny_model, tiny_processor

from train.data.shard_reader import read_shard
from train.shards import filter as shard_filter
from train.shards.__main__ import app
from train.shards.files import Manifest
from yi_vl import program
from yi_vl.files import read_json_lines

Run = Callable[..., tuple[int, str, str]]
Writer = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> Run:
    """Runs `python -m train.shards filter` on tmp_path/in in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object, out: str = "out") -> tuple[int, str, str]:
        command = ["train.shards", "filter", tmp_path / "in", tmp_path / out, "--model", model, *arguments]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in command])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            program.run(app, "error")
        out_text, err = capfd.readouterr()
        return int(caught.value.code or 0), out_text, err

    return call


@pytest.fixture
def shards(tmp_path: Path, write_shard: Writer) -> list[dict[str, Any]]:
    """Two shards of conversations, one of them broken and one too long; returns their samples."""
    samples = [chat_sample(number) for number in range(24)]
    key, members = samples[5]
    samples[5] = (key, members | {"json": b"{"})
    key, members = samples[6]
    samples[6] = (key, {"json": members["json"].replace(b"Hello!", b"Hello! " * 2000)})
    write_shard(tmp_path / "in/a.tar", samples[:14])
    write_shard(tmp_path / "in/b.tar", samples[14:])
    return [raw for name in ("a", "b") for raw in read_shard(str(tmp_path / f"in/{name}.tar"))]


def scores(folder: Path) -> list[dict[str, Any]]:
    return read_json_lines(folder / "scores.jsonl")


def members(raw: dict[str, Any]) -> dict[str, bytes]:
    return {name: content for name, content in raw.items() if not name.startswith("__") or name == "__key__"}


ANY = ("--max-broken", 0.2)


def test_it_keeps_what_is_in_the_range(run: Run, shards: list[dict[str, Any]], tmp_path: Path) -> None:
    code, output, heard = run("--max-loss", 1e9, *ANY, out="all")
    assert code == 0, heard
    rows = scores(tmp_path / "all")
    assert [row["name"].split()[-1] for row in rows] == [raw["__key__"] for raw in shards]
    assert [index for index, row in enumerate(rows) if not row["kept"]] == [5, 6]
    assert rows[5]["skipped"] == "broken" and "JSON" in rows[5]["reason"] and rows[5]["loss"] is None
    assert rows[6]["skipped"] == "too long" and "max_tokens is 1024" in rows[6]["reason"]
    assert "kept 22 of 24 samples (91.7%) in 2 shards; 1 broken; 1 too long" in output
    losses = sorted(row["loss"] for row in rows if row["loss"] is not None)

    low, high = losses[5], losses[15]
    code, output, _ = run("--max-loss", repr(high), "--min-loss", repr(low), *ANY)
    above, below = sum(loss > high for loss in losses), sum(loss < low for loss in losses)
    num_kept = 22 - above - below
    assert above >= 4 and below >= 3 and num_kept >= 11
    assert code == 0 and f"kept {num_kept} of 24" in output
    assert f"{above} above --max-loss; {below} below --min-loss; 1 broken" in output
    rows = scores(tmp_path / "out")
    assert [row["kept"] for row in rows] == [row["loss"] is not None and low <= row["loss"] <= high for row in rows]
    kept = [raw for name in ("00000", "00001") for raw in read_shard(str(tmp_path / f"out/{name}.tar"))]
    expected = [raw for raw, row in zip(shards, rows, strict=True) if row["kept"]]
    assert [members(raw) for raw in kept] == [members(raw) for raw in expected], "byte for byte"
    assert (tmp_path / "out/losses.png").stat().st_size > 1000
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None and sum(shard.samples for shard in manifest.shards.values()) == num_kept


def test_a_score_is_the_models_own_loss(run: Run, shards: list[dict[str, Any]], tmp_path: Path, model: Path) -> None:
    assert run("--max-loss", 100, *ANY)[0] == 0
    scorer = shard_filter.Scorer(str(model), "chat")
    reference = tiny_model(max_position_embeddings=1024)
    for raw, row in list(zip(shards, scores(tmp_path / "out")))[:5]:
        sample = scorer._encoder.encode(raw, 0)
        ids = torch.tensor([sample.encoded.input_ids])
        labels = torch.where(torch.tensor([sample.encoded.loss_mask]), ids, -100)
        images = [tiny_processor().image_processor.to_uint8(raw[name]) for name in sorted(raw) if name.endswith("png")]
        pixels = tiny_processor().image_processor.to_pixel_values(torch.stack(images)) if images else None
        loss = reference(input_ids=ids, labels=labels, pixel_values=pixels).loss
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_an_interrupted_command_goes_on(
    run: Run, shards: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--max-loss", 6.9, *ANY, out="whole")[0] == 0
    real, num_scored = shard_filter.Scorer.loss, 0

    def interrupted(self: Any, raw: Any) -> float:
        nonlocal num_scored
        num_scored += 1
        if num_scored == 18:
            raise KeyboardInterrupt
        return real(self, raw)

    with monkeypatch.context() as patch:
        patch.setattr(shard_filter.Scorer, "loss", interrupted)
        assert run("--max-loss", 6.9, *ANY)[0] == 130
    out = tmp_path / "out"
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["00000.tar"] and len(scores(out)) == 14
    with (out / "scores.jsonl").open("a") as file:  # of a command that was killed between scores and manifest
        file.write(json.dumps(scores(out)[0] | {"shard": "00001.tar"}) + '\n{"name": "cut o')
    num_scored = 100
    with monkeypatch.context() as patch:
        patch.setattr(shard_filter.Scorer, "loss", interrupted)
        code, output, heard = run("--max-loss", 6.9, *ANY)
    assert code == 0 and num_scored == 110 and "1 of 2 shards are complete and kept" in heard
    for name in ("00000.tar", "00001.tar", "scores.jsonl", "manifest.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "of 24 samples" in output
    code, _, heard = run("--max-loss", 5, *ANY)
    assert code == 2 and "holds shards made from" in heard and "6.9" in heard
    with monkeypatch.context() as patch:
        patch.setattr(shard_filter.Scorer, "loss", None)
        assert run("--max-loss", 6.9, *ANY)[0] == 0, "what is complete is not scored again"


def test_a_shard_of_which_nothing_is_kept_is_empty(run: Run, shards: list[dict[str, Any]], tmp_path: Path) -> None:
    code, output, _ = run("--max-loss", 0, *ANY)
    assert code == 0 and "kept 0 of 24 samples (0.0%)" in output
    assert list(read_shard(str(tmp_path / "out/00000.tar"))) == []


def test_other_formats_and_one_file(
    run: Run, tmp_path: Path, write_shard: Writer, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    long_key = "folder/" + "k" * 200
    write_shard(tmp_path / "in/a.tar", [caption_sample(1), (long_key, caption_sample(2)[1])])
    code, output, heard = run("--format", "caption", "--max-loss", 100)
    assert code == 0 and "kept 2 of 2" in output, heard
    assert [raw["__key__"] for raw in read_shard(str(tmp_path / "out/00000.tar"))] == ["c00001", long_key]
    command = ["filter", f"{tmp_path}/in/{{a,}}*.tar", tmp_path / "glob", "--model", model, "--format", "caption"]
    monkeypatch.setattr(sys, "argv", ["train.shards", *map(str, command), "--max-loss", "100"])
    with pytest.raises(SystemExit) as caught:
        program.run(app, "error")
    assert not caught.value.code


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "say which samples to keep"),
        (("--max-loss", "nan"), "--max-loss is nan"),
        (("--max-loss", 1, "--min-loss", 2), "--min-loss 2 is above --max-loss 1"),
        (("--max-loss", 1, "--format", "poem"), "--format is 'poem'"),
        (("--max-loss", 1, "--model", "{tmp}/none"), "there is no such folder"),
        (("--max-loss", 1, "--max-tokens", 5000), "the model has 1024 positions"),
        (("--max-loss", 1), r"\d of 1\d\d samples cannot be used, more than --max-broken 0.01"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, shards: list[dict[str, Any]], tmp_path: Path, arguments: tuple[Any, ...], reason: str
) -> None:
    if arguments == ("--max-loss", 1):  # more broken ones than usual
        for name in "cdefgh":
            (tmp_path / f"in/{name}.tar").write_bytes((tmp_path / "in/a.tar").read_bytes())
    code, _, heard = run(*(str(argument).replace("{tmp}", str(tmp_path)) for argument in arguments))
    error = heard.splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and re.search(reason, error), heard
    assert "Traceback" not in heard


def test_a_folder_without_shards(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    code, _, heard = run("--max-loss", 1)
    assert code == 2 and "holds no .tar files" in heard


def test_a_loss_that_is_not_finite_is_broken(
    run: Run, shards: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shard_filter.Objective.forward

    def spoiled(self: Any, *arguments: Any) -> Any:
        loss, per_source = real(self, *arguments)
        return loss * math.nan, per_source

    monkeypatch.setattr(shard_filter.Objective, "forward", spoiled)
    code, _, _ = run("--max-loss", 1, "--max-broken", 1)
    assert code == 0 and "NaN or infinite" in scores(tmp_path / "out")[0]["reason"]
