"""Hostile images: answered or refused quickly and in little memory, through every entry point for images."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import CONTEXT, finish
from tiny import tiny_yi_vl

from yi_vl.chat import from_llava, render
from yi_vl.encode import TooLongError
from yi_vl.image import WEB_FORMATS, YiVLImageProcessor, load_image

HERE = Path(__file__).parent
ROOM_BYTES = 1 << 30  # of address space, for the largest image besides what importing takes
PATIENCE_SECONDS = 20  # of a processor's time, for what takes one or two; what is meant took minutes


def chunk(chunk_type: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + chunk_type + body + struct.pack(">I", zlib.crc32(chunk_type + body))


def png(width: int, height: int, depth: int, color_type: int, num_channels: int, more: bytes = b"") -> bytes:
    """A whole PNG, of stripes, written row by row."""
    row = (
        b"\0"
        + (bytes(range(256)) * (width * depth * num_channels // 2048 + 1))[: (width * depth * num_channels + 7) // 8]
    )
    pack = zlib.compressobj(1)
    many, rest = divmod(height, 64)
    rows = b"".join([*(pack.compress(row * 64) for _ in range(many)), pack.compress(row * rest), pack.flush()])
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", rows) + chunk(b"IEND")


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def phone_photo(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.new("RGB", (12_032, 9_024), "teal"), "JPEG", quality=30, exif=exif)


def icon(content: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


def apple_icon(content: bytes) -> bytes:
    return b"icns" + struct.pack(">I4sI", 16 + len(content), b"ic10", 8 + len(content)) + content


def gif_with(extensions: bytes) -> bytes:
    gif = encoded(Image.new("P", (8, 8)), "GIF")
    end = 13 + 3 * (2 << (gif[10] & 7))
    return gif[:end] + extensions + gif[end:]


def png_with(chunks: bytes) -> bytes:
    small = encoded(Image.new("RGB", (8, 8)), "PNG")
    return small[:33] + chunks + small[33:]


def jpeg_with(segments: bytes) -> bytes:
    small = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return small[:2] + segments + small[2:]


def jpeg_of_scans(side_px: int, num_scans: int) -> bytes:
    """A progressive JPEG whose scans after the first say, in a few bytes each, that nothing changes in any block."""
    num_blocks = (side_px // 8) ** 2
    tables = b"\xff\xdb\0\x43\0" + bytes([1] * 64)
    for table_id, symbol in ((0x00, 0), (0x10, 0xE0)):
        tables += b"\xff\xc4" + struct.pack(">HB", 20, table_id) + bytes([1] + [0] * 15 + [symbol])
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, side_px, side_px, 1) + bytes([1, 0x11, 0])
    bits = ("0" + "1" * 14) * (num_blocks // 32_767 + 1)
    nothing = int(bits + "1" * (-len(bits) % 8), 2).to_bytes((len(bits) + 7) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1)
    first = scan + bytes([1, 0, 0, 0, 0]) + bytes(num_blocks // 8 + 1)
    return b"\xff\xd8" + tables + frame + first + (scan + bytes([1, 0, 1, 63, 0]) + nothing) * num_scans + b"\xff\xd9"


def bmp_in_rle(side_px: int) -> bytes:
    runs = b"\xff\x01" * (side_px * side_px // 255 + 1)
    header = struct.pack("<IiiHHIIiiII", 40, side_px, side_px, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, 1078) + header + bytes(1024) + runs


FILES: dict[str, tuple[Callable[[], bytes], str]] = {  # name -> content, and the reason to refuse it, "" for none
    "100,000,000 x 1": (lambda: png(100_000_000, 1, 1, 0, 1), "a side of at most 65,535"),
    "1 x 300,000": (lambda: png(1, 300_000, 8, 2, 3), "a side of at most 65,535"),
    "1 x 65,535": (lambda: png(1, 65_535, 8, 2, 3), ""),
    "1,600 x 65,535": (lambda: png(1_600, 65_535, 8, 2, 3), ""),
    "16-bit grey": (lambda: png(10_000, 10_000, 16, 0, 1), ""),
    "colour and alpha": (lambda: png(10_000, 10_000, 8, 6, 4), ""),
    "phone, upright": (lambda: phone_photo(6), ""),
    "too many pixels": (lambda: png(12_000, 12_000, 1, 0, 1), "at most 110,000,000"),
    "icon": (lambda: icon(png(10_000, 10_000, 1, 0, 1)), "an icon that holds an image of 10000 x 10000"),
    "icon, two headers": (
        lambda: icon(png(16, 16, 8, 0, 1)[:33] + png(10_000, 10_000, 1, 0, 1)[8:]),
        "an icon that holds an image of 10000 x 10000",
    ),
    "icon, bitmap": (
        lambda: icon(struct.pack("<IiiHHIIiiII", 40, 12_000, 12_000, 1, 32, 0, 0, 0, 0, 0, 0)),
        "an icon that holds an image of 12000 x 12000",
    ),
    "Apple's icon": (lambda: apple_icon(png(10_000, 10_000, 1, 0, 1)), "an icon that holds an image of 10000 x 10000"),
    "GIF comments": (lambda: gif_with(b"!\xfe\1a\0" * 3_000_000), "too many pieces"),
    "GIF comment in parts": (lambda: gif_with(b"!\xfe" + b"\1a" * 4_000_000 + b"\0"), "too many pieces"),
    "PNG chunks": (lambda: png_with(chunk(b"abCd") * 1_000_000), "too many pieces"),
    "PNG profile": (lambda: png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 28)))), "cannot be decoded"),
    "JPEG comments": (lambda: jpeg_with(b"\xff\xfe\0\2" * 4_000_000), "too many pieces"),
    "JPEG of 400 scans": (lambda: jpeg_of_scans(10_000, 400), "more than 50 scans"),
    "QOI": (
        lambda: b"qoif" + struct.pack(">IIBB", 10_000, 10_000, 3, 0) + b"\xfd" * 1_700_000,
        "decoded slowly",
    ),
    "BMP in RLE": (lambda: bmp_in_rle(10_000), "decoded slowly"),
    "PostScript": (lambda: encoded(Image.new("RGB", (8, 8)), "EPS"), "another program would draw"),
}


def read_all(outcomes: Path) -> None:
    """Read every file, in a process of its own, whose address space is hardly larger than imports have made it."""
    torch.set_num_threads(1)
    processor = YiVLImageProcessor(size_px=112)
    processor.prepare(Image.new("RGB", (8, 8)))  # imports what is imported late
    contents = {name: make() for name, (make, _) in FILES.items()}
    reserved = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (reserved + ROOM_BYTES, reserved + ROOM_BYTES))
    with outcomes.open("w", encoding="utf-8") as file:
        for name, content in contents.items():
            start, outcome = time.process_time(), ""
            try:
                assert processor.prepare(content).size == (112, 112)
            except ValueError as error:
                outcome = str(error)
            file.write(json.dumps([name, outcome, time.process_time() - start]) + "\n")
    assert load_image(contents["16-bit grey"]).size == (10_000, 10_000)
    assert load_image(contents["phone, upright"]).height > load_image(contents["phone, upright"]).width


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    written = tmp_path_factory.mktemp("hostile") / "outcomes.jsonl"
    process = CONTEXT.Process(target=read_all, args=(written,))
    process.start()
    assert finish([process]) == [0]
    rows = map(json.loads, written.read_text(encoding="utf-8").splitlines())
    return {name: (outcome, seconds) for name, outcome, seconds in rows}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs a limit on address space")
@pytest.mark.parametrize("name", FILES)
def test_hostile_files_are_answered_or_refused_soon_and_in_little_memory(
    name: str, outcomes: dict[str, tuple[str, float]]
) -> None:
    outcome, seconds = outcomes[name]
    reason = FILES[name][1]
    assert reason in outcome and bool(reason) == bool(outcome) and "\n" not in outcome
    assert seconds < PATIENCE_SECONDS


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((1, 300_000, 3), np.uint8), "a side of at most"),
        (torch.zeros(3, 300_000, 2), "a side of at most"),
        (np.broadcast_to(np.uint16(0), (20_000, 20_000)), "at most 110,000,000"),
        (np.zeros((5, 0, 3), np.uint8), "no pixels"),
        (np.zeros((0, 5)), "no pixels"),
        (np.zeros((2, 2), complex), "complex128 values"),
        (np.array([["a"]]), "values; expected"),
    ],
)
def test_arrays_are_bounded_as_files_are(array: np.ndarray | torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_image(array)


def test_opened_images_are_bounded_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, reason in (
        (png(1, 300_000, 1, 0, 1), "a side of at most"),
        (encoded(Image.new("RGB", (8, 8)), "EPS"), "another program"),
        (jpeg_of_scans(64, 60), "scans"),
    ):
        with Image.open(io.BytesIO(content)) as image, pytest.raises(ValueError, match=reason):
            monkeypatch.setattr(type(image), "load", lambda *_: pytest.fail("it was decoded"))
            load_image(image)


def test_ordinary_files_of_the_same_kinds_are_read() -> None:
    photo = Image.effect_noise((96, 64), 50).convert("RGB")
    for image_format, options in (
        ("ICO", {"sizes": [(32, 32), (96, 64)]}),
        ("ICNS", {}),
        ("QOI", {}),
        ("JPEG", {"progressive": True, "comment": b"a comment"}),
        ("MPO", {"save_all": True, "append_images": [photo]}),
        ("GIF", {"comment": b"a comment" * 1000}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("JPEG2000", {}),
    ):
        assert load_image(encoded(photo, image_format, **options)).mode == "RGB"
    assert load_image(encoded(photo, "MPO", save_all=True, append_images=[photo]), WEB_FORMATS).size == (96, 64)
    with pytest.raises(ValueError, match="not an image of a format that is read: PNG, JPEG"):
        load_image(encoded(photo, "JPEG2000"), WEB_FORMATS)


def test_training_reads_within_the_same_bounds() -> None:
    from train.data.fast_image import to_inputs

    for name in ("1 x 300,000", "icon", "GIF comments", "JPEG of 400 scans", "PostScript"):
        make, reason = FILES[name]
        with pytest.raises(ValueError, match=reason):
            to_inputs(make(), 56)


def test_what_cannot_fit_is_refused_before_it_is_tokenized() -> None:
    yi_vl = tiny_yi_vl()
    start = time.process_time()
    for content in (
        "a" * 30_000_000,
        " " * 30_000_000 + "a",
        "#" * 5_000,
        [{"type": "image", "image": "a.png"}] * 200_000 + [{"type": "text", "text": "What?"}] * 2,
    ):
        with pytest.raises(TooLongError, match="takes at least"):
            yi_vl.answer([{"role": "user", "content": content}])
    assert time.process_time() - start < PATIENCE_SECONDS


def test_messages_of_many_parts_are_walked_once() -> None:
    start = time.process_time()
    (message,) = from_llava([{"from": "human", "value": "<image>\n" * 100_000 + "What?"}])
    assert len(message["content"]) == 100_001
    parts = [{"type": "image"}] * 100_000 + [{"type": "text", "text": "What?"}] * 1_000
    assert len(render([{"role": "user", "content": parts}], add_generation_prompt=True)) > 101_000
    assert time.process_time() - start < PATIENCE_SECONDS
