"""The judge: what it sees, how its reply is read, and that no reply is asked for twice or lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_openai import completion, fake_openai, prompt_of
from typer.testing import CliRunner

from eval import judge as judging
from eval import scoring
from eval.__main__ import app
from eval.benchmarks import mmmu
from eval.types import Answered, Question, QuestionType
from yi_vl.files import read_json_lines

OPTIONS = {"A": "red", "B": "green", "C": "blue"}


def answered(
    question_type: QuestionType = "choice", gold: str = "B", response: str = "the green one", **changes: Any
) -> Answered:
    options = OPTIONS if question_type == "choice" else {}
    return Answered(Question("1", "Art", question_type, gold, options, ("Which colour?",), **changes), response)


@pytest.mark.parametrize(
    ("item", "reply", "parsed"),
    [
        (answered(), "B", "B"),
        (answered(), " (B).\n", "B"),
        (answered(), "**B**", "B"),
        (answered(), "none", "none"),
        (answered(), "None.", "none"),
        (answered(may_have_several=True), "C, A", "AC"),
        (answered("true_false", "对"), "A", "对"),
        (answered("true_false", "对"), "B", "错"),
        (answered("open", "36"), "A", "A"),
        # Anything else is a failure, and no verdict.
        (answered(), "D", None),
        (answered(), "b", None),
        (answered(), "AB", None),
        (answered(), "A/B", None),
        (answered(), "B. green", None),
        (answered(), "The response says B", None),
        (answered(), "", None),
        (answered("true_false", "对"), "C", None),
        (answered(may_have_several=True), "AA", None),
    ],
)
def test_a_reply_is_a_letter_or_none(item: Answered, reply: str, parsed: str | None) -> None:
    if parsed is None:
        with pytest.raises(ValueError, match="neither a letter nor none"):
            judging.read_reply(item, reply)
    else:
        assert judging.read_reply(item, reply) == parsed


def test_the_judge_sees_question_options_and_answer_and_the_gold_only_of_open_questions() -> None:
    item = answered(gold="SECRET", response='<think>red?</think>the "green"\none')
    prompt = judging.prompt_of(item)
    assert all(text in prompt for text in ("Which colour?", "(A) red\n(B) green\n(C) blue", r'"the \"green\"\none"'))
    assert "SECRET" not in prompt and "red?" not in prompt
    assert "SECRET" not in judging.prompt_of(answered("true_false", "SECRET"))
    assert '["36"]' in judging.prompt_of(answered("open", "36")) and '["x"]' in judging.prompt_of(
        answered("blank", "x")
    )


def write_scorable(folder: Path) -> list[str]:
    """Predictions and answers of six questions; the command that scores them."""
    folder.mkdir()
    response = {
        1: "the green one",
        2: "B",
        3: "<think>(B)",
        4: "the blue one",
        5: "red or green",
        6: "<think>x</think>36 W",
    }
    lines = [
        {"id": f"validation_Art_{n}", "prompt": f"Question {n}:", "response": text, "options": OPTIONS}
        for n, text in response.items()
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    golds = {
        f"validation_Art_{n}": {"question_type": "multiple-choice" if n < 6 else "short-answer", "ground_truth": gold}
        for n, gold in enumerate("BBBBB", start=1)
    } | {"validation_Art_6": {"question_type": "short-answer", "ground_truth": "36 watts"}}
    (folder / "answers.json").write_text(json.dumps(golds))
    paths = ["--predictions", str(folder / "predictions.jsonl"), "--answers", str(folder / "answers.json")]
    return ["score", "mmmu", *paths, "--judge-model", "wise", "--out", str(folder / "out")]


def respond(body: dict[str, Any]) -> tuple[int, Any]:
    """A judge that thinks aloud and reads well."""
    text = prompt_of(body)
    answers = {'"the green one"': "B", '"B"': "B", '"the blue one"': "C", '"red or green"': "none", '"36 W"': "A"}
    return completion("<think>A?</think>" + next(reply for response, reply in answers.items() if response in text))


def test_judged_results_stand_beside_the_others_and_no_reply_is_asked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "judges-key")
    monkeypatch.setenv("OPENAI_API_KEY", "models-key")
    command = write_scorable(tmp_path / "one")
    out = tmp_path / "one" / "out"
    with fake_openai(respond) as server:
        done = CliRunner().invoke(app, [*command, "--judge", server.url], catch_exceptions=False)
        assert done.exit_code == 0 and len(server.requests) == 5  # unfinished reasoning is no answer: nothing to ask
        assert all(body["temperature"] == 0 and body["model"] == "wise" for body in server.requests)
        assert {headers["authorization"] for headers in server.headers} == {"Bearer judges-key"}
        results = json.loads((out / "results.json").read_text())
        judge = results["judge"]
        assert (judge["correct"], judge["num"], judge["failed"], judge["errors"]) == (3, 6, 0, {})
        assert (
            judge["model"] == "wise" and judge["prompt_version"] == "1" and set(judge["prompts"]) >= {"choice", "open"}
        )
        assert results["no_guess"]["correct"] == 1 and "read by a judge" in done.stdout
        verdicts = {row["id"][-1]: row for row in read_json_lines(out / "verdicts.jsonl")}
        assert [verdicts[n]["judge"]["parsed"] for n in "12345"] == ["B", "B", "none", "C", "none"]
        assert "key" not in "".join(path.read_text() for path in out.glob("*.json*")).replace("keys", "")

        CliRunner().invoke(app, [*command, "--judge", server.url], catch_exceptions=False)
        assert len(server.requests) == 5
        (out / "judgements.jsonl").write_bytes((out / "judgements.jsonl").read_bytes()[:-9])  # killed while writing
        CliRunner().invoke(app, [*command, "--judge", server.url], catch_exceptions=False)
        assert len(server.requests) == 6
        assert json.loads((out / "results.json").read_text())["judge"] == judge

        other = write_scorable(tmp_path / "two")
        CliRunner().invoke(app, [*other, "--judge", server.url], catch_exceptions=False)
        shown = CliRunner().invoke(app, ["compare", str(out), str(tmp_path / "two" / "out")], catch_exceptions=False)
        assert shown.stdout.count("| 6 | +0.0 |") == 3 and f"judge wise at {server.url}, prompt 1" in shown.stdout


def test_a_failing_judge_is_counted_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.chat_client.MAX_RETRIES", 0)
    command = write_scorable(tmp_path / "one")
    out = tmp_path / "one" / "out"

    def unsure(body: dict[str, Any]) -> tuple[int, Any]:
        if "blue one" in prompt_of(body):
            return completion("Hmm, hard to say.")
        return (500, {"error": {"message": "oops"}}) if "red or green" in prompt_of(body) else respond(body)

    with fake_openai(unsure) as server:
        done = CliRunner().invoke(app, [*command, "--judge", server.url], catch_exceptions=False)
        assert done.exit_code == 1 and "2 of 6 answers could not be judged" in done.stderr
        judge = json.loads((out / "results.json").read_text())["judge"]
        assert (judge["num"], judge["correct"], judge["failed"]) == (4, 3, 2)
        assert (
            "Hmm, hard to say." in judge["errors"]["validation_Art_4"] and "500" in judge["errors"]["validation_Art_5"]
        )
        server.respond = respond
        assert CliRunner().invoke(app, [*command, "--judge", server.url], catch_exceptions=False).exit_code == 0
        assert len(server.requests) == 5 + 2
        judge = json.loads((out / "results.json").read_text())["judge"]
        assert (judge["num"], judge["correct"], judge["failed"]) == (6, 3, 0)
    # A judge that is not there: the other protocols' results are written all the same.
    gone = write_scorable(tmp_path / "two")
    done = CliRunner().invoke(app, [*gone, "--judge", server.url], catch_exceptions=False)
    results = json.loads((tmp_path / "two" / "out" / "results.json").read_text())
    assert done.exit_code == 1 and results["judge"]["failed"] == 5 and results["official"]["num"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "http://127.0.0.1:9"], "go together"),
        (["--judge-model", "x"], "go together"),
        (["--judge", "gpt", "--judge-model", "x"], "not the URL"),
        (["--judge", "http://127.0.0.1:9", "--judge-model", "x"], "--judge needs --out"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_at_once(arguments: list[str], message: str) -> None:
    command = ["score", "mmmu", "--predictions", "none.json", "--answers", "none.json", *arguments]
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_run_is_judged_too(tmp_path: Path) -> None:
    from test_eval_endpoint import run, write_mmmu

    data = write_mmmu(tmp_path / "data", 3)
    with fake_openai(lambda body: completion("B" if body["model"] == "wise" else "the green one")) as server:
        done = run(server, data, tmp_path / "out", "--judge", server.url, "--judge-model", "wise")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert done.exit_code == 0 and (results["judge"]["correct"], results["no_guess"]["correct"]) == (3, 0)
    assert scoring.summarize(mmmu, [], "judge") == {"num": 0}
