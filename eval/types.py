"""Questions, responses, verdicts and what a benchmark provides: the types that everything in eval shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from .benchmarks.mmmu_official import RandomGuess
from .reasoning import answer_of

QuestionType = Literal["choice", "open", "true_false", "blank"]
ResponseFormat = Literal["response", "answer"]
Split = Literal["dev", "val", "test"]
Outcome = Literal["answered", "failed", "refused", "cut"]


@dataclass(frozen=True)
class BenchmarkImage:
    """One image of a benchmark; its bytes are read when they are needed."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Marker:
    """A position in a prompt where an image belongs: `text` as the benchmark writes it, `index` into the images."""

    text: str
    index: int


@dataclass(frozen=True)
class Question:
    """One question. Without `parts` it can be scored, but not asked."""

    id: str
    subject: str
    question_type: QuestionType
    gold: str | tuple[str, ...]  # "" where it is not public
    options: Mapping[str, str] = field(default_factory=dict)  # letter -> text, in order
    parts: tuple[str | Marker, ...] = ()
    images: tuple[BenchmarkImage, ...] = ()
    may_have_several: bool = False  # a choice whose answer may be several letters

    @property
    def prompt(self) -> str:
        """The whole prompt, with the benchmark's own markers where images belong."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def content(self, first_image_only: bool = False) -> list[dict[str, Any]]:
        """The parts of a user's message: every image at its marker, unmarked ones first.

        Args:
            first_image_only: as the official LLaVA run does it: the first image before the prompt, markers as text.
        """
        if first_image_only:
            return [*map(_image_part, self.images[:1]), {"type": "text", "text": self.prompt}]
        marked = {part.index for part in self.parts if isinstance(part, Marker)}
        content = [_image_part(image) for index, image in enumerate(self.images) if index not in marked]
        for part in self.parts:
            if isinstance(part, Marker):
                content.append(_image_part(self.images[part.index]))
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += part
            else:
                content.append({"type": "text", "text": part})
        return content


@dataclass(frozen=True)
class Answered:
    """A question and a model's response to it.

    Attributes:
        response: all of it, reasoning included; what is scored is `answer`.
        response_format: "response" for free text, "answer" for one that was parsed already.
        outcome: "failed" where the question could not be asked, "refused" and "cut" where the server reported it.
    """

    question: Question
    response: str
    response_format: ResponseFormat = "response"
    outcome: Outcome = "answered"

    @cached_property
    def answer(self) -> str:
        """The response without its reasoning; "" where that never ended."""
        return answer_of(self.response)


def from_record(
    question: Question, record: Mapping[str, Any], response: Any, response_format: ResponseFormat = "response"
) -> Answered:
    """A question with its record of a prediction file; this harness's own records have the outcome and the prompt too.

    An API's error in place of a response (null or an object) counts as empty, as in the official scripts.
    """
    if not question.parts and isinstance(prompt := record.get("prompt", record.get("question")), str):
        question = replace(question, parts=(prompt,))
    is_failed = bool(record.get("error")) or isinstance(response, (dict, type(None)))
    outcomes: dict[Any, Outcome] = {"refused": "refused", "length": "cut"}
    outcome = "failed" if is_failed else outcomes.get(record.get("finish"), "answered")
    return Answered(question, response if isinstance(response, str) else "", response_format, outcome)


@dataclass(frozen=True)
class Verdict:
    """What an answer was parsed to and whether that is correct; `is_guess` where the official rules guessed it."""

    parsed: Any
    is_correct: bool
    is_guess: bool


class Benchmark(Protocol):
    """What the module of a benchmark provides; the runner and the reports use nothing else."""

    @property
    def NAME(self) -> str: ...
    @property
    def GROUPS(self) -> Mapping[str, Sequence[str]]: ...  # discipline -> subjects, as papers order them
    @property
    def LABELS(self) -> Mapping[str, str]: ...  # discipline -> its name on charts, where it is another
    @property
    def PUBLISHED(self) -> Sequence[PublishedRow]: ...
    @property
    def NUM_REQUIRED(self) -> int | None: ...  # how many responses the official script insists on, where it does
    @property
    def HAS_ANSWERS_IN_PREDICTIONS(self) -> bool: ...  # official prediction files can be scored by themselves

    def load(self, data: str, split: Split) -> list[Question]: ...

    def parse_official(self, answered: Answered, random_guess: RandomGuess) -> Any:
        """The value that the official rules parse an answer to; `random_guess` is called where they guess."""

    def is_correct(self, answered: Answered, parsed: Any) -> bool: ...
    def official_order(self, answered: Sequence[Answered]) -> list[Answered]: ...
    def read_answers(self, path: Path) -> list[Question]: ...
    def read_predictions(self, path: Path, questions: Mapping[str, Question]) -> list[Answered]: ...
    def format_official(self, num_correct: int, num: int) -> str:
        """An accuracy as the official script prints it."""

    def submission(self, answered: Sequence[Answered]) -> tuple[str, str]:
        """The name and text of the test server's file; `ValueError` where there is no test server."""


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table, in per cent: `scores` has "Overall" and as many disciplines as were published."""

    model: str
    split: Split
    scores: Mapping[str, float]
    source: str


def _image_part(image: BenchmarkImage) -> dict[str, Any]:
    return {"type": "image", "image": image}
