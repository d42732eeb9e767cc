"""Pictures that strangers send: `data:` URLs, and, where allowed, ones fetched from the public internet. Never a file.

So that nobody reaches through this machine what only it can reach, a host's name is looked up once, every address it
has must be public, and the connection goes to the address that was checked; every redirect is checked in the same way.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable, Sequence

import httpx
from PIL import Image

from ..image import WEB_FORMATS
from ..image_source import decode_data_url
from .addresses import is_public
from .protocol import ApiError, Limits

_MAX_REDIRECTS = 3


async def read_url(url: str, param: str, limits: Limits, allow_remote: bool) -> bytes:
    """The encoded picture at a URL.

    Args:
        param: where in the request the URL is, for errors.

    Raises:
        ApiError: 400: a kind of URL that is not read; 413: the picture is too large; 422: it cannot be had.
    """
    url = url.strip()
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _decode_data_url(url, param, limits.image_bytes)
    if scheme not in ("http", "https"):
        raise ApiError(400, f"{param} must be a data: URL, data:image/png;base64,...; files are not read.", param)
    if not allow_remote:
        message = f"{param}: this server fetches no pictures (--allow-remote-images); send a data: URL."
        raise ApiError(400, message, param, "remote_images_not_allowed")
    try:
        return await asyncio.wait_for(_fetch(url, param, limits.image_bytes), limits.fetch_seconds)
    except asyncio.TimeoutError as error:
        message = f"{param} took longer than {limits.fetch_seconds:g} seconds."
        raise ApiError(422, message, param, "image_unavailable") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ApiError(422, f"{param} cannot be fetched.", param, "image_unavailable") from error


def open_picture(data: bytes, param: str, prepare: Callable[[bytes, Sequence[str]], Image.Image]) -> Image.Image:
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
        raise _too_large(param, max_bytes)
    return data


async def _fetch(url: str, param: str, max_bytes: int) -> bytes:
    target = httpx.URL(url)
    never_reused = httpx.Limits(max_keepalive_connections=0)  # a connection is for the host it was checked for
    async with httpx.AsyncClient(verify=_ssl_context(), trust_env=False, limits=never_reused) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            request = client.build_request(
                "GET",
                target.copy_with(host=await _resolve(target, param), userinfo=b""),
                headers={"Host": target.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.raw_host.decode()},  # whose certificate it must be
            )
            response = await client.send(request, stream=True)
            try:
                if response.has_redirect_location:
                    target = target.join(response.headers["Location"])
                    continue
                if response.status_code != 200:
                    message = f"{param} cannot be fetched: its server answers {response.status_code}."
                    raise ApiError(422, message, param, "image_unavailable")
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > max_bytes:
                        raise _too_large(param, max_bytes)
                return bytes(data)
            finally:
                await response.aclose()
    message = f"{param} is redirected more than {_MAX_REDIRECTS} times."
    raise ApiError(422, message, param, "image_unavailable")


async def _resolve(target: httpx.URL, param: str) -> str:
    """An address of a URL's host, all of whose addresses are public."""
    if target.scheme not in ("http", "https") or not target.host:
        raise ApiError(422, f"{param} leads to what is no http or https URL.", param, "image_unavailable")
    found = await asyncio.get_running_loop().getaddrinfo(
        target.host, target.port or target.scheme, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    addresses = [str(place[0]) for *_, place in found]
    if not all(map(is_public, addresses)):
        raise ApiError(422, f"{param} leads to an address that is not public.", param, "image_unavailable")
    return addresses[0]


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _too_large(param: str, max_bytes: int) -> ApiError:
    return ApiError(413, f"{param} is larger than {max_bytes:,} bytes.", param, "image_too_large")
