"""Image sources resolved to a path, bytes, a PIL image or an array.

Streams (file objects, and named pipes such as `/dev/fd/63`) are read once, to their end, within bounds. http and https
URLs are fetched only when the caller allows it.
"""

from __future__ import annotations

import base64
import os
import re
import stat as file_types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, Union
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from ..arguments import as_path, one_line, stat
from .samples import ImageError, is_tensor

if TYPE_CHECKING:
    from torch import Tensor

MAX_STREAM_BYTES = 1 << 28  # of an encoded image: what a pipe or a file object may give
_CHUNK_BYTES = 1 << 20
_URL = re.compile(r"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")  # base64's other alphabet


class Readable(Protocol):
    """A file object in binary mode."""

    def read(self, size: int = -1, /) -> bytes: ...


ImageSource = Union[  # with |, a type in quotes (torch is not imported here) would be no type
    str, os.PathLike, bytes, bytearray, memoryview, Readable, Image.Image, np.ndarray, "Tensor"
]


def resolve(source: ImageSource, allow_remote_images: bool = False) -> Path | bytes | Image.Image | np.ndarray | Tensor:
    """An image's source with streams read, `data:` URLs decoded and others fetched; paths lead to a file that is not
    empty.

    Raises:
        ImageError: there is no such file, it cannot be fetched, or what was handed over is no image's source.
    """
    if isinstance(source, (Image.Image, np.ndarray)) or is_tensor(source):
        return source
    name = describe(source)
    if is_url(source):
        check_url(source, allow_remote_images)
        resolved: Path | bytes = _fetch(source, name)
    elif isinstance(source, (str, os.PathLike)):
        resolved = _resolve_text(source, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        resolved = bytes(source)
    elif callable(read := getattr(source, "read", None)):
        resolved = read_stream(read, name)
    else:
        raise ImageError(f"{name} is no image: expected a path, bytes, a URL, a file object, a PIL image or an array.")
    if isinstance(resolved, bytes) and not resolved:
        raise ImageError(f"{name} is empty (0 bytes), not an image.")
    return resolved


def is_url(source: object) -> TypeGuard[str]:
    """Whether a source is a URL, but not a `data:` URL, which holds the image itself."""
    return isinstance(source, str) and _URL.match(source) is not None


def check_url(url: str, allow_remote_images: bool) -> None:
    """
    Raises:
        ImageError: the URL is not of http or https, or URLs are not to be fetched.
    """
    name, scheme = describe(url), url.lstrip().partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise ImageError(f"{name} is a URL of {scheme}:, of which none are read; fetch it, and give its bytes.")
    if not allow_remote_images:
        raise ImageError(
            f"{name} is a URL, and is fetched only with allow_remote_images=True (of yi_vl.load and load_image) or "
            "--allow-remote-images."
        )


def is_stream(source: ImageSource) -> bool:
    """Whether a source can be read only once."""
    if isinstance(source, (str, os.PathLike)):
        try:
            return Path(source).expanduser().is_fifo()
        except (OSError, ValueError, RuntimeError, TypeError):
            return False
    holds_all = isinstance(source, (Image.Image, np.ndarray, bytes, bytearray, memoryview)) or is_tensor(source)
    return not holds_all and hasattr(source, "read")


def read_stream(read: Callable[[int], Any], name: str) -> bytes:
    """All bytes that `read(size)` still gives.

    Raises:
        ImageError: there are more than `MAX_STREAM_BYTES`, they are text, or they cannot be read.
    """
    content = bytearray()
    while len(content) <= MAX_STREAM_BYTES:
        try:
            chunk = read(_CHUNK_BYTES)
        except Exception as error:
            raise ImageError(f"{name} cannot be read: {one_line(error)}.") from error
        if isinstance(chunk, str):
            raise ImageError(f"{name} gives text; open it in binary mode, with open(path, 'rb').")
        if not isinstance(chunk, (bytes, bytearray, memoryview)):
            raise ImageError(f"{name} gives {type(chunk).__name__} when it is read; expected bytes.")
        if not chunk:
            return bytes(content)
        content += chunk
    raise ImageError(f"{name} gives more than {MAX_STREAM_BYTES:,} bytes; save it to a file first.")


def decode_data_url(url: str, name: str) -> bytes:
    """The bytes in a `data:` URL of any media type, in base64 or percent-encoded.

    Blanks and line breaks within base64, its URL-safe alphabet and missing padding are fine.

    Raises:
        ImageError: it is malformed.
    """
    header, comma, payload = url.strip().partition(",")
    if not comma:
        raise ImageError(f"{name} has no comma; expected data:image/png;base64,...")
    content = unquote_to_bytes(payload)
    if not header.rstrip().lower().endswith(";base64"):
        return content
    encoded = content.translate(_URL_SAFE, delete=b" \t\r\n\f\v").rstrip(b"=")
    try:
        return base64.b64decode(encoded + b"=" * (-len(encoded) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"{name} is not base64: {one_line(error)}.") from error


def describe(source: object) -> str:
    """A source's name in errors, on one line."""
    if isinstance(source, str) and _is_data_url(source):
        return f"the data: URL of {len(source)} characters"
    if is_url(source):
        return _printable(_without_secrets(source))
    if isinstance(source, (str, os.PathLike)):
        return _printable(str(source))
    for attribute in ("filename", "name"):  # of a PIL image that was opened from a file, of a file object
        if isinstance(name := getattr(source, attribute, None), (str, os.PathLike)) and name:
            return _printable(str(name))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the image of {len(source)} bytes"
    return f"the image given as {type(source).__name__}"


def _resolve_text(source: str | os.PathLike, name: str) -> Path | bytes:
    if isinstance(source, str) and _is_data_url(source):
        return decode_data_url(source, name)
    try:
        path = as_path(source, "the image's path")
        status = stat(path, name)
    except ValueError as error:
        raise ImageError(str(error)) from error
    if status is None:
        raise ImageError(f"{name}: there is no such file.")
    if file_types.S_ISDIR(status.st_mode):
        raise ImageError(f"{name} is a folder, not an image.")
    if file_types.S_ISFIFO(status.st_mode):
        return _read_pipe(path, name)
    if not file_types.S_ISREG(status.st_mode):
        raise ImageError(f"{name} is a device or a socket, not a file.")
    return path if status.st_size else b""


def _read_pipe(path: Path, name: str) -> bytes:
    try:
        with path.open("rb", buffering=0) as pipe:
            return read_stream(pipe.read, name)
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}.") from error


def _fetch(url: str, name: str) -> bytes:
    try:
        from .remote import fetch_blocking
    except ModuleNotFoundError as error:
        raise ImageError(f'{name}: {error.name} is missing; fetching needs: pip install "yi_vl[serve]"') from error
    return fetch_blocking(url.strip(), name)


def _without_secrets(url: str) -> str:
    """A URL without its password, query and fragment."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:  # a bracket that is not closed
        return f"the URL of {len(url)} characters"
    hidden = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{hidden}"


def _is_data_url(text: str) -> bool:
    return text.lstrip()[:5].lower() == "data:"


def _printable(text: str) -> str:
    text = text if len(text) < 200 else f"{text[:80]}..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
