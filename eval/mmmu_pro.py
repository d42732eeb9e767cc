"""MMMU-Pro: MMMU's questions with ten options, or as screenshots. Source: hub id MMMU/MMMU_Pro; mmmu_pro_rules.py.

Called by the commands through the names of `question.Benchmark`; calls data.py and the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from . import mmmu_pro_rules, strict
from .data import Row, pictures_of, read_jsonl, read_rows, split_at_markers
from .mmmu import GROUPS as GROUPS
from .mmmu import LABELS as LABELS
from .mmmu_rules import Draw
from .question import Answered, Marker, PublishedRow, Question, Split, Verdict

NAME = "mmmu-pro"
HUB_ID = "MMMU/MMMU_Pro"
PUBLISHED: tuple[PublishedRow, ...] = ()  # Yi-VL was never measured on it
Variant = Literal["standard (10 options)", "standard (4 options)", "vision"]
Style = Literal["direct", "cot"]
_LETTERS = "ABCDEFGHIJ"
_COLUMNS = ("id", "options", "answer", "subject")
_MARKER = r"<image (\d)>"
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

    Raises:
        ValueError: there are none, or a row is not as the benchmark's rows are.
    """
    if split != "test":
        raise ValueError(f"MMMU-Pro has no split {split}; its only one is test.")
    columns = (*_COLUMNS, "image") if variant == "vision" else (*_COLUMNS, "question", "image_1")
    build = _vision_question if variant == "vision" else _standard_question
    return [build(row, style) for row in read_rows(data, ("test",), columns, [variant])]


def _standard_question(row: Row, style: Style) -> Question:
    options = _options(row)
    lines = "".join(f"{letter}. {option}\n" for letter, option in options.items())
    pictures, index_of = pictures_of(row, [f"image_{number}" for number in range(1, 8)])
    markers = {f"<image {number}>": index_of.get(f"image_{number}") for number in range(1, 8)}
    prompt = f"{row.text('question')}\n{lines}\n{_STANDARD[style]}"
    parts = split_at_markers(row, prompt, _MARKER, markers)
    return Question(row.id, row.text("subject"), "choice", row.text("answer"), options, parts, pictures)


def _vision_question(row: Row, style: Style) -> Question:
    pictures, _ = pictures_of(row, ["image"])
    if not pictures:
        raise row.error("it has no image")
    parts = (Marker("<image>", 0), _VISION[style])
    return Question(row.id, row.text("subject"), "choice", row.text("answer"), _options(row), parts, pictures)


def _options(row: Row) -> dict[str, str]:
    options = row.literal_list("options")
    if not 2 <= len(options) <= len(_LETTERS):
        raise row.error(f"it has {len(options)} options, not 2 to {len(_LETTERS)}")
    return dict(zip(_LETTERS, options))


def judge(answered: Answered, draw: Draw) -> Any:
    return mmmu_pro_rules.parse_choice(answered.said, answered.question.options, draw)


def is_right(answered: Answered, meaning: Any) -> bool:
    return bool(meaning == answered.question.gold)


def judge_strictly(answered: Answered) -> Verdict:
    behind = answered.said.rsplit("Answer:", 1)[-1].strip() or answered.said
    letter = strict.choice(behind, answered.question.options) or strict.choice(answered.said, answered.question.options)
    return Verdict(letter, letter == answered.question.gold, letter is not None)


def official_order(answered: Sequence[Answered]) -> list[Answered]:
    """As they came. The official draws have no seed; here they come from the same seeded stream as MMMU's."""
    return list(answered)


def read_answers(path: Path) -> list[Question]:
    """JSON lines with id, options, answer and perhaps subject, as the official prediction files have them."""
    return [_recorded_question(path, record) for record in read_jsonl(path)]


def read_predictions(path: Path, questions: Mapping[str, Question]) -> list[Answered]:
    """The official JSON lines, or this harness's. A response that is an object (an API's error) says nothing."""
    answered = []
    for record in read_jsonl(path):
        if "id" not in record or "response" not in record:
            raise ValueError(f"{path}: a prediction must have an id and a response; found {str(record)[:100]}.")
        if record["id"] not in questions:
            raise ValueError(f"{path}: there is no question {record['id']!r} among the {len(questions)} answers.")
        said = record["response"]
        answered.append(Answered(questions[record["id"]], said if isinstance(said, str) else ""))
    missing = set(questions) - {one.question.id for one in answered}
    if missing:
        raise ValueError(
            f"{path} answers {len(answered)} of {len(questions)} questions; MMMU-Pro is scored whole. "
            f"Missing: {', '.join(sorted(missing)[:5])} ..."
        )
    return answered


def _recorded_question(path: Path, record: Mapping[str, Any]) -> Question:
    row = Row(record, str(path))
    missing = [name for name in ("id", "options", "answer") if name not in record]
    if missing:
        raise row.error(f"it has no {', '.join(missing)}")
    options = record["options"]
    letters = dict(options) if isinstance(options, dict) else _options(row)
    return Question(row.id, row.text("subject") or "all", "choice", row.text("answer"), letters)


def printed(num_right: int, num: int) -> str:
    return f"{round(100 * num_right / num, 2)}%"


def submission(answered: Sequence[Answered]) -> tuple[str, str]:
    """There is nothing to submit: MMMU-Pro's answers are public."""
    raise ValueError("MMMU-Pro's answers are public; score the predictions here instead of submitting them.")
