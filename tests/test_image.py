"""Every image that a user may pass: the right pixels, or a one-line error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import OFFICIAL

from yi_vl.image import MAX_PIXELS, YiVLImageProcessor, load_image, pad_and_resize
from yi_vl.image import resize as image_resize
from yi_vl.image import samples as image_samples

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(chunk_type: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + chunk_type + body + struct.pack(">I", zlib.crc32(chunk_type + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_FILES = {
    "missing.png": (None, "no such file"),
    "text.png": (b"this is no image", "not an image"),
    "empty.jpg": (b"", "0 bytes"),
    "truncated.jpg": (encoded(noise(200, 200), "JPEG")[:3000], "truncated"),
    "truncated.png": (encoded(noise(200, 200))[:3000], "truncated"),
    "bomb.png": (png_header(60_000, 60_000), "too many pixels"),
    "large.png": (png_header(12_000, 12_000), f"{MAX_PIXELS:,}"),
    "nothing.gif": (b"GIF89a" + bytes(7), ""),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_that_names_file_and_reason(name: str, tmp_path: Path) -> None:
    content, reason = BAD_FILES[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_image(path)
    message = str(caught.value)
    assert str(path) in message and reason in message and "\n" not in message


def test_an_image_that_was_opened_but_not_read_may_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(encoded(noise(200, 200), "JPEG")[:3000])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"cut\.jpg is damaged"):
        load_image(image)


def test_folder_and_unknown_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ValueError, match="expected a path, bytes"):
        load_image(42)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 bytes"):
        load_image(b"")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = 255 if mode == "1" else 200
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 8), grey << 8, np.uint16))
    else:
        image = Image.new("L", (8, 6), grey).convert(mode)
    assert image.mode == mode
    rgb = load_image(image)
    assert rgb.mode == "RGB" and rgb.size == (8, 6)
    assert np.abs(np.asarray(rgb).astype(int) - grey).max() <= 2


def test_cmyk_jpeg_and_16_bit_png() -> None:
    assert load_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")).getpixel((1, 1))[0] > 200
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256)
    grey = np.asarray(load_image(encoded(Image.fromarray(ramp))))[0, :, 0]
    assert grey[0] == 0 and grey[-1] == 255 and np.all(np.diff(grey.astype(int)) >= 0)


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (*RED, 0))
    clear.putpixel((0, 0), (*RED, 255))
    rgb = load_image(encoded(clear))
    assert rgb.getpixel((0, 0)) == RED and rgb.getpixel((3, 3)) == WHITE
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    rgb = load_image(encoded(palette, transparency=1))
    assert rgb.getpixel((0, 0)) == RED and rgb.getpixel((3, 3)) == WHITE


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animation = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(animation).getpixel((0, 0)) == RED


def test_exif_rotation_is_applied() -> None:
    sideways = Image.new("RGB", (8, 4), "white")
    sideways.paste("red", (0, 0, 2, 4))  # red at the left; upright, after a quarter turn clockwise, at the top
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = load_image(encoded(sideways, exif=exif))
    assert upright.size == (4, 8) and upright.getpixel((0, 0)) == RED and upright.getpixel((0, 7)) == WHITE


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "image.txt"
    path.write_bytes(encoded(Image.new("RGB", (3, 2), "red"), "BMP"))
    assert load_image(str(path)).size == (3, 2)


@pytest.mark.parametrize(
    "array",
    [
        np.full((5, 8, 3), RED, np.uint8),
        np.full((5, 8, 4), (*RED, 255), np.uint8),
        np.full((5, 8, 3), (1.0, 0.0, 0.0)),
        np.full((5, 8, 3), RED, np.int64),
        torch.tensor(RED, dtype=torch.uint8)[:, None, None].expand(3, 5, 8),
        torch.tensor((1.0, 0.0, 0.0), dtype=torch.bfloat16)[:, None, None].expand(3, 5, 8),
    ],
)
def test_arrays(array: np.ndarray | torch.Tensor) -> None:
    image = load_image(array)
    assert image.size == (8, 5) and image.getpixel((7, 4)) == RED


def test_grey_arrays() -> None:
    for array in (np.full((5, 4), 7, np.uint8), np.full((5, 4, 1), 7, np.uint8)):
        assert load_image(array).getpixel((0, 0)) == (7, 7, 7)
    assert load_image(np.array([[True, False]])).getpixel((0, 0)) == WHITE


GREY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
DARK = (GREY // 16).astype(np.uint8)
SAME = {  # the same image, in other modes and types
    "F in 0..1": Image.fromarray((GREY / 255).astype(np.float32)),
    "F in 0..255": Image.fromarray(GREY.astype(np.float32)),
    "F in 0..65535": Image.fromarray(GREY.astype(np.float32) * 257),
    "F that overshoots": Image.fromarray((GREY / 255 * 1.16 - 0.08).astype(np.float32)),
    "I of 8 bits": Image.fromarray(GREY.astype(np.int32)),
    "I of 16 bits": Image.fromarray(GREY.astype(np.int32) * 257),
    "I of 24 bits": Image.fromarray(GREY.astype(np.int32) << 16),
    "I of 31 bits": Image.fromarray(GREY.astype(np.int32) << 23),
    "I;16": Image.fromarray(GREY.astype(np.uint16) * 257),
    "I;16, 8 bits": Image.fromarray(GREY.astype(np.uint16)),
    "I;16, 10 bits": Image.fromarray(GREY.astype(np.uint16) << 2),
    "I;16, 12 bits": Image.fromarray(GREY.astype(np.uint16) << 4),
    "I;16, 14 bits": Image.fromarray(GREY.astype(np.uint16) << 6),
    "I;16B": Image.frombytes("I;16B", (30, 20), (GREY.astype(np.uint16) * 257).astype(">u2").tobytes()),
    "uint16": GREY.astype(np.uint16) << 8,
    "int32": GREY.astype(np.int32) << 8,
    "uint32": GREY.astype(np.uint32) << 24,
    "int64 in colour": np.stack([GREY.astype(np.int64) << 8] * 3, -1),
    "float16": (GREY / 255).astype(np.float16),
    "float64 in 0..255": GREY.astype(np.float64),
    "a tensor": torch.from_numpy(GREY.astype(np.float32)).expand(3, 20, 30),
    "a tensor of uint16": torch.from_numpy(GREY.astype(np.uint16) << 8),
    "La": Image.fromarray(GREY).convert("LA").convert("La"),
    "RGBa": Image.fromarray(GREY).convert("RGBA").convert("RGBa"),
    "PA": Image.fromarray(GREY).convert("P").convert("PA"),
    "HSV": Image.fromarray(GREY).convert("RGB").convert("HSV"),
    "RGBX": Image.fromarray(GREY).convert("RGB").convert("RGBX"),
}


@pytest.mark.parametrize("source", SAME)
def test_samples_of_every_mode_are_the_8_bit_image(source: str) -> None:
    tolerance = 20 if source == "F that overshoots" else 2
    grey = np.asarray(load_image(SAME[source])).astype(int)
    assert np.abs(grey - GREY[..., None]).max() <= tolerance


@pytest.mark.parametrize("factor", [256, 257])
def test_dark_images_stay_dark_in_16_bits(factor: int) -> None:
    for dtype in (np.uint16, np.int32):
        assert np.array_equal(np.asarray(load_image(Image.fromarray(DARK.astype(dtype) * factor)))[..., 0], DARK)


def test_transparent_16_bit_samples_are_white() -> None:
    ramp = (np.arange(12, dtype=np.uint16).reshape(3, 4) + 200) << 8
    grey = np.asarray(load_image(encoded(Image.fromarray(ramp), transparency=int(ramp[1, 1]))))
    assert grey[1, 1].tolist() == [255] * 3 and grey[0, 0].tolist() == [200] * 3


@pytest.mark.parametrize("samples", [[[0.0, 5.0]], [[0.0, float("nan")]], [[-300.0, 300.0]], [[0.0, 1e12]]])
def test_samples_that_are_none_of_an_image_are_refused_in_every_type(samples: list[list[float]]) -> None:
    array = np.array(samples, np.float32)
    for source in (array, Image.fromarray(array), torch.from_numpy(array)):
        with pytest.raises(ValueError, match="outside"):
            load_image(source)


def test_pixels_are_normalized_where_the_images_are() -> None:
    images = torch.zeros(2, 14, 14, 3, dtype=torch.uint8, device="meta")
    assert YiVLImageProcessor(size_px=14).to_pixel_values(images).device.type == "meta"


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3, 5)), np.zeros(4), np.full((2, 2), 2.0), np.full((2, 2), np.nan), np.full((2, 2), -1)]
)
def test_arrays_that_are_no_image(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"shape|outside"):
        load_image(array)


def padded_then_resized(image: Image.Image, size_px: int) -> Image.Image:
    side = max(image.size)
    padded = Image.new("RGB", (side, side), (122, 116, 104))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded.resize((size_px, size_px), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(97, 61), (40, 300), (1, 1), (64, 64), (700, 5), (3, 517), (1, 900), (9, 8), (8, 9)])
def test_pad_and_resize_equals_padding_then_resizing(size: tuple[int, int]) -> None:
    image = noise(*size)
    assert pad_and_resize(image, 56).tobytes() == padded_then_resized(image, 56).tobytes()


@pytest.mark.parametrize("max_padded_pixels", [0, 1 << 25])  # large long images, and all others
def test_every_variant_of_resizing_equals_padding_then_resizing(
    max_padded_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_resize, "_MAX_PADDED_PIXELS", max_padded_pixels)
    rng = np.random.default_rng(max_padded_pixels)
    for index in range(150):
        width, height = np.exp(rng.uniform(0, 6.9, 2)).astype(int).tolist()  # 1 to 1000 px
        monkeypatch.setattr(image_resize, "_STRIP_PIXELS", int(rng.choice([100, 10_000, 1 << 19])))
        size_px = int(rng.choice([28, 112, 224, 448]))
        image = noise(width, height, index)
        if index % 2:
            image = image.point(lambda value: 255 * (value > 127))  # where kernels overshoot
        assert pad_and_resize(image, size_px).tobytes() == padded_then_resized(image, size_px).tobytes(), image.size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_of_a_turned_image_are_the_turned_image(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(23, 37)
    image.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(image)
    strips = image_samples.strips_of_image(image, "it")
    assert strips.size == upright.size
    for start, stop in ((0, 5), (5, 22), (11, 12), (0, upright.height)):
        assert strips.read(start, stop).tobytes() == upright.crop((0, start, upright.width, stop)).tobytes()
    monkeypatch.setattr(image_samples, "_STRIP_PIXELS", 100)
    assert load_image(image).tobytes() == upright.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (10_000, 20), (20, 10_000)])
def test_extreme_shapes_become_pixels(size: tuple[int, int]) -> None:
    pixels = YiVLImageProcessor(size_px=56)(Image.new("RGB", size, "red"))["pixel_values"]
    assert pixels.shape == (1, 3, 56, 56) and pixels.isfinite().all()


@pytest.mark.parametrize(
    ("case", "names"), [("one_image", ["wide"]), ("chinese", ["tall"]), ("two_images", ["wide", "tall"])]
)
def test_pixels_equal_the_official_ones(case: str, names: list[str]) -> None:
    golden = np.load(OFFICIAL / "golden.npz")[f"{case}.pixels"]
    pixels = YiVLImageProcessor(size_px=56)([OFFICIAL / f"{name}.png" for name in names])["pixel_values"]
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), golden, atol=1e-5)


def test_preparing_twice_changes_nothing() -> None:
    processor = YiVLImageProcessor(size_px=56)
    once = processor.prepare(noise(70, 30))
    assert np.array_equal(np.asarray(processor.prepare(once)), np.asarray(once))


def test_batches_of_batches_keep_reading_order() -> None:
    processor = YiVLImageProcessor(size_px=14)
    colours = [Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue")]
    pixels = processor([[colours[0]], [colours[1], colours[2]]])["pixel_values"]
    assert pixels.shape == (3, 3, 14, 14)
    assert pixels.mean((2, 3)).argmax(1).tolist() == [0, 1, 2]
