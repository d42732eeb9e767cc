"""An ASGI layer in front of Gradio that keeps uploads private; Gradio alone would serve any upload to all.

A visitor is a browser, identified by a cookie. Its uploads are limited in bytes, can be read by itself only, and are
removed when its last tab has been closed for a while.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Awaitable, Mapping
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_COOKIE = "yi_vl_visitor"


class Uploads:
    """Records which browser uploaded which file; `layer` enforces it.

    `public` are paths that everybody may read.

    Args:
        max_image_bytes: of one upload; how many pixels it may have is yi_vl.image.load's business.
        max_bytes: of all that a visitor sends, until its files are removed.
        grace_seconds: how long files are kept after a visitor's last tab is closed, for reloads and bad connections.
    """

    def __init__(
        self, max_image_bytes: int = 20 << 20, max_bytes: int = 200 << 20, grace_seconds: float = 60.0
    ) -> None:
        self.public: set[str] = set()
        self.max_image_bytes = max_image_bytes
        self.max_bytes = max_bytes
        self._grace_seconds = grace_seconds
        self._paths: defaultdict[str, set[str]] = defaultdict(set)  # visitor -> files
        self._num_bytes: Counter[str] = Counter()  # visitor -> sent so far
        self._num_tabs: Counter[str] = Counter()  # visitor -> living tabs, and uploads under way

    def may_read(self, cookies: Mapping[str, str], path: str) -> bool:
        """Whether a file is an upload of the browser that sent these cookies, or everybody's."""
        return path in self.public or path in self._paths.get(cookies.get(_COOKIE, ""), ())

    def layer(self, app: ASGIApp) -> ASGIApp:
        """Starlette middleware: gives every browser its cookie, and refuses files to all others."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            cookies, path = HTTPConnection(scope).cookies, scope["path"]
            visitor = cookies.get(_COOKIE)
            file = re.search(r"/file[=/](.*)", path, re.DOTALL)
            if file and not self.may_read(cookies, file[1]):
                await PlainTextResponse("There is no such file of yours.", 403)(scope, receive, send)
            elif visitor is None and scope["method"] == "POST":
                await PlainTextResponse("Open the page first, and allow its cookie.", 403)(scope, receive, send)
            elif visitor is None:
                await app(scope, receive, _with_cookie(send))
            elif path.endswith("/upload"):
                num_bytes = int(Headers(scope=scope).get("content-length", self.max_bytes + 1))
                if self._num_bytes[visitor] + num_bytes > self.max_bytes:
                    return await PlainTextResponse(self._full(), 413)(scope, receive, send)
                self._num_bytes[visitor] += num_bytes
                await self._while_present(visitor, app(scope, receive, self._recording_paths(visitor, send)))
            elif "/heartbeat/" in path:
                await self._while_present(visitor, app(scope, receive, send))
            else:
                await app(scope, receive, send)

        return guarded

    def _full(self) -> str:
        limit = f"{self.max_bytes >> 20} MB"
        return (
            f"You may send {limit} of images. Close all tabs of this page, wait a minute, and start again. "
            f"最多可以发送 {limit} 的图片。请关闭本页的所有标签页，等一分钟再重新开始。"
        )

    def _recording_paths(self, visitor: str, send: Send) -> Send:
        """A `send` that records the paths with which Gradio answers an upload."""
        body = bytearray()

        async def recording(message: Message) -> None:
            body.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                with_paths = body.startswith(b"[")  # else an error about a file that was too large
                self._paths[visitor].update(json.loads(body) if with_paths else ())
            await send(message)

        return recording

    async def _while_present(self, visitor: str, tab: Awaitable[None]) -> None:
        """Await a tab or an upload of a visitor; some time after the last one ended, remove the visitor's files."""
        self._num_tabs[visitor] += 1
        try:
            await tab
        finally:
            self._num_tabs[visitor] -= 1
            asyncio.get_running_loop().call_later(self._grace_seconds, self._remove_if_gone, visitor)

    def _remove_if_gone(self, visitor: str) -> None:
        if self._num_tabs[visitor] > 0:
            return
        del self._num_tabs[visitor], self._num_bytes[visitor]
        gone = self._paths.pop(visitor, set())
        for path in gone.difference(self.public, *self._paths.values()):  # Gradio keeps equal uploads once
            Path(path).unlink(missing_ok=True)


def _with_cookie(send: Send) -> Send:
    async def giving(message: Message) -> None:
        if message["type"] == "http.response.start":
            cookie = f"{_COOKIE}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; SameSite=Lax"
            MutableHeaders(scope=message).append("set-cookie", cookie)
        await send(message)

    return giving
