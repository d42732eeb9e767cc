"""What a benchmark asks and what a model said: the types that everything in eval shares. No logic of any benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from .benchmarks.mmmu_official import Draw
from .reasoning import answer_of

Kind = Literal["choice", "open", "judgement", "blank"]
Form = Literal["response", "answer"]
Split = Literal["dev", "val", "test"]
Outcome = Literal["answered", "failed", "refused", "cut"]


@dataclass(frozen=True)
class Picture:
    """One image of a benchmark; its bytes are read when they are needed."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Marker:
    """A place in a prompt where a picture belongs: `text` as the benchmark writes it, `index` into the pictures."""

    text: str
    index: int


@dataclass(frozen=True)
class Question:
    """One question. Without `parts` it can be scored, but not asked."""

    id: str
    subject: str
    kind: Kind
    gold: str | tuple[str, ...]  # "" where it is not public
    options: Mapping[str, str] = field(default_factory=dict)  # letter -> text, in order
    parts: tuple[str | Marker, ...] = ()
    pictures: tuple[Picture, ...] = ()
    may_have_several: bool = False  # a choice whose answer may be several letters

    @property
    def prompt(self) -> str:
        """The whole prompt, with the benchmark's own words where pictures belong."""
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)

    def content(self, first_picture_only: bool = False) -> list[dict[str, Any]]:
        """The parts of a user's message: every picture at its marker, unmarked ones first.

        Args:
            first_picture_only: as the official LLaVA run does it: the first picture before the prompt, markers as text.
        """
        if first_picture_only:
            return [*map(_image, self.pictures[:1]), {"type": "text", "text": self.prompt}]
        marked = {part.index for part in self.parts if isinstance(part, Marker)}
        content = [_image(picture) for index, picture in enumerate(self.pictures) if index not in marked]
        for part in self.parts:
            if isinstance(part, Marker):
                content.append(_image(self.pictures[part.index]))
            elif content and content[-1]["type"] == "text":
                content[-1]["text"] += part
            else:
                content.append({"type": "text", "text": part})
        return content


@dataclass(frozen=True)
class Answered:
    """A question and what was said to it: a model's own words, or an answer that was made out of them already.

    Attributes:
        said: the whole response, reasoning included; what is scored is `answer`.
        outcome: "failed" where the question could not be asked, "refused" and "cut" where the server said so.
    """

    question: Question
    said: str
    form: Form = "response"
    outcome: Outcome = "answered"

    @cached_property
    def answer(self) -> str:
        """The response without its reasoning; "" where that never ended."""
        return answer_of(self.said)


def recorded(question: Question, record: Mapping[str, Any], said: Any, form: Form = "response") -> Answered:
    """A question and its record in a prediction file: this harness's own records have their outcome and prompt too.

    An API's error in place of a response (null or an object) says nothing, as in the official scripts.
    """
    if not question.parts and isinstance(prompt := record.get("prompt", record.get("question")), str):
        question = replace(question, parts=(prompt,))
    is_failed = bool(record.get("error")) or isinstance(said, (dict, type(None)))
    outcomes: dict[Any, Outcome] = {"refused": "refused", "length": "cut"}
    outcome = "failed" if is_failed else outcomes.get(record.get("finish"), "answered")
    return Answered(question, said if isinstance(said, str) else "", form, outcome)


@dataclass(frozen=True)
class Verdict:
    """What an answer was taken to mean and whether that is right; `is_guess` where the official rules drew it."""

    meaning: Any
    is_right: bool
    is_guess: bool


class Benchmark(Protocol):
    """The few names that every benchmark's file has; the runner and the reports know no others."""

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

    def parse_official(self, answered: Answered, draw: Draw) -> Any:
        """What the official rules take an answer to mean; `draw` is called where they leave it to chance."""

    def is_right(self, answered: Answered, meaning: Any) -> bool: ...
    def official_order(self, answered: Sequence[Answered]) -> list[Answered]: ...
    def read_answers(self, path: Path) -> list[Question]: ...
    def read_predictions(self, path: Path, questions: Mapping[str, Question]) -> list[Answered]: ...
    def printed(self, num_right: int, num: int) -> str:
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


def _image(picture: Picture) -> dict[str, Any]:
    return {"type": "image", "image": picture}
