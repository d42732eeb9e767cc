"""Image files opened within bounds: what is too large, or hides something that is, is refused before it is decoded.

Pillow reads a file's header when it opens it, and decodes when pixels are accessed; these checks are made in between.
Icons are checked before they are opened, because Pillow decodes them then.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    features,
)

from .samples import ImageError, decoding

MAX_PIXELS = 110_000_000  # more than a 108-megapixel phone's 12,032 x 9,024; RGB of so many takes 0.44 GB
MAX_SIDE_PX = 65_535  # a JPEG's longest
# What strangers may send: not all that Pillow reads. AVIF comes with most builds of Pillow from 11.3 on.
_AVIF = ("AVIF",) if "avif" in features.get_supported_modules() else ()
WEB_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *_AVIF)

_MAX_PYTHON_PIXELS = 4_000_000  # of what Pillow decodes in Python, at about a microsecond each: QOI, BMP in RLE
_MAX_ICON_SIDE_PX = 4096  # of an image in an icon
_MAX_FULL_JPEG_PIXELS = 50_000_000  # at half its size a JPEG takes half the time and a quarter of the memory
_MAX_SCANS = 50  # of a progressive JPEG, each of which passes over the whole image; ten are usual
_MAX_SEGMENTS = 10_000  # of a progressive JPEG
_SEGMENT = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")  # its marker; the other codes belong to coded data
_MAX_READS = {  # by a file's first bytes: number of reads always allowed, and bytes per additional one
    b"\x89PNG": (100_000, 1 << 10),
    b"\xff\xd8": (5_000, 1 << 14),
    b"GIF8": (5_000, 1 << 14),
}


@contextmanager
def open_file(source: Path | bytes, name: str, formats: Sequence[str] | None = None) -> Iterator[Image.Image]:
    """An image file within bounds, not decoded yet.

    Args:
        name: of the file, for errors.
        formats: those that are read, as Pillow calls them; by default all of raster images.

    Raises:
        ImageError: it is no image of these formats, or damaged, or `check_image` refuses it.
    """
    try:
        raw = io.FileIO(source) if isinstance(source, Path) else io.BytesIO(source)
    except OSError as error:
        raise ImageError(f"{name} cannot be read as an image: {error.strerror}.") from error
    with _BoundedReader(raw, name) as file:  # type: ignore[arg-type]
        _check_icon(file, name)
        image = _open(file, name, formats)
        check_image(image, name)
        yield image


def halve_large_jpeg_(image: Image.Image) -> None:
    """Let a JPEG of more than 50 megapixels, which is not decoded yet, be decoded at half its size."""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.width * image.height > _MAX_FULL_JPEG_PIXELS:
        image.draft(None, (image.width // 2, image.height // 2))


def check_size(size: tuple[int, int], name: str) -> None:
    """
    Raises:
        ImageError: an image of this (width, height) has no pixels, or more than are read.
    """
    width, height = size
    if not width or not height:
        raise ImageError(f"{name} has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are read. Shrink it first.")
    if max(size) > MAX_SIDE_PX:
        raise ImageError(
            f"{name} has {width} x {height} pixels; a side of at most {MAX_SIDE_PX:,} is read. Cut it into parts."
        )


def check_image(image: Image.Image, name: str) -> None:
    """Look at an opened image before it is decoded.

    Raises:
        ImageError: it is too large, would take too long, or is not decoded by Pillow itself.
    """
    check_size(image.size, name)
    tiles = getattr(image, "tile", ())  # what is to be decoded, none afterwards
    if isinstance(image, ImageFile.StubImageFile) or (tiles and image.format in ("EPS", "IPTC")):
        raise ImageError(f"{name} is {image.format}, which another program would draw; save it as PNG or JPEG.")
    num_pixels = image.width * image.height
    if num_pixels > _MAX_PYTHON_PIXELS and any(tile[0] in Image.DECODERS for tile in tiles):
        raise ImageError(
            f"{name} has {image.width} x {image.height} pixels; of {image.format} in this coding, which is decoded "
            f"slowly, at most {_MAX_PYTHON_PIXELS:,} are read. Save it as PNG or JPEG."
        )
    if tiles and image.info.get("progressive") and isinstance(image, JpegImagePlugin.JpegImageFile):
        with decoding(name):
            has_too_many_scans = _has_too_many_scans(image.fp)
        if has_too_many_scans:
            raise ImageError(f"{name} is a JPEG of more than {_MAX_SCANS} scans; save it again.")


class _BoundedReader(io.BufferedReader):
    """Refuses files made of too many pieces: Pillow looks at each in Python, and joins a GIF's or a JPEG's comments in
    a time that grows with the square of their number."""

    def __init__(self, raw: io.RawIOBase, name: str) -> None:
        super().__init__(raw)
        self._name = name
        num_bytes = self.seek(0, os.SEEK_END)
        self.seek(0)
        head = super().read(4)
        self.seek(0)
        limits = [limit for magic, limit in _MAX_READS.items() if head.startswith(magic)]
        self._num_left = (
            sum(fixed + num_bytes // bytes_each for fixed, bytes_each in limits) or -1
        )  # negative: no limit

    def read(self, size: int | None = -1, /) -> bytes:
        if not self._num_left:
            raise ImageError(f"{self._name} is made of too many pieces; save it again, without comments.")
        self._num_left -= 1
        return super().read(size)


def _open(file: IO[bytes], name: str, formats: Sequence[str] | None) -> Image.Image:
    try:
        with decoding(name), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            return Image.open(file, formats=None if formats is None else tuple(formats))
    except ImageError as error:
        cause = error.__cause__
        if isinstance(cause, Image.DecompressionBombError):
            raise ImageError(f"{name} is refused, it unpacks to too many pixels ({cause}).") from cause
        if isinstance(cause, UnidentifiedImageError):
            supported = f"that is read: {', '.join(formats)}" if formats else "Pillow knows"
            raise ImageError(
                f"{name} is not an image of a format {supported} (its content counts, not its name)."
            ) from cause
        raise


def _check_icon(file: _BoundedReader, name: str) -> None:
    """Pillow decodes an icon as it opens it, so its images are looked at before.

    Raises:
        ImageError: one is too large, whatever the icon says of it.
    """
    head = file.read(8)
    offsets: list[int] = []
    if head[:4] in (b"\0\0\1\0", b"\0\0\2\0"):
        file.seek(6)
        entries = file.read(16 * int.from_bytes(head[4:6], "little"))
        offsets = [int.from_bytes(entries[end - 4 : end], "little") for end in range(16, len(entries) + 1, 16)]
    elif head[:4] == b"icns":
        while len(block := file.read(8)) == 8 and (num_bytes := int.from_bytes(block[4:], "big")) > 8:
            offsets.append(file.tell())
            file.seek(num_bytes - 8, os.SEEK_CUR)
    for offset in offsets:
        file.seek(offset)
        size = _nested_size(file)
        if max(size) > _MAX_ICON_SIDE_PX:
            raise ImageError(
                f"{name} is an icon that holds an image of {size[0]} x {size[1]} pixels; in an icon a side of at most "
                f"{_MAX_ICON_SIDE_PX:,} is read."
            )
    file.seek(0)


def _nested_size(file: _BoundedReader) -> tuple[int, int]:
    """The size of an image that begins here, as Pillow will read it; (0, 0) if it is none, as Pillow will say."""
    magic = file.read(12)
    file.seek(-len(magic), os.SEEK_CUR)
    opener: type[ImageFile.ImageFile] = BmpImagePlugin.DibImageFile
    if magic.startswith(b"\x89PNG"):
        opener = PngImagePlugin.PngImageFile
    elif magic.startswith((b"\xff\x4f\xff\x51", b"\x0d\x0a\x87\x0a", b"\0\0\0\x0cjP  ")):
        opener = Jpeg2KImagePlugin.Jpeg2KImageFile
    with suppress(Exception):
        return opener(file).size
    return 0, 0


def _has_too_many_scans(file: IO[bytes] | None) -> bool:
    """Whether a progressive JPEG, opened and not decoded yet, has more than `_MAX_SCANS`."""
    if file is None:
        return False
    offset = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(offset)
    num_scans, end = 0, 2  # after the start of the image
    for _ in range(_MAX_SEGMENTS):
        segment = _SEGMENT.search(data, end)
        if segment is None or segment[1] == b"\xd9" or num_scans > _MAX_SCANS:
            return num_scans > _MAX_SCANS
        num_scans += segment[1] == b"\xda"
        end = segment.end() + max(2, int.from_bytes(data[segment.end() : segment.end() + 2], "big"))
    return True
