"""What a sample holds is read in each common spelling, or the sample is broken and the key is named."""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COLOURS, caption_sample, chat_sample, png
from PIL import Image

from train.config import DataConfig, SourceConfig
from train.data.encoder import SampleEncoder
from train.data.loader import StepLoader
from train.data.samples import read_sample
from train.data.shard_reader import read_shard
from train.shards.__main__ import build
from train.shards.check import inspect
from train.shards.files import Manifest, Shard
from train.shards.sources import LlavaSource
from yi_vl.chat import SYSTEM_PROMPT, to_text
from yi_vl.image import YiVLImageProcessor
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

Writer = Callable[..., Path]
QUESTION, ANSWER = "What is it?", "A red image."
SHOWN = f"{SYSTEM_PROMPT}\n\n### Human: <image_placeholder>\n{QUESTION}\n### Assistant: {ANSWER}\n###"


@pytest.fixture(scope="module")
def processor(toy_language_model: Path) -> YiVLProcessor:
    return YiVLProcessor(YiVLImageProcessor(28), prepare_tokenizer(str(toy_language_model)), patch_size=14)


def raw(**members: bytes) -> dict[str, Any]:
    return {"__url__": "x.tar", "__key__": "k"} | members


def encoded_image(suffix: str, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 24), COLOURS[colour]).save(file, Image.registered_extensions()[f".{suffix}"])
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["gif", "bmp", "tif", "TIFF", "JPG", "jpe", "jfif", "Jpeg", "ppm", "jp2", "webp"])
def test_an_image_of_any_format_is_trained_on(
    processor: YiVLProcessor, tmp_path: Path, write_shard: Writer, suffix: str
) -> None:
    shard = write_shard(tmp_path / "a.tar", [("k", {suffix: encoded_image(suffix.lower()), "txt": b"a red image"})])
    data = DataConfig(format="caption", sources=[SourceConfig(name="toys", shards=str(shard))])
    (sample,) = (SampleEncoder(processor, data, 400).encode(raw, 0) for raw in read_shard(str(shard)))
    red, _, blue = sample.images[0][14, 14].tolist()
    assert sample.encoded.image_starts == [0] and red > 200 > blue


@pytest.mark.parametrize("suffix", ["heic", "svg", "jxl"])
def test_an_image_that_cannot_be_read_is_no_missing_one(processor: YiVLProcessor, suffix: str) -> None:
    data = DataConfig(format="caption", sources=[SourceConfig(name="toys", shards="")])
    with pytest.raises(ValueError, match="is not an image of a format"):
        SampleEncoder(processor, data, 400).encode(raw(**{suffix: b"\0\0\0\x18ftypheic", "txt": b"a caption"}), 0)


@pytest.mark.parametrize(
    ("sample_format", "members", "reason"),
    [
        ("caption", {"txt": b"a red image"}, "caption without an image; .* format text"),
        ("caption", {"mp4": b"x", "txt": b"a red image"}, "member .mp4 is not read"),
        ("chat", {"jpg": b"x", "npy": b"x", "json": b"{}"}, "member .npy is not read"),
        ("caption", {"jpg": b"x", "txt": b"one", "1.txt": b"two"}, "member .1.txt is not read"),
        ("caption", {"jpg": b"x", "txt": "\u200b\ufeff".encode()}, ".txt is empty"),
        ("text", {"jpg": b"x", "txt": b"a red image"}, "member .jpg is an image"),
        (
            "caption",
            {"json": b'[{"from":"human","value":"<image>"},{"from":"gpt","value":"x"}]'},
            "1 <image> .* 0 images",
        ),
    ],
)
def test_no_member_is_ignored_without_a_word(sample_format: str, members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_sample(raw(**members), sample_format)


def test_what_is_harmless_or_named_may_be_there() -> None:
    members = {"jpg": b"x", "txt": b"a caption", "json": b'{"anything": 1}', "url": b"x", "npy": b"x"}
    segments, images = read_sample(raw(**members), "caption", ignore=["npy"])
    assert to_text(segments) == "<image_placeholder>a caption\n" and images == [b"x"]
    assert to_text(read_sample(raw(txt=b"some text"), "text")[0]) == "some text\n"


URL = {"image_url": {"url": "a.png", "detail": "low"}, "type": "image_url"}
SPELLINGS: dict[str, Any] = {
    "llava": {"image": "a.png", "conversations": [
        {"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]},
    "sharegpt": {"images": ["a.png"], "id": 1, "conversations": [
        {"from": "user", "value": f"<image>\n{QUESTION}"}, {"from": "assistant", "value": ANSWER}]},
    "llama-factory": {"images": ["a.png"], "messages": [
        {"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": ANSWER}]},
    "openai": {"messages": [
        {"role": "user", "content": [URL, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": ANSWER, "weight": 1}]},
    "transformers": {"messages": [
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]},
    "hub": {"images": ["a.png"], "messages": [
        {"role": "user", "content": [
            {"type": "image", "text": None, "index": 0}, {"type": "text", "text": QUESTION, "index": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER, "index": None}]}]},
    "qwen": {"conversation": [
        {"role": "user", "content": [{"image": "a.png"}, {"text": QUESTION}]},
        {"role": "Assistant", "content": ANSWER}], "tools": None, "videos": [], "system": ""},
    "data url": {"image": "data:image/png;base64," + base64.b64encode(png("red")).decode(), "conversations": [
        {"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "chatgpt", "value": ANSWER}]},
    "list": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": QUESTION}]},
             {"role": "assistant", "content": ANSWER}],
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_are_one_conversation(processor: YiVLProcessor, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "x.json").write_text(json.dumps([SPELLINGS[spelling]]))
    build(LlavaSource(tmp_path / "x.json", tmp_path), tmp_path / "out", 10, processes=1, max_broken=0)
    (made,) = read_shard(str(tmp_path / "out/00000.tar"))
    segments, images = read_sample(made, "chat")
    assert to_text(segments) == SHOWN and images == [png("red")]
    if spelling != "data url":  # the same record as somebody else's shard has it, beside its image
        segments, images = read_sample(raw(png=png("red"), json=json.dumps(SPELLINGS[spelling]).encode()), "chat")
        assert to_text(segments) == SHOWN and images == [png("red")]


def llava(**more: Any) -> dict[str, Any]:
    return SPELLINGS["llava"] | more


def turns(answer: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": answer} | more]}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        *((llava(**{key: "x"}), f"its `{key}` is not read") for key in ("video", "audios", "tools", "rejected")),
        (llava(image=None, image_path="a.png"), "`image_path` is not read"),
        (llava(images=["a.png"]), "images twice, in `image` and in `images`"),
        (llava(image=["a.png", "a.png"]), "1 <image> in the text but 2 images"),
        (llava(image=""), "1 <image> in the text but 0 images"),
        (llava(messages=[{}]), "both `conversations` and `messages`"),
        (llava(system={"x": 1}), "`system` is dict"),
        ({"messages": [{"role": "assistant", "content": "A."}]}, "begins with an answer"),
        (turns(""), "answer in message 2 is empty"),
        (turns(" \n\u200b"), "answer in message 2 is empty"),
        (turns(None), "no text"),
        (turns([]), "answer in message 2 is empty"),
        (turns("x", tool_calls=[{"id": 1}]), "message 2: `tool_calls` is not read"),
        (turns("x", weight=0), "`weight` 0, which is not read"),
        (turns("x", loss=False), "`loss` False, which is not read"),
        (turns([{"type": "video", "video": "x.mp4"}]), "part of type video, which is not read"),
        (turns([{"type": "text", "text": "x", "image": "a.png"}]), "a part's `image` is not read"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "found 'tool', which is not read"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "found 'function_call', which is not read"),
        ({"messages": [{"role": "user", "content": [URL | {"image_url": {"url": "https://x.org/a.png"}},
          {"type": "text", "text": "?"}]}, {"role": "assistant", "content": "x"}]}, "nothing is downloaded"),
        ({"instruction": "x", "output": "y"}, "no list of `conversations` or `messages`, only instruction, output"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path: Path, record: Any, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "x.json").write_text(json.dumps([SPELLINGS["llava"], record]))
    build(LlavaSource(tmp_path / "x.json", tmp_path), tmp_path / "out", 10, processes=1, max_broken=0.5)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    (line,) = manifest.shards["00000.tar"].broken
    assert line.startswith("entry 1")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(line)


def test_a_key_may_be_ignored_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "x.json").write_text(json.dumps([llava(rejected="x")]))
    source = LlavaSource(tmp_path / "x.json", tmp_path, ignore=["rejected"])
    build(source, tmp_path / "out", 10, processes=1, max_broken=0)
    assert len(list(read_shard(str(tmp_path / "out/00000.tar")))) == 1


def test_a_system_prompt_is_kept(tmp_path: Path) -> None:
    turns = SPELLINGS["llava"]["conversations"]
    system = {"from": "system", "value": "Be brief."}
    entries = [llava(system="Be brief."), llava(conversations=[system, *turns])]
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "x.json").write_text(json.dumps(entries))
    build(LlavaSource(tmp_path / "x.json", tmp_path), tmp_path / "out", 10, processes=1, max_broken=0)
    for made in read_shard(str(tmp_path / "out/00000.tar")):
        assert to_text(read_sample(made, "chat")[0]) == SHOWN.replace(SYSTEM_PROMPT, "Be brief.")


LINES = "".join(json.dumps(llava(id=number)) + "\n" for number in range(3))


@pytest.mark.parametrize(
    ("content", "num_broken"),
    [
        (LINES.encode(), 0),
        (b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode(), 0),
        (LINES.encode("utf-16"), 0),
        (gzip.compress(LINES.encode()), 0),
        (LINES.encode()[:-30], 1),
        (b"\xef\xbb\xbf" + json.dumps([llava(id=number) for number in range(3)], indent=1).encode(), 0),
    ],
    ids=["lines", "byte order mark", "utf-16", "gzip", "cut off", "indented list with a byte order mark"],
)
def test_json_lines_and_byte_order_marks_are_read(tmp_path: Path, content: bytes, num_broken: int) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "x.jsonl").write_bytes(content)
    build(LlavaSource(tmp_path / "x.jsonl", tmp_path), tmp_path / "out", 10, processes=1, max_broken=0.5)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert manifest.shards["00000.tar"].samples == 3 - num_broken
    assert [line.split(" is not")[0] for line in manifest.shards["00000.tar"].broken] == [
        "entry 2: line 3"
    ] * num_broken


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> bytes:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def test_what_systems_put_into_tars_is_skipped_and_said_once(tmp_path: Path) -> None:
    junk = ["./._{}.png", "__MACOSX/._{}.png", "__MACOSX/{}.txt", ".DS_Store", "a/Thumbs.db"]
    members = []
    for number in range(3):
        members += [(name.format(number), b"\0\5\x16\7") for name in junk]
        members += [(f"./{number}.png", png("red")), (f"./{number}.txt", b"a red image")]
    write_tar(tmp_path / "a.tar", members)
    samples = list(read_shard(str(tmp_path / "a.tar")))
    assert [sample["__key__"] for sample in samples] == ["./0", "./1", "./2"]
    assert all(len(read_sample(sample, "caption")[1]) == 1 for sample in samples)
    (note,) = [sample["__note__"] for sample in samples if "__note__" in sample]
    assert "._0.png" in note and "skipped" in note
    assert inspect(tmp_path / "a.tar").notes == [note] and not inspect(tmp_path / "a.tar").broken


def test_members_that_are_no_sample_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.png"
        tar.addfile(link)
        info = tarfile.TarInfo("0.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    errors = [sample["__error__"] for sample in read_shard(str(tmp_path / "a.tar")) if "__error__" in sample]
    assert "README is not named KEY.suffix" in errors[0] and "0.png is a link" in errors[1]


def shard_of(num_samples: int) -> list[tuple[str, bytes]]:
    return [(f"{number:02d}.txt", b"x" * 2000) for number in range(num_samples)]


@pytest.mark.parametrize(
    ("damage", "num_read", "reason", "num_lost"),
    [
        (lambda tar: tar[: 6 * 2560], 6, "cut off; 6 samples were read, how many more it held is not known", 1),
        (lambda tar: tar[: 6 * 2560 + 700], 6, "6 samples were read, how many more it held is not known", 1),
        (lambda tar: tar[: 40 * 2560] + b"?" * 2560 + tar[41 * 2560 :], 40, "about 64 samples are lost", 64),
        (lambda tar: tar + tar, 100, "joined by cat; not read; 100 samples", 108),
    ],
    ids=["between members", "within a member", "a damaged header", "joined"],
)
def test_a_truncated_shard_tells_what_is_lost(
    tmp_path: Path, damage: Callable[[bytes], bytes], num_read: int, reason: str, num_lost: int
) -> None:
    good = write_tar(tmp_path / "a.tar", shard_of(100))
    (tmp_path / "a.tar").write_bytes(damage(good))
    *samples, error = read_shard(str(tmp_path / "a.tar"))
    assert len(samples) == num_read and not any("__error__" in sample for sample in samples)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(error["__error__"])
    assert error["__lost__"] == num_lost
    manifest = Manifest(tmp_path, {"num_shards": 1})
    manifest.write()
    if num_read < 100:
        manifest.add(Shard("a.tar", 100, len(good), ""))
        *_, error = read_shard(str(tmp_path / "a.tar"))
        assert error["__lost__"] == 100 - num_read and "of 100 are lost by its manifest" in error["__error__"]


def test_a_sample_that_is_cut_off_is_not_trained_on(tmp_path: Path) -> None:
    members = [(f"{number}.{suffix}", b"x" * 100) for number in range(3) for suffix in ("txt", "0.png", "1.png")]
    good = write_tar(tmp_path / "a.tar", members)
    for size in (8 * 1024, 8 * 1024 + 550):  # before the last member of the last sample, and in it
        (tmp_path / "a.tar").write_bytes(good[:size])
        *samples, error = read_shard(str(tmp_path / "a.tar"))
        assert [sample["__key__"] for sample in samples] == ["0", "1"] and "__error__" in error


def loader(processor: YiVLProcessor, data: DataConfig, num_samples: int = 10) -> StepLoader:
    return StepLoader(processor, data, 400, 0, 0, 1, num_samples, 4)


def broken_first(num_broken: int, num_good: int) -> list[tuple[str, dict[str, bytes]]]:
    broken = [(f"b{number}", {"txt": b"no image"}) for number in range(num_broken)]
    return broken + [caption_sample(number) for number in range(num_good)]


@pytest.mark.parametrize(("num_broken", "num_good", "seen"), [(5, 200, "5 of 100"), (150, 0, "100 of 100")])
def test_too_many_broken_samples_are_one_sentence_whichever_comes_last(
    processor: YiVLProcessor, tmp_path: Path, write_shard: Writer, num_broken: int, num_good: int, seen: str
) -> None:
    """All broken ones are in the first steps, so that the step in which it is noticed has none."""
    write_shard(tmp_path / "a.tar", broken_first(num_broken, num_good))
    fraction = 1.0 if not num_good else 0.03
    data = DataConfig(
        format="caption", workers=0, shuffle_buffer=1, max_broken_fraction=fraction,
        sources=[SourceConfig(name="toys", shards=f"{tmp_path}/a.tar")],
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=rf"{seen} samples are broken, more than .*the last: .*b\d+: skipped, its .txt"
    ):
        for _ in loader(processor, data):
            pass


def test_lost_samples_count_as_broken(processor: YiVLProcessor, tmp_path: Path, write_shard: Writer) -> None:
    path = write_shard(tmp_path / "a.tar", [chat_sample(number) for number in range(200)])
    path.write_bytes(path.read_bytes()[: 60 * 1024] + b"?" * 1024 + path.read_bytes()[61 * 1024 :])
    data = DataConfig(
        format="chat", workers=0, max_broken_fraction=0.5, sources=[SourceConfig(name="toys", shards=str(path))]
    )
    with pytest.raises(
        ValueError, match=r"samples are broken, .*a\.tar \(tar\): skipped, ReadError: .*samples are lost"
    ):
        for _ in loader(processor, data):
            pass


def test_a_samples_pixels_are_those_of_its_image(processor: YiVLProcessor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "x.json").write_text(json.dumps([SPELLINGS["openai"]]))
    build(LlavaSource(tmp_path / "x.json", tmp_path), tmp_path / "out", 10, processes=1, max_broken=0)
    data = DataConfig(format="chat", fast_pixels=False, sources=[SourceConfig(name="toys", shards="")])
    (made,) = read_shard(str(tmp_path / "out/00000.tar"))
    sample = SampleEncoder(processor, data, 2000).encode(made, 0)
    assert torch.equal(sample.images[0], processor.image_processor.to_uint8(png("red")))
