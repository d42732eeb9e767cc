"""MMMU: 30 subjects, multiple choice and open questions. Source: hub id MMMU/MMMU."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from yi_vl.files import read_json_lines

from ..data import Row, images_of, read_json, read_rows, split_at_markers
from ..types import Answered, PublishedRow, Question, QuestionType, Split, from_record
from . import mmmu_official
from .mmmu_official import RandomGuess

NAME = "mmmu"
HUB_ID = "MMMU/MMMU"
GROUPS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
LABELS: dict[str, str] = {}
_YI_PAPER = "Yi technical report (arXiv 2403.04652), table 7"
_SHIPPED = "its published responses, scored by this project"


def _row(model: str, split: Split, source: str, overall: float, *disciplines: float) -> PublishedRow:
    return PublishedRow(model, split, {"Overall": overall} | dict(zip(GROUPS, disciplines)), source)


PUBLISHED = (
    _row("GPT-4V", "test", _YI_PAPER, 55.7, 65.3, 64.3, 48.4, 63.5, 76.3, 41.7),
    _row("Yi-VL-34B", "test", _YI_PAPER, 41.6, 56.1, 33.3, 32.9, 45.9, 66.5, 36.0),
    _row("Yi-VL-6B", "test", _YI_PAPER, 37.8, 53.4, 30.3, 30.0, 39.3, 58.5, 34.1),
    _row("LLaVA-1.5-13B", "test", _YI_PAPER, 33.6, 49.8, 28.2, 25.9, 34.9, 54.7, 28.3),
    _row("GPT-4V", "val", "MMMU (arXiv 2311.16502), table 2", 56.8),
    _row("Yi-VL-34B", "val", "Yi-VL's model card", 45.9),
    _row("Yi-VL-6B", "val", "Yi-VL's model card", 39.1),
    _row("LLaVA-1.5-13B", "val", _SHIPPED, 36.7, 52.5, 22.7, 29.3, 38.7, 55.0, 31.0),
)
NUM_REQUIRED = None
HAS_ANSWERS_IN_PREDICTIONS = False
_COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
_DISK_SPLITS: dict[Split, tuple[str, ...]] = {"dev": ("dev",), "val": ("validation", "val"), "test": ("test",)}
_MARKER = r"<image [1-7]>"
_NOT_PUBLIC = "?"  # what the test split has for an answer
_CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."
_OPEN_INSTRUCTION = "Answer the question using a single word or phrase."


def load(data: str, split: Split) -> list[Question]:
    """All questions of a split, from a folder of the hub's parquet files or the hub id.

    Raises:
        ValueError: there are none, or a row is not as the benchmark's rows are.
    """
    return [_question(row) for row in read_rows(data, _DISK_SPLITS[split], _COLUMNS)]


def _question(row: Row) -> Question:
    question_type: QuestionType = "choice" if row.text("question_type") == "multiple-choice" else "open"
    options = row.lettered_options() if question_type == "choice" else {}
    images, index_of = images_of(row, [f"image_{number}" for number in range(1, 8)])
    markers = {f"<image {number}>": index_of.get(f"image_{number}") for number in range(1, 8)}
    return Question(
        id=row.id,
        subject=subject_of(row.id),
        question_type=question_type,
        gold=_gold(row.text("answer")),
        options=options,
        parts=split_at_markers(row, prompt(row.text("question"), options), _MARKER, markers),
        images=images,
    )


def prompt(question: str, options: Mapping[str, str]) -> str:
    """The prompt of the official llava1.5 configuration."""
    if not options:
        return f"{question}\n\n{_OPEN_INSTRUCTION}"
    lines = "".join(f"({letter}) {option}\n" for letter, option in options.items())
    return f"{question}\n{lines}\n{_CHOICE_INSTRUCTION}"


def subject_of(key: str) -> str:
    """`validation_Art_Theory_7` -> `Art_Theory`"""
    return "_".join(key.split("_")[1:-1])


def _gold(text: str) -> str | tuple[str, ...]:
    """Several golds are written as a Python list; "" where the gold is not public."""
    if text.strip() == _NOT_PUBLIC:
        return ""
    if text.startswith("["):
        try:
            values = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return tuple(values)
    return text


def parse_official(answered: Answered, random_guess: RandomGuess) -> Any:
    question = answered.question
    if question.question_type == "open":
        return mmmu_official.parse_open(answered.answer)
    if answered.response_format == "answer":
        return answered.answer
    return mmmu_official.parse_choice(answered.answer, question.options, random_guess)


def is_correct(answered: Answered, parsed: Any) -> bool:
    question = answered.question
    if question.question_type == "open":
        return mmmu_official.is_open_correct(parsed, question.gold)
    return mmmu_official.is_choice_correct(parsed, question.gold)


def official_order(answered: Sequence[Answered]) -> list[Answered]:
    """Subjects by name, and within one in the order given: the order in which the official script guesses."""
    return sorted(answered, key=lambda item: item.question.subject)


def read_answers(path: Path) -> list[Question]:
    """The official `answer_dict_val.json`."""
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, not MMMU's object of id -> answer.")
    questions = []
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not {"question_type", "ground_truth"} <= set(entry):
            raise ValueError(f"{path}: {key} has no question_type and ground_truth, as MMMU's answer_dict has.")
        truth = entry["ground_truth"]
        gold = tuple(map(str, truth)) if isinstance(truth, list) else str(truth)
        question_type: QuestionType = "choice" if entry["question_type"] == "multiple-choice" else "open"
        questions.append(Question(key, subject_of(key), question_type, gold))
    return questions


def read_predictions(path: Path, questions: Mapping[str, Question]) -> list[Answered]:
    """Responses or answers in any format that the official scripts or this harness read or write.

    A folder `SUBJECT/output.json` or one such file, or JSON lines: responses, with their options. One object
    id -> answer (what the test server takes): answers, compared as they are.
    """
    if path.is_dir():
        files = sorted(path.glob("*/output.json"))
        if not files:
            raise ValueError(f"{path} has no SUBJECT/output.json; give such a folder, a .json or a .jsonl file.")
        return [item for file in files for item in read_predictions(file, questions)]
    records = read_json_lines(path) if path.suffix == ".jsonl" else read_json(path)
    if isinstance(records, dict):
        return [Answered(_known(path, key, questions), str(answer), "answer") for key, answer in records.items()]
    return [_answered(path, record, questions) for record in records]


def _answered(path: Path, record: Mapping[str, Any], questions: Mapping[str, Question]) -> Answered:
    if not isinstance(record, dict) or "id" not in record or "response" not in record:
        raise ValueError(f"{path}: a prediction must have an id and a response; found {str(record)[:100]}.")
    question = _known(path, str(record["id"]), questions)
    if question.question_type == "choice" and not question.options:
        column = next((name for name in ("index2ans", "options") if record.get(name)), None)
        if column is None:
            raise ValueError(
                f"{path}: {question.id} is multiple choice, but neither the answers nor its prediction list the "
                "options (index2ans); without them a response cannot be read. Give the data set as --answers."
            )
        question = replace(question, options=Row(record, str(path)).lettered_options(column))
    return from_record(question, record, record["response"])


def _known(path: Path, key: str, questions: Mapping[str, Question]) -> Question:
    if key not in questions:
        raise ValueError(f"{path}: there is no question {key!r} among the {len(questions)} answers.")
    return questions[key]


def format_official(num_correct: int, num: int) -> str:
    return f"{round(num_correct / num, 3)}"


def submission(answered: Sequence[Answered]) -> tuple[str, str]:
    """The test server's file: one object id -> letter, or free text for open questions.

    A choice without a recognizable letter is left empty instead of guessed.
    """
    entries = {
        item.question.id: item.answer
        if item.question.question_type == "open"
        else parse_official(item, lambda letters: "")
        for item in answered
    }
    return "submission.json", json.dumps(entries, ensure_ascii=False, indent=1)
