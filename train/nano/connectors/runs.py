"""The runs of a comparison: each connector is trained through all stages with each seed, and answers questions."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from train.checkpoint import FINAL
from train.config import TrainConfig
from train.init import fingerprint
from train.metrics import METRICS_FILE, read_metrics, training_rows, validation_rows
from train.nano.measure.evaluate import QUESTIONS, Question, measure, scores
from train.optim import component_parameters
from train.resume import changed_results
from train.run_series import (
    approximate,
    delete_models,
    free_memory,
    print_line,
    read_result,
    train_in_series,
    unreadable,
    write_result,
)
from yi_vl import load
from yi_vl.files import sha256, write_json_lines

from .config import Comparison

KEPT_SEED = 0  # whose models stay, for their speed
_ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Result:
    """A finished run of a connector and a seed; `scores` are empty and the rest is None if it diverged.

    parameters: of the connector.
    scores: as `evaluate.scores`.
    loss: the held-out loss at the end of the last stage; None if it was not measured.
    samples_per_second: of the last stage, its first logged steps left out.
    inputs: what else the result depends on, besides the settings of the stages; see `Runner`.
    """

    connector: str
    seed: int
    tokens_per_image: int | None
    parameters: int | None
    scores: dict[str, dict[str, Any]]
    loss: float | None
    samples_per_second: float | None
    inputs: dict[str, Any]
    seconds: float


class Runner:
    """Makes the runs of a comparison, or reads the results of finished ones, and prints how many are left.

    Args:
        questions: that every model answers.

    Raises:
        ValueError: the model that the runs start from is not there.
    """

    def __init__(self, comparison: Comparison, questions: Sequence[Question]) -> None:
        self.comparison = comparison
        self._questions = questions
        config = comparison.config
        self._inputs: dict[str, Any] = {
            "model": fingerprint(config.model),
            "heldout": sha256(Path(config.heldout) / QUESTIONS)[:16],
            "questions": config.questions,
        }

    def run_all(self) -> Iterator[list[Result]]:
        """Seed by seed, in each all connectors, so that what else the machine does meets all of them; after each run
        all results so far.

        Raises:
            ValueError: a run needs the user's attention, or a folder holds one with other settings.
            SystemExit: a signal was received, and a checkpoint saved.
        """
        runs, done = self._runs(), {(result.connector, result.seed): result for result in self.finished()}
        results: list[Result] = []
        for number, run in enumerate(runs, start=1):
            if run not in done:
                left = ""
                if done:
                    seconds = fmean(result.seconds for result in done.values()) * (len(runs) - len(done))
                    left = f", {approximate(seconds)} left"
                print_line(f"run {number} of {len(runs)}{left}: {run[0]}, seed {run[1]}")
                try:
                    done[run] = self._run(*run)
                except SystemExit:
                    print_line(f"Stopped in run {number} of {len(runs)}; the same command resumes the comparison.")
                    raise
            results.append(done[run])
            yield results

    def finished(self) -> list[Result]:
        """The results of the runs that are made.

        Raises:
            ValueError: a folder holds a run with other settings.
        """
        return [result for run in self._runs() if (result := self._stored(*run)) is not None]

    def _runs(self) -> list[tuple[str, int]]:
        return [(name, seed) for seed in range(self.comparison.config.seeds) for name in self.comparison.names]

    def _stored(self, name: str, seed: int) -> Result | None:
        """The result of a finished run, None if there is none yet.

        Raises:
            ValueError: it is unreadable, or the run, finished or not, has other settings.
        """
        directory = self.comparison.run_directory(name, seed)
        configs = self.comparison.stage_configs(name, seed)
        changed = [
            f"{stage}: {change}"
            for stage, config in configs.items()
            if (Path(config.run_dir) / "config.yaml").is_file()
            for change in changed_results(Path(config.run_dir), config)
        ]
        row = read_result(directory)
        try:
            result = None if row is None else Result(**row)
        except TypeError as error:
            raise unreadable(directory) from error
        if result is not None:
            changed += [
                f"{key} {result.inputs.get(key)}, this comparison has {value}"
                for key, value in self._inputs.items()
                if result.inputs.get(key) != value
            ]
        if changed:
            raise ValueError(
                f"{directory} holds a run with {'; with '.join(changed)}. Set it back, take another directory, or "
                "delete it to repeat the run."
            )
        if result is not None:
            self._delete_models(configs, seed)
        return result

    def _run(self, name: str, seed: int) -> Result:
        start = time.monotonic()
        directory = self.comparison.run_directory(name, seed)
        configs = self.comparison.stage_configs(name, seed)
        has_diverged = False
        for stage, config in configs.items():
            if has_diverged := train_in_series(config, f"{name}, seed {seed}, {stage}").has_diverged:
                print_line(f"  {stage} diverged; the run is left out")
                break
        last = list(configs.values())[-1]
        measured: dict[str, Any] = {
            "scores": {}, "tokens_per_image": None, "parameters": None, "loss": None, "samples_per_second": None
        }  # fmt: skip
        if not has_diverged:
            measured = self._measure(directory, last)
        result = Result(
            connector=name,
            seed=seed,
            inputs=self._inputs,
            seconds=round(time.monotonic() - start, 1),
            **measured,
        )
        write_result(directory, asdict(result))
        self._delete_models(configs, seed)
        return result

    def _measure(self, directory: Path, last: TrainConfig) -> dict[str, Any]:
        """What the finished model is and answers, and what the log of its last stage says."""
        run_dir = Path(last.run_dir)
        model = load(run_dir / FINAL)
        records = measure(model, self._questions)
        write_json_lines(directory / _ANSWERS, records)
        rows = read_metrics(run_dir / METRICS_FILE)
        rates = [row["samples_per_second"] for row in training_rows(rows)]
        losses = [row["validation_loss"] for row in validation_rows(rows)]
        by_skill = scores(records)
        measured = {
            "scores": by_skill,
            "tokens_per_image": model.processor.tokens_per_image,
            "parameters": sum(p.numel() for p in component_parameters(model.model)["projector"]),
            "loss": losses[-1] if losses else None,
            "samples_per_second": median(rates[1:] or rates),
        }
        del model
        free_memory()
        shown = "  ".join(f"{skill} {100 * score['both']:.0f}%" for skill, score in by_skill.items())
        print_line(f"  {shown}")
        return measured

    def _delete_models(self, configs: dict[str, TrainConfig], seed: int) -> None:
        last = list(configs)[-1]
        for stage, config in configs.items():
            delete_models(Path(config.run_dir), keeps_final=seed == KEPT_SEED and stage == last)


def select_questions(questions: Sequence[Question], per_skill: int | None) -> list[Question]:
    """So many of each skill, half of them in each language, spread evenly; fewer where there are no more."""
    if per_skill is None:
        return list(questions)
    groups: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in questions:
        groups[question.skill, question.lang].append(question)
    num_langs = len({lang for _, lang in groups})
    chosen: list[Question] = []
    for group in groups.values():
        count = min(len(group), per_skill // num_langs)
        chosen += [group[index] for index in np.linspace(0, len(group) - 1, count).astype(int)]
    return chosen
