"""The server through OpenAI's own client: answers, streams, options, failures, metrics, and its command."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from openai import OpenAI
from serving import (
    CHATS,
    HI,
    Gate,
    Turns,
    address,
    ask,
    client,
    client_of,
    direct,
    gate,
    make_model_generate,
    metric,
    openai_messages,
    serving,
    wait_until,
    yi_vl,
)
from tiny import NUM_PATCHES

from yi_vl import cli
from yi_vl.predict import YiVL
from yi_vl.server import create_app


@pytest.mark.core
@pytest.mark.parametrize("chat", CHATS)
def test_answers_are_those_of_the_model(client: OpenAI, yi_vl: YiVL, chat: str) -> None:
    text, reason, num_read, num_generated = direct(yi_vl, CHATS[chat], max_new_tokens=12)
    reply = client.chat.completions.create(model="tiny", messages=openai_messages(CHATS[chat]), max_tokens=12)
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, reason)
    assert reply.usage is not None and reply.model == "tiny" and reply.object == "chat.completion"
    usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens)
    assert usage == (num_read, num_generated, num_read + num_generated)
    assert num_read > NUM_PATCHES * sum(len(images) for _, images, _ in CHATS[chat])


def test_every_chat_has_a_different_answer(yi_vl: YiVL) -> None:
    assert len({direct(yi_vl, turns, max_new_tokens=12)[0] for turns in CHATS.values()}) == len(CHATS)


@pytest.mark.core
@pytest.mark.parametrize("includes_usage", [True, False])
def test_a_stream_is_the_answer_in_pieces(client: OpenAI, yi_vl: YiVL, includes_usage: bool) -> None:
    text, reason, num_read, num_generated = direct(yi_vl, CHATS["image"], max_new_tokens=12)
    options: Any = {"stream_options": {"include_usage": True}} if includes_usage else {}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=openai_messages(CHATS["image"]), max_completion_tokens=12, stream=True, **options
        )
    )
    if includes_usage:
        last = chunks.pop()
        assert last.choices == [] and last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (num_read, num_generated)
    deltas = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(delta or "" for delta in deltas) == text and len(deltas) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.usage for chunk in chunks} == {None} and len({chunk.id for chunk in chunks}) == 1


def test_pieces_are_sent_as_they_come(client: OpenAI, gate: Gate) -> None:
    gate.let(3)
    stream = client.chat.completions.create(model="tiny", messages=HI, max_tokens=9, stream=True)  # type: ignore[call-overload]
    for _, chunk in zip(range(2), stream):  # the role and a piece
        assert chunk.choices[0].finish_reason is None
    assert gate.num_begun <= 4
    gate.open()
    assert list(stream)[-1].choices[0].finish_reason == "length"


def test_sampling_options_are_those_of_the_model(client: OpenAI, yi_vl: YiVL) -> None:
    options = {"temperature": 1.0, "top_p": 0.9}
    expected = [direct(yi_vl, CHATS["text"], max_new_tokens=8, seed=5 + i, **options)[0] for i in range(3)]
    assert len(set(expected)) == 3
    reply = client.chat.completions.create(
        model="tiny", messages=openai_messages(CHATS["text"]), max_tokens=8, seed=5, n=3, **options
    )
    assert [choice.message.content for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage is not None and reply.usage.completion_tokens == 24
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="tiny", messages=openai_messages(CHATS["text"]), max_tokens=8, seed=5, n=3, stream=True, **options
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == expected
    negative = client.chat.completions.create(model="tiny", messages=HI, max_tokens=2, seed=-1, temperature=1.0)
    assert negative.choices[0].finish_reason == "length"


@pytest.mark.parametrize("as_list", [True, False])
def test_stop_strings_end_an_answer_and_are_not_in_it(client: OpenAI, yi_vl: YiVL, as_list: bool) -> None:
    text, _, _, num_generated = direct(yi_vl, CHATS["text"], max_new_tokens=12)
    stop = text[len(text) // 2 :][:3]
    reply = client.chat.completions.create(
        model="tiny", messages=openai_messages(CHATS["text"]), max_tokens=12, stop=["never", stop] if as_list else stop
    )
    assert reply.choices[0].message.content == text.partition(stop)[0].rstrip()
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and 0 < reply.usage.completion_tokens < num_generated


@pytest.mark.parametrize(
    ("generated", "then", "limit", "expected"),
    [
        (" A dog.", 2, 9, ("A dog.", "stop")),
        (" A dog.\n### Human: more", 2, 50, ("A dog.", "stop")),
        (" dog" * 9, 2, 3, ("dog dog dog", "length")),
    ],
)
def test_finish_reasons(
    client: OpenAI, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, generated: str, then: int, limit: int, expected: Any
) -> None:
    make_model_generate(yi_vl, monkeypatch, generated, then)
    (choice,) = client.chat.completions.create(model="tiny", messages=HI, max_tokens=limit).choices
    assert (choice.message.content, choice.finish_reason) == expected


def test_models_and_health(client: OpenAI, address: str) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}


def test_defaults_of_openai_pass_and_its_answers_come_back(client: OpenAI, yi_vl: YiVL) -> None:
    first = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=4, frequency_penalty=0, logprobs=False, stop=None, user="Li",
        response_format={"type": "text"},
    )  # fmt: skip
    history: Any = [*HI, first.choices[0].message, {"role": "user", "content": "So?"}]
    second = client.chat.completions.create(model="tiny", messages=history, max_tokens=4)
    history: Turns = [
        ("user", [], "Hi"),
        ("assistant", [], first.choices[0].message.content or ""),
        ("user", [], "So?"),
    ]
    assert second.choices[0].message.content == direct(yi_vl, history, max_new_tokens=4)[0]


def test_pages_that_do_not_exist_and_other_methods(address: str) -> None:
    missing, wrong = httpx.get(f"{address}/v1/nothing"), httpx.get(f"{address}/v1/chat/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["type"] == wrong.json()["error"]["type"] == "invalid_request_error"
    response = httpx.post(f"{address}/v1/chat/completions", data={"model": "tiny"})
    assert response.status_code == 400 and "application/json" in response.json()["error"]["message"]


def test_a_failure_is_reported_and_the_server_stays_up(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(create_app(yi_vl, "tiny")) as address, client_of(address) as client:
        make_model_generate(yi_vl, monkeypatch, " dog dog", RuntimeError("out of memory at 0x1234"))
        with pytest.raises(openai.InternalServerError, match="The server failed") as caught:
            client.chat.completions.create(**ask(max_tokens=9))
        assert "0x1234" not in str(caught.value)
        make_model_generate(yi_vl, monkeypatch, " dog dog", RuntimeError("out of memory at 0x1234"))
        text = ""
        with pytest.raises(openai.APIError, match="The server failed"):
            for chunk in client.chat.completions.create(**ask(max_tokens=9, stream=True)):
                text += chunk.choices[0].delta.content or ""
        assert text == "dog dog"
        monkeypatch.undo()
        assert client.chat.completions.create(**ask()).choices[0].finish_reason == "length"
        assert metric(address, "failures_total") == metric(address, "requests_total", status="500") == 2


def test_metrics_count(yi_vl: YiVL) -> None:
    with serving(create_app(yi_vl, "tiny")) as address, client_of(address) as client:
        usages = [client.chat.completions.create(**ask(max_tokens=n)).usage for n in (3, 4)]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ask(n=99))
        wait_until(lambda: metric(address, "requests_total") == 3)
        assert metric(address, "requests_total", status="200") == 2
        assert metric(address, "requests_total", status="400") == 1
        assert metric(address, "prompt_tokens_total") == sum(usage.prompt_tokens for usage in usages)
        assert metric(address, "completion_tokens_total") == 7
        assert metric(address, "time_to_first_token_seconds_count") == 2
        assert metric(address, "time_to_first_token_seconds_sum") > 0
        assert metric(address, "requests_running") == metric(address, "requests_waiting") == 0


def test_the_command_serves(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[uvicorn.Config] = []

    class Server:
        def __init__(self, config: uvicorn.Config) -> None:
            configs.append(config)

        def run(self, sockets: list[socket.socket]) -> None:
            assert sockets[0].getsockname() == ("127.0.0.1", port)
            sockets[0].close()

    monkeypatch.setattr(cli, "load_quickly", lambda *_, **__: yi_vl)
    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setenv("YI_VL_API_KEY", "sesame other")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--max-tokens", "5", "--port", str(port), "--shutdown-seconds", "7"]
    monkeypatch.setattr(sys, "argv", ["yi-vl", "serve", str(tmp_path), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code and configs[0].timeout_graceful_shutdown == 7
    monkeypatch.undo()
    with serving(configs[0].app) as address:  # type: ignore[arg-type]
        assert httpx.get(f"{address}/v1/models").status_code == 401
        with client_of(address, key="other") as client:
            assert [model.id for model in client.models.list()] == [tmp_path.name]
        with client_of(address, key="sesame") as client:
            with pytest.raises(openai.BadRequestError, match="at most 5"):
                client.chat.completions.create(model=tmp_path.name, messages=HI, max_tokens=6)
            reply = client.chat.completions.create(model=tmp_path.name, messages=HI)
            assert reply.usage is not None and reply.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("arguments", "missing", "problem"),
    [
        ([], "uvicorn", 'pip install "yi_vl[serve]"'),
        ([], "prometheus_client", 'pip install "yi_vl[serve]"'),
        (["--api-key", ""], None, "key is empty"),
        (["--api-key", "a", "--api-key", " "], None, "key is empty"),
        (["--api-key-file", "/nowhere"], None, "/nowhere cannot be read"),
        (["--port", "99999"], None, "no port 99999"),
        (["--port=-1"], None, "no port -1"),
        (["--host", ""], None, "host is empty"),
        (["--host", "256.1.1.1"], None, "'256.1.1.1'"),
        (["--host", "192.0.2.1"], None, "Cannot assign"),
        (["--cors-origin", "https://example.org/"], None, "https://example.org/"),
        (["--cors-origin", "example.org"], None, "'example.org'"),
        (["--allowed-host", "https://example.org"], None, "'https://example.org'"),
        (["--ssl-keyfile", "/nowhere"], None, "--ssl-certfile"),
        (["--ssl-certfile", "/nowhere"], None, "/nowhere is not a file"),
        (["--ssl-certfile", __file__], None, "no PEM certificate"),
    ],
)
def test_what_hinders_serving_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    missing: Any,
    problem: str,
) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(cli, "load_quickly", None)  # is not called
    monkeypatch.setattr(sys, "argv", ["yi-vl", "serve", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1
