"""Images at http and https URLs: fetched where asked for, from public addresses only, however they are written.

The server's limits on them are tested in test_server_limits.py.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_yi_vl
from web import WIDE, serving_images

from yi_vl import cli, load
from yi_vl.engine.request_queue import BatchError
from yi_vl.image import check_source, load_image
from yi_vl.image import remote as image_remote
from yi_vl.image.addresses import is_public
from yi_vl.image.remote import UnavailableError, _resolve
from yi_vl.image.source import describe
from yi_vl.predict import YiVL

PUBLIC = [
    "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
    "168.63.129.15", "168.63.129.17", "169.253.255.255", "172.15.255.255", "172.32.0.0", "191.255.255.255",
    "192.0.1.0", "192.169.0.0", "198.17.255.255", "198.20.0.0", "223.255.255.255", "2606:4700::1111", "2a00::1",
    "2001:4860:4860::8888", "2003::1", "64:ff9b::808:808", "64:ff9b::8.8.8.8",
]  # fmt: skip
# Embedded IPv4 addresses of each kind, public ones too: what translates them is not ours to know.
EMBEDDED = [
    pattern.format(ipv4)
    for ipv4 in ("7f00:1", "a9fe:a9fe", "c0a8:101", "808:808")
    for pattern in ("::{}", "::ffff:{}", "::ffff:0:{}", "64:ff9b:1::{}", "2002:{}::", "2002:{}::1", "2001::{}")
]
PRIVATE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "168.63.129.16", "169.254.0.23", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1",
    "192.0.0.8", "192.0.0.9", "192.0.0.10", "192.0.0.170", "192.0.0.192", "192.0.0.255", "192.0.2.1", "192.31.196.1",
    "192.52.193.1", "192.88.99.1", "192.168.1.1", "192.175.48.1", "198.18.0.1", "198.19.255.255", "198.51.100.1",
    "203.0.113.1", "161.26.0.10", "166.8.0.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "100::1", "100:0:0:1::1", "5f00::1", "fc00::1", "fd00::1", "fd00:ec2::254", "fd20:ce::254",
    "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "2001:0:1::1", "2001:2::1", "2001:3::1", "2001:10::1",
    "2001:20::1", "2001:30::1", "2001:4:112::1", "2001:1::1", "2001:db8::1", "2620:4f:8000::1", "3ffe::1", "3fff::1",
    "2606:4700::1111%eth0", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::c000:c0", "64:ff9b::a83f:8110",
    "64:ff9b::192.168.0.1", "2002:a83f:8110::1", "2002:c000:c0::1", *EMBEDDED,
]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "public"), [*((address, True) for address in PUBLIC), *((address, False) for address in PRIVATE)]
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "017700000001", "127.1", "0x7f.0.0.1", "0177.0.0.1", "0", "0.0", "2852039166",
        "0xa9fea9fe", "168.63.33040", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:a9fe:a9fe]", "[64:ff9b::a9fe:a9fe]",
        "[fe80::1%25lo]", "１２７.0.0.1", "127。0。0。1", "127.0.0.1.", "LOCALHOST", "localhost.", "user@127.0.0.1", "",
    ],
)  # fmt: skip
def test_private_hosts_in_disguise_are_not_fetched_from(host: str) -> None:
    with pytest.raises((UnavailableError, httpx.InvalidURL, OSError, ValueError)):  # all are "cannot be fetched"
        addresses = asyncio.run(_resolve(httpx.URL(f"http://{host}/a.png"), "url"))
        pytest.fail(f"{host} leads to {addresses}")


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


@pytest.fixture(scope="module")
def fetching(yi_vl: YiVL) -> YiVL:
    return YiVL(yi_vl.model, yi_vl.processor, allow_remote_images=True)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with serving_images(monkeypatch) as server:
        yield server


def url_of(web: ThreadingHTTPServer, path: str = "wide.png", host: str = "public.test", scheme: str = "http") -> str:
    return f"{scheme}://{host}:{web.server_address[1]}/{path}"


def run_ask(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["yi-vl", *arguments])
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


ENTRY_POINTS: list[Callable[[YiVL, str], Any]] = [
    lambda yi_vl, url: yi_vl.predict(url, "What?"),
    lambda yi_vl, url: list(yi_vl.stream([WIDE, url], "What?")),
    lambda yi_vl, url: yi_vl.predict_batch([([url], "What?")]),
    lambda yi_vl, url: yi_vl.chat().ask("What?", url),
    lambda yi_vl, url: yi_vl.answer([{"role": "user", "content": [{"type": "image", "image": url}]}]),
    lambda yi_vl, url: yi_vl.processor.image_processor(url),
    lambda yi_vl, url: load_image(url),
    lambda yi_vl, url: check_source(url),
]


@pytest.mark.parametrize("ask", ENTRY_POINTS)
@pytest.mark.parametrize("scheme", ["http", "HTTPS"])
def test_urls_are_not_fetched_unasked(yi_vl: YiVL, web: Any, ask: Any, scheme: str) -> None:
    with pytest.raises(ValueError, match=r"wide.png is a URL, .* allow_remote_images=True .* --allow-remote-images"):
        ask(yi_vl, url_of(web, scheme=scheme))
    assert not web.requests


def test_urls_are_fetched_when_asked(yi_vl: YiVL, fetching: YiVL, web: Any) -> None:
    url, options = url_of(web), {"max_new_tokens": 3}
    pixels = np.array(Image.open(WIDE).convert("RGB"))
    assert np.array_equal(load_image(f" {url}\n", allow_remote_images=True), pixels)
    assert np.array_equal(load_image(url_of(web, "moved"), allow_remote_images=True), pixels)
    expected = yi_vl.predict(WIDE, "What?", **options)
    assert fetching.predict(url, "What?", **options) == expected
    assert fetching.predict_batch([(url, "What?"), (WIDE, "What?")], **options) == [expected] * 2
    conversation = fetching.chat()
    assert conversation.ask("What?", url, **options) == expected
    num_requests = len(web.requests)
    conversation.ask("And?", **options)
    assert len(web.requests) == num_requests  # fetched once, and remembered


def test_urls_are_fetched_within_an_event_loop_and_from_threads(web: Any) -> None:
    def size(_: int) -> tuple[int, int]:
        return load_image(url_of(web), allow_remote_images=True).size

    async def within() -> tuple[int, int]:
        return size(0)

    expected = Image.open(WIDE).size
    assert asyncio.run(within()) == expected
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(size, range(16))) == {expected}


@pytest.mark.parametrize(
    ("host", "path", "problem", "num_requests"),
    [
        ("private.test", "wide.png", "private.test:[0-9]+/wide.png leads to an address that is not public", 0),
        ("both.test", "wide.png", "not public", 0),
        ("nowhere.test", "wide.png", "cannot be fetched: no such name", 0),
        ("me:sesame@public.test", "missing?key=sesame#sesame", "http://public.test:[0-9]+/missing.* answers 404", 1),
        ("public.test", "elsewhere", "not public", 1),
        ("public.test", "file", "no http or https URL", 1),
        ("public.test", "loop", "redirected more than 3 times", 4),
        ("public.test", "endless", "larger than 100,000 bytes", 1),
        ("public.test", "slow", "longer than 0.5 seconds", 1),
        ("public.test", "empty", "is empty", 1),
    ],
)
def test_limits(
    web: Any, monkeypatch: pytest.MonkeyPatch, host: str, path: str, problem: str, num_requests: int
) -> None:
    monkeypatch.setattr(image_remote, "MAX_BYTES", 100_000)
    monkeypatch.setattr(image_remote, "MAX_SECONDS", 0.5 if path == "slow" else 120)
    with pytest.raises(ValueError, match=problem) as caught:
        load_image(url_of(web, path, host), allow_remote_images=True)
    assert len(web.requests) == num_requests and "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("ftp://example.org/a.png", "a URL of ftp:"),
        ("file:///etc/passwd", "a URL of file:"),
        ("S3://bucket/a.png", "a URL of s3:"),
        ("http://[::1/a.png", "the URL of 17 characters cannot be fetched"),
        ("https://", "no http or https URL"),
        ("http://example.org:99999/a.png", "cannot be fetched"),
        ("http://exa\nmple.org/", "cannot be fetched"),
        ("http://" + "a" * 300 + ".org/", "cannot be fetched"),
    ],
)
def test_urls_that_are_none(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        load_image(url, allow_remote_images=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_secrets_in_urls_are_not_shown() -> None:
    assert describe(" https://me:sesame@example.org:8/a/b.png?X-Sig=1#c ") == "https://example.org:8/a/b.png?..."


def test_one_url_that_fails_takes_no_other_answer_with_it(fetching: YiVL, web: Any) -> None:
    requests = [(url_of(web), "What?"), (url_of(web, "missing"), "What?"), (WIDE, "What?")]
    good, bad, other = fetching.predict_batch(requests, errors="return", max_new_tokens=3)
    assert good == other and isinstance(bad, ValueError) and "answers 404" in str(bad)
    with pytest.raises(BatchError, match=r"requests\[1\].*answers 404"):
        fetching.predict_batch(requests, max_new_tokens=3)


def test_the_command_fetches_when_asked(
    yi_vl: YiVL, fetching: YiVL, web: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake_load(*_: Any, allow_remote_images: bool, **__: Any) -> YiVL:
        return fetching if allow_remote_images else yi_vl

    monkeypatch.setattr("yi_vl.predict.load", fake_load)
    arguments = ["ask", url_of(web), "What?", "--max-new-tokens", "3"]
    assert run_ask(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert "--allow-remote-images" in error and error.count("\n") == 1 and not web.requests
    assert run_ask(monkeypatch, *arguments, "--allow-remote-images") == 0
    assert capsys.readouterr().out.strip() == yi_vl.predict(WIDE, "What?", max_new_tokens=3)
    assert run_ask(monkeypatch, "ask", url_of(web), "--allow-remote-images") == 2
    assert "it is a URL" in capsys.readouterr().err
    lines = iter([f"/image {url_of(web)} {url_of(web, 'missing')}", f"/image '{url_of(web)}'", "What?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/exit"))
    assert run_ask(monkeypatch, "chat", "--allow-remote-images", "--max-new-tokens", "3") == 0
    shown = capsys.readouterr()
    assert "answers 404" in shown.err and yi_vl.predict(WIDE, "What?", max_new_tokens=3) in shown.out


def test_without_httpx_the_message_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "yi_vl.image.remote")
    with pytest.raises(ValueError, match=r'httpx is missing; .* pip install "yi_vl\[serve\]"'):
        load_image("https://example.org/a.png", allow_remote_images=True)


def test_the_option_is_a_bool() -> None:
    with pytest.raises(ValueError, match="allow_remote_images is 'False'; expected True or False"):
        load(allow_remote_images="False")  # type: ignore[arg-type]
