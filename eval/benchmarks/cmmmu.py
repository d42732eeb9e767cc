"""CMMMU: Chinese choice, true-or-false and blank questions.

Source: hub id m-a-p/CMMMU, or the folders cmmmu-data-SPLIT of CMMMU-Benchmark/CMMMU, whose test split has no answers; scored as
cmmmu_official.py does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from yi_vl.files import read_json_lines

from ..data import Row, images_of, read_rows, refuse_repeated, split_at_markers, warn_of_unshown
from ..types import Answered, BenchmarkImage, PublishedRow, Question, QuestionType, ResponseFormat, Split, from_record
from . import cmmmu_official
from .mmmu_official import RandomGuess

NAME = "cmmmu"
HUB_ID = "m-a-p/CMMMU"
# In the order of the official script, in which it takes its random guesses from one stream.
LABELS = {
    "艺术与设计": "Art and Design",
    "商业": "Business",
    "科学": "Science",
    "健康与医学": "Health and Medicine",
    "人文社会科学": "Humanities and Social Science",
    "技术与工程": "Tech and Engineering",
}  # on charts: not every machine has a Chinese font
GROUPS = {name: (name,) for name in LABELS}
PUBLISHED = (
    PublishedRow("Yi-VL-34B", "test", {"Overall": 36.5}, "Yi-VL's model card"),
    PublishedRow("Yi-VL-6B", "test", {"Overall": 35.0}, "Yi-VL's model card"),
    PublishedRow(
        "Yi-VL-34B",
        "val",
        {"Overall": 36.2} | dict(zip(GROUPS, (58.0, 15.9, 33.8, 40.5, 38.8, 37.3))),
        "its published responses, scored by this project",
    ),
    PublishedRow("Yi-VL-6B", "val", {"Overall": 35.8}, "Yi-VL's model card"),
    PublishedRow("GPT-4V", "val", {"Overall": 42.0}, "CMMMU (arXiv 2401.11944), abstract"),
)
NUM_REQUIRED = None  # it wants every question of the answers, which read_predictions sees to
HAS_ANSWERS_IN_PREDICTIONS = False
QUESTION_TYPES: dict[str, QuestionType] = {"选择": "choice", "判断": "true_false", "填空": "blank"}
_TYPES = {question_type: name for name, question_type in QUESTION_TYPES.items()}
_INSTRUCTIONS: dict[QuestionType, str] = {
    "choice": "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。",
    "true_false": "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。如果信息不完整或不足以作出绝对判断，请运用你的逻辑推理和现有信息来做出最可能的判断。",
    "blank": "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。如果信息不足以确切回答，那么请依据现有的数据和你的推理能力来填写最合理的答案。",
}
_COLUMNS = ("id", "type", "question", "category")
_TABLE_COLUMNS = (*_COLUMNS, "option1", "image_1", "image_1_filename")
_DISK_SPLITS: dict[Split, tuple[str, ...]] = {"dev": ("dev",), "val": ("val", "validation"), "test": ("test",)}
_FILE_MARKER = re.compile(r'<img="([^"]+)">')


def load(data: str, split: Split) -> list[Question]:
    """All questions of a split: from the hub id, a folder of its parquet files, or of JSON lines with images.

    Raises:
        ValueError: there are none, or a row is not as the benchmark's rows are.
    """
    folder = Path(data).expanduser()
    if folder.is_dir() and not any(folder.rglob("*.parquet")) and any(folder.rglob("*.jsonl")):
        questions = [_question(row, row.values.get("img_list") or []) for row in _jsonl_rows(folder, split)]
    else:
        rows = read_rows(data, _DISK_SPLITS[split], (*_TABLE_COLUMNS, *_answer_column(split)))
        questions = [_question(row, [row.text(f"image_{number}_filename") for number in range(1, 6)]) for row in rows]
    warn_of_unshown(questions, _FILE_MARKER.pattern, data)
    return questions


def _jsonl_rows(folder: Path, split: Split) -> list[Row]:
    """Rows of the files named after the split (or in a folder that is); of all files where none is."""
    files = sorted(folder.rglob("*.jsonl"))
    named = [path for path in files if _is_named_after(path.relative_to(folder), _DISK_SPLITS[split])]
    inside = folder.resolve()
    image_paths = {
        path.name: path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.resolve().is_relative_to(inside)
    }
    rows = []
    for path in named or files:
        for values in read_json_lines(path):
            images: dict[str, BenchmarkImage] = {}
            row = Row(values, str(path), images)
            missing = [name for name in (*_COLUMNS, *_answer_column(split)) if name not in values]
            if missing:
                raise row.error(f"it has no {', '.join(missing)}")
            for number, name in enumerate(values.get("img_list") or [], start=1):
                if name not in image_paths:
                    raise row.error(f"its image {name} is nowhere under {folder}")
                images[f"image_{number}"] = BenchmarkImage(name, partial(Path.read_bytes, image_paths[name]))
            rows.append(row)
    return refuse_repeated(rows, str(folder))


def _answer_column(split: Split) -> tuple[str, ...]:
    """The test split's answers are not public: its rows may do without."""
    return () if split == "test" else ("answer",)


def _is_named_after(path: Path, splits: Sequence[str]) -> bool:
    """`val.jsonl`, `cmmmu_val_1.jsonl`, `val/business.jsonl` and the official `cmmmu-data-val/business/business.jsonl`."""
    stems = {path.stem, *path.stem.split("_"), *path.stem.split("-")}
    return bool((stems | {re.split("[-_]", folder)[-1] for folder in path.parts[:-1]}) & set(splits))


def _question(row: Row, files: Sequence[str]) -> Question:
    """`files`: the names of the images, image_1 first; the text speaks of images by these names.

    A name that is none of them is left in the text, as in the benchmark's own prompts.
    """
    if row.text("type") not in QUESTION_TYPES:
        raise row.error(f"its type is {row.text('type')!r}, not one of {', '.join(QUESTION_TYPES)}")
    question_type = QUESTION_TYPES[row.text("type")]
    options = (
        {letter: row.text(f"option{i}") for i, letter in enumerate("ABCD", start=1)}
        if question_type == "choice"
        else {}
    )
    numbers = {name: number for number, name in reversed(list(enumerate(files, start=1))) if name}

    def numbered(match: re.Match[str]) -> str:
        return f"<图片 {numbers[match[1]]}>" if match[1] in numbers else match[0]

    text = _FILE_MARKER.sub(numbered, prompt(question_type, row.text("question"), options))
    columns = {f"<图片 {number}>": f"image_{number}" for number in range(1, len(files) + 1)}
    images, index_of = images_of(row, list(columns.values()))
    markers = {marker: index_of.get(column) for marker, column in columns.items()}
    parts = split_at_markers(row, text, "|".join(markers) or "(?!)", markers)
    return Question(
        row.id, row.text("category"), question_type, _gold(row), options, parts, images, question_type == "choice"
    )


def _gold(row: Row) -> str:
    """ "" where it is not public."""
    return "" if row.text("answer").strip() == "?" else row.text("answer")


def prompt(question_type: QuestionType, question: str, options: Mapping[str, str]) -> str:
    """The prompt of the benchmark's author."""
    lines = "选项：\n" + "".join(f"({letter}) {text}\n" for letter, text in options.items()) + "\n" if options else ""
    return f"{_INSTRUCTIONS[question_type]}\n\n问题：{question}\n{lines}正确答案：\n"


def parse_official(answered: Answered, random_guess: RandomGuess) -> Any:
    question_type, response = answered.question.question_type, answered.answer
    if question_type == "blank":
        parse = cmmmu_official.parse_blank if answered.response_format == "response" else cmmmu_official.normalize
        return parse(response, str(answered.question.gold))
    if answered.response_format == "answer":
        return response
    if question_type == "true_false":
        return cmmmu_official.parse_true_false(response, random_guess)
    return cmmmu_official.parse_choice(response, answered.question.options, random_guess)


def is_correct(answered: Answered, parsed: Any) -> bool:
    if answered.question.question_type == "blank":
        return cmmmu_official.is_blank_correct(parsed, str(answered.question.gold))
    return bool(parsed == answered.question.gold)


def official_order(answered: Sequence[Answered]) -> list[Answered]:
    """Disciplines in the official order, and within one as they came."""
    position = {name: index for index, name in enumerate(GROUPS)}
    return sorted(answered, key=lambda item: position.get(item.question.subject, len(position)))


def read_answers(path: Path) -> list[Question]:
    """JSON lines with id, type, answer, category and, for choices, option1 to option4."""
    questions = []
    for record in read_json_lines(path):
        row = Row(record, str(path))
        missing = [name for name in ("id", "type", "answer", "category") if name not in record]
        if missing:
            raise row.error(f"it has no {', '.join(missing)}")
        question_type = _question_type(path, record)
        options = (
            {letter: row.text(f"option{i}") for i, letter in enumerate("ABCD", start=1)}
            if question_type == "choice"
            else {}
        )
        question = Question(
            row.id, row.text("category"), question_type, row.text("answer"), options, may_have_several=bool(options)
        )
        questions.append(replace(question, parts=(row.text("question"),) if "question" in record else ()))
    return questions


def read_predictions(path: Path, questions: Mapping[str, Question]) -> list[Answered]:
    """Responses (`id`, `type`, `response`) or answers (`id`, `type`, `answer`), as the official script takes them.

    This harness's own records have more keys; a file of anybody else's must have exactly those three.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no .jsonl files.")
    records = [(file, record) for file in files for record in read_json_lines(file)]
    response_format = _response_format(path, [record for _, record in records])
    answered = [_answered(file, record, response_format, questions) for file, record in records]
    ids = [item.question.id for item in answered]
    repeated = sorted({key for key in ids if ids.count(key) > 1}) if len(set(ids)) < len(ids) else []
    missing = sorted(set(questions) - set(ids))
    for problem, keys in (("are answered more than once", repeated), ("are not answered", missing)):
        if keys:
            raise ValueError(f"{path}: {len(keys)} of {len(questions)} questions {problem}: {', '.join(keys[:5])} ...")
    return answered


def _response_format(path: Path, records: Sequence[Mapping[str, Any]]) -> ResponseFormat:
    if records and all("prompt" in record and "response" in record for record in records):
        return "response"
    formats: tuple[ResponseFormat, ...] = ("answer", "response")
    for response_format in formats:
        if records and all(set(record) == {"id", "type", response_format} for record in records):
            return response_format
    odd = next((set(record) for record in records if set(record) != {"id", "type", "answer"}), set())
    raise ValueError(
        f"{path}: every line must have the keys id, type and answer, or id, type and response, and no others; found "
        f"{', '.join(sorted(odd)) or 'no lines'}."
    )


def _answered(
    path: Path, record: Mapping[str, Any], response_format: ResponseFormat, questions: Mapping[str, Question]
) -> Answered:
    key = str(record["id"])
    if key not in questions:
        raise ValueError(f"{path}: there is no question {key!r} among the {len(questions)} answers.")
    response = record[response_format]
    question = (
        questions[key] if "type" not in record else replace(questions[key], question_type=_question_type(path, record))
    )
    return from_record(
        question,
        record,
        response if isinstance(response, (str, dict, type(None))) else str(response),
        response_format,
    )


def _question_type(path: Path, record: Mapping[str, Any]) -> QuestionType:
    if record["type"] not in QUESTION_TYPES:
        raise ValueError(
            f"{path}: {record['id']} has the type {record['type']!r}, not one of {', '.join(QUESTION_TYPES)}."
        )
    return QUESTION_TYPES[record["type"]]


def format_official(num_correct: int, num: int) -> str:
    return f"{num_correct / num}"


def submission(answered: Sequence[Answered]) -> tuple[str, str]:
    """The test server's file: JSON lines of id (a number), type and response."""
    lines = [
        json.dumps(
            {"id": int(item.question.id), "type": _TYPES[item.question.question_type], "response": item.answer},
            ensure_ascii=False,
        )
        for item in answered
    ]
    return "submission.jsonl", "\n".join(lines) + "\n"
