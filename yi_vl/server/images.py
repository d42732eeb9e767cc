"""Images that clients send: `data:` URLs, and, where allowed, ones fetched from the public internet. Never a file."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..image import WEB_FORMATS, YiVLImageProcessor
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


@dataclass
class _Image:
    """An image that is decoded or waits for it, and how many requests wait for it."""

    pixels: Future[list[Tensor]]
    num_waiting: int = 0


class ImageDecoder:
    """Decodes images in a few threads. Those of the latest requests are kept, as each turn of a chat sends them again.

    Args:
        num_threads: images decoded concurrently, each of which may take hundreds of megabytes.
        max_images: that are kept, 0.6 MB each at 448 px, and for each tile.
    """

    def __init__(self, processor: YiVLImageProcessor, num_threads: int, max_images: int) -> None:
        self._processor = processor
        self._max_images = max_images
        self._threads = ThreadPoolExecutor(num_threads, "yi-vl-images")
        self._images: OrderedDict[bytes, _Image] = OrderedDict()  # by the hash of the encoded bytes

    async def count_inputs(self, data: bytes, param: str) -> int:
        """How many inputs of the tower the image in encoded bytes is, by its header; arguments as of `decode`.

        Raises:
            ApiError: 422: as `decode`, but for damage that only shows when it is decoded.
        """
        count = partial(self._processor.count_inputs, data, formats=WEB_FORMATS)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, count)
        except ValueError as error:
            raise ApiError(422, f"{param}: {error}", param, "invalid_image") from error

    async def decode(self, data: bytes, param: str) -> list[Tensor]:
        """What the tower sees of the image in encoded bytes, (H, W, 3) uint8 each, not to be modified.

        Args:
            param: where in the request the image is, for errors.

        Raises:
            ApiError: 422: it is broken, of another format or too large.
        """
        digest = hashlib.sha256(data).digest()
        image = self._images.pop(digest, None)
        if image is None or _has_failed(image.pixels):
            image = _Image(self._threads.submit(self._processor.to_inputs, data, WEB_FORMATS))
        self._images[digest] = image
        while len(self._images) > self._max_images:
            self._images.popitem(last=False)
        pixels = asyncio.wrap_future(image.pixels)
        pixels.add_done_callback(lambda done: done.cancelled() or done.exception())  # else asyncio logs unseen ones
        image.num_waiting += 1
        try:
            return await asyncio.shield(pixels)  # the last client that leaves cancels it, not the first
        except ValueError as error:
            raise ApiError(422, f"{param}: {error}", param, "invalid_image") from error
        finally:
            image.num_waiting -= 1
            if not image.num_waiting:
                image.pixels.cancel()  # unless it has begun

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def _has_failed(pixels: Future[list[Tensor]]) -> bool:
    return pixels.cancelled() or (pixels.done() and pixels.exception() is not None)


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
