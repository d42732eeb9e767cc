"""Asks a model questions, in batches and on several processes, whatever the benchmark.

Predictions are appended as they come, a line each. A run that was killed continues with the questions that have none or
that failed, in any number of processes; at the end they are in one file in the benchmark's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from accelerate import PartialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from yi_vl.files import read_json_lines, write_json_lines

from .models import Answerer, Reply, Settings
from .types import Question

PREDICTIONS = "predictions.jsonl"
_IDENTITY = ("model", "settings", "first_image_only", "prompt")


def run(
    questions: Sequence[Question],
    make_model: Callable[[], Answerer],
    model_name: str,
    out_dir: Path,
    settings: Settings,
    batch_size: int = 16,
    first_image_only: bool = False,
    is_correct: Callable[[Question, str], bool] | None = None,
) -> list[dict[str, Any]]:
    """Every question's record, in the order of `questions`, also written to `out_dir/predictions.jsonl`.

    Args:
        make_model: is called only where something is left to answer.
        is_correct: for the running accuracy beside the progress bar.

    Raises:
        ValueError: `out_dir` holds predictions that were made otherwise, or an endpoint is gone; what was answered
            until then is kept.
    """
    state = PartialState()
    out_dir.mkdir(parents=True, exist_ok=True)
    blank = {
        question.id: _record(question, model_name, settings, first_image_only, response="") for question in questions
    }
    previous = _read_records(out_dir, blank)
    todo = [question for question in questions if question.id not in previous or "error" in previous[question.id]]
    # What failed before comes last, so that it never holds up the rest.
    todo.sort(key=lambda question: (question.id in previous, _length(question)))
    local = todo[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # all have read before any writes
    if local:
        path = out_dir / (PREDICTIONS if state.is_main_process else f"predictions-{state.process_index}.jsonl")
        batches = [local[start : start + batch_size] for start in range(0, len(local), batch_size)]
        with path.open("a", encoding="utf-8") as file, _progress(state.is_main_process) as progress:
            _ask(batches, make_model(), settings, first_image_only, blank, file, progress, is_correct)
    state.wait_for_everyone()
    records = _read_records(out_dir, blank)
    if state.is_main_process:
        missing = [question.id for question in questions if question.id not in records]
        if missing:
            raise ValueError(f"{out_dir}: {len(missing)} questions have no prediction: {', '.join(missing[:5])} ...")
        if all("error" in record for record in records.values()):
            raise ValueError(f"None of {len(questions)} questions has a response: {records[questions[0].id]['error']}")
        _write_in_order(out_dir, [records[question.id] for question in questions])
    state.wait_for_everyone()
    return [records[question.id] for question in questions]


def _ask(
    batches: Sequence[Sequence[Question]],
    model: Answerer,
    settings: Settings,
    first_image_only: bool,
    blank: Mapping[str, Mapping[str, Any]],
    file: TextIO,
    progress: Progress,
    is_correct: Callable[[Question, str], bool] | None,
) -> None:
    """Append a record for each question; stop where a server fails a whole batch by itself and more would follow."""
    num = sum(map(len, batches))
    task = progress.add_task("", total=num, accuracy="")
    num_correct = num_done = 0
    for batch in batches:
        replies = model.answer([question.content(first_image_only) for question in batch], settings)
        for question, reply in zip(batch, replies, strict=True):
            file.write(json.dumps({**blank[question.id], **_response(reply)}, ensure_ascii=False) + "\n")
            num_correct += bool(is_correct and is_correct(question, reply.text))
        file.flush()
        if batch is not batches[-1] and all(reply.is_server_down for reply in replies):
            reason = (replies[0].error or "").rstrip(".")
            raise ValueError(
                f"{reason}. Stopped after {num_done} of {num} questions; their predictions are kept in "
                f"{Path(file.name).parent}, and the same command asks the rest."
            )
        num_done += len(batch)
        shown = f"{num_correct / num_done:.1%} right" if is_correct else ""
        progress.update(task, advance=len(batch), accuracy=shown)


def _record(
    question: Question, model_name: str, settings: Settings, first_image_only: bool, response: str
) -> dict[str, Any]:
    return {
        "id": question.id,
        "subject": question.subject,
        "question_type": question.question_type,
        "model": model_name,
        "settings": asdict(settings),
        "first_image_only": first_image_only,
        "prompt": question.prompt,
        "images": [image.name for image in question.images],
        "options": dict(question.options),
        "gold": question.gold if isinstance(question.gold, str) else list(question.gold),
        "response": response,
    }


def _response(reply: Reply) -> dict[str, Any]:
    """A reply as part of a record; with its reasoning and refusal only where they are separate from the response."""
    if reply.error is not None:
        return {"response": "", "error": reply.error}
    optional = {"finish": reply.finish, "reasoning": reply.reasoning, "refusal": reply.refusal}
    return {"response": reply.text, **{key: value for key, value in optional.items() if value}}


def _length(question: Question) -> tuple[int, int]:
    """A sort key that grows with the number of the prompt's tokens."""
    return len(question.images), len(question.prompt.encode())


def _read_records(out_dir: Path, blank: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Records of this run that are there already, by id; a last line that was cut short is dropped.

    Of several records of a question one with a response is taken.
    """
    records: dict[str, dict[str, Any]] = {}
    for path in sorted(out_dir.glob("predictions*.jsonl")):
        for record in _whole_lines(path):
            expected = blank.get(record.get("id", ""))
            if expected is None:
                raise ValueError(
                    f"{path} answers {record.get('id')!r}, which is not asked now; give another --out or remove it."
                )
            for key in _IDENTITY:
                before, now = str(record.get(key))[:200], str(expected[key])[:200]
                if record.get(key) != expected[key]:
                    raise ValueError(
                        f"{path} was made otherwise: {record['id']} has {key} {before!r}, now it is {now!r}. Give "
                        "another --out, or remove it."
                    )
            if "error" not in record or "error" in records.get(record["id"], record):
                records[record["id"]] = record
    return records


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The records of a file; a last line that was cut short is cut off, so that appending is safe."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    try:
        return read_json_lines(path)
    except ValueError as error:
        raise ValueError(f"{error} Remove the line, or give another --out.") from error


def _write_in_order(out_dir: Path, records: Sequence[dict[str, Any]]) -> None:
    write_json_lines(out_dir / PREDICTIONS, records)
    for path in out_dir.glob("predictions-*.jsonl"):
        path.unlink()


def _progress(is_shown: bool) -> Progress:
    return Progress(
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[accuracy]}"),
        disable=not is_shown,
    )
