"""A request's body: JSON, gzip-compressed or not, of bounded size on the wire and in memory, within a bounded time."""

from __future__ import annotations

import asyncio
import zlib

from starlette.requests import Request

from .protocol import ApiError, Limits

_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's names for the two containers


async def read_body(request: Request, limits: Limits) -> bytes:
    """The decompressed body.

    Raises:
        ApiError: 400: it is not announced as JSON, or its compression is broken; 408: it is too slow; 413: it is too
            large, as sent or decompressed; 415: its encoding is not supported.
    """
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":  # also keeps out web pages of other origins: a browser asks before it sends it
        raise ApiError(400, "Send JSON, with the header `Content-Type: application/json`.")
    body = _Body(request.headers.get("Content-Encoding", ""), limits.body_bytes)
    if int(request.headers.get("Content-Length", 0)) > limits.body_bytes:
        raise body.too_large

    async def read() -> None:
        async for chunk in request.stream():
            body.add(chunk)

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"The body took longer than {limits.body_seconds:g} seconds.") from error
    return body.end()


class _Body:
    """Collects a body chunk by chunk; never holds more than one byte beyond the limit."""

    def __init__(self, encoding: str, max_bytes: int) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", *_WINDOW_BITS):
            message = f"The Content-Encoding {encoding[:100]!r} is not supported, only gzip and deflate."
            raise ApiError(415, message, code="unsupported_encoding")
        self.too_large = ApiError(413, f"The body is larger than {max_bytes:,} bytes.", code="request_too_large")
        self._max_bytes = max_bytes
        self._data = bytearray()
        self._inflater = zlib.decompressobj(_WINDOW_BITS[encoding]) if encoding in _WINDOW_BITS else None

    def add(self, chunk: bytes) -> None:
        if self._inflater is not None and chunk:
            try:
                chunk = self._inflater.decompress(chunk, self._max_bytes - len(self._data) + 1)
            except zlib.error as error:
                raise self._broken(str(error)) from error
            if self._inflater.unused_data:
                raise self._broken("something follows the end of the compressed data")
        self._data += chunk
        if len(self._data) > self._max_bytes:
            raise self.too_large

    def end(self) -> bytes:
        if self._inflater is not None and not self._inflater.eof:
            raise self._broken("it is cut short")
        return bytes(self._data)

    def _broken(self, problem: str) -> ApiError:
        return ApiError(400, f"The body cannot be decompressed: {problem}.", code="invalid_encoding")
