"""The quick pixels of training against inference's, and the benchmarks at toy size: never their times."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor

from train.config import DataConfig, SourceConfig
from train.data.encoder import SampleEncoder
from train.data.fast_image import to_inputs
from train.speed.data import baseline, drift, make_shards, processor_for, resident_memory, yi_vl_loader
from train.speed.step import SampleFormat, compare, make_work
from yi_vl.image import YiVLImageProcessor

pytestmark = pytest.mark.slow


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, with edges, as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 20, 30), (width // 4, height // 4, width // 2, height // 2))
    return image


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def differences(content: bytes, size_px: int) -> torch.Tensor:
    (fast,) = to_inputs(content, size_px)
    exact = YiVLImageProcessor(size_px).to_uint8(content)
    assert fast.shape == exact.shape and fast.dtype == torch.uint8
    return (fast.float() - exact.float()).abs()


@pytest.mark.parametrize("size", [(640, 480), (301, 450), (56, 56), (57, 57), (500, 3), (90, 89)])
def test_without_scaled_decoding_only_rounding_differs(size: tuple[int, int]) -> None:
    assert differences(encoded(photograph(*size), "PNG"), 56).max() <= 1


@pytest.mark.parametrize("size", [(640, 480), (640, 472), (639, 480), (641, 479), (480, 640), (1301, 700), (143, 100)])
def test_a_scaled_jpeg_lies_where_the_whole_one_does(size: tuple[int, int]) -> None:
    """A final pixel beside its place, the mean would be 10."""
    assert differences(encoded(photograph(*size), "JPEG", quality=90), 56).mean() < 1.5


@pytest.mark.parametrize(("mode", "orientation"), [("RGB", 3), ("RGB", 6), ("L", 1), ("CMYK", 8)])
def test_a_scaled_jpeg_may_be_turned_or_grey(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert differences(encoded(photograph(640, 472).convert(mode), "JPEG", quality=90, exif=exif), 56).mean() < 1.5


def test_a_large_jpeg_is_decoded_scaled_and_a_small_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import train.data.fast_image

    decoded: list[tuple[int, int]] = []
    load = train.data.fast_image.load_image
    monkeypatch.setattr(train.data.fast_image, "load_image", lambda image: decoded.append(image.size) or load(image))
    for side in (139, 141, 447, 449, 895, 897):
        to_inputs(encoded(photograph(side, side // 2), "JPEG"), 56)
    assert [size[0] for size in decoded] == [139, 71, 224, 113, 224, 113]


def test_errors_name_what_is_broken() -> None:
    for content, reason in ((b"", "0 bytes"), (b"rotten", "not an image")):
        with pytest.raises(ValueError, match=reason):
            to_inputs(content, 56)
    with pytest.raises(ValueError, match="damaged"):
        to_inputs(encoded(photograph(640, 480), "JPEG")[:3000], 56)


def test_the_option_makes_inferences_pixels() -> None:
    processor = processor_for(56)
    content = encoded(photograph(640, 480), "JPEG")
    raw = {"__url__": "x", "__key__": "k", "jpg": content, "txt": b"a"}
    exact = processor.image_processor.to_uint8(content)
    for is_fast in (True, False):
        data = DataConfig("caption", [SourceConfig("x", "x")], fast_pixels=is_fast)
        (image,) = SampleEncoder(processor, data, 100).encode(raw, 0).images
        assert torch.equal(image, exact) == (not is_fast)


def test_both_loaders_read_the_same_samples(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    shard = make_shards(tmp_path, "jpg", 16)
    processor = processor_for(56)
    batches = [next(load(shard, processor)) for load in (baseline, yi_vl_loader)]
    words, supervised, colours = [], [], []
    for batch in batches:
        words.append(sorted(row[row != 0].tolist() for row in batch["input_ids"]))
        supervised.append(int((batch["labels"] != -100).sum()))
        colours.append(batch["pixel_values"].mean((2, 3)).sort(dim=0).values)
    assert words[0] == words[1] and supervised[0] == supervised[1]
    assert colours[0].shape == (20, 3), "every fourth of 16 has two"
    torch.testing.assert_close(colours[0], colours[1], rtol=0, atol=0.1)
    assert make_shards(tmp_path, "jpg", 16).stat().st_mtime_ns == shard.stat().st_mtime_ns
    assert all(0 < difference < 10 for difference in drift(shard, 56, 4))


def test_resident_memory_is_told_at_each_tenth(tmp_path: Path) -> None:
    rows = list(resident_memory(tmp_path, 1600))
    assert [done for done, _ in rows] == [160 * tenth for tenth in range(1, 11)]
    assert all(megabytes > 50 for _, megabytes in rows)


@pytest.mark.parametrize("sample_format", ["caption", "chat"])
def test_both_loops_train_alike(sample_format: SampleFormat, tmp_path: Path) -> None:
    """On a model without batch norm, its micro-batches sorted: the same losses, step by step."""
    checkpoint = tmp_path / "tiny"
    tiny_model(max_position_embeddings=4096).save_pretrained(checkpoint)
    tiny_processor().save_pretrained(checkpoint)
    work = make_work(tmp_path, checkpoint, sample_format, (8, 4), 3, "fp32", compiles=False)
    assert len({row.tokens for row in work.rows}) > 3 and len(work.rows) == 16
    measured = compare(work)
    first, second = measured["losses"].values()
    assert second == pytest.approx(first, abs=1e-4) and len(first) == 3
    assert set(measured["loops"]) == {"baseline", "train"}
