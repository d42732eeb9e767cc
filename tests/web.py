"""A web server with images, under host names with public, private and changing addresses."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tiny import OFFICIAL

from yi_vl.image import remote as image_remote

WIDE = OFFICIAL / "wide.png"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append((self.headers["Host"], self.path))  # type: ignore[attr-defined]
        port = self.server.server_address[1]
        redirects = {
            "/moved": "wide.png",
            "/elsewhere": f"http://private.test:{port}/wide.png",
            "/loop": "/loop",
            "/file": f"file://{WIDE}",
        }
        path = self.path.partition("?")[0]
        with suppress(OSError):  # the reader may leave
            if path in redirects:
                self.send_response(302)
                self.send_header("Location", redirects[path])
                self.end_headers()
            elif path == "/missing":
                self.send_error(404)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(WIDE.read_bytes() if path == "/wide.png" else b"")
                while path == "/endless":
                    self.wfile.write(bytes(10_000))
                while path == "/slow" and not self.server.is_over.wait(0.02):  # type: ignore[attr-defined]
                    self.wfile.write(b"0")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A web server at 127.0.0.1, public here, with names that lead to it or to 127.0.0.2, which is not."""
    names = {
        "public.test": ["127.0.0.1"],
        "private.test": ["127.0.0.2"],
        "both.test": ["127.0.0.1", "127.0.0.2"],
        "rebinding.test": ["127.0.0.1"],
    }
    look_up = socket.getaddrinfo

    def fake(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        host = host.decode() if isinstance(host, bytes) else host
        if host == "nowhere.test":
            raise socket.gaierror("no such name")
        if host not in names:
            return look_up(host, port, *arguments, **options)
        addresses = names[host]
        if host == "rebinding.test":
            names[host] = ["127.0.0.2"]  # for the next lookup
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", fake)
    monkeypatch.setattr(image_remote, "is_public", lambda address: address == "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.requests, server.is_over = [], threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.is_over.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join(120)
