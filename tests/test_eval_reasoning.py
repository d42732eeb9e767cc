"""Reasoning is no answer: every family's marks, under every protocol and benchmark."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from eval import scoring
from eval.benchmarks import cmmmu, mmmu, mmmu_pro
from eval.chat_client import Reply
from eval.models import Settings, TransformersModel
from eval.reasoning import answer_of
from eval.types import Answered, Question

OPTIONS = {"A": "red", "B": "green", "C": "blue", "D": "black"}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>\nA? No, (A) is wrong.\n</think>\n\nB", "B"),
        ("Surely (A).</think>B", "B"),  # the template opened it
        ("<think></think>B", "B"),
        ("<THINK>(A)</THINK>\nB", "B"),
        ("<think>(A)</think>Perhaps (C).<think>(D)</think>B", "B"),
        ("<think>(A) <think>(C)</think> (D)</think> B", "B"),
        ("<thinking>(A)<reflection>(C)</reflection></thinking><output>B</output>", "B"),
        ("<thought>(A)</thought>B", "B"),
        ("<reasoning>(A)</reasoning>\n<answer>\nB\n</answer>", "B"),
        ("<SUMMARY>(A)</SUMMARY><REASONING>(A)</REASONING>\n\n<CONCLUSION> B </CONCLUSION>", "B"),
        ("<analysis>easy</analysis><think>(A)</think><answer>B</answer>", "B"),
        ("<seed:think>(A)</seed:think>B", "B"),
        ("<longcat_think>(A)</longcat_think>B", "B"),
        ("[THINK](A)[/THINK]B", "B"),
        ("◁think▷(A)◁/think▷B", "B"),
        ("<|begin_of_thought|>(A)<|end_of_thought|>\n<|begin_of_solution|>B<|end_of_solution|>", "B"),
        ("<|START_THINKING|>(A)<|END_THINKING|><|START_RESPONSE|>B<|END_RESPONSE|>", "B"),
        ("<|inner_prefix|>(A)<|inner_suffix|>B", "B"),
        ("<|channel>thought\n(A)<channel|>B", "B"),
        ("[unused16](A)[unused17]B", "B"),
        ("<unused94>thought\n(A)<unused95>B", "B"),
        ("<scratchpad>(A)</scratchpad><reason>(C)</reason>B", "B"),
        ("<|channel|>analysis<|message|>(A)<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>", "B"),
        ("analysisThe user asks; (A)?assistantfinalB", "B"),
        ("Here is my thought process: (A)\n\nHere is my response: B", "B"),
        ("## Thinking\n\n(A)\n\n## Final Response\n\nB", "B"),
        ("<think>(A)</think><answer>It is <|begin_of_box|>B<|end_of_box|>.</answer>", "B"),
        ("It is <|begin_of_box|>B<|end_of_box|>.", "B"),  # the server kept the reasoning apart
        ("<answer>B", "B"),  # cut by a stop string
        # What never ended is no answer.
        ("<think>The answer is (B)", ""),
        ("[THINK]The answer is (B)", ""),
        ("◁think▷B", ""),
        ("<|channel|>analysis<|message|>The answer is (B)", ""),
        ("analysisWe need (B)", ""),
        ("<think>(A)</think><think>(B)", ""),
        ("<think>(B)</think>", ""),
        # Without a mark nothing changes, not even a space.
        (" A\n", " A\n"),
        ("I think the analysis shows <b>B</b> < C > D", "I think the analysis shows <b>B</b> < C > D"),
        ("", ""),
    ],
)
def test_the_answer_is_what_stands_behind_the_reasoning(response: str, answer: str) -> None:
    assert answer_of(response) == answer


def test_a_long_response_of_odd_characters_is_read_in_linear_time() -> None:
    """A model that repeats itself to its greatest length; a pattern that looks back from every blank takes minutes."""
    pieces = ("\n", " ", "<think>", "</think>", "<answer>", "## Thinking\n", "< ", "<|channel|>final")
    started = time.perf_counter()
    for piece in pieces:
        answer_of(piece * (100_000 // len(piece)) + "</think>" + piece * (100_000 // len(piece)) + "x")
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    ("benchmark", "question_type", "gold", "reasoning", "answer"),
    [
        (mmmu, "choice", "B", "(A), (A) or (C)", "(B)"),
        (mmmu, "open", "36", "it is 35", "36 watts"),
        (mmmu_pro, "choice", "B", "Answer: A", "Answer: B"),
        (cmmmu, "choice", "BD", "(A)(A)(A)", "(B)(D)"),
        (cmmmu, "true_false", "错", "所以正确。", "错误"),
        (cmmmu, "blank", "60", "所以等于50。", "等于60"),
    ],
)
def test_every_benchmark_and_protocol_scores_the_answer_alone(
    benchmark: scoring.Benchmark, question_type: str, gold: str, reasoning: str, answer: str
) -> None:
    question = Question("1", "Art", question_type, gold, OPTIONS if question_type == "choice" else {})  # type: ignore[arg-type]

    def score(response: str) -> scoring.Scored:
        return scoring.score(benchmark, [Answered(question, response)])[0]

    for response in (f"<think>{reasoning}</think>\n\n{answer}", f"{reasoning}</think>{answer}"):
        assert score(response).official == score(answer).official
        assert score(response).official.is_correct and not score(response).official.is_guess
        assert scoring.is_correct_without_guess(benchmark, Answered(question, response))
    unfinished = score(f"<think>{reasoning}. {answer}")
    assert unfinished.official == score("").official
    assert not unfinished.verdict("no_guess").is_correct  # type: ignore[union-attr]
    assert scoring.count_outcomes([unfinished.answered])["unfinished_reasoning"] == 1


def test_a_submission_holds_answers_and_the_verdicts_the_whole_response() -> None:
    response = "<think>35?</think>36 W"
    answered = Answered(Question("validation_Art_1", "Art", "open", "36"), response)
    assert json.loads(mmmu.submission([answered])[1]) == {"validation_Art_1": "36 W"}
    answered = Answered(Question("7", "商业", "blank", ""), response)
    assert json.loads(cmmmu.submission([answered])[1])["response"] == "36 W"


def test_guesses_are_the_official_draws_and_count_as_wrong() -> None:
    def verdicts(benchmark: scoring.Benchmark, question_type: str, gold: str, response: str) -> tuple[bool, bool, bool]:
        question = Question("1", "Art", question_type, gold, OPTIONS if question_type == "choice" else {})  # type: ignore[arg-type]
        item = scoring.score(benchmark, [Answered(question, response)])[0]
        return item.official.is_correct, item.official.is_guess, item.verdict("no_guess").is_correct  # type: ignore[union-attr]

    assert verdicts(mmmu, "choice", "A", "who knows") == (True, True, False)  # the first draw of the seeded stream is A
    assert verdicts(mmmu, "choice", "B", "who knows") == (False, True, False)
    assert verdicts(mmmu, "choice", "A", "A") == (True, False, True)
    assert verdicts(mmmu_pro, "choice", "A", "") == (True, True, False)
    assert verdicts(cmmmu, "true_false", "对", "不知道")[1:] == (True, False)
    assert verdicts(cmmmu, "choice", "A", "") == (False, False, False)  # CMMMU draws nothing for an empty response
    assert verdicts(mmmu, "open", "500", "$500") == (True, False, True)  # nothing is ever drawn for free text


def test_marks_that_are_special_tokens_are_kept_and_all_other_special_tokens_left_out() -> None:
    class Tokenizer:
        words = ("<pad>", "[THINK]", "[/THINK]", "</s>", "<image>", "A", "B")
        all_special_ids = range(5)

        def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
            return "".join(self.words[token] for token in tokens if not (skip_special_tokens and token < 5))

    model = TransformersModel.__new__(TransformersModel)
    model._processor = SimpleNamespace(tokenizer=Tokenizer())
    settings = Settings(max_new_tokens=4)
    assert model._reply([1, 5, 2, 6, 3, 0], settings) == Reply("[THINK]A[/THINK]B", finish="stop")
    assert model._reply([1, 5, 5, 6], settings) == Reply("[THINK]AAB", finish="length")
    assert model._reply([4, 6, 3, 0], settings) == Reply("B", finish="stop")
    assert model._reply([3, 0, 0, 0], settings) == Reply("", finish="stop")
