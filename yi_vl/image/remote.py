"""Encoded images fetched from http and https URLs, within bounds, and from the public internet only.

So that a URL cannot reach what only this machine reaches, a host's name is looked up once, every address it has must be
public, and the connection goes to the address that was checked; every redirect is checked in the same way.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import httpx

from ..arguments import one_line
from .addresses import is_public
from .samples import ImageError

MAX_BYTES = 16 << 20  # of an encoded image
MAX_SECONDS = 10.0  # for it to arrive, redirects included
_MAX_REDIRECTS = 3


class UnavailableError(ImageError):
    """An image that could not be fetched."""


class TooLargeError(ImageError):
    """An encoded image of more bytes than are read."""

    def __init__(self, name: str, max_bytes: int) -> None:
        super().__init__(f"{name} is larger than {max_bytes:,} bytes.")


async def fetch(url: str, name: str, max_bytes: int, max_seconds: float) -> bytes:
    """The bytes at an http or https URL. Neither the proxies nor the passwords of this machine are used.

    Args:
        name: of the image, for errors.

    Raises:
        TooLargeError: there are more than `max_bytes`.
        UnavailableError: they take longer, are not to be had, or lie at an address that is not public.
    """
    try:
        return await asyncio.wait_for(_fetch(url, name, max_bytes), max_seconds)
    except asyncio.TimeoutError as error:
        raise UnavailableError(f"{name} took longer than {max_seconds:g} seconds.") from error
    except ImageError:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise UnavailableError(f"{name} cannot be fetched: {one_line(error)}.") from error


def fetch_blocking(url: str, name: str) -> bytes:
    """`fetch` within `MAX_BYTES` and `MAX_SECONDS`, also for callers within a running event loop, like a notebook's."""
    with ThreadPoolExecutor(1, "yi-vl-fetch") as thread:
        return thread.submit(asyncio.run, fetch(url, name, MAX_BYTES, MAX_SECONDS)).result()


async def _fetch(url: str, name: str, max_bytes: int) -> bytes:
    target = httpx.URL(url)
    never_reused = httpx.Limits(max_keepalive_connections=0)  # a connection is for the host it was checked for
    async with httpx.AsyncClient(verify=_ssl_context(), trust_env=False, limits=never_reused) as client:
        for _ in range(_MAX_REDIRECTS + 1):
            request = client.build_request(
                "GET",
                target.copy_with(host=await _resolve(target, name), userinfo=b""),
                headers={"Host": target.netloc.decode(), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.raw_host.decode()},  # whose certificate it must be
            )
            response = await client.send(request, stream=True)
            try:
                if response.has_redirect_location:
                    target = target.join(response.headers["Location"])
                    continue
                if response.status_code != 200:
                    raise UnavailableError(f"{name} cannot be fetched: its server answers {response.status_code}.")
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > max_bytes:
                        raise TooLargeError(name, max_bytes)
                return bytes(data)
            finally:
                await response.aclose()
    raise UnavailableError(f"{name} is redirected more than {_MAX_REDIRECTS} times.")


async def _resolve(target: httpx.URL, name: str) -> str:
    """An address of a URL's host, all of whose addresses are public."""
    if target.scheme not in ("http", "https") or not target.host:
        raise UnavailableError(f"{name} leads to what is no http or https URL.")
    infos = await asyncio.get_running_loop().getaddrinfo(
        target.host, target.port or target.scheme, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    )
    addresses = [str(socket_address[0]) for *_, socket_address in infos]
    if not all(map(is_public, addresses)):
        raise UnavailableError(f"{name} leads to an address that is not public.")
    return addresses[0]


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()
