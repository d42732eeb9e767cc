"""Accuracy of a nano on the held-out questions, by skill and language.

An answer is correct when it equals an accepted one but for case, spaces and end marks; of two images only the verdict
counts (the text before the comma), not whether both are named correctly, too.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from train.nano.measure.other_answer import other_answer
from train.nano.measure.page import write_pages
from train.nano.text.dialogue import is_not_sure
from yi_vl import YiVL, load
from yi_vl.files import read_json_lines
from yi_vl.quantize import Scheme

QUESTIONS = "questions.jsonl"
_BATCH = 64
_EDGES = re.compile(r"^[\s\"'“”]+|[\s.。!！\"'“”]+$")


@dataclass(frozen=True)
class Question:
    """A held-out question with its images and every accepted answer; the topic is what of the skill is asked."""

    id: str
    skill: str
    topic: str
    lang: str
    images: tuple[Path, ...]
    question: str
    accepted: tuple[str, ...]


def read_questions(folder: Path) -> list[Question]:
    """The rows of `folder/questions.jsonl`; their images are named relative to it."""
    path = folder / QUESTIONS
    if not path.is_file():
        raise ValueError(f"{path} is not here; `python -m train.nano data` makes it.")
    return [
        Question(
            id=row["id"],
            skill=row["skill"],
            topic=row.get("topic", ""),
            lang=row["lang"],
            images=tuple(folder / name for name in row["images"]),
            question=row["question"],
            accepted=tuple(row["accepted"]),
        )
        for row in read_json_lines(path)
    ]


def is_correct(skill: str, answer: str, accepted: Iterable[str]) -> bool:
    """Whether an answer is one of the accepted, but for case, spaces around it and the mark at its end."""
    essence = _essence(skill)
    return essence(answer) in {essence(gold) for gold in accepted}


def constant_accuracy(questions: Iterable[Question]) -> dict[str, float]:
    """skill, and "all" -> what share is correct of a model that does not look: to each topic, in each language, it
    gives the answer that is most often correct."""
    counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    num_questions: Counter[str] = Counter()
    for question in questions:
        num_questions.update((question.skill, "all"))
        essence = _essence(question.skill)
        counts[question.skill, question.topic, question.lang].update({essence(gold) for gold in question.accepted})
    num_correct: Counter[str] = Counter()
    for (skill, _, _), answers in counts.items():
        best = max(answers.values())
        num_correct.update({skill: best, "all": best})
    return {skill: num_correct[skill] / num_questions[skill] for skill in num_questions}


def measure(model: YiVL, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """One record per question, in order: question, answer, accepted answers, and whether the answer is correct."""
    by_shape = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(questions[i].question)))
    answers: dict[int, str] = {}
    for start in track(range(0, len(by_shape), _BATCH), "measure"):
        chunk = by_shape[start : start + _BATCH]
        requests = [(list(questions[i].images), questions[i].question) for i in chunk]
        answers |= zip(chunk, model.predict_batch(requests, max_new_tokens=48, batch_size=_BATCH), strict=True)
    return [
        {
            "id": question.id,
            "skill": question.skill,
            "lang": question.lang,
            "images": [f"{path.parent.name}/{path.name}" for path in question.images],
            "question": question.question,
            "answer": answers[i],
            "accepted": list(question.accepted),
            "right": is_correct(question.skill, answers[i], question.accepted),
        }
        for i, question in enumerate(questions)
    ]


def add_other_answers(model: YiVL, records: Iterable[dict[str, Any]], heldout: Path) -> None:
    """To each record that wrongly is "not sure", what the model answers otherwise, and whether that is correct."""
    for record in records:
        if not record["right"] and is_not_sure(record["answer"]):
            images = [heldout / name for name in record["images"]]
            answer = other_answer(model, images, record["question"], record["answer"])
            record |= {"otherwise": answer, "otherwise_right": is_correct(record["skill"], answer, record["accepted"])}


def scores(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """skill -> {"en", "zh", "both": share of right answers, "count"}, and the same under "all"."""
    groups: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for skill in (record["skill"], "all"):
            groups[skill][record["lang"]].append(record["right"])
            groups[skill]["both"].append(record["right"])
    return {
        skill: {lang: round(sum(right) / len(right), 4) for lang, right in langs.items()}
        | {"count": len(langs["both"])}
        for skill, langs in sorted(groups.items(), key=lambda group: group[0] == "all")
    }


def table(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a row per skill, for every model a column of "English / Chinese" percentages."""
    skills = sorted(next(iter(measured.values())), key=lambda skill: skill == "all")  # the sum last
    lines = [
        "| skill (questions) | " + " | ".join(measured) + " |",
        "|---|" + "---|" * len(measured),
    ]
    for skill in skills:
        cells = [f"{_percent(by[skill], 'en')} / {_percent(by[skill], 'zh')}" for by in measured.values()]
        count = next(iter(measured.values()))[skill]["count"]
        lines.append(f"| {skill} ({count}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def measure_all(checkpoints: dict[str, Path], heldout: Path, out_dir: Path, quantize: Scheme | None = None) -> str:
    """Measure several checkpoints; their answers, scores and HTML pages go to `out_dir`, the Markdown table is
    returned.

    Args:
        quantize: the quantization they are loaded with; it is appended to their names.
    """
    questions = read_questions(heldout)
    out_dir.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for name, path in checkpoints.items():
        model = load(path, quantize=quantize)
        records = measure(model, questions)
        add_other_answers(model, records, heldout)
        name = f"{name}-{quantize}" if quantize else name
        measured[name] = scores(records)
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (out_dir / f"answers-{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_pages(out_dir / f"answers-{name}", name, records, heldout)
        (out_dir / "scores.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")
    (out_dir / "table.md").write_text(table(measured), encoding="utf-8")
    return table(measured)


def write_table(path: Path, markdown: str) -> None:
    """Put the table between the two comments that mark its place in a document."""
    before, marker, rest = path.read_text(encoding="utf-8").partition("<!-- nano table -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not marker or not end:
        raise ValueError(f"{path} has no `<!-- nano table -->` ... `<!-- end -->` to write the table between.")
    path.write_text(before + marker + markdown + end + after, encoding="utf-8")


def _essence(skill: str) -> Callable[[str], str]:
    return _verdict if skill == "same" else _plain


def _plain(answer: str) -> str:
    return _EDGES.sub("", answer).casefold()


def _verdict(answer: str) -> str:
    return _plain(re.split("[,，]", answer, maxsplit=1)[0])


def _percent(by_lang: dict[str, Any], lang: str) -> str:
    return f"{100 * by_lang[lang]:.1f}" if lang in by_lang else "–"
