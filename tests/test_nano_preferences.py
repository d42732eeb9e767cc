"""Nano's preferences: its own correct answers without their full stop, and how often models answer so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preference_runs import supervised

from train.data.samples import read_versions
from train.data.shard_reader import read_shard
from train.nano.data.preferences import NUM_SAMPLES, build_preferences, cut_short, without_full_stop
from train.nano.measure import style
from train.nano.measure.evaluate import Question
from train.nano.measure.style import style_scores
from yi_vl.chat import to_text


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [("It is a dog.", "It is a dog"), ("这是狗。 ", "这是狗"), ("Hello!", None), ("B", None), ("", None), (".", "")],
)
def test_a_sentence_without_its_full_stop(sentence: str, expected: str | None) -> None:
    assert without_full_stop(sentence) == expected


class Parrot:
    """Answers by the question; `requests` keeps what it was asked."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers, self.requests = answers, []  # type: ignore[var-annotated]

    def predict_batch(self, requests: list[tuple[list[bytes], str]], **_: Any) -> list[str]:
        self.requests += requests
        return [self.answers[question] for _, question in requests]


def test_nanos_preferences_are_its_own_correct_answers(tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    questions = {  # question -> nano's answer, and the conversation's
        "things?": ("it is a cat.", "It is a cat."),
        "flags?": ("It is the flag of Peru.", "It is the flag of Peru."),
        "words?": ("It says NO.", "It says OK."),
        "scenes?": ("Three", "Three"),
        "digits?": ("No!", "No!"),
        "same?": ("是的，都是狗。", "是的，都是狗。"),
        "same 1?": ("No, a cat and a dog.", "No, one shows a cup and one a dog."),  # the verdict is right
        "same 2?": ("Yes, a dog.", "Yes, a dog."),  # one yes more than there are no
        "unknown?": ("I am not sure.", "I am not sure."),
    }
    for name in NUM_SAMPLES:
        samples = []
        for number, question in enumerate(question for question in questions if question.startswith(name)):
            slots = "<image><image>" if name == "same" else "<image>"
            asks = {"from": "human", "value": f"{slots}\n{question}"}
            turns = [asks, {"from": "gpt", "value": questions[question][1]}, {"from": "human", "value": "And?"}]
            record = {"conversations": [*turns, {"from": "gpt", "value": "More."}]}
            members = {"0.jpg": b"x", "1.jpg": b"y"} if name == "same" else {"jpg": b"x"}
            samples.append((f"{number:08d}", members | {"json": json.dumps(record).encode()}))
        write_shard(tmp_path / f"chat-448/{name}/00000.tar", samples)
    model = Parrot({question: answer for question, (answer, _) in questions.items()})
    folder = build_preferences(tmp_path, model)  # type: ignore[arg-type]
    assert ([b"x", b"y"], "same?") in model.requests and ([b"x"], "flags?") in model.requests
    pairs = {pair["__key__"]: pair for pair in read_shard(str(folder / "00000.tar"))}
    assert sorted(pairs) == [
        "flags-00000000", "same-00000000", "same-00000001", "things-00000000", "unknown-00000000",
    ]  # fmt: skip
    num_cut = 0
    for key, pair in pairs.items():
        versions, images = read_versions(pair, "preference")
        chosen, rejected = (supervised(version).removesuffix("\n###") for version in versions)
        question = "same 1?" if key == "same-00000001" else f"{key.split('-')[0]}?"
        answer = questions[question][0]
        assert chosen == f" {answer[:-1]}" and "And?" not in to_text(versions[0])
        is_cut = rejected != f" {answer}"
        assert not is_cut or (chosen.startswith(rejected) and 1 < len(rejected) < len(chosen))
        assert images == ([b"x", b"y"] if question.startswith("same") else [b"x"])
        num_cut += is_cut
    assert num_cut == 2, "the first and the fourth of five pairs"


def test_a_cut_answer_is_a_beginning() -> None:
    rng = np.random.default_rng(0)
    cuts = {cut_short("It is", rng) for _ in range(100)}
    assert cuts == {"I", "It", "It i"}


def test_an_answer_is_correct_with_a_full_stop_or_without() -> None:
    def record(skill: str, answer: str, accepted: str) -> dict[str, Any]:
        return {"skill": skill, "lang": "en", "answer": answer, "accepted": [accepted]}

    scores = style_scores([
        record("things", "It is a dog", "It is a dog."), record("things", "It is a dog.", "It is a dog."),
        record("flags", "It is the flag of Aruba", "It is the flag of Peru."),
        record("scenes", "It is red.", "It is blue."),
    ])  # fmt: skip
    assert scores["things"] == (2, 0.5, 1.0) and scores["flags"] == (1, 1.0, 0.0) and scores["scenes"] == (1, 0.0, 0.0)
    assert scores["all"] == (4, 0.5, 0.5) and list(scores)[-1] == "all"


def test_every_so_many_th_question_is_of_both_languages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Held-out questions alternate between the languages."""
    questions = [
        Question(str(i), "things", "name", ("en", "zh")[i % 2], (), "What?", ("It is a dog.",)) for i in range(12)
    ]
    prompted: list[Question] = []

    def measure(_: Any, questions: list[Question]) -> list[dict[str, Any]]:
        prompted.extend(questions)
        return [{"skill": "things", "answer": "It is a dog", "accepted": ["It is a dog."]} for _ in questions]

    monkeypatch.setattr(style, "read_questions", lambda _: questions)
    monkeypatch.setattr(style, "load", lambda _: None)
    monkeypatch.setattr(style, "measure", measure)
    table = style.measure_style({"nano": tmp_path}, tmp_path, every=2)
    assert [question.lang for question in prompted] == ["en"] * 3 + ["zh"] * 3
    assert "| all (6) | 100.0% | 100.0% |" in table
