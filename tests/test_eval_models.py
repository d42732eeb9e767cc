"""Models under evaluation: yi_vl's, quantized, any of transformers, endpoints; batches, processes and speed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import run_cli
from processes import run_program

from eval.benchmarks import mmmu
from eval.models import Content, Endpoint, ModelChoice, Settings, TransformersModel, YiVLModel, open_model
from eval.types import BenchmarkImage
from yi_vl.quantize import packed_layers

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_predictions_do_not_depend_on_batches_or_processes(small_mmmu: str, tiny_folder: Path, tmp_path: Path) -> None:
    common = ["mmmu", "--model", str(tiny_folder), "--data", small_mmmu, "--max-new-tokens", "6"]
    run_cli(*common, "--out", str(tmp_path / "one"), "--batch-size", "1")
    run_cli(*common, "--out", str(tmp_path / "four"), "--batch-size", "4")
    ranks = run_program(tmp_path, "eval", *common, "--out", str(tmp_path / "two"), num_ranks=2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].stderr
    texts = {(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "four", "two")}
    assert len(texts) == 1
    records = [json.loads(line) for line in texts.pop().splitlines()]
    assert len({record["response"] for record in records}) > 1
    assert records[0]["settings"] == {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": None}
    assert not list((tmp_path / "two").glob("predictions-*"))
    results = json.loads((tmp_path / "four" / "results.json").read_text())
    assert results["official"]["num"] == results["no_guess"]["num"] == 7
    assert {"config", "versions", "git", "chance"} <= set(results) and results["official"]["interval_95"][0] >= 0
    assert (tmp_path / "four" / "results.png").stat().st_size > 5000
    shown = run_cli("compare", str(tmp_path / "one"), str(tmp_path / "four"))
    assert "| official | 7 | +0.0 | +0.0 to +0.0 | 0 | 0 | 1 |" in shown


def test_a_quantized_run_is_recorded_as_such_and_continues_no_other(
    small_mmmu: str, tiny_folder: Path, tmp_path: Path
) -> None:
    command = ["mmmu", "--model", str(tiny_folder), "--data", small_mmmu, "--max-new-tokens", "6", "--device", "cpu"]
    command += ["--out", str(tmp_path / "out")]
    run_cli(*command, "--limit", "2")
    with pytest.raises(ValueError, match=r"made otherwise: .* has model '.*tiny0', now it is '.*tiny0, int4'"):
        run_cli(*command, "--quantize", "int4")
    (tmp_path / "out" / "predictions.jsonl").unlink()
    table = run_cli(*command, "--quantize", "int4")
    with pytest.raises(ValueError, match="made otherwise"):
        run_cli(*command)
    with pytest.raises(ValueError, match="made otherwise"):
        run_cli(*command, "--quantize", "int8")
    name = f"{tiny_folder}, int4"
    assert f"**{name}** (official rules)" in table
    config = json.loads((tmp_path / "out" / "results.json").read_text())["config"]
    assert (config["model"], config["quantize"]) == (name, "int4")
    records = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert {record["model"] for record in records} == {name}
    contents = [question.content() for question in mmmu.load(small_mmmu, "val")]
    quantized = YiVLModel(str(tiny_folder), "cpu", "int4")
    assert len(list(packed_layers(quantized.yi_vl.model))) == 15  # seven in each of two layers, and the head
    replies = quantized.answer(contents, Settings(max_new_tokens=6))
    assert [record["response"] for record in records] == [reply.text for reply in replies]
    assert replies != YiVLModel(str(tiny_folder), "cpu").answer(contents, Settings(max_new_tokens=6))


def test_models_that_cannot_be_quantized_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    YiVLModel(str(tiny_folder), "cpu", "int8").yi_vl.save(tmp_path / "int8")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "blip-2"}')
    for model, message in (
        (str(tmp_path / "int8"), "is quantised already"),
        (str(tmp_path / "other"), "for a Yi-VL that is loaded here, but the model is .*other, a blip-2. Leave it out"),
        ("http://127.0.0.1:1/v1", "but the model is an endpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            open_model(ModelChoice(model, quantize="int4"))


def test_any_transformers_model_is_asked_through_its_own_template(small_mmmu: str, tiny_folder: Path) -> None:
    """Our own tiny model, once as a Yi-VL and once as whatever transformers makes of the folder."""
    contents = [question.content() for question in mmmu.load(small_mmmu, "val")]
    settings = Settings(max_new_tokens=6)
    native = YiVLModel(str(tiny_folder)).answer(contents, settings)
    generic = TransformersModel(str(tiny_folder), "cpu").answer(contents, settings)
    assert [reply.text for reply in native] == [reply.text for reply in generic] and len(
        {reply.text for reply in native}
    ) > 1
    assert {reply.finish for reply in [*native, *generic]} == {"length"}


def test_a_question_that_cannot_be_asked_is_recorded_and_the_others_are_asked(tiny_folder: Path) -> None:
    def content(text: str, read: Any = None) -> Content:
        images = [{"type": "image", "image": BenchmarkImage("x.png", read)}] if read else []
        return [*images, {"type": "text", "text": text}]

    gone = content("Hi", Path("/nowhere/x.png").read_bytes)
    requests = [content("Hi"), content("word " * 2000), gone, content("Hi", lambda: b"no image"), content("Hi")]
    for model in (YiVLModel(str(tiny_folder)), TransformersModel(str(tiny_folder), "cpu")):
        replies = model.answer(requests, Settings(max_new_tokens=4))
        assert replies[0] == replies[4] and replies[0].error is None
        assert "/nowhere/x.png cannot be read: No such file" in (replies[2].error or "")
        assert "not an image" in (replies[3].error or "")
        if isinstance(model, YiVLModel):  # which knows its context's length
            assert "tokens" in (replies[1].error or "")


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-style server that answers with its prompt in capitals; 400 for "refuse"."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, {"object": "list", "data": [{"id": "echo", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(body)
            text = body["messages"][0]["content"][-1]["text"]
            message = {"role": "assistant", "content": text.upper()}
            if "refuse" in text:
                self._reply(400, {"error": {"message": "no"}})
            else:
                self._reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "echo",
                                  "choices": [{"index": 0, "finish_reason": "stop", "message": message}]})  # fmt: skip

        def _reply(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_with_images_and_settings(
    endpoint: tuple[str, list[dict[str, Any]]], small_mmmu: str
) -> None:
    url, requests = endpoint
    contents = [mmmu.load(small_mmmu, "val")[0].content(first_image_only=True), [{"type": "text", "text": "refuse"}]]
    replies = Endpoint(url).answer(contents, Settings(max_new_tokens=5, temperature=0.5, seed=3))
    assert replies[0].text.endswith("DIRECTLY.") and replies[1].error is not None and "no" in replies[1].error
    sent = next(body for body in requests if len(body["messages"][0]["content"]) == 2)
    assert sent["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("echo", 5, 0.5, 3)
    assert ModelChoice("https://user:secret@host/v1?key=secret").title == "https://host/v1"


@pytest.mark.usefixtures("two_rounds")
def test_speed_is_measured_over_the_same_answers(small_mmmu: str, tiny_folder: Path) -> None:
    from eval.speed.engine import compare_chat, compare_prefill
    from eval.speed.runner import compare_runner

    result = compare_runner(ModelChoice(str(tiny_folder)), mmmu.load(small_mmmu, "val"), 4, 6)
    assert result["same_answers"] == "7 of 7" and result["ratio"] > 0
    model = YiVLModel(str(tiny_folder)).yi_vl
    chat = compare_chat(model, ROOT / "docs" / "images" / "dog.png", 3, 4)
    assert all(list(times) == ["turn_1_ms", "turn_2_ms", "turn_3_ms"] for times in chat["variants"].values())
    prefill = compare_prefill(model, 100)
    assert prefill["variants"]["yi_vl"]["of_the_limit"] > 0 and abs(int(prefill["what"].split()[0]) - 100) < 10
