"""Tiles of large images: the rule of grids, pixels, and tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiled import COLOURS, SIZE, ask, encoded, noise, tiled_processor, tiled_yi_vl
from tiny import NUM_PATCHES, tiny_processor

from yi_vl.chat import render
from yi_vl.image import YiVLImageProcessor, pad_and_resize
from yi_vl.image import file as image_file
from yi_vl.image import resize as image_resize
from yi_vl.image.tiles import MAX_TILES, NO_TILES, choose_grid, num_inputs, tile_side
from yi_vl.predict import YiVL

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def tiled() -> YiVL:
    return tiled_yi_vl()


@pytest.fixture
def large() -> Image.Image:
    """Of 2 x 2 tiles."""
    return noise(3 * SIZE, 2 * SIZE + 40)


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
