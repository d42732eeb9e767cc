"""What the server refuses, by name and status: bad requests, large or slow bodies, missing keys, remote images."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from serving import (
    CHATS,
    HI,
    PATIENCE_SECONDS,
    TALL,
    WIDE,
    address,
    ask,
    bomb,
    client,
    client_of,
    data_url,
    direct,
    encoded_image,
    openai_messages,
    serving,
    show,
    yi_vl,
)
from test_image_hostile import bmp_in_rle, gif_with, icon, jpeg_of_scans, png
from web import serving_images

from yi_vl.image import MAX_PIXELS
from yi_vl.predict import YiVL
from yi_vl.server import Limits, create_app


def with_text(request: dict[str, Any], text: str) -> dict[str, Any]:
    request["messages"][0]["content"].append({"type": "text", "text": text})
    return request


URL = "messages[0].content[0].image_url.url"
REFUSED: list[tuple[Any, int, str | None, str]] = [
    (b"{", 400, None, "not JSON"),
    (b"\xff", 400, None, "not JSON"),
    (b"[" * 100_000, 400, None, "not JSON"),
    ([], 400, None, "object"),
    ({"messages": HI}, 400, "model", "missing"),
    ({"model": "tiny"}, 400, "messages", "missing"),
    (ask(model="gpt-4o"), 404, "model", "no model 'gpt-4o'"),
    (ask(messages=[]), 400, "messages", "at least 1"),
    (ask(messages=[{"role": "wizard", "content": "Hi"}]), 400, "messages[0].role", "'wizard'"),
    (ask(messages=[{"role": "user"}]), 400, "messages[0].content", "missing"),
    (ask(messages=[{"role": "user", "content": "Hi", "nmae": "Li"}]), 400, "messages[0].nmae", "not supported"),
    (ask(messages=[{"role": "tool", "content": "Hi"}]), 400, "messages[0].role", "'tool'"),
    (
        ask(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
        400,
        "messages[0].content[0].type",
        "audio",
    ),
    (ask(messages=[{"role": "user", "content": [{"type": "text"}]}]), 400, "messages[0].content[0]", "holds `text`"),
    (ask(messages=[{"role": "assistant", "content": "Hi"}]), 400, "messages", "nothing to answer"),
    (ask(messages=[{"role": "user", "content": " "}]), 400, "messages", "question is empty"),
    (ask(messages=[{"role": "user", "content": "a dog " * 600}]), 400, "messages", "the model holds 512"),
    (ask(temperature=-1), 400, "temperature", "greater than or equal to 0"),
    (ask(temperature="hot"), 400, "temperature", "'hot'"),
    (json.dumps(ask(temperature=math.nan)).encode(), 400, "temperature", "finite"),
    (ask(top_p=-0.1), 400, "top_p", "greater than or equal to 0"),
    (ask(max_tokens=0), 400, "max_tokens", "at least 1"),
    (ask(max_tokens=-2), 400, "max_tokens", "at least 1"),
    (ask(max_tokens=1.5), 400, "max_tokens", "integer"),
    (ask(max_tokens=True), 400, "max_tokens", "integer"),
    (ask(max_tokens=10**6), 400, "max_tokens", "at most 2048"),
    (ask(max_tokens=None, max_completion_tokens=10**6), 400, "max_completion_tokens", "at most 2048"),
    (ask(max_completion_tokens=3), 400, None, "they differ; give one"),
    (ask(n=5), 400, "n", "at most 4"),
    (ask(seed=2**64), 400, "seed", "less than"),
    (ask(stop=3), 400, "stop", "array"),
    (ask(stop=["a"] * 5), 400, "stop", "at most 4"),
    (ask(temprature=1), 400, "temprature", "not supported"),
    (ask(logprobs=True), 400, "logprobs", "not supported"),
    (ask(presence_penalty=0.5), 400, "presence_penalty", "not supported"),
    (ask(response_format={"type": "json_object"}), 400, "response_format", "not supported"),
    (ask(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    (show("data:image/png;base64,AAAA"), 422, URL, "not an image"),
    (show("data:image/png;base64,!"), 422, URL, "not base64"),
    (show("data:image/png,abc"), 400, URL, "must have the form"),
    (show(data_url(TALL.read_bytes()[:2000])), 422, URL, "damaged"),
    (show(data_url(bomb())), 422, URL, f"at most {MAX_PIXELS:,}"),
    (show(data_url(encoded_image("EPS"))), 422, URL, "not an image of a format"),
    (show(data_url(png(1, 300_000, 8, 2, 3))), 422, URL, "a side of at most 65,535"),
    (show(data_url(gif_with(b"!\xfe\1a\0" * 100_000))), 422, URL, "too many pieces"),
    (show(data_url(jpeg_of_scans(10_000, 400))), 422, URL, "more than 50 scans"),
    (show(data_url(bmp_in_rle(10_000))), 422, URL, "decoded slowly"),
    (show(data_url(icon(png(10_000, 10_000, 1, 0, 1)))), 422, URL, "an icon that holds"),
    (ask(messages=[{"role": "user", "content": "a" * 10_000_000}]), 400, "messages", "takes at least"),
    (ask(messages=[{"role": "user", "content": "#" * 5_000}]), 400, "messages", "takes at least"),
    ({"messages": [], "metadata": [0] * 250_002}, 413, None, "more than 250,000 values"),
    ({"messages": [], "metadata": [json.loads("[" * 100 + "]" * 100)] * 2501}, 413, None, "more than 250,000 values"),
    ({"messages": [], "metadata": [{"a": {}}] * 90_000}, 413, None, "more than 250,000 values"),
    (with_text(show(data_url(bomb())), "a" * 100_000), 400, "messages", "takes at least"),  # before it is decoded
    (show(str(WIDE)), 400, URL, "files are not read"),
    (show(f"file://{WIDE}"), 400, URL, "files are not read"),
    (show("http://127.0.0.1/a.png"), 400, URL, "fetches no images"),
    (show(3), 400, URL, "string"),
    (show(data_url(encoded_image("PNG")), crop="high"), 400, URL.replace("url.url", "url.crop"), "not supported"),
    (ask(messages=show("data:,")["messages"] * 9), 413, "messages", "9 images"),
]


@pytest.mark.parametrize(("request_", "status", "param", "problem"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_requests_are_refused_by_name(
    address: str, request_: Any, status: int, param: str | None, problem: str
) -> None:
    content = request_ if isinstance(request_, bytes) else json.dumps(request_).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{address}/v1/chat/completions", content=content, headers=headers, timeout=PATIENCE_SECONDS)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert problem in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 500


def test_a_stream_that_is_refused_has_a_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a dog " * 600}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


def test_bodies_and_images_are_limited_in_bytes(yi_vl: YiVL) -> None:
    limits = Limits(body_bytes=40_000, image_bytes=5_000)
    with serving(create_app(yi_vl, "tiny", limits=limits)) as address, client_of(address) as client:
        with pytest.raises(openai.APIStatusError, match="larger than 40,000 bytes") as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a" * 5_000_000}])
        assert caught.value.status_code == 413
        chunked = httpx.post(
            f"{address}/v1/chat/completions",
            content=(b" " * 10_000 for _ in range(9)),  # of a length that no header tells
            headers={"Content-Type": "application/json"},
        )
        assert chunked.status_code == 413
        with pytest.raises(openai.APIStatusError, match="larger than 5,000 bytes") as caught:
            client.chat.completions.create(model="tiny", messages=openai_messages([("user", [TALL], "What?")]))
        assert caught.value.status_code == 413 and caught.value.param == URL
        assert client.chat.completions.create(
            model="tiny", messages=openai_messages(CHATS["image"]), max_tokens=1
        ).choices


def test_a_body_that_does_not_arrive_is_given_up(yi_vl: YiVL) -> None:
    with serving(create_app(yi_vl, "tiny", limits=Limits(body_seconds=0.1))) as address:
        connection = socket.create_connection(("127.0.0.1", httpx.URL(address).port or 0), PATIENCE_SECONDS)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with connection:
            connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_key_is_asked_for_and_never_logged(yi_vl: YiVL, caplog: pytest.LogCaptureFixture) -> None:
    with serving(create_app(yi_vl, "tiny", api_keys=["öffne dich"])) as address:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
                answer = httpx.request(method, address + path, headers=header)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    caplog.set_level("DEBUG")
    with serving(create_app(yi_vl, "tiny", api_keys=["sesame"]), log_level="trace") as address:
        with client_of(address, key="wrong") as client, pytest.raises(openai.AuthenticationError, match="key"):
            client.models.list()
        with client_of(address, key="sesame") as client:
            assert client.chat.completions.create(model="tiny", messages=HI, max_tokens=1).choices
        assert httpx.get(f"{address}/healthz").status_code == httpx.get(f"{address}/metrics").status_code == 200
    log = "".join(record.getMessage() for record in caplog.records if not record.name.startswith(("http", "openai")))
    assert "/v1/models" in log and "sesame" not in log


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    with serving_images(monkeypatch) as server:
        yield server


def ask_about_remote_image(yi_vl: YiVL, web: ThreadingHTTPServer, location: str) -> str:
    """What a server that may fetch images answers about the one at `host/path`."""
    host, _, path = location.partition("/")
    limits = Limits(image_bytes=100_000, fetch_seconds=0.5 if path == "slow" else PATIENCE_SECONDS)
    app = create_app(yi_vl, "tiny", allow_remote_images=True, limits=limits)
    with serving(app) as address, client_of(address) as client:
        request = show(f"http://{host}:{web.server_address[1]}/{path}")
        return client.chat.completions.create(**request).choices[0].message.content


@pytest.mark.parametrize("location", ["public.test/wide.png", "public.test/moved", "rebinding.test/wide.png"])
def test_remote_images_are_fetched(web: Any, yi_vl: YiVL, location: str) -> None:
    assert (
        ask_about_remote_image(yi_vl, web, location) == direct(yi_vl, [("user", [WIDE], "What?")], max_new_tokens=2)[0]
    )
    host = location.partition("/")[0]
    assert set(web.requests) <= {(f"{host}:{web.server_address[1]}", path) for path in ("/wide.png", "/moved")}


@pytest.mark.parametrize(
    ("location", "status", "problem", "num_requests"),
    [
        ("private.test/wide.png", 422, "not public", 0),
        ("both.test/wide.png", 422, "not public", 0),
        ("127.0.0.2/wide.png", 422, "not public", 0),
        ("public.test/elsewhere", 422, "not public", 1),
        ("public.test/file", 422, "no http or https", 1),
        ("public.test/loop", 422, "redirected more than 3", 4),
        ("public.test/missing", 422, "answers 404", 1),
        ("public.test/endless", 413, "larger than 100,000", 1),
        ("public.test/slow", 422, "longer than 0.5 seconds", 1),
        ("public.test/empty", 422, "not an image", 1),
        ("nowhere.test/wide.png", 422, "cannot be fetched", 0),
    ],
)
def test_remote_images_have_limits(
    web: Any, yi_vl: YiVL, location: str, status: int, problem: str, num_requests: int
) -> None:
    with pytest.raises(openai.APIStatusError, match=problem) as caught:
        ask_about_remote_image(yi_vl, web, location)
    assert (caught.value.status_code, caught.value.param, len(web.requests)) == (status, URL, num_requests)
