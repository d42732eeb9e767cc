"""Tiles in the trainer: the pixels and tokens of inference, exact resume and averages, refusals, preview and plan."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COLOURS, Members, png
from PIL import Image
from preference_runs import configure_preferences
from processes import finish, output_path, start
from test_train_processes import assert_same, logged, one_process
from toy_runs import losses, step_once, stop_after, trainer

import yi_vl
from train.config import DataConfig, InitConfig, SourceConfig, TrainableConfig, TrainConfig
from train.config_file import load_config, to_yaml
from train.data.encoder import SampleEncoder, TooLong
from train.data.fast_image import to_inputs
from train.data.loader import StepLoader
from train.data.reference import ReferenceModel, WrongReferenceError, read_member, to_member
from train.init import initial_model, initial_processor
from train.plan.__main__ import make_plan
from train.plan.count import count_flops
from train.plan.flops import Row, step_flops
from train.plan.tiles import as_image_size, tile_assumptions
from train.preview import preview
from train.trainer import train
from yi_vl.config import preset
from yi_vl.image import YiVLImageProcessor

Configure = Callable[..., TrainConfig]
CHAT_6B = Path(__file__).parents[1] / "train/configs/6b/chat-448.yaml"
SIZES = ((32, 24), (50, 30), (28, 100), (200, 90))  # at 28 px: without tiles, of 2, of 4, and of 3 in a row
NUM_INPUTS = (1, 3, 5, 4)
TILES = "image.tiles=4"


def tiled_sample(index: int) -> tuple[str, Members]:
    """A question about images of several sizes; every fifth sample has two, every seventh none."""
    count = 0 if index % 7 == 6 else 2 if index % 5 == 4 else 1
    colours = [list(COLOURS)[(index + image) % len(COLOURS)] for image in range(count)]
    question = "<image>" * count + "\nWhat colour is it?" if count else "Hello!"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " and ".join(colours) or "Hello."}]
    suffixes = ["png"] if count == 1 else [f"{image}.png" for image in range(count)]
    members = {
        suffix: png(colour, SIZES[(index + image) % len(SIZES)])
        for image, (suffix, colour) in enumerate(zip(suffixes, colours, strict=True))
    }
    return f"t{index:05d}", members | {"json": json.dumps({"conversations": turns}).encode()}


@pytest.fixture
def configure_tiles(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    """A function (overrides) -> the settings of a toy run over images of several sizes, with up to four tiles."""
    for number in range(2):
        write_shard(tmp_path / f"tiled/{number}.tar", [tiled_sample(30 * number + i) for i in range(30)])
    sources = f"data.sources=[{{name: tiled, shards: '{tmp_path}/tiled/*.tar'}}]"
    return lambda *overrides: configure(sources, TILES, *overrides)


def photograph(width: int, height: int) -> Image.Image:
    """Smooth, so that its pixels hardly depend on how it is resized."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [127 + 120 * np.sin(x / 37 + index) * np.cos(y / 53 - index) for index in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Samples


def test_samples_are_what_inference_sees(configure_tiles: Configure) -> None:
    config = configure_tiles("data.fast_pixels=false")
    processor = initial_processor(config)
    encoder = SampleEncoder(processor, config.data, config.max_tokens)
    for index in range(12):
        key, members = tiled_sample(index)
        sample = encoder.encode({"__key__": key, "__url__": "x", **members}, 0)
        images = [members[name] for name in sorted(members) if name.endswith("png")]
        expected = [each for image in images for each in processor.image_processor.to_inputs(image)]
        assert len(sample.images) == len(expected) and all(map(torch.equal, sample.images, expected))
        counts = [NUM_INPUTS[(index + image) % len(SIZES)] for image in range(len(images))]
        assert sum(counts) == len(sample.images) == len(sample.encoded.image_starts)
        num_tokens = sample.encoded.input_ids.count(processor.image_token_id)
        assert num_tokens == len(sample.images) * processor.tokens_per_image
        assert len(sample.encoded.input_ids) == len(sample.encoded.loss_mask)
        assert processor.tokenizer.decode(
            [id for id, mask in zip(sample.encoded.input_ids, sample.encoded.loss_mask) if mask]
        ).startswith((" red", " lime", " blue", " white", " Hello", *(f" {colour}" for colour in COLOURS)))


def test_what_tiles_make_too_long_is_skipped_undecoded(
    configure_tiles: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure_tiles("data.fast_pixels=false")
    key, members = tiled_sample(3)
    monkeypatch.setattr(YiVLImageProcessor, "to_inputs", lambda *_: pytest.fail("decoded"))
    processor = initial_processor(config)
    plain = initial_processor(configure_tiles("image.tiles=0"))
    raw = {"__key__": key, "__url__": "x", **members}
    with pytest.raises(TooLong, match=r"\d+ tokens, max_tokens is"):
        SampleEncoder(processor, config.data, _num_tokens(plain, raw, config.data) + 11).encode(raw, 0)


def _num_tokens(processor: Any, raw: dict[str, Any], data: DataConfig) -> int:
    return SampleEncoder(processor, replace(data, fast_pixels=True), 400).encode(raw, 0).num_tokens


@pytest.mark.parametrize("size", [(300, 200), (90, 700), (640, 90), (200, 200), (333, 1000), (50, 40)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_tiles_are_those_of_inference_but_for_rounding(
    size: tuple[int, int], format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph(*size), format, exif=exif)
    fast, exact = to_inputs(content, 56, 6), YiVLImageProcessor(56, max_tiles=6).to_inputs(content)
    assert len(fast) == len(exact) == YiVLImageProcessor(56, max_tiles=6).count_inputs(content)
    for approximate, expected in zip(fast, exact, strict=True):
        assert approximate.shape == expected.shape == (56, 56, 3)
        assert (approximate.float() - expected.float()).abs().mean() < 3


# Runs


def test_it_learns_resumes_exactly_and_answers(configure_tiles: Configure, tmp_path: Path) -> None:
    whole = configure_tiles(f"run_dir={tmp_path}/whole", "steps=8")
    final = train(whole)
    expected = losses(whole)
    assert expected[-1] < expected[0]
    killed = configure_tiles("steps=8", "checkpoint.every_steps=3")
    stop_after(trainer(killed), 5)
    assert losses(train_again(killed)) == expected
    model = yi_vl.load(final, dtype="float32")
    assert model.processor.image_processor.max_tiles == 4
    large = png("red", (200, 90))
    assert len(model.engine.prepare([{"role": "user", "content": [{"type": "image", "image": large}]}]).key.images) == 4
    assert isinstance(model.predict(large, "What colour is it?", max_new_tokens=3), str)


def train_again(config: TrainConfig) -> TrainConfig:
    train(config)
    return config


def test_a_micro_batch_of_many_inputs_is_the_sum_of_small_ones(configure_tiles: Configure) -> None:
    """Rows with one to ten inputs of the tower, texts among them: the step's average is that of the whole batch."""
    results = []
    for micro_batch in (8, 3, 1):
        run = trainer(configure_tiles(f"micro_batch={micro_batch}", "clip_norm=null"))
        per_source, norm = step_once(run)
        results.append((per_source.sum(0).tolist(), norm))
    for result in results[1:]:
        assert result[0] == pytest.approx(results[0][0], rel=1e-5)
        assert result[1] == pytest.approx(results[0][1], rel=1e-4)


def test_the_order_of_samples_does_not_depend_on_tiles(configure_tiles: Configure) -> None:
    names = []
    for tiles in (0, 4):
        config = configure_tiles(f"image.tiles={tiles}")
        loader = StepLoader(initial_processor(config), config.data, config.max_tokens, 0, 0, 1, 8, 4)
        batches = iter(loader)
        names.append([next(batches).names for _ in range(3)])
    assert names[0] == names[1]


def test_the_default_is_no_tiles_to_the_last_bit(configure_tiles: Configure, tmp_path: Path) -> None:
    absent = configure_tiles("image.tiles=null", f"run_dir={tmp_path}/absent", "steps=3")
    none = configure_tiles("image.tiles=0", f"run_dir={tmp_path}/none", "steps=3")
    train(absent), train(none)
    assert losses(absent) == losses(none)
    assert yi_vl.load(tmp_path / "absent/final").processor.image_processor.max_tiles == 0


def test_a_checkpoints_tiles_are_kept_unless_others_are_given(configure_tiles: Configure, tmp_path: Path) -> None:
    first = train(configure_tiles(f"run_dir={tmp_path}/first", "steps=1"))
    start = ["init_from.tower=null", "init_from.language_model=null", f"init_from.checkpoint={first}"]
    for setting, expected in (("null", 4), ("0", 0), ("2", 2)):
        config = configure_tiles(*start, f"image.tiles={setting}", f"run_dir={tmp_path}/next")
        assert initial_processor(config).image_processor.max_tiles == expected
        assert initial_model(config, torch.device("cpu"))[1].image_processor.max_tiles == expected
    assert make_plan(_written(tmp_path, config), ["image.tiles=null"]).config.image.tiles == 4


def _written(folder: Path, config: TrainConfig) -> Path:
    (folder / "written.yaml").write_text(to_yaml(config))
    assert load_config(folder / "written.yaml") == config
    return folder / "written.yaml"


def test_generations_and_validation_see_tiles(configure_tiles: Configure, tmp_path: Path) -> None:
    shards = f"{tmp_path}/tiled/0.tar"
    config = configure_tiles(
        f"generations={{shards: '{shards}', every_steps: 2, count: 3, max_new_tokens: 3}}", "steps=2",
        f"validation={{sources: [{{name: held, shards: '{shards}'}}], samples: 8}}",
    )  # fmt: skip
    run = trainer(config)
    assert [[len(image) for image in sample.images] for sample in run.held_out.samples] == [[1], [3], [5]]
    run.run()
    assert "img" in (Path(config.run_dir) / "generations.html").read_text()


def test_preferences_share_the_tiles_of_their_images(
    configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    pairs = configure_preferences(configure, tmp_path, write_shard)

    def sample(index: int) -> tuple[str, Members]:
        key, members = tiled_sample(index)
        record = json.loads(members["json"])
        (question, answer) = record["conversations"]
        record = {"conversations": [question], "chosen": answer, "rejected": {"from": "gpt", "value": "It is pink."}}
        return key, members | {"json": json.dumps(record).encode()}

    write_shard(tmp_path / "tiled-pairs/0.tar", [sample(index) for index in range(30)])
    sources = f"data.sources=[{{name: pairs, shards: '{tmp_path}/tiled-pairs/*.tar'}}]"
    results = []
    for micro_batch in (8, 1):
        run = trainer(pairs(sources, TILES, f"micro_batch={micro_batch}"))
        per_source, norm = step_once(run)
        results.append([*per_source.sum(0).tolist(), norm])
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-5)
    assert results[0][0] == pytest.approx(8 * np.log(2), rel=1e-4), "at first the model is its own reference"


@pytest.mark.slow
def test_two_ranks_learn_as_one(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    run = trainer(configure())
    run.model.to(torch.bfloat16).float()  # as released; other processes do not know the toy tower
    run.save(tmp_path / "start", with_state=False)
    for number, size in enumerate((5, 21, 13)):
        write_shard(tmp_path / f"uneven/{number}.tar", [tiled_sample(30 * number + i) for i in range(size)])

    def settings(*overrides: str) -> TrainConfig:
        source = f"data.sources=[{{name: uneven, shards: '{tmp_path}/uneven/*.tar'}}]"
        start_from = f"init_from={{checkpoint: {tmp_path}/start, tower: null, language_model: null}}"
        return configure(start_from, source, TILES, "log_samples=true", "data.workers=1", "steps=4", *overrides)

    config = settings()
    assert finish(start(config, 2)) == [0, 0], output_path(config, 1).read_text()
    assert logged(config) == pytest.approx(one_process(settings(f"run_dir={tmp_path}/one")), rel=1e-4)
    again = settings(f"run_dir={tmp_path}/again", "checkpoint={every_steps: 2, keep_last: 2}")
    assert finish(start(again, 2)) == [0, 0]
    assert_same(again, config, num_ranks=2)


# Settings


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image.tiles=1", "image.tiles is 1, but one tile would be the thumbnail again; expected 0, or 2 to 64"),
        ("image.tiles=-2", "image.tiles is -2; it must be from 0 to 64"),
        ("image.tiles=65", "image.tiles is 65; it must be from 0 to 64"),
        ("image.tiles=many", "image.tiles: .*many"),
        ("image={tile: 4}", "tile"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_config_is_read(override: str, message: str, configure: Configure) -> None:
    with pytest.raises(ValueError, match=message):
        configure(override)


def test_adapters_have_the_tiles_of_their_base(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image\.tiles cannot be set with trainable\.language: lora"):
        configure(
            "init_from.tower=null", "init_from.language_model=null", f"init_from.checkpoint={tmp_path}", TILES,
            "trainable.language=lora",
        )  # fmt: skip


def test_a_run_that_was_begun_keeps_its_tiles(configure_tiles: Configure) -> None:
    stop_after(trainer(configure_tiles("checkpoint.every_steps=2")), 3)
    with pytest.raises(ValueError, match=r"image\.tiles 4, this run has 2, but the model was trained with other tiles"):
        train(configure_tiles("checkpoint.every_steps=2", "image.tiles=2"))


def test_references_are_of_the_same_tiles() -> None:
    """Those of a model without tiles are written and read as ever."""
    plain, tiled = ReferenceModel("abc", 448, True), ReferenceModel("abc", 448, True, 4)
    record = to_member(-1.0, -2.0, plain)
    assert "tiles" not in json.loads(record)
    assert read_member({"ref.json": record}, plain) == (-1.0, -2.0)
    assert read_member({"ref.json": to_member(-1.0, -2.0, tiled)}, tiled) == (-1.0, -2.0)
    for content, expected in ((record, tiled), (to_member(-1.0, -2.0, tiled), plain)):
        with pytest.raises(WrongReferenceError, match="made with tiles"):
            read_member({"ref.json": content}, expected)


# Shown


def test_the_preview_shows_tiles(configure_tiles: Configure) -> None:
    page = preview(configure_tiles("data.shuffle_buffer=1"), 8)
    assert "4 tokens per image, and as many for each of at most 4 tiles" in page
    assert "1 images, 4 tiles" in page and page.count("[image: 4 tokens]") == page.count("<img")
    assert " tiles" not in preview(configure_tiles("image.tiles=0"), 4)


def test_a_plan_counts_tiles() -> None:
    plain, all_tiles = make_plan(CHAT_6B, []), make_plan(CHAT_6B, ["image.tiles=2", "max_tokens=4096"])
    assert [row.tokens for _, row in plain.rows] == [1024 + 256]
    assert [row.tokens for _, row in all_tiles.rows] == [3 * 1024 + 256]
    average = make_plan(CHAT_6B, ["image.tiles=2", "max_tokens=4096"], image_size=(400, 300))
    assert average.rows == plain.rows
    assert all_tiles.flops(False) > 2.2 * plain.flops(False)
    with pytest.raises(ValueError, match=r"an image of 5,120 tokens and 256 tokens of text exceed max_tokens"):
        make_plan(CHAT_6B, ["image.tiles=4"])
    (line,) = tile_assumptions([(2, 1024), (2, 1024), (0, 1024)], (640, 480))
    assert "of 640 x 480 px" in line and "1,024 to 3,072 tokens" in line
    for text in ("", "448", "0x448", "448x70000", "axb"):
        with pytest.raises(ValueError, match="--image-pixels is"):
            as_image_size(text)
    assert as_image_size("1024x768") == (1024, 768)


def test_the_flops_of_tiles_are_those_that_are_counted() -> None:
    model = preset("nano")
    trains = TrainableConfig()
    config = TrainConfig(
        init_from=InitConfig(), trainable=trains, data=DataConfig(sources=[SourceConfig("a", "a.tar")])
    )
    row = Row(3 * model.num_image_tokens + 32, 32, image_inputs=3)
    without_tiles = Row(model.num_image_tokens + 32, 32)
    formula = step_flops(model, trains, row) - step_flops(model, trains, without_tiles)
    counted = count_flops(model, config, row) - count_flops(model, config, without_tiles)
    stem = 2 * _stem_flops(model, config)
    assert formula == pytest.approx(counted - stem, rel=0.05)


def _stem_flops(model: Any, config: TrainConfig) -> int:
    """Of the convolutional stem, which the formula leaves out but for the patches."""
    plain = deepcopy(model)
    plain.vision_config.stem_widths = None
    row = Row(model.num_image_tokens + 32, 32)
    return count_flops(model, config, row) - count_flops(plain, config, row)
