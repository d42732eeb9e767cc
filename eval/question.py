"""What a benchmark asks and what a model said: the types that everything in eval shares. No logic of any benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from .mmmu_rules import Draw

Kind = Literal["choice", "open", "judgement", "blank"]
Form = Literal["response", "answer"]
Split = Literal["dev", "val", "test"]


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
    """A question and what was said to it: a model's own words, or an answer that was made out of them already."""

    question: Question
    said: str
    form: Form = "response"


@dataclass(frozen=True)
class Verdict:
    """What an answer was taken to mean and whether that is right; not `is_parsed` where no rule found a meaning."""

    meaning: Any
    is_right: bool
    is_parsed: bool


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

    def judge(self, answered: Answered, draw: Draw) -> Any:
        """What the official rules take an answer to mean; `draw` is called where they leave it to chance."""

    def is_right(self, answered: Answered, meaning: Any) -> bool: ...
    def judge_strictly(self, answered: Answered) -> Verdict: ...
    def official_order(self, answered: Sequence[Answered]) -> list[Answered]: ...
    def read_answers(self, path: Path) -> list[Question]: ...
    def read_predictions(self, path: Path, questions: Mapping[str, Question]) -> list[Answered]: ...
    def printed(self, num_right: int, num: int) -> str:
        """An accuracy as the official script prints it."""

    def submission(self, answered: Sequence[Answered]) -> tuple[str, str]: ...


@dataclass(frozen=True)
class PublishedRow:
    """A row of a published table, in per cent: `scores` has "Overall" and as many disciplines as were published."""

    model: str
    split: Split
    scores: Mapping[str, float]
    source: str


def _image(picture: Picture) -> dict[str, Any]:
    return {"type": "image", "image": picture}
