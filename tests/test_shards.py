"""Shards: what is written is what the trainer reads, what cannot be used is named, an interrupted run resumes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import COLOURS, Members, RunApp, caption_sample, chat_sample, png
from PIL import Image

from train.config import DataConfig, SourceConfig
from train.data.batch import Sample
from train.data.encoder import SampleEncoder
from train.data.stream import expand_shards, read_shard
from train.shards.__main__ import app, build
from train.shards.files import MANIFEST, Manifest
from train.shards.sources import Chunk, LlavaSource, Reader
from yi_vl.chat import from_llava, render, to_text
from yi_vl.image import YiVLImageProcessor
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

Run = Callable[..., tuple[int, str, str]]
Entry = dict[str, Any]


@pytest.fixture(scope="module")
def processor(toy_language_model: Path) -> YiVLProcessor:
    return YiVLProcessor(YiVLImageProcessor(28), prepare_tokenizer(str(toy_language_model)), patch_size=14)


@pytest.fixture
def run(run_app: RunApp, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `python -m train.shards` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")
    return partial(run_app, "train.shards", app)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images in several formats, one of them damaged; and an image outside it."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, colour in (("a.jpg", "red"), ("sub/b.png", "green"), ("c.webp", "blue"), ("d.gif", "yellow")):
        Image.new("RGB", (40, 30), COLOURS[colour]).save(folder / name)
    (folder / "mislabelled.jpg").write_bytes(png("green"))
    (folder / "cut.png").write_bytes(png("red")[:60])
    (tmp_path / "outside.png").write_bytes(png("red"))
    return folder


def entry(text: str, image: Any = None, **more: Any) -> Entry:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "An answer, 一个回答."}]
    return ({"image": image} if image is not None else {}) | {"conversations": turns} | more


ENTRIES = [
    entry("<image>\nWhat is it?", "a.jpg", id="same"),
    entry("What is it?\n<image>", "sub/b.png", id="same"),
    entry("<image><image><image>\nCompare.", ["d.gif", "a.jpg", "c.webp"], id=7),
    entry("Hello!", id="coco/000.1"),
    entry("<image>\nAnd this?", "mislabelled.jpg"),
    entry("Hello again!", image=""),
    entry("<image>\nThe last.", ["c.webp"], id="last"),
]


def write_json(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def stream(folder: Path, processor: YiVLProcessor, sample_format: str) -> list[Sample]:
    """All samples of a folder, as the trainer takes them."""
    source = SourceConfig(name="made", shards=f"{folder}/*.tar")
    encoder = SampleEncoder(
        processor, DataConfig(format=sample_format, sources=[source], fast_pixels=False), max_tokens=2000
    )
    return [encoder.encode(raw, 0) for shard in expand_shards(source) for raw in read_shard(shard)]


def broken(folder: Path) -> list[str]:
    manifest = Manifest.read(folder)
    assert manifest is not None
    return [line for shard in manifest.shards.values() for line in shard.broken]


def test_the_trainer_reads_what_llava_becomes(run: Run, processor: YiVLProcessor, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    code, output, heard = run(
        "llava", write_json(tmp_path / "x.json", ENTRIES), images, out, "--samples-per-shard", 3, "--processes", 2
    )
    assert code == 0 and "7 samples in 3 shards" in output and "0 skipped" in output
    assert "1 ids come again" in heard
    samples = stream(out, processor, "chat")
    assert [sample.name.split()[-1] for sample in samples] == [f"{index:09d}" for index in range(7)]
    for sample, expected in zip(samples, ENTRIES, strict=True):
        assert to_text(sample.segments) == to_text(render(from_llava(expected["conversations"])))
        names = expected.get("image") or []
        names = [names] if isinstance(names, str) else names
        assert len(sample.images) == len(names)
        for image_uint8, name in zip(sample.images, names):
            assert torch.equal(image_uint8, processor.image_processor.to_uint8(images / name)), name
    raws = [raw for path in sorted(out.glob("*.tar")) for raw in read_shard(str(path))]
    assert raws[0]["jpg"] == (images / "a.jpg").read_bytes(), "as it was, not encoded again"
    assert {"0.png", "1.jpg", "2.webp"} <= raws[2].keys() and "png" in raws[4], "named by content"
    assert json.loads(raws[0]["json"])["id"] == "same" and json.loads(raws[2]["json"])["id"] == 7


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        (entry("<image>\nWhat?", "none.jpg"), "'none.jpg' cannot be read: No such file"),
        (entry("<image>\nWhat?", "sub"), "'sub' cannot be read: Is a directory"),
        (entry("<image>\nWhat?", "../outside.png"), "leads out of the image folder"),
        (entry("<image>\nWhat?", "sub/../../outside.png"), "leads out of the image folder"),
        (entry("<image>\nWhat?", "..\\outside.png"), "leads out of the image folder"),
        (entry("<image>\nWhat?", "C:\\outside.png"), "leads out of the image folder"),
        (entry("<image>\nWhat?", "{outside}"), "leads out of the image folder"),
        (entry("<image>\nWhat?", "cut.png"), "damaged|cannot be read as an image"),
        (entry("<image>\nWhat?", "a.jpg\0"), "null"),
        (entry("<image><image>\nWhat?", "a.jpg"), "2 <image> in the text but 1 images"),
        (entry("<image>\nWhat?"), "1 <image> in the text but 0 images"),
        (entry("What?", "a.jpg"), "0 <image> in the text but 1 images"),
        (entry("<image>\nWhat?", 5), "neither a path nor a list of paths"),
        (entry("<image>\nWhat?", ["a.jpg", None]), "neither a path nor a list of paths"),
        ({"id": "x", "image": "a.jpg"}, "no list of `conversations`"),
        ({"id": "x", "conversations": [{"from": "human", "value": "What?"}]}, "no answer"),
        ({"id": "x", "conversations": [{"from": "cat", "value": "Miaow"}]}, "unknown|needs `from`"),
        (entry("\ud800"), "surrogates not allowed"),
        ("text", "it is a str"),
    ],
)
def test_what_cannot_be_used_is_named(run: Run, images: Path, tmp_path: Path, expected: Any, reason: str) -> None:
    if isinstance(expected, dict) and expected.get("image") == "{outside}":
        expected = expected | {"image": str(tmp_path / "outside.png")}
    source = LlavaSource(write_json(tmp_path / "x.json", [ENTRIES[0], expected]), images)
    build(source, tmp_path / "out", 10, processes=1, max_broken=0.5)
    (line,) = broken(tmp_path / "out")
    assert line.startswith("entry 1") and "\n" not in line
    assert re.search(reason, line), line
    assert len(list(read_shard(str(tmp_path / "out" / "00000.tar")))) == 1


def test_too_many_broken_samples_stop_it(run: Run, images: Path, tmp_path: Path) -> None:
    entries = [entry("<image>\nWhat?", "a.jpg" if index % 20 else "none.jpg", id=index) for index in range(140)]
    command = ("llava", write_json(tmp_path / "x.json", entries), images, tmp_path / "out", "--samples-per-shard", 40)
    code, _, heard = run(*command, "--processes", 1)
    error = heard.splitlines()[-1]
    assert code == 2 and "6 of 120 samples cannot be used, more than --max-broken 0.01" in error
    assert "none.jpg" in error and "Traceback" not in heard
    code, output, heard = run(*command, "--max-broken", 0.05)
    assert code == 0 and "133 samples in 4 shards" in output and "7 skipped" in output
    assert "3 of 4 shards are complete and kept" in heard and "skipped: entry 0, id '0'" in heard


@dataclass(frozen=True)
class ToyChunk:
    first: int
    size: int
    deadly: bool

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[str, Reader]]:
        for index in range(self.first, self.first + self.size):
            yield f"sample {index}", partial(self._read, index)

    def _read(self, index: int) -> Members:
        if self.deadly and index == self.first + self.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return chat_sample(index)[1]


@dataclass(frozen=True)
class ToySource:
    """Four shards; the process that makes the third one is killed before its last sample."""

    deadly: bool
    format: str = "chat"
    name: str = "toys"

    @property
    def identity(self) -> dict[str, Any]:
        return {"toys": self.name}

    def chunks(self, size: int) -> list[Chunk]:
        return [ToyChunk(size * number, size, self.deadly and number == 2) for number in range(4)]


def test_a_killed_run_goes_on(run: Run, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    with pytest.raises(ValueError, match="a process was killed"):
        build(ToySource(deadly=True), out, 5, processes=1, max_broken=0)
    assert sorted(path.name for path in out.iterdir()) == [".00002.tar.tmp", "00000.tar", "00001.tar", MANIFEST]
    code, _, heard = run("check", out)
    assert code == 2 and "2 of 4 shards are made so far" in heard
    with (out / MANIFEST).open("a") as file:
        file.write('{"name": "00002.tar", "sam')  # as if the line had been cut short as well
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    build(ToySource(deadly=False), out, 5, processes=1, max_broken=0)
    build(ToySource(deadly=False), whole, 5, processes=2, max_broken=0)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept, "made twice"
    tars = sorted(path.name for path in whole.glob("*.tar"))
    assert len(tars) == 4 and sorted(path.name for path in out.iterdir()) == [*tars, MANIFEST]
    for name in tars:
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert run("check", out)[0] == 0


def test_a_shard_that_shrank_is_made_again(tmp_path: Path) -> None:
    build(ToySource(deadly=False), tmp_path, 5, processes=1, max_broken=0)
    before = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(before[:1000])
    build(ToySource(deadly=False), tmp_path, 5, processes=1, max_broken=0)
    assert (tmp_path / "00001.tar").read_bytes() == before


def test_other_shards_are_not_mixed_in(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    write_shard(tmp_path / "foreign" / "00000.tar", [caption_sample(0)])
    with pytest.raises(ValueError, match="not made here"):
        build(ToySource(deadly=False), tmp_path / "foreign", 5, processes=1, max_broken=0)
    build(ToySource(deadly=False), tmp_path / "mine", 5, processes=1, max_broken=0)
    for source, size in ((ToySource(deadly=False, name="others"), 5), (ToySource(deadly=False), 6)):
        with pytest.raises(ValueError, match="holds shards made from"):
            build(source, tmp_path / "mine", size, processes=1, max_broken=0)
    (tmp_path / "mine" / MANIFEST).write_text("{}\n")
    with pytest.raises(ValueError, match="is no manifest"):
        build(ToySource(deadly=False), tmp_path / "mine", 5, processes=1, max_broken=0)


def test_the_trainer_reads_what_parquet_becomes(run: Run, processor: YiVLProcessor, tmp_path: Path) -> None:
    colours = [list(COLOURS)[index % 4] for index in range(11)]
    (tmp_path / "beside.png").write_bytes(png("blue"))
    cells: list[Any] = [{"bytes": png(colour), "path": "../x.png"} for colour in colours]
    cells[2] = {"bytes": None, "path": "beside.png"}
    cells[5] = None
    cells[6] = {"bytes": None, "path": "../beside.png"}
    rows = [{"photo": cell, "words": f"a {colour} image"} for cell, colour in zip(cells, colours)]
    for number, part in enumerate((rows[:9], rows[9:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{number}.parquet", row_group_size=4)
    files = sorted(tmp_path.glob("*.parquet"))
    options = ("--image", "photo", "--caption", "words", "--samples-per-shard", 3, "--max-broken", 0.5)
    code, output, _ = run("parquet", *files, tmp_path / "out", *options, "--processes", 1)
    assert code == 0 and "9 samples in 4 shards" in output
    assert broken(tmp_path / "out") == [
        "0.parquet row 5: it has no image",
        "0.parquet row 6: the image path '../beside.png' leads out of the image folder",
    ]
    good = [index for index in range(11) if index not in (5, 6)]
    samples = stream(tmp_path / "out", processor, "caption")
    for sample, index in zip(samples, good, strict=True):
        assert to_text(sample.segments).endswith(f"a {colours[index]} image\n")
        assert torch.equal(sample.images[0], processor.image_processor.to_uint8(png(colours[index])))


@pytest.mark.parametrize("as_text", [False, True])
def test_conversations_in_parquet(run: Run, processor: YiVLProcessor, tmp_path: Path, as_text: bool) -> None:
    turns = [expected["conversations"] for expected in (ENTRIES[3], ENTRIES[0], ENTRIES[2])]
    images = [[], [png("red")], [png("red"), png("green"), png("blue")]]
    column = [json.dumps(conversation) if as_text else conversation for conversation in turns]
    pq.write_table(pa.table({"image": images, "talk": column}), tmp_path / "x.parquet")
    code, _, _ = run("parquet", tmp_path / "x.parquet", tmp_path / "out", "--conversations", "talk", "--processes", 1)
    samples = stream(tmp_path / "out", processor, "chat")
    assert code == 0 and [len(sample.images) for sample in samples] == [0, 1, 3]
    assert [to_text(sample.segments) for sample in samples] == [to_text(render(from_llava(talk))) for talk in turns]


def test_img2dataset_output_is_taken_as_it_is(
    run: Run, processor: YiVLProcessor, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    """Its tars hold KEY.jpg, KEY.txt and KEY.json, which is metadata; beside them lie statistics and parquet."""
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), COLOURS["red"]).save(buffer, "JPEG")
    metadata = json.dumps(
        {"caption": "not this one", "url": "x", "key": "0", "status": "success", "width": 60}
    ).encode()
    samples = [
        (f"{i:09d}", {"jpg": buffer.getvalue(), "txt": f"caption {i}".encode(), "json": metadata}) for i in range(3)
    ]
    samples.append(("000000003", {"jpg": buffer.getvalue(), "txt": b"", "json": metadata}))  # it had no caption
    write_shard(tmp_path / "00000.tar", samples)
    write_json(tmp_path / "00000_stats.json", {"count": 4})
    (tmp_path / "00000.parquet").write_bytes(b"")
    code, output, heard = run("check", tmp_path, "--processes", 1)
    rows = table(output)
    assert code == 0 and rows["samples"] == "4" and rows["manifest"] == "none" and rows["cannot be used"] == "1"
    assert rows["captions"].startswith("3 ") and rows["conversations"].startswith("0 ")
    assert "000000003: its .txt is empty" in heard
    write_shard(tmp_path / "00000.tar", samples[:3])
    streamed = stream(tmp_path, processor, "caption")
    assert [to_text(sample.segments) for sample in streamed] == [f"<image_placeholder>caption {i}\n" for i in range(3)]


def table(output: str) -> dict[str, str]:
    """The rows of the check's table."""
    cells = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line.startswith("│")
    ]
    return {name: value for name, value in cells}


def test_check_tells_what_a_folder_holds(run: Run, tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    write_shard(tmp_path / "a.tar", [caption_sample(i) for i in range(4)])
    samples = [chat_sample(i) for i in range(7)]  # one with two images, one with none
    samples += [("broken", {"png": png("red")[:60], "txt": b"a red image"})]
    samples += [("wide", {"png": png("red", (200, 10)), "txt": b"a red image"})]
    write_shard(tmp_path / "b.tar", samples)
    code, output, heard = run("check", tmp_path, "--processes", 1)
    rows = table(output)
    assert code == 0 and rows["shards"].startswith("2, ") and rows["samples"] == "13"
    assert rows["captions"].startswith("12 "), "a conversation's one answer is a caption, too"
    assert rows["conversations"].startswith("7 ") and rows["without an image"] == "1"
    assert rows["images"] == "12: 12 PNG" and rows["longer side"] == "32 to 200 px, half of them at most 32 px"
    assert rows["cannot be used"] == "1" and "b.tar broken: " in heard


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("change", "00001.tar: SHA-256 "),
        ("cut", "00001.tar cannot be read to its end: "),
        ("delete", "00001.tar is in the manifest but not here"),
        ("add", "more.tar is here but not in the manifest"),
        ("not a tar", "00001.tar cannot be read to its end: "),
    ],
)
def test_check_finds_what_differs_from_the_manifest(run: Run, tmp_path: Path, damage: str, reason: str) -> None:
    build(ToySource(deadly=False), tmp_path, 5, processes=1, max_broken=0)
    code, output, _ = run("check", tmp_path, "--processes", 1)
    assert code == 0 and table(output)["manifest"] == "agrees"
    shard = tmp_path / "00001.tar"
    content = bytearray(shard.read_bytes())
    if damage == "change":
        content[-1] ^= 1  # in the padding: only the hash can tell
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 3])
    elif damage == "delete":
        shard.unlink()
    elif damage == "add":
        (tmp_path / "more.tar").write_bytes(content)
    else:
        shard.write_bytes(b"x" * len(content))
    code, output, heard = run("check", tmp_path, "--processes", 1)
    assert code == 2 and "mismatch" in table(output)["manifest"]
    assert f"mismatch: {reason}" in heard and "Traceback" not in heard


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("llava", "none.json", ".", "out"), "none.json: there is no such file"),
        (("llava", "{folder}/x.json", "{folder}/none", "out"), "there is no such image folder"),
        (("llava", "{folder}/bad.json", "{folder}", "out"), "bad.json is not JSON"),
        (("llava", "{folder}/x.json", "{folder}", "out"), "expected a list of conversations, found dict"),
        (("llava", "{folder}/empty.json", "{folder}", "{folder}/out"), "the source holds no samples"),
        (("llava", "{folder}/one.json", "{folder}", "{folder}/x.json"), "exists"),
        (("parquet", "{folder}/x.json", "out"), "say which column holds the text"),
        (("parquet", "{folder}/x.json", "out", "--caption", "c"), "x.json cannot be read as parquet"),
        (("parquet", "{folder}/x.parquet", "out", "--caption", "c"), "has no column 'image'; it has words"),
        (("check", "{folder}"), "holds no .tar files"),
    ],
)
def test_mistakes_are_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], reason: str) -> None:
    write_json(tmp_path / "x.json", {})
    write_json(tmp_path / "empty.json", [])
    write_json(tmp_path / "one.json", [entry("Hello!")])
    (tmp_path / "bad.json").write_text("[")
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "x.parquet")
    code, _, heard = run(*(argument.replace("{folder}", str(tmp_path)) for argument in arguments))
    assert code == 2 and heard.startswith("error: ") and heard.count("\n") == 1 and reason in heard
