"""One model on a loopback server that answers as ModelScope and as the Hugging Face hub do."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from tiny import OFFICIAL

MODEL = "01-ai/Yi-VL-Tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHECKPOINT = OFFICIAL / "checkpoint"


class Hub(ThreadingHTTPServer):
    """The files of the test checkpoint and one that no Yi-VL needs, under the name `MODEL`.

    Attributes:
        fetched: the paths of the files that were sent, one for each time.
        broken: paths of files whose transfer ends after 100 bytes, always.
        is_silent: whether requests get no answer, until the server is stopped.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        paths = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
        self.files = {str(path.relative_to(CHECKPOINT)): path.read_bytes() for path in paths}
        self.files["images/example.png"] = b"unused"
        self.fetched: list[str] = []
        self.broken: set[str] = set()
        self.is_silent = False
        self.is_over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """Clients may leave."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.server.is_silent:
            self.server.is_over.wait(60)
            return
        url = urlsplit(self.path)
        answers = {
            f"/api/v1/models/{MODEL}/repo/files": self._list_on_modelscope,
            f"/api/v1/models/{MODEL}/repo": lambda: self._send_file(parse_qs(url.query)["FilePath"][0]),
            f"/api/models/{MODEL}": self._describe_on_hub,
            f"/api/models/{MODEL}/revision/main": self._describe_on_hub,
            f"/api/models/{MODEL}/tree/{COMMIT}": self._list_on_hub,
        }
        resolved = url.path.removeprefix(f"/{MODEL}/resolve/{COMMIT}/")
        if resolved in self.server.files:
            self._send_file(resolved)
        elif url.path in answers:
            answers[url.path]()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")  # the hub's
            self._send_body(json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())

    do_HEAD = do_GET

    def _list_on_modelscope(self) -> None:
        files = [
            {"Path": path, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
            for path, content in self.server.files.items()
        ]
        self._send_json({"Code": 200, "Data": {"Files": files}, "Success": True})

    def _describe_on_hub(self) -> None:
        self._send_json({"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": path} for path in self.server.files]})

    def _list_on_hub(self) -> None:
        self._send_json(
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in self.server.files.items()
            ]
        )

    def _send_file(self, path: str) -> None:
        content = self.server.files[path]
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.command == "GET":
            self.server.fetched.append(path)
        self._send_body(content[start:], end=100 if path in self.server.broken else None)

    def _send_json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send_body(json.dumps(value).encode())

    def _send_body(self, body: bytes, end: int | None = None) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:end])

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving_hub() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            hub.is_over.set()
            hub.shutdown()
            thread.join(60)


def content_of(folder: Path) -> dict[str, bytes]:
    """The files in a folder by their relative paths, hidden ones left out."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path): (folder / path).read_bytes() for path in paths if not path.name.startswith(".")}


def announced(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that are for the user; other packages log, too, where an earlier test has set their levels."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("yi_vl")]
