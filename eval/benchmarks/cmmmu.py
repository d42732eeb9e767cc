"""CMMMU: Chinese choice, true-or-false and blank questions.

Source: hub id m-a-p/CMMMU, or the folders cmmmu-data-SPLIT of CMMMU-Benchmark/CMMMU, whose test split has no answers; the
rules of cmmmu_rules.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..data import Row, pictures_of, read_jsonl, read_rows, refuse_repeated, split_at_markers, warn_of_unshown
from ..types import Answered, Form, Kind, Picture, PublishedRow, Question, Split, recorded
from . import cmmmu_official as cmmmu_rules
from .mmmu_official import Draw

NAME = "cmmmu"
HUB_ID = "m-a-p/CMMMU"
# The order in which the official script goes through them, and so uses its stream of draws.
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
KINDS: dict[str, Kind] = {"选择": "choice", "判断": "judgement", "填空": "blank"}
_TYPES = {kind: name for name, kind in KINDS.items()}
_INSTRUCTIONS: dict[Kind, str] = {
    "choice": "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。",
    "judgement": "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。如果信息不完整或不足以作出绝对判断，请运用你的逻辑推理和现有信息来做出最可能的判断。",
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
    images = {
        path.name: path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and path.resolve().is_relative_to(inside)
    }
    rows = []
    for path in named or files:
        for values in read_jsonl(path):
            pictures: dict[str, Picture] = {}
            row = Row(values, str(path), pictures)
            missing = [name for name in (*_COLUMNS, *_answer_column(split)) if name not in values]
            if missing:
                raise row.error(f"it has no {', '.join(missing)}")
            for number, name in enumerate(values.get("img_list") or [], start=1):
                if name not in images:
                    raise row.error(f"its image {name} is nowhere under {folder}")
                pictures[f"image_{number}"] = Picture(name, partial(Path.read_bytes, images[name]))
            rows.append(row)
    return refuse_repeated(rows, str(folder))


def _answer_column(split: Split) -> tuple[str, ...]:
    """The test split's answers are not public: its rows may do without."""
    return () if split == "test" else ("answer",)


def _is_named_after(path: Path, splits: Sequence[str]) -> bool:
    """`val.jsonl`, `cmmmu_val_1.jsonl`, `val/business.jsonl` and the official `cmmmu-data-val/business/business.jsonl`."""
    words = {path.stem, *path.stem.split("_"), *path.stem.split("-")}
    return bool((words | {re.split("[-_]", folder)[-1] for folder in path.parts[:-1]}) & set(splits))


def _question(row: Row, files: Sequence[str]) -> Question:
    """`files`: the names of the images, image_1 first; the text speaks of images by these names.

    A name that is none of them stays in the text, as the author's prompts leave it.
    """
    if row.text("type") not in KINDS:
        raise row.error(f"its type is {row.text('type')!r}, not one of {', '.join(KINDS)}")
    kind = KINDS[row.text("type")]
    options = {letter: row.text(f"option{i}") for i, letter in enumerate("ABCD", start=1)} if kind == "choice" else {}
    numbers = {name: number for number, name in reversed(list(enumerate(files, start=1))) if name}

    def numbered(found: re.Match[str]) -> str:
        return f"<图片 {numbers[found[1]]}>" if found[1] in numbers else found[0]

    text = _FILE_MARKER.sub(numbered, prompt(kind, row.text("question"), options))
    columns = {f"<图片 {number}>": f"image_{number}" for number in range(1, len(files) + 1)}
    pictures, index_of = pictures_of(row, list(columns.values()))
    markers = {marker: index_of.get(column) for marker, column in columns.items()}
    parts = split_at_markers(row, text, "|".join(markers) or "(?!)", markers)
    several = kind == "choice"
    return Question(row.id, row.text("category"), kind, _gold(row), options, parts, pictures, several)


def _gold(row: Row) -> str:
    """ "" where it is not public."""
    return "" if row.text("answer").strip() == "?" else row.text("answer")


def prompt(kind: Kind, question: str, options: Mapping[str, str]) -> str:
    """The prompt of the benchmark's author."""
    lines = "选项：\n" + "".join(f"({letter}) {text}\n" for letter, text in options.items()) + "\n" if options else ""
    return f"{_INSTRUCTIONS[kind]}\n\n问题：{question}\n{lines}正确答案：\n"


def parse_official(answered: Answered, draw: Draw) -> Any:
    kind, said = answered.question.kind, answered.answer
    if kind == "blank":
        parse = cmmmu_rules.parse_blank if answered.form == "response" else cmmmu_rules.normalise
        return parse(said, str(answered.question.gold))
    if answered.form == "answer":
        return said
    if kind == "judgement":
        return cmmmu_rules.parse_judgement(said, draw)
    return cmmmu_rules.parse_choice(said, answered.question.options, draw)


def is_right(answered: Answered, meaning: Any) -> bool:
    if answered.question.kind == "blank":
        return cmmmu_rules.is_blank_right(meaning, str(answered.question.gold))
    return bool(meaning == answered.question.gold)


def official_order(answered: Sequence[Answered]) -> list[Answered]:
    """Disciplines in the official order, and within one as they came."""
    place = {name: index for index, name in enumerate(GROUPS)}
    return sorted(answered, key=lambda one: place.get(one.question.subject, len(place)))


def read_answers(path: Path) -> list[Question]:
    """JSON lines with id, type, answer, category and, for choices, option1 to option4."""
    questions = []
    for record in read_jsonl(path):
        row = Row(record, str(path))
        missing = [name for name in ("id", "type", "answer", "category") if name not in record]
        if missing:
            raise row.error(f"it has no {', '.join(missing)}")
        kind = _kind(path, record)
        options = (
            {letter: row.text(f"option{i}") for i, letter in enumerate("ABCD", start=1)} if kind == "choice" else {}
        )
        question = Question(
            row.id, row.text("category"), kind, row.text("answer"), options, may_have_several=bool(options)
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
    records = [(file, record) for file in files for record in read_jsonl(file)]
    form = _form(path, [record for _, record in records])
    answered = [_answered(file, record, form, questions) for file, record in records]
    ids = [one.question.id for one in answered]
    repeated = sorted({key for key in ids if ids.count(key) > 1}) if len(set(ids)) < len(ids) else []
    missing = sorted(set(questions) - set(ids))
    for problem, keys in (("are answered more than once", repeated), ("are not answered", missing)):
        if keys:
            raise ValueError(f"{path}: {len(keys)} of {len(questions)} questions {problem}: {', '.join(keys[:5])} ...")
    return answered


def _form(path: Path, records: Sequence[Mapping[str, Any]]) -> Form:
    if records and all("prompt" in record and "response" in record for record in records):
        return "response"
    forms: tuple[Form, ...] = ("answer", "response")
    for form in forms:
        if records and all(set(record) == {"id", "type", form} for record in records):
            return form
    odd = next((set(record) for record in records if set(record) != {"id", "type", "answer"}), set())
    raise ValueError(
        f"{path}: every line must have the keys id, type and answer, or id, type and response, and no others; found "
        f"{', '.join(sorted(odd)) or 'no lines'}."
    )


def _answered(path: Path, record: Mapping[str, Any], form: Form, questions: Mapping[str, Question]) -> Answered:
    key = str(record["id"])
    if key not in questions:
        raise ValueError(f"{path}: there is no question {key!r} among the {len(questions)} answers.")
    said = record[form]
    question = questions[key] if "type" not in record else replace(questions[key], kind=_kind(path, record))
    return recorded(question, record, said if isinstance(said, (str, dict, type(None))) else str(said), form)


def _kind(path: Path, record: Mapping[str, Any]) -> Kind:
    if record["type"] not in KINDS:
        raise ValueError(f"{path}: {record['id']} has the type {record['type']!r}, not one of {', '.join(KINDS)}.")
    return KINDS[record["type"]]


def printed(num_right: int, num: int) -> str:
    return f"{num_right / num}"


def submission(answered: Sequence[Answered]) -> tuple[str, str]:
    """The test server's file: JSON lines of id (a number), type and response."""
    lines = [
        json.dumps(
            {"id": int(one.question.id), "type": _TYPES[one.question.kind], "response": one.answer}, ensure_ascii=False
        )
        for one in answered
    ]
    return "submission.jsonl", "\n".join(lines) + "\n"
