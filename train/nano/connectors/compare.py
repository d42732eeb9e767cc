"""A comparison of connectors from its runs to its table: `python -m train.nano connectors`."""

from __future__ import annotations

import os
from pathlib import Path

from train.nano.measure.evaluate import constant_accuracy, read_questions
from train.run_series import print_line
from train.setup import check_shards

from .config import Comparison
from .report import PLOT, TABLE, write_report
from .runs import KEPT_SEED, Result, Runner, select_questions
from .speed import measure_speed, read_speed


def compare(comparison: Comparison) -> str:
    """Make the runs that are not made yet, measure the speed, and write the results; returns the table.

    Raises:
        ValueError: data, settings or a run need the user's attention.
        SystemExit: a signal was received; the same command resumes.
    """
    _check_single_process()
    questions = read_questions(Path(comparison.config.heldout))
    chosen, constant = select_questions(questions, comparison.config.questions), constant_accuracy(questions)
    for config in comparison.stage_configs(comparison.names[0], 0).values():
        check_shards(config)
    runner, results = Runner(comparison, chosen), list[Result]()
    _print_plan(comparison, len(chosen))
    for results in runner.run_all():
        write_report(comparison.directory, results, read_speed(comparison.directory), constant, comparison.names)
    with_models = {result.connector for result in results if result.scores and result.seed == KEPT_SEED}
    if with_models - read_speed(comparison.directory).get("milliseconds", {}).keys():
        measure_speed(comparison, chosen)
        write_report(comparison.directory, results, read_speed(comparison.directory), constant, comparison.names)
    return _table(comparison)


def compare_speed(comparison: Comparison) -> str:
    """Measure the speed of the finished models again, and write the results with it; returns the table.

    Raises:
        ValueError: there is no model yet.
    """
    questions = read_questions(Path(comparison.config.heldout))
    chosen, constant = select_questions(questions, comparison.config.questions), constant_accuracy(questions)
    results = Runner(comparison, chosen).finished()
    measure_speed(comparison, chosen)
    write_report(comparison.directory, results, read_speed(comparison.directory), constant, comparison.names)
    return _table(comparison)


def _check_single_process() -> None:
    if (num_ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(
            f"A comparison trains in one process, and was started on {num_ranks} ranks; start it with python."
        )


def _print_plan(comparison: Comparison, num_questions: int) -> None:
    num_runs, steps = len(comparison.names) * comparison.config.seeds, comparison.num_steps
    print_line(
        f"{comparison.directory}: {', '.join(comparison.names)}; seeds: {comparison.config.seeds}; runs: {num_runs} of "
        f"{steps:,} steps, {num_runs * steps:,} in all; questions after each run: {num_questions:,}. Each stage logs "
        "to runs/NAME-seed-SEED/STAGE/train.log."
    )


def _table(comparison: Comparison) -> str:
    markdown = (comparison.directory / TABLE).read_text(encoding="utf-8")
    return f"{markdown}\nThe plot: {comparison.directory / PLOT}"
