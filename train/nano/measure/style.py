"""What a preference for answers without a full stop changes: how often nano answers so, and how often correctly.

An answer is correct here when it is an accepted one, with its full stop or without.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.nano.data.preferences import FULL_STOPS, without_full_stop
from train.nano.measure.evaluate import is_correct, measure, read_questions
from yi_vl import load


def measure_style(models: dict[str, Path], heldout: Path, every: int = 1) -> str:
    """A Markdown table: for each model and skill the shares of held-out answers that have no full stop, and that are
    correct.

    Args:
        every: only each so many-th question of either language is asked.

    Raises:
        ValueError: the questions or a model are not there.
    """
    questions = sorted(read_questions(heldout), key=lambda question: question.lang)[::every]  # else of one language
    measured = {name: style_scores(measure(load(path), questions)) for name, path in models.items()}
    lines = [
        "| skill (questions) | " + " | ".join(f"{name}: without | correct" for name in measured) + " |",
        "|---|" + "---|---|" * len(measured),
    ]
    for skill, (count, _, _) in next(iter(measured.values())).items():
        cells = [f"{scores[skill][1]:.1%} | {scores[skill][2]:.1%}" for scores in measured.values()]
        lines.append(f"| {skill} ({count}) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def style_scores(records: Iterable[dict[str, Any]]) -> dict[str, tuple[int, float, float]]:
    """By skill, and over all: number of answers, and the shares of them that have no full stop and that are correct.

    Args:
        records: as `evaluate.measure` returns them.
    """
    groups: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for record in records:
        accepted = [*record["accepted"], *(text for text in map(without_full_stop, record["accepted"]) if text)]
        answer = record["answer"].strip()
        result = (not answer.endswith(FULL_STOPS), is_correct(record["skill"], answer, accepted))
        for name in (record["skill"], "all"):
            groups[name].append(result)
    return {
        name: (len(results), *(sum(values) / len(results) for values in zip(*results)))  # type: ignore[misc]
        for name, results in sorted(groups.items(), key=lambda group: group[0] == "all")
    }
