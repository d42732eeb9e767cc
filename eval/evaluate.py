"""What the benchmarks' commands share: generate responses, score them, write and print the results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from .judge import JudgeChoice
    from .options import Options
    from .scoring import Scored
    from .types import Answered, Benchmark, Question, Split


def run(
    benchmark: Benchmark,
    questions: list[Question],
    split: Split,
    out: Path,
    options: Options,
    details: Mapping[str, str] | None = None,
) -> None:
    """Generate responses, score and write them.

    Args:
        details: further settings of the questions for results.json, such as their variant.
    """
    from accelerate import PartialState

    from .scoring import score
    from .types import from_record
    from .viewer import write_page

    choice, judge, details = options.choice, options.judge_choice, details or {}
    if not questions:
        raise ValueError(f"The data has no questions of {benchmark.NAME}'s split {split}.")
    questions = questions[: options.limit]
    if judge is not None and not all(question.gold for question in questions):
        raise ValueError(
            f"--judge needs the right answers, and those of {benchmark.NAME}'s split {split} are not public."
        )
    records = _generate(benchmark, questions, out, options)
    if not PartialState().is_main_process:
        return
    answered = [
        from_record(question, record, record["response"]) for question, record in zip(questions, records, strict=True)
    ]
    errors = {record["id"]: record["error"] for record in records if "error" in record}
    config = {
        "model": choice.title,
        "quantize": choice.quantize,
        "settings": asdict(options.settings),
        "official_first_image": options.official_first_image,
        "batch_size": options.batch_size,
        **details,
        "errors": errors,
    }
    scored, is_complete = _write(benchmark, score(benchmark, answered), out, config, split, judge)
    write_page(scored, f"{', '.join([f'{benchmark.NAME} {split}', *details.values()])}: {choice.title}", out)
    _print_summary(out, errors, len(questions))
    if errors or not is_complete:
        raise typer.Exit(1)


def _generate(benchmark: Benchmark, questions: list[Question], out: Path, options: Options) -> list[dict[str, Any]]:
    """The records of the runner."""
    from .models import open_model
    from .runner import run as run_questions
    from .scoring import is_correct_without_guess
    from .types import Answered

    def is_correct(question: Question, response: str) -> bool:
        return is_correct_without_guess(benchmark, Answered(question, response))

    return run_questions(
        questions,
        lambda: open_model(options.choice),
        options.choice.title,
        out,
        options.settings,
        options.batch_size,
        options.official_first_image,
        is_correct if questions[0].gold else None,
    )


def _print_summary(out: Path, errors: Mapping[str, str], num_questions: int) -> None:
    if (out / "results.md").exists():
        typer.echo((out / "results.md").read_text(encoding="utf-8"))
    typer.echo(f"{out}: predictions.jsonl, verdicts.jsonl, results.json, results.md, results.png, page.html", err=True)
    _warn_of(errors, f"of {num_questions} questions failed and are scored as empty responses", "asks them again")


def _warn_of(errors: Mapping[str, str], what: str, next_time: str) -> None:
    if errors:
        first, reason = next(iter(errors.items()))
        typer.echo(
            f"{len(errors)} {what}, {first} first: {reason.rstrip('.')}. The same command {next_time}.", err=True
        )


def _write(
    benchmark: Benchmark,
    scored: list[Scored],
    out: Path,
    config: Mapping[str, Any],
    split: Split,
    choice: JudgeChoice | None,
) -> tuple[list[Scored], bool]:
    """Write the results, a judge's among them; returns the verdicts and whether the judge gave all of its own."""
    from .judge import judge
    from .report import write_results

    errors: dict[str, str] = {}
    if choice is not None:
        scored, errors = judge(choice, scored, out)
    write_results(benchmark, scored, out, config, split, {**choice.details, "errors": errors} if choice else None)
    what = f"of {len(scored)} answers could not be judged and are not among the judged"
    _warn_of(errors, what, "asks the judge again")
    return scored, not errors


def report_scores(
    benchmark: Benchmark,
    answered: list[Answered],
    out: Path | None,
    config: Mapping[str, Any],
    split: Split,
    judge: JudgeChoice | None,
) -> None:
    """Score and print the table; with `out` also write the files."""
    from .report import markdown, summarize_all
    from .scoring import score

    scored = score(benchmark, answered)
    if out is None:
        typer.echo(markdown(benchmark, summarize_all(benchmark, scored, config, split)))
        return
    _, is_complete = _write(benchmark, scored, out, config, split, judge)
    typer.echo((out / "results.md").read_text(encoding="utf-8"))
    if not is_complete:
        raise typer.Exit(1)
