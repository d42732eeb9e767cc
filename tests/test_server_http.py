"""HTTP around the answers: methods, paths, compressed bodies, origins, hosts, keys, TLS, the port, and the shutdown."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from serving import PATIENCE_SECONDS, Gate, ask, gate, metric, serving, wait_until, yi_vl

from yi_vl.predict import YiVL
from yi_vl.server import Limits, create_app
from yi_vl.server.body import _Body
from yi_vl.server.engine_loop import EngineLoop, retry_seconds
from yi_vl.server.launch import bind, check_certificate, read_keys
from yi_vl.server.middleware import check_origin, hosts_for
from yi_vl.server.protocol import ApiError

COMPLETIONS = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
BODY = json.dumps(ask()).encode()
CERTIFICATE = Path(__file__).parent / "localhost.pem"  # signed by itself, with its key: for this test alone


@pytest.fixture(scope="module")
def address(yi_vl: YiVL) -> Iterator[str]:
    with serving(create_app(yi_vl, "tiny", limits=Limits(body_bytes=100_000))) as address:
        yield address


def post(address: str, content: bytes = BODY, path: str = COMPLETIONS, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(address + path, content=content, headers={**JSON, **named}, timeout=PATIENCE_SECONDS)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/models/", "/healthz", "/metrics", "/healthz/"])
def test_pages_have_heads(address: str, path: str) -> None:
    head, whole = httpx.head(address + path), httpx.get(address + path)
    assert (head.status_code, whole.status_code, head.content) == (200, 200, b"")
    assert head.headers["Content-Type"] == whole.headers["Content-Type"]


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1//chat/completions", "//v1/chat/completions//"])
def test_slashes_are_forgiven_without_a_redirect(address: str, path: str) -> None:
    answer = post(address, path=path, Host="evil.example")
    assert answer.status_code == 200 and answer.json()["choices"]
    missing = httpx.get(f"{address}/v1/nothing/", headers={"Host": "evil.example"})
    assert missing.status_code == 404 and "Location" not in missing.headers


def deflate(data: bytes) -> bytes:
    return zlib.compress(data)


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("GZIP", gzip.compress),
                               ("deflate", deflate), ("identity", bytes), ("", bytes)],
)  # fmt: skip
def test_compressed_bodies(address: str, encoding: str, compress: Any) -> None:
    answer = post(address, compress(BODY), Content_Encoding=encoding)
    assert answer.status_code == 200 and answer.json()["choices"]


@pytest.mark.parametrize(
    ("content", "encoding", "status", "problem"),
    [
        (gzip.compress(bytes(50_000_000)), "gzip", 413, "larger than 100,000"),
        (gzip.compress(BODY + b" " * 100_000), "gzip", 413, "larger than 100,000"),
        (deflate(bytes(50_000_000)), "deflate", 413, "larger than 100,000"),
        (gzip.compress(BODY)[:-9], "gzip", 400, "cut short"),
        (b"", "gzip", 400, "cut short"),
        (BODY, "gzip", 400, "cannot be decompressed"),
        (gzip.compress(BODY) * 2, "gzip", 400, "follows the end"),
        (gzip.compress(BODY) + b"\n", "gzip", 400, "follows the end"),
        (gzip.compress(gzip.compress(BODY)), "gzip, gzip", 415, "only gzip and deflate"),
        (BODY, "br", 415, "'br' is not supported"),
        (BODY, "zstd", 415, "'zstd' is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip writes the time into its header
)
def test_compressed_bodies_that_are_refused(
    address: str, content: bytes, encoding: str, status: int, problem: str
) -> None:
    answer = post(address, content, Content_Encoding=encoding)
    assert answer.status_code == status and problem in answer.json()["error"]["message"]


def test_a_bomb_takes_no_memory() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    body = _Body("gzip", 100_000)
    tracemalloc.start()
    with pytest.raises(ApiError) as caught:
        body.add(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.status == 413 and peak < 1_000_000


def test_web_pages_of_other_origins_ask_only_where_allowed(yi_vl: YiVL, address: str) -> None:
    def preflight(address: str, origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        more_headers = {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
        return httpx.options(address + COMPLETIONS, headers={**headers, **more_headers})

    closed = preflight(address, "https://chat.example")
    assert closed.status_code == 405 and "Access-Control-Allow-Origin" not in closed.headers
    origins = ["https://chat.example", "http://localhost:3000"]
    with serving(create_app(yi_vl, "tiny", api_keys=["k"], cors_origins=origins)) as open_address:
        for origin in origins:
            allowed = preflight(open_address, origin)
            assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == origin
            assert "x-stainless-lang" in allowed.headers["Access-Control-Allow-Headers"].lower()
        assert preflight(open_address, "https://evil.example").status_code == 400
        for key, status in (("k", 200), ("wrong", 401)):  # errors can be read too
            answer = post(open_address, Authorization=f"Bearer {key}", Origin=origins[0])
            assert answer.status_code == status and answer.headers["Access-Control-Allow-Origin"] == origins[0]
        other = post(open_address, Authorization="Bearer k", Origin="https://evil.example")
        assert "Access-Control-Allow-Origin" not in other.headers
    with serving(create_app(yi_vl, "tiny", cors_origins=["*"])) as open_address:
        assert post(open_address, Origin="https://any.example").headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        ("https://a.example", True), ("http://localhost:3000", True), ("http://[::1]:80", True), ("*", True),
        ("null", True), ("chrome-extension://abc", True), ("https://a.example/", False), ("a.example", False),
        ("https://a.example/x", False), ("https://*.example/?", False), ("", False), ("https://", False),
    ],
)  # fmt: skip
def test_origins(origin: str, good: bool) -> None:
    if good:
        assert check_origin(origin) == origin
    else:
        with pytest.raises(ValueError, match="none that browsers send"):
            check_origin(origin)


@pytest.mark.parametrize(
    ("host", "allowed", "answered", "refused"),
    [
        ("127.0.0.1", [], ["localhost", "LOCALHOST", "a.localhost", "[::1]"], ["evil.example", "10.1.1.1"]),
        ("::1", [], ["localhost.", "[::1]"], ["127.0.0.1.evil.example"]),
        ("127.0.0.2", [], ["127.0.0.2", "localhost"], ["localhost.evil.example", "evillocalhost", "[::1", ""]),
        ("127.0.0.1", ["a.example", "*.b.example"], ["a.example", "x.b.example"], ["b.example", "xa.example"]),
        ("0.0.0.0", ["a.example"], ["a.example", "127.0.0.1"], ["evil.example"]),
        ("0.0.0.0", [], ["evil.example", "10.0.0.1"], []),
        ("127.0.0.1", ["*"], ["evil.example"], []),
    ],
)  # fmt: skip
def test_names_that_are_answered(
    yi_vl: YiVL, host: str, allowed: list[str], answered: list[str], refused: list[str]
) -> None:
    with serving(create_app(yi_vl, "tiny", allowed_hosts=hosts_for(host, allowed))) as address:
        port = httpx.URL(address).port
        for name in [*answered, *refused]:
            status = 403 if name in refused else 200
            for spelled in (name, f"{name}:{port}"):
                assert httpx.get(f"{address}/v1/models", headers={"Host": spelled}).status_code == status, spelled
        if refused:  # whatever the page
            answer = post(address, Host=refused[0])
            assert answer.status_code == 403 and "--allowed-host" in answer.json()["error"]["message"]
            assert httpx.get(f"{address}/metrics", headers={"Host": refused[0]}).status_code == 403


@pytest.mark.parametrize("name", ["http://a.example", "a.example:80", "a.example/x", "a*.example", "", "a b"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="not a name or address"):
        hosts_for("127.0.0.1", [name])


def test_several_keys_from_everywhere(yi_vl: YiVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeff# for Li\n  third  \n\nvierter-Schlüssel\n", encoding="utf-8")
    keys = read_keys(["first", "second"], str(file))
    assert keys == ["first", "second", "third", "vierter-Schlüssel"]
    with serving(create_app(yi_vl, "tiny", api_keys=keys)) as address:
        for shown in ("Bearer first", "bearer  second", "Bearer third", "Bearer vierter-Schlüssel"):
            headers = {b"Authorization": shown.encode()}
            assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200, shown  # type: ignore[arg-type]
        for shown in ("Bearer # for Li", "Bearer", "first", "Basic first", "Bearer first second"):
            assert httpx.get(f"{address}/v1/models", headers={"Authorization": shown}).status_code == 401, shown
    file.write_text("\n# none\n")
    with pytest.raises(ValueError, match="holds no key"):
        read_keys([], str(file))
    monkeypatch.setenv("YI_VL_API_KEY", " ")
    with pytest.raises(ValueError, match="YI_VL_API_KEY is set but empty"):
        read_keys([], None)
    monkeypatch.delenv("YI_VL_API_KEY")
    assert read_keys([], None) == []


def test_a_port_in_use_is_reported_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1, port {port}: Address already in use"):
            bind("127.0.0.1", port)
        command = [sys.executable, "-m", "yi_vl", "serve", "--port", str(port)]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1 and f"port {port}" in finished.stderr
    (free,) = bind("127.0.0.1", port)
    free.close()
    sockets = bind("localhost", 0)  # on all its addresses, at one port
    assert len({bound.getsockname()[1] for bound in sockets}) == 1
    for bound in sockets:
        bound.close()


def test_tls(yi_vl: YiVL, tmp_path: Path) -> None:
    lines = CERTIFICATE.read_text().partition("-----BEGIN CERTIFICATE-----")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    key.write_text(lines[0])
    certificate.write_text(lines[1] + lines[2])
    check_certificate(str(certificate), str(key))
    check_certificate(str(CERTIFICATE), None)
    with pytest.raises(ValueError, match="no PEM certificate"):
        check_certificate(str(certificate), None)
    (bound,) = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    config = uvicorn.Config(
        create_app(yi_vl, "tiny"), ssl_certfile=str(certificate), ssl_keyfile=str(key), log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        trusted = ssl.create_default_context(cafile=str(certificate))
        trusted.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
        assert httpx.get(f"https://localhost:{port}/healthz", verify=trusted).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{port}/healthz")
    finally:
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("mean", "elapsed", "seconds"),
    [(None, 0, 1), (None, 7.2, 8), (0.01, 0, 1), (30, 0, 30), (30, 12.5, 18), (30, 45, 1), (3600, 0, 60)],
)
def test_when_to_try_again(mean: float | None, elapsed: float, seconds: int) -> None:
    assert retry_seconds(mean, elapsed) == seconds


def test_retry_after_fits_the_answers_so_far(yi_vl: YiVL, gate: Gate) -> None:
    loop = EngineLoop(yi_vl.engine, max_batch_size=1, num_waiting=1)
    for _ in range(20):
        loop._note_interval(20)
    loop._note_interval(10)
    assert loop.retry_seconds() == 17
    loop.close()


def read_events(address: str, events: list[str], **fields: Any) -> None:
    """Collects the lines of a stream until it ends, properly or not."""
    body = json.dumps(ask(stream=True, max_tokens=40, **fields)).encode()
    with httpx.stream("POST", address + COMPLETIONS, content=body, headers=JSON, timeout=PATIENCE_SECONDS) as answer:
        events.extend(line for line in answer.iter_lines() if line)


def test_answers_that_the_shutdown_cuts_end_with_an_error(
    yi_vl: YiVL, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(yi_vl, "tiny", limits=Limits(max_batch_size=1))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    events: list[str] = []
    statuses: list[tuple[int, Any]] = []

    def read_whole() -> None:
        answer = post(address)
        statuses.append((answer.status_code, answer.json()["error"]))

    gate.let(3)
    streaming = threading.Thread(target=read_events, args=(address, events))
    streaming.start()
    wait_until(lambda: gate.num_begun == 4)
    waiting = threading.Thread(target=read_whole)
    waiting.start()
    wait_until(lambda: metric(address, "requests_waiting") == 1)
    server.should_exit = True
    streaming.join(PATIENCE_SECONDS), waiting.join(PATIENCE_SECONDS)
    gate.open()
    thread.join(PATIENCE_SECONDS)
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down" and last["error"]["type"] == "server_error"
    assert "[DONE]" not in events[-1] and json.loads(events[0].removeprefix("data: "))["choices"]
    ((status, error),) = statuses
    assert status == 503 and error["code"] == "shutting_down"
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "Cancel 2 running task(s), timeout graceful shutdown exceeded"
    ]

    async def last_metrics() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=address) as client:
            return (await client.get("/metrics")).text

    assert 'yi_vl_requests_total{status="503"} 2.0' in asyncio.run(last_metrics())
