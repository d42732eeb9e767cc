"""MMMU-Pro: MMMU's questions with up to ten options and more, or as screenshots.

Source: hub id MMMU/MMMU_Pro; prompts as mmmu-pro/prompts.yaml and mmmu-pro/infer of MMMU-Benchmark/MMMU lay them out;
scored as mmmu_pro_official.py does. A row's options are taken as the official code takes them: the text is parsed once as
a Python literal, and each element is one option, whatever it is and however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from yi_vl.files import read_json_lines

from ..data import Row, images_of, read_rows, split_at_markers, warn_of_unshown
from ..types import Answered, Marker, PublishedRow, Question, Split, from_record
from . import mmmu_pro_official
from .mmmu import GROUPS as GROUPS
from .mmmu import LABELS as LABELS
from .mmmu_official import RandomGuess

NAME = "mmmu-pro"
HUB_ID = "MMMU/MMMU_Pro"
PUBLISHED: tuple[PublishedRow, ...] = ()  # Yi-VL was never measured on it
NUM_REQUIRED = 1730
HAS_ANSWERS_IN_PREDICTIONS = True
Variant = Literal["standard (10 options)", "standard (4 options)", "vision"]
Style = Literal["direct", "cot"]
_COLUMNS = ("id", "options", "answer", "subject")
_MARKER = r"<image [1-7]>"  # one for each image column; the official code leaves other numbers as text
_LAST_LINE = "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options."
_STANDARD: dict[Style, str] = {
    "direct": "Answer with the option letter from the given choices directly.",
    "cot": f"Answer the preceding multiple choice question. {_LAST_LINE} Think step by step before answering.",
}
_VISION: dict[Style, str] = {
    "direct": f"Answer with the option letter from the given choices directly. {_LAST_LINE}",
    "cot": f"Write out the multiple-choice question in the image and then solve it. {_LAST_LINE} Think step by step before answering.",
}


def load(
    data: str, split: Split, variant: Variant = "standard (10 options)", style: Style = "direct"
) -> list[Question]:
    """All questions of a variant; there is one split, "test".

    A question that names an image which its row does not have is asked with those that are there, as the official
    scripts ask it, and a warning names it.

    Raises:
        ValueError: there are none, or a row is not as the benchmark's rows are.
    """
    if split != "test":
        raise ValueError(f"MMMU-Pro has no split {split}; its only one is test.")
    columns = (*_COLUMNS, "image") if variant == "vision" else (*_COLUMNS, "question", "image_1")
    build = _vision_question if variant == "vision" else _standard_question
    questions = [build(row, style) for row in read_rows(data, ("test",), columns, [variant])]
    warn_of_unshown(questions, _MARKER, f"{data} ({variant})")
    return questions


def _standard_question(row: Row, style: Style) -> Question:
    options = row.lettered_options()
    lines = "\n".join(f"{letter}. {option}" for letter, option in options.items())
    images, index_of = images_of(row, [f"image_{number}" for number in range(1, 8)])
    markers = {f"<image {name[-1]}>": index for name, index in index_of.items()}
    prompt = f"{row.text('question')}\n{lines}\n{_STANDARD[style]}"
    parts = split_at_markers(row, prompt, "|".join(markers) or "(?!)", markers)
    return Question(row.id, row.text("subject"), "choice", row.text("answer"), options, parts, images)


def _vision_question(row: Row, style: Style) -> Question:
    images, _ = images_of(row, ["image"])
    if not images:
        raise row.error("it has no image")
    parts = (Marker("<image>", 0), _VISION[style])
    return Question(row.id, row.text("subject"), "choice", row.text("answer"), row.lettered_options(), parts, images)


def parse_official(answered: Answered, random_guess: RandomGuess) -> Any:
    return mmmu_pro_official.parse_choice(answered.answer, answered.question.options, random_guess)


def is_correct(answered: Answered, parsed: Any) -> bool:
    return bool(parsed == answered.question.gold)


def official_order(answered: Sequence[Answered]) -> list[Answered]:
    """The order given. The official guesses have no seed; here they come from the same seeded stream as MMMU's."""
    return list(answered)


def read_answers(path: Path) -> list[Question]:
    """JSON lines with id, options, answer and perhaps subject: a prediction file, the official ones or this harness's."""
    return [_recorded_question(path, record) for record in read_json_lines(path)]


def read_predictions(path: Path, questions: Mapping[str, Question]) -> list[Answered]:
    """The official JSON lines, or this harness's. A response that is an object (an API's error) or null counts as empty.

    Raises:
        ValueError: a record has no id or response, or options or an answer other than its question's.
    """
    return [_answered(Row(record, str(path)), questions) for record in read_json_lines(path)]


def _answered(row: Row, questions: Mapping[str, Question]) -> Answered:
    if "id" not in row.values or "response" not in row.values:
        raise ValueError(f"{row.source}: a prediction must have an id and a response; found {str(row.values)[:100]}.")
    if row.id not in questions:
        raise ValueError(f"{row.source}: there is no question {row.id!r} among the {len(questions)} answers.")
    question, response = questions[row.id], row.values["response"]
    if "options" in row.values and row.lettered_options() != question.options:
        raise row.error("it was asked with other options than its answer has; is --answers of another variant?")
    if not isinstance(response, (str, dict, type(None))):
        raise row.error(f"its response is a {type(response).__name__}, not text")
    return from_record(question, row.values, response)


def _recorded_question(path: Path, record: Mapping[str, Any]) -> Question:
    row = Row(record, str(path))
    answer = "answer" if "answer" in record else "gold"  # the latter in this harness's own predictions
    missing = [name for name in ("id", "options") if name not in record]
    missing += [] if answer in record else ["answer"]
    if missing:
        raise row.error(f"it has no {', '.join(missing)}")
    return Question(row.id, row.text("subject") or "all", "choice", row.text(answer), row.lettered_options())


def format_official(num_correct: int, num: int) -> str:
    """Per cent with two decimals, always two."""
    return f"{num_correct / num * 100:.2f}%"


def submission(answered: Sequence[Answered]) -> tuple[str, str]:
    """There is nothing to submit: MMMU-Pro's answers are public."""
    raise ValueError("MMMU-Pro's answers are public; score the predictions here instead of submitting them.")
