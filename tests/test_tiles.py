"""Tiles of large images: the rule of grids, pixels, tokens, exact answers, files, the server, and what is refused."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import BadRequestError, OpenAI
from PIL import Image
from serving import client_of, serving
from tiny import IMAGE_SIZE_PX, NUM_PATCHES, OFFICIAL, tiny_model, tiny_processor, uncached
from torch import Tensor
from typer.testing import CliRunner

import yi_vl
from yi_vl.chat import render
from yi_vl.checkpoint import Layout, convert, open_checkpoint
from yi_vl.checkpoint.gguf import write_gguf
from yi_vl.cli import app
from yi_vl.image import TiledImage, YiVLImageProcessor, pad_and_resize
from yi_vl.image import file as image_file
from yi_vl.image import resize as image_resize
from yi_vl.image.data_url import data_url, png_bytes
from yi_vl.image.tiles import MAX_TILES, NO_TILES, choose_grid, num_inputs, tile_side
from yi_vl.info import config_table
from yi_vl.predict import TooLongError, YiVL
from yi_vl.processor import YiVLProcessor, max_tiles_of
from yi_vl.server import create_app

pytestmark = pytest.mark.core

SIZE = IMAGE_SIZE_PX
COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiled_processor(max_tiles: int = 4) -> YiVLProcessor:
    processor = tiny_processor()
    processor.image_processor.max_tiles = max_tiles
    return processor


@pytest.fixture(scope="module")
def tiled() -> YiVL:
    return YiVL(tiny_model(max_position_embeddings=1024), tiled_processor())


@pytest.fixture
def large() -> Image.Image:
    """Of 2 x 2 tiles."""
    return noise(3 * SIZE, 2 * SIZE + 40)


def ask(images: list[Any], text: str = "What is this?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# The rule


def random_cases() -> list[tuple[tuple[int, int], int, int]]:
    rng = np.random.default_rng(0)
    cases, numbers = [], [0, 2, 3, 4, 6, 12, MAX_TILES]
    for _ in range(400):
        width, height = np.exp(rng.uniform(0, 9, 2)).astype(int).tolist()  # 1 to 8100 px
        cases.append(((width, height), int(rng.choice([28, 224, 448])), int(rng.choice(numbers))))
    return cases


def kept(size: tuple[int, int], grid: tuple[int, int], size_px: int) -> float:
    """The part of an image's pixels that are in its tiles, of which each side is `size_px`."""
    scale = min(1.0, grid[0] * size_px / size[0], grid[1] * size_px / size[1])
    return scale * scale


def test_the_fewest_tiles_that_keep_three_quarters_of_the_pixels() -> None:
    for size, size_px, max_tiles in random_cases():
        grid = choose_grid(size, size_px, max_tiles)
        num_tiles = grid[0] * grid[1]
        assert 1 <= num_tiles <= max(1, max_tiles), (size, size_px, max_tiles)
        others = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
        best = max((kept(size, other, size_px) for other in [*others, NO_TILES]), default=0)
        least = min(best, 0.75)
        assert kept(size, grid, size_px) >= least
        assert all(kept(size, other, size_px) < least for other in others if other[0] * other[1] < num_tiles)
        if max(size) <= size_px or not max_tiles:
            assert grid == NO_TILES
        assert num_inputs(grid) == (1 if grid == NO_TILES else 1 + num_tiles)


def test_a_turned_image_has_as_many_tiles() -> None:
    """So a header's size is enough, whatever its orientation says."""
    for (width, height), size_px, max_tiles in random_cases():
        counts = {num_inputs(choose_grid(size, size_px, max_tiles)) for size in ((width, height), (height, width))}
        assert len(counts) == 1, (width, height, size_px, max_tiles)


def test_the_tiles_cover_the_image_and_each_shows_a_part_of_it() -> None:
    for size, size_px, max_tiles in random_cases():
        grid = choose_grid(size, size_px, max_tiles)
        side = tile_side(size, grid)
        for length, count in zip(size, grid, strict=True):
            start = (count * side - length) // 2  # of the image in its grid
            assert start >= 0 and start + length <= count * side
            assert start < side and start + length > (count - 1) * side, (size, grid)


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((448, 448), 4, (1, 1)), ((517, 517), 4, (1, 1)), ((518, 518), 4, (2, 2)), ((640, 480), 12, (2, 1)),
        ((480, 640), 12, (1, 2)), ((1000, 1414), 4, (2, 2)), ((1000, 1414), 12, (2, 3)), ((4000, 3000), 12, (4, 3)),
        ((2000, 20), 4, (4, 1)), ((20, 2000), 6, (1, 4)), ((10_000, 10), 6, (6, 1)), ((1344, 1344), 12, (3, 3)),
        ((8000, 8000), 2, (1, 1)),
    ],
)  # fmt: skip
def test_grids_of_common_images(size: tuple[int, int], max_tiles: int, grid: tuple[int, int]) -> None:
    assert choose_grid(size, 448, max_tiles) == grid


# Pixels


def padded_then_resized(image: Image.Image, size_px: int, grid: tuple[int, int]) -> Image.Image:
    side = max(-(-image.width // grid[0]), -(-image.height // grid[1]))
    padded = Image.new("RGB", (grid[0] * side, grid[1] * side), (122, 116, 104))
    padded.paste(image, ((padded.width - image.width) // 2, (padded.height - image.height) // 2))
    return padded.resize((grid[0] * size_px, grid[1] * size_px), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("max_padded_pixels", [0, 1 << 25])  # large long images, and all others
def test_a_grid_equals_padding_then_resizing(max_padded_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_resize, "_MAX_PADDED_PIXELS", max_padded_pixels)
    rng = np.random.default_rng(max_padded_pixels)
    for index in range(60):
        width, height = np.exp(rng.uniform(0, 6.5, 2)).astype(int).tolist()  # 1 to 665 px
        grid = (int(rng.integers(1, 5)), int(rng.integers(1, 5)))
        monkeypatch.setattr(image_resize, "_STRIP_PIXELS", int(rng.choice([100, 10_000])))
        image = noise(width, height, index)
        expected = padded_then_resized(image, 28, grid)
        assert pad_and_resize(image, 28, grid).tobytes() == expected.tobytes(), (image.size, grid)


def test_the_thumbnail_is_first_and_tiles_follow_row_by_row() -> None:
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE))
    for index, colour in enumerate(COLOURS.values()):
        image.paste(colour, (index % 2 * SIZE, index // 2 * SIZE, (index % 2 + 1) * SIZE, (index // 2 + 1) * SIZE))
    thumbnail, *tiles = tiled_processor().image_processor.to_inputs(image)
    assert torch.equal(thumbnail, YiVLImageProcessor(SIZE).to_uint8(image))
    assert [tuple(tile[SIZE // 2, SIZE // 2].tolist()) for tile in tiles] == list(COLOURS.values())
    assert [tuple(tile.float().mean((0, 1)).tolist()) for tile in tiles] == list(COLOURS.values()), "nothing else in it"


def test_without_tiles_nothing_changes(large: Image.Image) -> None:
    processor = tiny_processor()
    image_processor = processor.image_processor
    assert image_processor.max_tiles == 0
    (only,) = image_processor.to_inputs(large)
    assert torch.equal(only, image_processor.to_uint8(large)) and image_processor.count_inputs(large) == 1
    assert set(image_processor([large])) == {"pixel_values"}
    assert isinstance(image_processor.snapshot(large), Image.Image)
    assert processor.encode_messages(ask([None])) == processor.expand(processor.encode_messages(ask([None])), [1])


def exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("size", [(150, 60), (60, 300), (120, 119), (40, 40), (1, 3000), (3000, 1), (57, 61)])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}), ("PNG", {"exif": exif(6)}), ("JPEG", {}), ("JPEG", {"exif": exif(6)}), ("JPEG", {"exif": exif(3)}),
        ("TIFF", {}), ("TIFF", {"tiffinfo": {0x0112: 8}}), ("GIF", {}), ("WEBP", {"exif": exif(5)}), ("BMP", {}),
    ],
)  # fmt: skip
def test_a_header_tells_how_many_inputs_an_image_is(
    size: tuple[int, int], format: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "_MAX_FULL_JPEG_PIXELS", 5000)  # such are decoded at half their size
    content = encoded(noise(*size), format, **options)
    image_processor = tiled_processor(6).image_processor
    assert image_processor.count_inputs(content) == len(image_processor.to_inputs(content))


def test_an_image_turned_by_exif_has_the_tiles_of_the_upright_one() -> None:
    image = noise(5 * SIZE, SIZE)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    inputs = tiled_processor(6).image_processor.to_inputs(encoded(turned, exif=exif(6)))
    assert len(inputs) == 6 and all(map(torch.equal, inputs, tiled_processor(6).image_processor.to_inputs(image)))


def test_unusual_images_have_tiles_as_well() -> None:
    processor = tiled_processor().image_processor
    frames = [noise(150, 150, seed).quantize(16) for seed in range(3)]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for source in (
        encoded(noise(150, 150).convert("CMYK"), "JPEG"), animation, np.zeros((150, 150), np.uint16) + 300,
        torch.zeros(3, 150, 151), np.zeros((150, 150, 4), np.uint8), noise(150, 150).convert("LA"),
    ):  # fmt: skip
        assert len(processor.to_inputs(source)) == 5 == processor.count_inputs(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (1500, 65_535)])
def test_extreme_shapes_have_few_tiles_in_bounded_time(size: tuple[int, int]) -> None:
    inputs = tiled_processor(MAX_TILES).image_processor.to_inputs(Image.new("RGB", size, "red"))
    assert 2 < len(inputs) <= 1 + MAX_TILES
    with pytest.raises(ValueError, match="a side of at most 65,535 is read"):
        tiled_processor().image_processor.count_inputs(np.zeros((1, 100_000), np.uint8))


# Tokens: processor, engine and transformers agree


def test_the_processor_gives_what_the_engine_does(tiled: YiVL, large: Image.Image) -> None:
    small = noise(40, 30)
    for images in ([large], [small, large], [large, large, small]):
        messages = ask(images)
        text = tiled.processor.apply_chat_template(ask([None] * len(images)), add_generation_prompt=True)
        inputs = tiled.processor(images=images, text=text, return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
        prompt = tiled.engine.prepare(messages)
        expected = tiled.engine.model_inputs(prompt)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
        count = sum(5 if image is large else 1 for image in images)
        assert int((inputs["input_ids"] == tiled.processor.image_token_id).sum()) == count * NUM_PATCHES
        starts = [image.start for image in prompt.key.images]
        assert starts == list(range(starts[0], starts[0] + count * NUM_PATCHES, NUM_PATCHES)), "one run of tokens"


def test_a_batch_of_transformers_has_each_images_tokens(tiled: YiVL, large: Image.Image) -> None:
    small = noise(40, 30)
    batch = [[large], [small, large]]
    texts = [
        tiled.processor.apply_chat_template(ask([None] * len(images)), add_generation_prompt=True) for images in batch
    ]
    inputs = tiled.processor(images=batch, text=texts, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 5 + 1 + 5
    for row, images in enumerate(batch):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert ids.tolist() == tiled.engine.prepare(ask(images)).input_ids[0].tolist()
    with torch.inference_mode():
        outputs = tiled.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = tiled.processor.post_process_image_text_to_text(outputs[:, inputs["input_ids"].shape[1] :])
    assert answers == [tiled.answer(ask(images), max_new_tokens=8) for images in batch]


def test_the_loss_mask_is_right_beside_tiles(tiled: YiVL, large: Image.Image) -> None:
    answer = {"role": "assistant", "content": "A dog."}
    messages = [*ask([large]), answer, *ask([noise(40, 30), large]), answer]
    applied = tiled.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    walk = tiled.processor.expand(tiled.processor.encode(render(messages)), [5, 1, 5])
    assert applied["input_ids"][0] == walk.input_ids
    assert list(map(bool, applied["assistant_masks"][0])) == walk.loss_mask and any(walk.loss_mask)


def test_servers_of_others_get_the_number_of_tokens() -> None:
    counts = tiled_processor()._get_num_multimodal_tokens(image_sizes=[[40, 50], [2 * SIZE, 2 * SIZE], [SIZE, 999]])
    assert counts["num_image_patches"] == [1, 5, 5]
    assert counts["num_image_tokens"] == [NUM_PATCHES, 5 * NUM_PATCHES, 5 * NUM_PATCHES]


def test_too_few_features_for_the_tokens_fail_loudly(tiled: YiVL, large: Image.Image) -> None:
    inputs = tiled.engine.model_inputs(tiled.engine.prepare(ask([large])))
    inputs["pixel_values"] = inputs["pixel_values"][:-1]
    with pytest.raises(ValueError, match="80 image tokens in input_ids but 64 image features"):
        tiled.model(**inputs)


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
