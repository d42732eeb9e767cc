"""The runs of a search: each an ordinary training run in a folder of its own, trained in this process.

A finished run leaves `result.json`, and is not repeated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig, num_steps
from ..metrics import METRICS_FILE, read_metrics, validation_rows
from ..run_series import (
    approximate,
    delete_models,
    print_line,
    read_result,
    train_in_series,
    unreadable,
    write_result,
)
from .config import Search
from .design import Point

VALIDATION, VERDICT = "validation", "verdict"


@dataclass(frozen=True)
class Run:
    """
    seed: added to the base's.
    steps: None: the proxy's.
    held_out: which samples its loss is measured on.
    """

    name: str
    point: Point
    seed: int = 0
    steps: int | None = None
    held_out: str = VALIDATION


@dataclass(frozen=True)
class Result:
    """A finished run.

    settings: what tells it from other runs of the search.
    loss: the held-out loss at its end; None: it diverged.
    start_loss: before the first step.
    """

    name: str
    settings: dict[str, Any]
    loss: float | None
    loss_per_source: dict[str, float | None]
    start_loss: float | None
    seconds: float


class Runner:
    """Makes runs, or reads the results of finished ones, and prints how far the search is.

    Args:
        fixed: shares of the sources that are not searched, by name.
        num_runs: runs that the search is expected to make.
        num_steps: their steps together.
    """

    def __init__(self, search: Search, fixed: dict[str, float], num_runs: int, num_steps: int) -> None:
        self.search = search
        self._fixed = fixed
        self._num_runs, self._num_steps = num_runs, num_steps
        self._done_runs, self._done_steps = 0, 0
        self._seconds, self._timed_steps = 0.0, 0
        self.results: list[Result] = []

    def run(self, run: Run) -> Result:
        """
        Raises:
            ValueError: the run needs the user's attention, or its folder holds another one.
            SystemExit: a signal was received, and a checkpoint saved.
        """
        settings = self._settings(run)
        directory = self.search.directory / "runs" / run.name
        self._done_runs += 1
        result = _read_result(directory, settings)
        if result is None:
            self._print_start(run, settings)
            config = self._config(run, settings, directory)
            result = self._train(run, config, settings)
        elif not self.search.config.keep_models:
            delete_models(directory)
        self._done_steps += settings["steps"]
        self._timed_steps += settings["steps"]
        self._seconds += result.seconds
        self.results.append(result)
        return result

    def shares(self, point: Point) -> dict[str, float]:
        """Every source's share of the samples."""
        free = 1 - sum(self._fixed.values())
        searched = [self.search.names[index] for index in self.search.searched]
        shares = self._fixed | {name: share * free for name, share in zip(searched, point.shares)}
        return {name: shares[name] for name in self.search.names}

    def hyper(self, point: Point) -> dict[str, Any]:
        """The searched settings of a point."""
        return {key: values[level] for (key, values), level in zip(self.search.hyper.items(), point.levels)}

    def _settings(self, run: Run) -> dict[str, Any]:
        steps = run.steps if run.steps is not None else num_steps(self.search.proxy)
        seed = self.search.proxy.seed + run.seed
        shares, hyper = self.shares(run.point), self.hyper(run.point)
        return {"shares": shares, "hyper": hyper, "seed": seed, "steps": steps, "held_out": run.held_out}

    def _config(self, run: Run, settings: dict[str, Any], directory: Path) -> TrainConfig:
        held_out = getattr(self.search.config, run.held_out)
        sources = [
            asdict(source) | {"weight": settings["shares"][source.name]} for source in self.search.proxy.data.sources
        ]
        return self.search.run_config(
            {
                **settings["hyper"],
                "run_dir": str(directory),
                "seed": settings["seed"],
                "steps": settings["steps"],
                "data.sources": sources,
                "validation": asdict(held_out) | {"every_steps": settings["steps"]},
                "generations": None,
                "checkpoint.keep_best": False,
            }
        )

    def _train(self, run: Run, config: TrainConfig, settings: dict[str, Any]) -> Result:
        directory = Path(config.run_dir)
        try:
            ended = train_in_series(config, run.name)
        except SystemExit:
            print_line(f"Stopped in run {self._done_runs} of {self._num_runs}; the same command resumes the search.")
            raise
        rows = {row["step"]: row for row in validation_rows(read_metrics(directory / METRICS_FILE))}
        first, last = rows.get(0, {}), {} if ended.has_diverged else rows[settings["steps"]]
        result = Result(
            run.name, settings, last.get("validation_loss"), last.get("validation_loss_per_source", {}),
            first.get("validation_loss"), ended.seconds,
        )  # fmt: skip
        write_result(directory, asdict(result))
        if not self.search.config.keep_models:
            delete_models(directory)
        shown = f"{result.loss:.4f}" if result.loss is not None else "none: it diverged, and is left out"
        print_line(f"  held-out loss {shown}  ({result.seconds:.0f} s)")
        return result

    def _print_start(self, run: Run, settings: dict[str, Any]) -> None:
        remaining = ""
        if self._timed_steps:
            seconds = self._seconds / self._timed_steps * (self._num_steps - self._done_steps)
            remaining = f", {approximate(seconds)} left"
        shares = "  ".join(f"{name} {share:.3f}" for name, share in settings["shares"].items())
        hyper = "".join(f"  {key} {value}" for key, value in settings["hyper"].items())
        print_line(f"run {self._done_runs} of {self._num_runs}{remaining}: {run.name}, {shares}{hyper}")


def _read_result(directory: Path, settings: dict[str, Any]) -> Result | None:
    """The result of a finished run, None if there is none yet.

    Raises:
        ValueError: it is unreadable, or that of another run.
    """
    stored = read_result(directory)
    if stored is None:
        return None
    try:
        result = Result(**stored)
    except TypeError as error:
        raise unreadable(directory) from error
    if differing := [key for key, value in settings.items() if result.settings.get(key) != value]:
        key = differing[0]
        raise ValueError(
            f"{directory} holds a run with {key} {result.settings.get(key)}, this search has {settings[key]}; take "
            "another search_dir, or delete it to repeat the run."
        )
    return result
