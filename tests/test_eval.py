"""Benchmarks from predictions to scores: the runner, official scores, submissions, the page, and users' mistakes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import REFERENCE, run_cli, with_reference
from PIL import Image

from eval import runner, scoring
from eval.__main__ import main
from eval.benchmarks import cmmmu, mmmu
from eval.models import Content, Reply, Settings
from eval.types import Answered, Question


class Scripted:
    """A model that answers with a letter by the length of the prompt; may be killed after some questions."""

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


def test_random_guesses_come_from_one_seeded_stream_in_the_official_order() -> None:
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
        for name, index in order.items():
            assert list(yi["disciplines"].values())[index]["correct"] == categories[name]["correct"]


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
