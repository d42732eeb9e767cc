"""Endpoints that misbehave: nothing is lost, every question's failure is its own, and the same command goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import encoded_image, write_parquet
from click.testing import Result
from fake_openai import FakeOpenAI, Respond, completion, fake_openai, prompt_of
from typer.testing import CliRunner

from eval import chat_client
from eval.__main__ import app
from eval.chat_client import ChatClient
from eval.models import Endpoint, Settings
from yi_vl.files import read_json_lines

ASK = [{"type": "text", "text": "Hi"}]


def write_mmmu(folder: Path, num: int) -> str:
    rows = [
        {
            "id": f"validation_Art_{number}",
            "question": f"Question {number}:",
            "options": "['red', 'green']",
            **{f"image_{index}": encoded_image("red") if index == 1 else None for index in range(1, 8)},
            "answer": "B",
            "question_type": "multiple-choice",
        }
        for number in range(1, num + 1)
    ]
    write_parquet(folder / "Art" / "validation-0.parquet", rows)
    return str(folder)


def number_of(body: dict[str, Any]) -> int:
    return int(prompt_of(body).split("Question ")[1].split(":")[0])


def run(server: FakeOpenAI, data: str, out: Path, *arguments: str) -> Result:
    command = ["mmmu", "--model", server.url, "--data", data, "--out", str(out), "--batch-size", "4", *arguments]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def reply_of(respond: Respond, **options: Any) -> chat_client.Reply:
    with fake_openai(respond) as server:
        return Endpoint(server.url, "fake", **options).answer([ASK], Settings())[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"choices": None}, "a reply without choices"),
        ({"choices": []}, "a reply without choices"),
        ({"choices": [None]}, "a reply without choices"),
        ({"choices": [{"index": 0}]}, "a reply without choices"),
        ({"choices": [{"message": None}]}, "a reply without choices"),
        ({"error": {"message": "over\nloaded", "code": 502}}, "an error instead of a reply: over loaded"),
        ({"error": "overloaded", "choices": []}, "an error instead of a reply: overloaded"),
        ({"choices": [{"message": {"content": ""}, "error": {"message": "cut"}}]}, "an error instead of a reply: cut"),
        ([], "a reply without choices"),
        ({"error": "half \ud800"}, "half ?"),
        (b"<html>gateway</html>", "no JSON"),
        (b"", "no JSON"),
    ],
)
def test_a_reply_that_is_none_is_one_line(body: Any, message: str) -> None:
    reply = reply_of(lambda _: (200, body))
    assert reply.error is not None and message in reply.error and "\n" not in reply.error
    assert reply.text == "" and not reply.is_server_down


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (completion("B"), ("B", "stop", "", "")),
        (completion([{"type": "text", "text": "B"}, {"type": "text", "text": " it is"}]), ("B it is", "stop", "", "")),
        (
            completion([{"type": "thinking", "thinking": [{"text": "A?"}]}, {"type": "text", "text": "B"}]),
            ("B", "stop", "A?", ""),
        ),
        (completion("B", reasoning_content="A?"), ("B", "stop", "A?", "")),
        (completion(None, "length", reasoning="A?"), ("", "length", "A?", "")),
        (completion(None, refusal="No."), ("", "refused", "", "No.")),
        (completion([{"type": "refusal", "refusal": "No."}]), ("", "refused", "", "No.")),
        (completion("", "content_filter"), ("", "refused", "", "")),
        (completion(None), ("", "stop", "", "")),
        (completion("B", None), ("B", None, "", "")),
        (completion("B \ud800"), ("B ?", "stop", "", "")),
    ],
)  # fmt: skip
def test_every_format_of_content_is_read(sent: tuple[int, Any], expected: tuple[Any, ...]) -> None:
    reply = reply_of(lambda _: sent)
    assert (reply.error, (reply.text, reply.finish, reply.reasoning, reply.refusal)) == (None, expected)


def test_a_busy_server_is_asked_again_and_one_failure_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "MAX_RETRIES", 2)
    seen: dict[str, int] = {}

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        text = prompt_of(body)
        seen[text] = seen.get(text, 0) + 1
        if text == "busy" or (text == "soon" and seen[text] < 3):
            return 429, {"error": {"message": "slow down"}}
        return completion(text)

    with fake_openai(respond) as server:
        contents = [[{"type": "text", "text": text}] for text in ("one", "soon", "busy", "two")]
        first, soon, busy, two = Endpoint(server.url, "fake").answer(contents, Settings())
    assert [first.text, soon.text, two.text] == ["one", "soon", "two"] and seen["busy"] == 3
    assert busy.error is not None and "HTTP 429" in busy.error and "slow down" in busy.error
    assert not busy.is_server_down


def test_the_timeout_is_the_users_and_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_client, "MAX_RETRIES", 0)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")

    def slow(_: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(1.5)
        return completion("late")

    started = time.perf_counter()
    reply = reply_of(slow, timeout_seconds=0.2)
    assert reply.error is not None and "timed out" in reply.error.lower() and not reply.is_server_down
    assert time.perf_counter() - started < 10

    with fake_openai(lambda _: (401, {"error": {"message": "bad key sk-very-secret"}})) as server:
        reply = ChatClient(server.url).complete("Hi", model="fake")
        assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert reply.error is not None and "[key]" in reply.error and "secret" not in reply.error and reply.is_server_down
    with pytest.raises(ValueError, match="cannot be used as a URL"):
        ChatClient("http://[::1")
    with pytest.raises(ValueError, match=r"^http://127.0.0.1:9/v1 does not list its models .* --endpoint-model"):
        ChatClient("http://user:sk-very-secret@127.0.0.1:9/v1?key=sk-very-secret").first_model()


def test_failed_questions_are_counted_and_asked_again_by_the_same_command(tmp_path: Path) -> None:
    data, out, is_broken = write_mmmu(tmp_path / "data", 8), tmp_path / "out", True

    def respond(body: dict[str, Any]) -> tuple[int, Any]:
        match number_of(body):
            case 2 if is_broken:
                return 200, {"choices": None}
            case 5 if is_broken:
                return 400, {"error": {"message": "no"}}
            case 3:
                return completion("")
            case 4:
                return completion(None, refusal="I will not.")
            case 6:
                return completion("<think>Well, (B)", "length")
        return completion("(B)", reasoning_content="A?")

    with fake_openai(respond) as server:
        first = run(server, data, out)
        assert first.exit_code == 1
        assert "2 of 8 questions failed and are scored as empty responses, validation_Art_2 first" in first.stderr
        results = json.loads((out / "results.json").read_text())
        assert results["responses"] == {
            "num": 8, "failed": 2, "refused": 1, "cut": 1, "empty": 2, "unfinished_reasoning": 1,
        }  # fmt: skip
        assert "Of 8 responses: 2 failed, 1 refused, 1 cut, 2 empty, 1 unfinished reasoning." in first.stdout
        assert results["no_guess"]["correct"] == 3 and len(results["official"]["random_guesses"]) == 5
        assert list(results["config"]["errors"]) == ["validation_Art_2", "validation_Art_5"]
        records = {record["id"]: record for record in read_json_lines(out / "predictions.jsonl")}
        assert records["validation_Art_6"]["response"] == "<think>Well, (B)"
        assert records["validation_Art_1"]["reasoning"] == "A?" and records["validation_Art_4"]["refusal"]
        again = CliRunner().invoke(app, ["score", "mmmu", "--predictions", str(out / "predictions.jsonl"), "--answers",
                                         data, "--out", str(tmp_path / "scored")])  # fmt: skip
        assert again.exit_code == 0
        assert json.loads((tmp_path / "scored" / "results.json").read_text())["responses"] == results["responses"]

        is_broken, num_before = False, len(server.requests)
        second = run(server, data, out)
        assert second.exit_code == 0 and len(server.requests) == num_before + 2
        assert {number_of(body) for body in server.requests[num_before:]} == {2, 5}
        results = json.loads((out / "results.json").read_text())
        assert results["responses"]["failed"] == 0 and results["no_guess"]["correct"] == 5
        records = {record["id"]: record for record in read_json_lines(out / "predictions.jsonl")}
        assert len(records) == 8 and "error" not in records["validation_Art_2"]


def test_a_server_that_goes_away_is_one_line_and_its_answers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_client, "MAX_RETRIES", 0)
    data, out, named = write_mmmu(tmp_path / "data", 12), tmp_path / "out", ("--endpoint-model", "fake")
    with fake_openai(lambda _: completion("(B)")) as server:

        def respond(_: dict[str, Any]) -> tuple[int, Any]:
            return completion("(B)") if len(server.requests) <= 4 else (401, {"error": {"message": "expired"}})

        server.respond = respond
        with pytest.raises(ValueError, match=r"HTTP 401 .* expired\. Stopped after 4 of 12 questions; .* kept"):
            run(server, data, out, *named)
        assert len(server.requests) == 8
    assert sum("error" not in record for record in read_json_lines(out / "predictions.jsonl")) == 4
    with pytest.raises(ValueError, match=r"Connection .*\. Stopped after 0 of 8 questions") as caught:
        run(server, data, out, *named)
    assert server.url in str(caught.value) and "\n" not in str(caught.value)
    # Where nothing but failures is left the results are written; without any response there are none.
    again = run(server, data, out, *named, "--batch-size", "12")
    assert again.exit_code == 1 and "8 of 12 questions failed and are scored as empty responses" in again.stderr
    assert json.loads((out / "results.json").read_text())["responses"]["failed"] == 8
    with pytest.raises(ValueError, match="None of 12 questions has a response: http://127"):
        run(server, data, tmp_path / "none", *named, "--batch-size", "12")
    assert not (tmp_path / "none" / "results.json").exists()


def test_mmmu_pro_has_no_test_server_and_says_so_before_any_data_is_read() -> None:
    with pytest.raises(ValueError, match="answers are public"):
        CliRunner().invoke(
            app, ["submit", "mmmu-pro", "--predictions", "none.jsonl", "--data", "none"], catch_exceptions=False
        )
