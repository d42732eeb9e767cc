"""Benchmarks from data to scores: loading, prompts, the runner, reports, submissions, other people's models."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import encoded_image, write_parquet
from PIL import Image
from processes import run_program
from tiny import tiny_model, tiny_processor
from typer.testing import CliRunner

from eval import runner, scoring
from eval.__main__ import app, main
from eval.benchmarks import cmmmu, mmmu
from eval.models import Content, Endpoint, ModelChoice, Reply, Settings, TransformersModel, YiVLModel, open_model
from eval.types import Answered, BenchmarkImage, Question
from yi_vl.quantize import packed_layers

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("YI_VL_REFERENCE", ROOT.parent / "shared" / "reference"))
with_reference = pytest.mark.skipif(
    not (REFERENCE / "edge_cases.json").exists(),
    reason="the benchmarks' published responses are not here (YI_VL_REFERENCE names their folder)",
)


def mmmu_row(subject: str, number: int, question: str = "<image 1> What is it?", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"validation_{subject}_{number}",
        "question": question,
        "options": "['red', 'green', \"it's blue\"]",
        "explanation": "",
        "image_1": encoded_image("red"),
        "image_2": encoded_image("blue"),
        **{f"image_{i}": None for i in range(3, 8)},
        "img_type": "['Photographs']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "x",
    } | changes


def write_mmmu(folder: Path, **by_subject: list[dict[str, Any]]) -> str:
    for subject, rows in by_subject.items():
        write_parquet(folder / subject / "validation-00000-of-00001.parquet", rows)
    return str(folder)


@pytest.fixture
def small_mmmu(tmp_path: Path) -> str:
    """Seven questions of two subjects, one of them open, one with two images."""
    return write_mmmu(
        tmp_path / "mmmu",
        Art_Theory=[mmmu_row("Art_Theory", number) for number in range(1, 5)],
        Math=[
            mmmu_row("Math", 1, "<image 2> then <image 1>?"),
            mmmu_row("Math", 2, question_type="open", options="[]", answer="['3.5', 'three and a half']"),
            mmmu_row("Math", 3, "No marker here"),
        ],
    )


class Scripted:
    """Says the first letter of what a question's id hashes to; may die after some questions."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.prompts: list[str] = []
        self.dies_after = dies_after

    def answer(self, requests: Sequence[Content], settings: Settings) -> list[Reply]:
        replies = []
        for content in requests:
            if len(self.prompts) == self.dies_after:
                raise KeyboardInterrupt
            text = "".join(part["text"] for part in content if part["type"] == "text")
            self.prompts.append(text)
            replies.append(Reply("ABC"[len(text) % 3]))
        return replies


def test_mmmu_questions_are_asked_as_the_official_llava_run_asks_them(small_mmmu: str) -> None:
    questions = {question.id: question for question in mmmu.load(small_mmmu, "val")}
    assert list(questions) == [f"validation_Art_Theory_{i}" for i in (1, 2, 3, 4)] + [
        f"validation_Math_{i}" for i in (1, 2, 3)
    ]
    choice, open_, two, bare = (
        questions[f"validation_{key}"] for key in ("Art_Theory_1", "Math_2", "Math_1", "Math_3")
    )
    assert choice.prompt == (
        "<image 1> What is it?\n(A) red\n(B) green\n(C) it's blue\n\nAnswer with the option's letter from the given "
        "choices directly."
    )
    assert open_.prompt == "<image 1> What is it?\n\nAnswer the question using a single word or phrase."
    assert (choice.subject, choice.question_type, choice.gold) == ("Art_Theory", "choice", "B")
    assert (open_.question_type, open_.gold, open_.options) == ("open", ("3.5", "three and a half"), {})

    shown = [part["image"].read() if part["type"] == "image" else part["text"] for part in two.content()]
    red, blue = encoded_image("red")["bytes"], encoded_image("blue")["bytes"]
    assert shown[:4] == [blue, " then ", red, shown[3]] and shown[3].startswith("?\n(A) red")
    first = two.content(first_image_only=True)
    assert [part["type"] for part in first] == ["image", "text"]
    assert first[0]["image"].read() == red and first[1]["text"] == two.prompt
    assert [part["type"] for part in bare.content()] == ["image", "image", "text"]  # what no marker places comes first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_1": None}, "validation_Art_1'.*<image 1>, but the row has no such image"),
        ({"options": "__import__('os').system('true')"}, "not the text of a list"),
        ({"options": "[]"}, "multiple-choice question, but it has no options"),
        ({"options": str(list(range(27)))}, "has 27 options, more than the 26 letters"),
        ({"id": "validation_Art_2"}, "1 ids come more than once: validation_Art_2"),
    ],
)
def test_a_bad_row_is_named_and_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = write_mmmu(tmp_path, Art=[mmmu_row("Art", 1, **change), mmmu_row("Art", 2)])
    with pytest.raises(ValueError, match=message):
        mmmu.load(data, "val")


def test_another_benchmarks_files_are_refused(small_mmmu: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no column type, category, option1"):
        write_parquet(tmp_path / "c" / "val-0.parquet", [mmmu_row("Art", 1)])
        cmmmu.load(str(tmp_path / "c"), "val")
    with pytest.raises(ValueError, match=r"has no test-\*.parquet"):
        mmmu.load(small_mmmu, "test")
    with pytest.raises(ValueError, match="there is no such folder"):
        mmmu.load(str(tmp_path / "nowhere" / "at" / "all"), "val")


def test_mmmu_reads_as_many_options_as_there_are_letters_and_knows_what_is_not_public(tmp_path: Path) -> None:
    twelve = [f"take {number}" for number in range(11)] + ["<image 2>, not <image 8>"]
    rows = [
        mmmu_row("Art", 1, options=str(twelve), answer="L", image_2=encoded_image("blue")),
        mmmu_row("Art", 2, options="[1, 2.50]", answer="?"),
        mmmu_row("Art", 3, options="['alone']", answer="A"),
        mmmu_row("Art", 4, options="", question_type="open", answer="?"),
        mmmu_row("Art", 5, options=None, question_type="open", answer="2.5"),
    ]
    # The hub's own conversion has a folder for each split.
    write_parquet(tmp_path / "Art" / "test" / "0000.parquet", rows)
    many, numbers, alone, hidden, open_ = mmmu.load(str(tmp_path), "test")
    assert list(many.options) == list("ABCDEFGHIJKL") and many.gold == "L"
    assert "(K) take 10\n(L) <image 2>, not <image 8>\n\nAnswer" in many.prompt
    assert [part["image"].name[-1] for part in many.content() if part["type"] == "image"] == ["1", "2"]
    assert numbers.options == {"A": "1", "B": "2.5"} and alone.options == {"A": "alone"}
    assert (numbers.gold, hidden.gold, open_.gold, open_.options) == ("", "", "2.5", {})


def cmmmu_row(number: int, question_type: str, answer: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "type": question_type,
        "question": f'看<img="q_{number}.png">。',
        **{f"option{i}": f"选{i}" if question_type == "选择" else "" for i in range(1, 5)},
        "image_1": encoded_image("red"),
        **{f"image_{i}": None for i in range(2, 6)},
        "answer": answer,
        "category": "商业",
        **{f"image_{i}_filename": f"q_{number}.png" if i == 1 else "" for i in range(1, 6)},
    } | changes


CMMMU_ROWS = [cmmmu_row(1, "选择", "AC"), cmmmu_row(2, "判断", "错"), cmmmu_row(3, "填空", "60")]


def test_cmmmu_from_parquet_and_from_json_lines_is_the_same(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p" / "business" / "val-00000-of-00001.parquet", CMMMU_ROWS)
    from_parquet = cmmmu.load(str(tmp_path / "p"), "val")
    folder = tmp_path / "j"
    (folder / "images").mkdir(parents=True)
    lines = []
    for row in CMMMU_ROWS:
        (folder / "images" / f"q_{row['id']}.png").write_bytes(row["image_1"]["bytes"])
        entry = {key: row[key] for key in ("type", "question", "answer", "category")} | {"id": int(row["id"])}
        lines.append(
            json.dumps(
                entry
                | {"img_list": [f"q_{row['id']}.png"]}
                | {k: v for k, v in row.items() if k.startswith("option") and v}
            )
        )
    (folder / "val.jsonl").write_text("\n".join(lines))
    from_lines = cmmmu.load(str(folder), "val")
    for item, other in zip(from_parquet, from_lines, strict=True):
        assert (item.id, item.question_type, item.gold, item.options, item.prompt) == (
            other.id,
            other.question_type,
            other.gold,
            other.options,
            other.prompt,
        )
        assert item.images[0].read() == other.images[0].read()
    assert from_parquet[0].prompt.endswith(
        "问题：看<图片 1>。\n选项：\n(A) 选1\n(B) 选2\n(C) 选3\n(D) 选4\n\n正确答案：\n"
    )
    assert from_parquet[1].prompt.endswith("问题：看<图片 1>。\n正确答案：\n")
    (folder / "images" / "q_2.png").unlink()
    with pytest.raises(ValueError, match=r"'?2'?: its image q_2.png is nowhere"):
        cmmmu.load(str(folder), "val")


def test_cmmmu_reads_the_official_folders_whose_test_split_has_no_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six images in the order of a list, a name that is none of them, suffixes in capitals, options' keys missing."""
    for split in ("val", "test"):
        (tmp_path / f"cmmmu-data-{split}" / "business").mkdir(parents=True)
    folder = tmp_path / "cmmmu-data-test" / "business"
    names = [f"a_{number}.PNG" for number in range(1, 7)]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    choice = {"id": 7, "type": "选择", "question": '看<img="a_6.PNG">与<img="gone.png">', "category": "商业"}
    choice |= {f"option{number}": f'<img="a_{number}.PNG">' for number in range(1, 5)} | {"img_list": names}
    blank = {"id": 8, "type": "填空", "question": "几？", "category": "商业", "img_list": []}
    (folder / "business.jsonl").write_text("\n".join(map(json.dumps, (choice, blank))))
    val = tmp_path / "cmmmu-data-val" / "business" / "business.jsonl"
    val.write_text(json.dumps(blank | {"id": 9, "answer": "3"}))

    first, second = cmmmu.load(str(tmp_path), "test")
    shown = [part["image"].name for part in first.content() if part["type"] == "image"]
    assert shown == ["a_5.PNG", "a_6.PNG", "a_1.PNG", "a_2.PNG", "a_3.PNG", "a_4.PNG"]
    assert '看<图片 6>与<img="gone.png">' in first.prompt and "(D) <图片 4>\n" in first.prompt
    assert (first.gold, second.gold, second.question_type) == ("", "", "blank")
    assert "1 of 2 questions speak of an image that their row does not have" in caplog.text and ": 7" in caplog.text
    assert [question.id for question in cmmmu.load(str(tmp_path), "val")] == ["9"]
    predictions = tmp_path / "p.jsonl"
    predictions.write_text(
        "\n".join(json.dumps({"id": i, "type": t, "response": "A"}) for i, t in ((7, "选择"), (8, "填空")))
    )
    with pytest.raises(ValueError, match="2 of 2 answered questions have no public answer, 7 first"):
        run_cli("score", "cmmmu", "--predictions", str(predictions), "--answers", str(tmp_path), "--split", "test")
    val.write_text("\n")
    with pytest.raises(ValueError, match="The data has no questions of cmmmu's split val"):
        run_cli("cmmmu", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    val.write_text(json.dumps(blank))
    with pytest.raises(ValueError, match="question 8: it has no answer"):
        cmmmu.load(str(tmp_path), "val")


@with_reference
def test_cmmmu_prompts_are_the_authors(tmp_path: Path) -> None:
    raw = (REFERENCE / "cmmmu" / "sample_raw_records.jsonl").read_text(encoding="utf-8")
    expected = json.loads((REFERENCE / "cmmmu" / "expected_prompts.json").read_text(encoding="utf-8"))
    (tmp_path / "val.jsonl").write_text(raw, encoding="utf-8")
    for line in raw.splitlines():
        for name in json.loads(line)["img_list"]:
            Image.new("RGB", (4, 4)).save(tmp_path / name)
    questions = {question.id: question for question in cmmmu.load(str(tmp_path), "val")}
    assert len(questions) == len(expected) == 9
    for entry in expected:
        question = questions[str(entry["id"])]
        assert question.prompt == entry["prompt"]
        files = json.loads(next(line for line in raw.splitlines() if json.loads(line)["id"] == entry["id"]))["img_list"]
        shown = [part["image"].name for part in question.content() if part["type"] == "image"]
        marked = [files[int(marker.strip("<图片 >")) - 1] for marker in entry["image_order"]]
        assert shown[-len(marked) :] == marked if marked else True


@pytest.mark.core
def test_a_killed_run_goes_on_without_repeating_or_losing_a_question(small_mmmu: str, tmp_path: Path) -> None:
    questions = mmmu.load(small_mmmu, "val")

    def ask(model: Scripted, folder: str = "killed", **options: Any) -> list[dict[str, Any]]:
        options = {"settings": Settings(), "batch_size": 2} | options
        return runner.run(questions, lambda: model, "scripted", tmp_path / folder, **options)

    whole = ask(Scripted(), "whole", batch_size=3)
    assert [record["id"] for record in whole] == [question.id for question in questions]
    first, second = Scripted(dies_after=4), Scripted()
    with pytest.raises(KeyboardInterrupt):
        ask(first)
    path = tmp_path / "killed" / "predictions.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "validation_Ma')  # cut short in the middle of a line
    assert ask(second) == whole
    assert len(first.prompts) + len(second.prompts) == len(questions)
    assert path.read_text() == (tmp_path / "whole" / "predictions.jsonl").read_text()
    third = Scripted()
    assert ask(third) == whole and third.prompts == []
    with pytest.raises(ValueError, match=r"made otherwise.*temperature"):
        ask(Scripted(), settings=Settings(temperature=0.5))
    with pytest.raises(ValueError, match="which is not asked now"):
        runner.run(questions[1:], Scripted, "scripted", tmp_path / "killed", Settings())


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def run_cli(*arguments: str) -> str:
    """What a command prints; whatever goes wrong is raised."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


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


def test_a_quantized_run_says_so_and_continues_no_other(small_mmmu: str, tiny_folder: Path, tmp_path: Path) -> None:
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
    """An OpenAI-style server that says what it was sent; 400 for "refuse"."""
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


def test_draws_come_from_one_seeded_stream_in_the_official_order() -> None:
    later = [
        Answered(Question(f"validation_Zoo_{i}", "Zoo", "choice", "A", dict.fromkeys("ABCD", "no")), "")
        for i in range(3)
    ]
    earlier = [Answered(Question("validation_Art_1", "Art", "choice", "A", dict.fromkeys("ABCD", "no")), "")]
    scored = scoring.score(mmmu, [*later, *earlier])
    assert [item.answered.question.subject for item in scored] == ["Art", "Zoo", "Zoo", "Zoo"]
    assert [item.official.parsed for item in scored] == ["A", "A", "C", "B"]  # random.Random(42) on four letters
    summary = scoring.summarize(mmmu, scored, "official")
    assert (summary["correct"], len(summary["random_guesses"]), summary["disciplines"]["Zoo"]["correct"]) == (2, 4, 1)
    assert scoring.summarize(mmmu, scored, "no_guess")["correct"] == 0


def test_intervals_and_comparisons() -> None:
    low, high = scoring.interval([True] * 326 + [False] * 574)
    assert 0.325 < low < 0.335 and 0.39 < high < 0.398
    first = {str(i): i < 60 for i in range(100)}
    second = {str(i): 10 <= i < 62 for i in range(100)}
    result = scoring.compare(first, second)
    assert (result["difference"], result["only_first_correct"], result["only_second_correct"]) == (0.08, 10, 2)
    assert result["p_value"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert result["interval_95"][0] < 0.08 < result["interval_95"][1]


@pytest.mark.core
@with_reference
def test_published_responses_score_as_published(tmp_path: Path) -> None:
    def score(*arguments: str) -> dict[str, Any]:
        run_cli("score", *arguments, "--out", str(tmp_path))
        return json.loads((tmp_path / "results.json").read_text())["official"]

    folder = REFERENCE / "mmmu"
    llava = score(
        "mmmu", "--predictions", str(folder / "llava1.5_13b"), "--answers", str(folder / "answer_dict_val.json")
    )
    expected = json.loads((folder / "expected_parse_and_eval_llava1.5_13b.json").read_text())
    assert (llava["correct"], llava["num"], llava["formatted"], len(llava["random_guesses"])) == (330, 900, "0.367", 2)
    for name, domain in expected["domains"].items():
        assert llava["disciplines"][name]["accuracy"] == domain["acc"]
        for subject, tally in domain["subjects"].items():
            assert llava["disciplines"][name]["subjects"][subject]["correct"] == tally["correct"]
    folder = REFERENCE / "cmmmu"
    categories = json.loads((folder / "expected_response_mode.json").read_text())["per_category"]
    order = {"art_and_design": 0, "business": 1, "science": 2, "health_and_medicine": 3}
    for mode, unparsed in (("response", 42), ("answer", 0)):
        yi = score(
            "cmmmu",
            "--predictions",
            str(folder / f"yi-vl-34b-{mode}.jsonl"),
            "--answers",
            str(folder / "answers.jsonl"),
        )
        assert (yi["correct"], yi["num"], len(yi["random_guesses"])) == (326, 900, unparsed)
        for name, place in order.items():
            assert list(yi["disciplines"].values())[place]["correct"] == categories[name]["correct"]


def test_cmmmu_predictions_must_be_whole_and_of_one_form(tmp_path: Path) -> None:
    questions = {str(i): Question(str(i), "商业", "true_false", "对") for i in (1, 2)}

    def read(*records: dict[str, Any]) -> list[Answered]:
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(json.dumps(record) for record in records))
        return cmmmu.read_predictions(path, questions)

    item, two = ({"id": i, "type": "判断", "response": "对"} for i in (1, 2))
    assert len(read(item, two)) == 2
    for records, message in (
        ([item], "1 of 2 questions are not answered: 2"),
        ([item, item, two], "answered more than once: 1"),
        ([item, two | {"id": 3}], "no question '3'"),
        ([item, {"id": 2, "type": "判断", "answer": "对"}], "id, type and answer"),
        ([item | {"type": "问答"}, two], "'问答'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(*records)


def test_test_server_files(small_mmmu: str, tmp_path: Path) -> None:
    questions = mmmu.load(small_mmmu, "val")
    runner.run(questions, Scripted, "scripted", tmp_path, Settings())
    predictions = tmp_path / "predictions.jsonl"
    command = [
        "submit",
        "mmmu",
        "--predictions",
        str(predictions),
        "--data",
        small_mmmu,
        "--split",
        "val",
        "--out",
        str(tmp_path),
    ]
    run_cli(*command)
    submitted = json.loads((tmp_path / "submission.json").read_text())
    assert set(submitted) == {question.id for question in questions} and set(submitted.values()) <= set("ABC")
    predictions.write_text("".join(predictions.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="lacks 1 of 7 questions"):
        run_cli(*command)
    name, text = cmmmu.submission([Answered(Question("7", "商业", "blank", ""), "六十")])
    assert (name, json.loads(text)) == ("submission.jsonl", {"id": 7, "type": "填空", "response": "六十"})


def test_the_page_shows_text_as_text(small_mmmu: str, tmp_path: Path) -> None:
    from eval.viewer import write_page

    question = mmmu.load(small_mmmu, "val")[0]
    response = "</script><script>alert(1)</script>"
    page = write_page(scoring.score(mmmu, [Answered(question, response)]), "title", tmp_path).read_text()
    assert response not in page and "\\u003c/script>" in page
    copies = list((tmp_path / "images").iterdir())
    assert [Image.open(copy).size for copy in copies] == [(8, 8)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mmmu", "--data", "no/such/folder"], "there is no such folder"),
        (["score", "mmmu", "--predictions", "nothing.json", "--answers", "nothing.json"], "nothing.json"),
        (["compare", "."], "two folders or more"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    response = capsys.readouterr().err
    assert ended.value.code == 2 and message in response and len(response.strip().splitlines()) == 1


def test_speed_is_measured_over_the_same_answers(small_mmmu: str, tiny_folder: Path) -> None:
    from eval.speed.engine import compare_chat, compare_prefill
    from eval.speed.runner import compare_runner

    result = compare_runner(ModelChoice(str(tiny_folder)), mmmu.load(small_mmmu, "val"), 4, 6)
    assert result["same_answers"] == "7 of 7" and result["ratio"] > 0
    model = YiVLModel(str(tiny_folder)).yi_vl
    chat = compare_chat(model, ROOT / "docs" / "images" / "penguin.png", 3, 4)
    assert all(list(times) == ["turn_1_ms", "turn_2_ms", "turn_3_ms"] for times in chat["variants"].values())
    prefill = compare_prefill(model, 100)
    assert prefill["variants"]["yi_vl"]["of_the_limit"] > 0 and abs(int(prefill["what"].split()[0]) - 100) < 10
