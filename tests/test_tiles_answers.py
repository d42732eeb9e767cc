"""Tiles in use: exact answers, the server, files, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
from PIL import Image
from serving import client_of, serving
from tiled import SIZE, ask, noise, tiled_yi_vl
from tiny import OFFICIAL, uncached
from torch import Tensor
from typer.testing import CliRunner

import yi_vl
from yi_vl.checkpoint import Layout, convert, open_checkpoint
from yi_vl.checkpoint.gguf import write_gguf
from yi_vl.cli import app
from yi_vl.image import TiledImage, YiVLImageProcessor
from yi_vl.image.data_url import data_url, png_bytes
from yi_vl.image.tiles import MAX_TILES
from yi_vl.info import config_table
from yi_vl.predict import TooLongError, YiVL
from yi_vl.processor import max_tiles_of
from yi_vl.server import create_app

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def tiled() -> YiVL:
    return tiled_yi_vl()


@pytest.fixture
def large() -> Image.Image:
    """Of 2 x 2 tiles."""
    return noise(3 * SIZE, 2 * SIZE + 40)


# Answers


def conversations(large: Image.Image) -> list[list[dict[str, Any]]]:
    return [
        ask([large]), ask([noise(40, 30)]), ask([]), ask([large, noise(300, 50, 1)], "Compare."),
        [*ask([large]), {"role": "assistant", "content": "A dog."}, *ask([noise(60, 200, 2)], "And this?")],
    ]  # fmt: skip


def test_answers_alone_together_and_cached_are_equal(tiled: YiVL, large: Image.Image) -> None:
    chats = conversations(large)
    alone = [uncached(tiled).answer(chat, max_new_tokens=12) for chat in chats]
    assert len(set(alone)) > 2
    fresh = uncached(tiled)
    assert fresh.answer_batch(chats, max_new_tokens=12) == alone
    assert [fresh.answer(chat, max_new_tokens=12) for chat in chats] == alone, "now from the caches"
    assert uncached(tiled).answer_batch(chats * 2, max_new_tokens=12, batch_size=3) == alone * 2
    for chat, answer in zip(chats[:2], alone):
        inputs = tiled.engine.model_inputs(tiled.engine.prepare(chat))
        outputs = tiled.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        text = tiled.processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == answer, "the model's own generate"


def test_the_tower_sees_each_tile_once(tiled: YiVL, large: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    yi, sizes = uncached(tiled), []
    encode = tiled.model.model.encode_images

    def counting(pixel_values: Tensor) -> Tensor:
        sizes.append(len(pixel_values))
        return encode(pixel_values)

    monkeypatch.setattr(tiled.model.model, "encode_images", counting)
    yi.answer(ask([large]), max_new_tokens=2)
    yi.answer(ask([large], "Another question?"), max_new_tokens=2)
    assert sum(sizes) == 5


def test_a_chat_remembers_the_tiles_when_the_file_is_gone(tiled: YiVL, large: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    large.save(path)
    chat = uncached(tiled).chat()
    first = chat.ask("What is this?", path, max_new_tokens=6)
    path.unlink()
    branch = copy.deepcopy(chat)
    second = chat.ask("Sure?", max_new_tokens=6)
    turns = [*ask([large]), {"role": "assistant", "content": first}, *ask([], "Sure?")]
    assert second == uncached(tiled).answer(turns, max_new_tokens=6) == branch.ask("Sure?", max_new_tokens=6)
    snapshot = tiled.prepare_image(large)
    assert isinstance(snapshot, TiledImage) and snapshot.thumbnail.size == (SIZE, SIZE)
    assert tiled.answer_batch([ask([snapshot])], max_new_tokens=6) == [first]
    other = YiVLImageProcessor(28, max_tiles=2)
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(28, 28, 3\)"):
        other.to_inputs(snapshot)


def test_what_tiles_make_too_long_is_refused_before_anything_is_decoded(
    tiled: YiVL, large: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    large.save(path)
    monkeypatch.setattr(YiVLImageProcessor, "to_inputs", lambda *_, **__: pytest.fail("decoded"))
    message = "1040 of them for 13 images and 52 tiles of them, of 16 each"
    with pytest.raises(TooLongError, match=message) as raised:
        tiled.engine.prepare(ask([path] * 13))
    assert raised.value.num_images == 13
    (error,) = tiled.answer_batch([ask([path] * 13)], errors="return")
    assert isinstance(error, TooLongError)


# The server


@pytest.fixture(scope="module")
def client(tiled: YiVL) -> Any:
    with serving(create_app(tiled, "tiny")) as address:
        yield client_of(address)


def url_messages(images: list[Image.Image]) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(png_bytes(image))}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}]


def test_the_server_answers_and_counts_tiles(client: OpenAI, tiled: YiVL, large: Image.Image) -> None:
    for images in ([large], [noise(40, 30), large], []):
        completion = client.chat.completions.create(model="tiny", messages=url_messages(images), max_tokens=8)
        assert completion.choices[0].message.content == tiled.answer(ask(images), max_new_tokens=8)
        assert completion.usage is not None
        assert completion.usage.prompt_tokens == len(tiled.engine.prepare(ask(images)))


def test_the_server_refuses_what_tiles_make_too_long_by_the_images_sizes(
    client: OpenAI, tiled: YiVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = [noise(2 * SIZE, 2 * SIZE, seed) for seed in range(8)]
    extra = [{"role": "user", "content": "Read "}, {"role": "assistant", "content": "Yes."}]
    messages = ask(wide)
    while len(tiled.processor.encode_messages([*extra, *messages]).input_ids) < 1000:  # without tiles there is room
        extra[0]["content"] += "on "
    monkeypatch.setattr(YiVLImageProcessor, "to_inputs", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=[*extra, *url_messages(wide)], max_tokens=2)
    assert raised.value.code == "context_length_exceeded" and "32 tiles" in str(raised.value)


def test_a_broken_image_is_named(client: OpenAI) -> None:
    parts = [{"type": "image_url", "image_url": {"url": data_url(b"no image")}}]
    with pytest.raises(Exception, match=r"messages\[0\].*not an image") as raised:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])  # type: ignore[misc,list-item]
    assert raised.value.status_code == 422  # type: ignore[attr-defined]


# Files, and what has no place for tiles


@pytest.fixture(scope="module")
def folder(tiled: YiVL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "model"
    tiled.save(path)
    return path


def test_the_number_is_saved_once_and_loaded_again(folder: Path, large: Image.Image, tmp_path: Path) -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.json")}
    assert [name for name, text in texts.items() if "max_tiles" in text] == ["processor_config.json"]
    model = yi_vl.load(folder)
    assert model.processor.image_processor.max_tiles == 4 == max_tiles_of(str(folder))
    answer = model.answer(ask([large]), max_new_tokens=6)
    assert len(model.engine.prepare(ask([large])).key.images) == 5
    convert(open_checkpoint(folder), tmp_path / "again", "yi-vl")
    assert yi_vl.load(tmp_path / "again").answer(ask([large]), max_new_tokens=6) == answer


def test_files_of_before_have_no_tiles(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "processor_config.json").read_text())
    del config["image_processor"]["max_tiles"]
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / "processor_config.json").write_text(json.dumps(config))
    assert yi_vl.load(copied).processor.image_processor.max_tiles == 0 == max_tiles_of(str(copied))
    assert yi_vl.load().processor.image_processor.max_tiles == 0, "the bundled nano"


def test_another_number_can_be_asked_for(
    folder: Path, tmp_path: Path, large: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(yi_vl.load(folder, image_tiles=0).engine.prepare(ask([large])).key.images) == 1
    assert len(yi_vl.load(folder, image_tiles=2).engine.prepare(ask([large])).key.images) == 3
    assert not caplog.records
    nano = yi_vl.load(image_tiles=2)
    assert nano.processor.image_processor.max_tiles == 2 and "without tiles" in caplog.text


@pytest.mark.parametrize("value", [1, -1, MAX_TILES + 1, "4", 2.0, True])
def test_numbers_that_are_none(value: Any) -> None:
    for make in (lambda: YiVLImageProcessor(max_tiles=value), lambda: yi_vl.load("nothing", image_tiles=value)):
        with pytest.raises(ValueError, match=r"(max|image)_tiles is .*(0, or 2 to 64|from 0 to 64|whole number)"):
            make()


def test_layouts_that_cannot_hold_tiles_refuse(folder: Path, tmp_path: Path) -> None:
    layouts: tuple[Layout, ...] = ("official", "llava-hf")
    message = "up to 4 tiles, for which the layout '{}' has no place"
    for layout in layouts:
        with pytest.raises(ValueError, match=message.format(layout)):
            convert(open_checkpoint(folder), tmp_path / layout, layout)
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=message.format("gguf")):
        write_gguf(open_checkpoint(folder), tmp_path / "gguf")


def test_info_shows_them(folder: Path, tiled: YiVL) -> None:
    def rows(path: Path | None) -> str:
        return str([list(column.cells) for column in config_table("it", tiled.model.config, path).columns])

    assert "up to 4 of a large image, beside it whole: 80 tokens at most" in rows(folder)
    assert "tiles" not in rows(None) and "tiles" not in rows(OFFICIAL / "checkpoint")


def test_the_command_line_has_the_option(folder: Path, large: Image.Image, tmp_path: Path) -> None:
    large.save(tmp_path / "large.png")
    answers = []
    for options in ([], ["--image-tiles", "0"]):
        arguments = [
            "ask",
            str(tmp_path / "large.png"),
            "What is this?",
            "--model",
            str(folder),
            "--max-new-tokens",
            "6",
        ]
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        answers.append(result.stdout.strip())
    for answer, tiles in zip(answers, (None, 0), strict=True):
        assert answer == yi_vl.load(folder, image_tiles=tiles).answer(ask([large]), max_new_tokens=6)
    result = CliRunner().invoke(app, ["ask", "Hi", "--model", str(folder), "--image-tiles", "1"])
    assert isinstance(result.exception, ValueError) and "image_tiles is 1" in str(result.exception)
