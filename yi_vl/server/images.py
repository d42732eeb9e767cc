"""Images that clients send: `data:` URLs, and, where allowed, ones fetched from the public internet. Never a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from ..image import WEB_FORMATS
from ..image.remote import TooLargeError, UnavailableError, fetch
from ..image.source import decode_data_url
from .protocol import ApiError, Limits


async def read_url(url: str, param: str, limits: Limits, allow_remote: bool) -> bytes:
    """The encoded image at a URL.

    Args:
        param: where in the request the URL is, for errors.

    Raises:
        ApiError: 400: a kind of URL that is not read; 413: the image is too large; 422: it cannot be had.
    """
    url = url.strip()
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _decode_data_url(url, param, limits.image_bytes)
    if scheme not in ("http", "https"):
        raise ApiError(400, f"{param} must be a data: URL, data:image/png;base64,...; files are not read.", param)
    if not allow_remote:
        message = f"{param}: this server fetches no images (--allow-remote-images); send a data: URL."
        raise ApiError(400, message, param, "remote_images_not_allowed")
    try:
        return await fetch(url, param, limits.image_bytes, limits.fetch_seconds)
    except TooLargeError as error:
        raise _too_large(error, param) from error
    except UnavailableError as error:
        raise ApiError(422, str(error), param, "image_unavailable") from error


def open_image(data: bytes, param: str, prepare: Callable[[bytes, Sequence[str]], Image.Image]) -> Image.Image:
    """The prepared image in encoded bytes; an `ApiError` 422 if it is broken, of another format or too large.

    Args:
        prepare: `YiVLImageProcessor.prepare`.
    """
    try:
        return prepare(data, WEB_FORMATS)
    except ValueError as error:
        raise ApiError(422, f"{param}: {error}", param, "invalid_image") from error


def _decode_data_url(url: str, param: str, max_bytes: int) -> bytes:
    """The bytes in a base64 data: URL of any media type; blanks and line breaks in it and missing padding are fine."""
    header, comma, _ = url.partition(",")
    if not comma or not header.rstrip().lower().endswith(";base64"):
        raise ApiError(400, f"{param} must have the form data:image/png;base64,...", param)
    try:
        data = decode_data_url(url, param)
    except ValueError as error:
        raise ApiError(422, str(error), param, "invalid_image") from error
    if len(data) > max_bytes:
        raise _too_large(TooLargeError(param, max_bytes), param)
    return data


def _too_large(error: TooLargeError, param: str) -> ApiError:
    return ApiError(413, str(error), param, "image_too_large")
