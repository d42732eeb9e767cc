"""The images of a source of shards: files inside a folder, `data:` URLs, or bytes; and the members that they become."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path, PureWindowsPath
from typing import Any

from yi_vl.image import load_image, open_image
from yi_vl.image.data_url import png_bytes

from .files import Members

_SUFFIX_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # MPO: a JPEG that is followed by more images


def image_bytes(value: Any, folder: Path) -> bytes:
    """The file that a cell or key holds or names: bytes, a path, a data: URL, or {"bytes", "path"} (bytes first).

    Raises:
        ValueError: it is none of these, leads out of the folder, or cannot be read.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return _decode_data_url(value) if value.startswith("data:") else _read_inside(folder, value)
    if not isinstance(value, bytes):
        raise ValueError(f"its image is {type(value).__name__}; expected bytes or {{bytes, path}}")
    return value


def _decode_data_url(url: str) -> bytes:
    head, _, coded = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"its image is the URL {url[:40]!r}...; of data: URLs those in base64 are read")
    try:
        return base64.b64decode(coded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its image is a data: URL that is damaged: {error}") from error


def _read_inside(folder: Path, name: str) -> bytes:
    """A file of the folder. Symbolic links are followed, as the owner of the folder made them, unlike the name."""
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
        raise ValueError(f"the image {name[:200]!r} is a URL, and nothing is downloaded; put it into the image folder")
    path = PureWindowsPath(name)  # knows the separators and roots of all systems
    if path.anchor or ".." in path.parts:
        raise ValueError(f"the image path {name!r} leads out of the image folder")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"the image {name!r} cannot be read: {error.strerror}") from error


def image_members(contents: list[bytes]) -> Members:
    """The members of some encoded images, each of which is decoded once as a check."""
    members: Members = {}
    for index, content in enumerate(contents):
        with open_image(content) as image:
            suffix = _SUFFIX_OF_FORMAT.get(image.format or "")
            decoded = load_image(image)
        if suffix is None:  # a format that the trainer does not read
            suffix, content = "png", png_bytes(decoded)
        members[suffix if len(contents) == 1 else f"{index}.{suffix}"] = content
    return members
