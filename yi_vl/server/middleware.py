"""What stands before the routes: CORS, the check of the Host header, and paths as clients spell them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .protocol import ApiError

_LOOPBACK_HOSTS = ("localhost", "*.localhost", "127.0.0.1", "[::1]")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#]+", re.IGNORECASE)


class NormalizePath:
    """ASGI middleware: `/v1/models/` and `/v1//models` are `/v1/models`, without a redirect.

    A redirect would lead to where the Host header says, and most clients do not repeat a POST after one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": re.sub("/+", "/", scope["path"]).rstrip("/") or "/"}
        await self._app(scope, receive, send)


class CheckHost:
    """ASGI middleware: 403 for requests to a name that is not allowed.

    Starlette's TrustedHostMiddleware refuses `[::1]` in the older versions that are allowed here, and says of no
    request what is wrong with it.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = [name.lower() for name in allowed]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = _host_name(Headers(scope=scope).get("Host", "")) if scope["type"] == "http" else None
        if name is None or any(_matches(name, pattern) for pattern in self._allowed):
            await self._app(scope, receive, send)
            return
        message = f"This server does not answer to the host {name[:200]!r}; start it with --allowed-host for that name."
        await JSONResponse(ApiError(403, message, code="host_not_allowed").body, 403)(scope, receive, send)


def _host_name(header: str) -> str:
    """The name in a Host header, without its port."""
    bracketed, bracket, _ = header.partition("]")
    return (bracketed + bracket if bracket else header.partition(":")[0]).lower().rstrip(".")


def _matches(name: str, pattern: str) -> bool:
    return pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def add_middleware(app: FastAPI, cors_origins: Sequence[str], allowed_hosts: Sequence[str]) -> None:
    """Normalized paths, and where asked for, answers to web pages of other origins and a check of the Host header."""
    app.add_middleware(NormalizePath)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[check_origin(origin) for origin in cors_origins],
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    if allowed_hosts:
        app.add_middleware(CheckHost, allowed=allowed_hosts)


def check_origin(origin: str) -> str:
    """The origin, if a browser could send it.

    Raises:
        ValueError: it is not of the form https://example.org, without a path.
    """
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"the origin {origin!r} is none that browsers send; give https://example.org, without a path or a slash at "
            "its end, or * for all."
        )
    return origin


def hosts_for(host: str, allowed: Sequence[str]) -> list[str]:
    """The Host headers to answer; none stands for all of them.

    A server on a loopback address is for this machine's programs; without a check of the name that they ask for, a web
    page anywhere could reach it by letting its own name lead here (DNS rebinding).

    Args:
        host: the address to listen at.
        allowed: further names, `*.example.org` for all below one, `*` for all.

    Raises:
        ValueError: a name has a scheme, a port or a path, or an asterisk that is not at its beginning.
    """
    for name in allowed:
        if not re.fullmatch(r"\*|(\*\.)?[^*/:\s]+|\[[0-9a-fA-F:.]+\]", name):
            raise ValueError(f"the allowed host {name!r} is not a name or address, like example.org or *.example.org.")
    is_loopback = host.strip("[]") in ("localhost", "::1") or host.startswith("127.")
    if not is_loopback and not allowed:
        return []
    return sorted({*_LOOPBACK_HOSTS, f"[{host.strip('[]')}]" if ":" in host else host, *allowed})
