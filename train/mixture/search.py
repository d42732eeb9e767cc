"""The order of a search: baselines and noise, short against longer runs, mixtures, regression, verdict."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from yi_vl.files import write_text

from ..config import batch_sizes, num_steps
from ..run_series import print_line
from .config import MIN_BUDGET, RUNS_PER_PARAMETER, Search
from .count_samples import check_held_out, source_sizes
from .design import Point, Region, baselines, share_caps, tried_points
from .regression import MIN_CORRELATION, best_point, features, fit_ridge, leave_one_out, spearman
from .report import write_report
from .runs import VERDICT, Result, Run, Runner
from .verdict import Verdict, judge, no_prediction, yaml_lines

_DESIGN = "design.json"
_VERDICT_SEED = 1000  # the judged runs have seeds that no other run has
_MIN_RUNS = 3  # of a regression
EQUAL, SIZE, PRESENT = "equal", "size", "present"


@dataclass(frozen=True)
class Design:
    """What a search tries.

    sizes: samples of each source, by name.
    fixed: shares of the sources that are not searched, by name.
    baselines: by name; the first is `equal`.
    points: the mixtures that the regression learns from, besides the baselines.
    """

    sizes: dict[str, int]
    fixed: dict[str, float]
    region: Region
    baselines: dict[str, Point]
    points: list[Point]


def run_search(search: Search) -> dict[str, Any]:
    """Search, or resume a search, to its verdict; returns what results.json holds.

    Raises:
        ValueError: data, settings or a run need the user's attention.
        SystemExit: a signal was received; the same command resumes.
    """
    if (num_ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"A search trains in one process, and was started on {num_ranks} ranks; start it with python.")
    check_held_out(search)
    design = make_design(search)
    check = search.config.rank_check
    num_long, repeats = (check.runs if check is not None else 0), search.config.repeats
    num_short = repeats + len(design.baselines) - 1 + len(design.points) + 2 * repeats
    steps = num_short * num_steps(search.proxy) + num_long * (check.steps if check is not None else 0)
    _print_plan(search, design, num_short, steps)
    runner = Runner(search, design.fixed, num_short + num_long, steps)

    noise = _baselines(runner, design)
    rank_check = _rank_check(runner, design)
    for number, point in enumerate(design.points):
        if number >= num_long:
            runner.run(_tried(number, point))
    regression, best = _regression(runner, design)
    verdict = _verdict(runner, design, regression, best)
    chosen = best if best is not None and verdict.is_recommended else design.baselines[EQUAL]
    results = {
        "sources": {name: design.sizes[name] for name in search.names},
        "fixed": design.fixed,
        "stage": {"config": search.config.base, "steps": num_steps(search.stage), "samples": _stage_samples(search)},
        "method": search.config.search.method,
        "steps": sum(result.settings["steps"] for result in runner.results),
        "runs": [asdict(result) for result in runner.results],
        "noise": noise,
        "rank_check": rank_check,
        "regression": regression,
        "best": None if best is None else {"shares": runner.shares(best), "hyper": runner.hyper(best)},
        "verdict": asdict(verdict),
        "yaml": yaml_lines(search.proxy.data.sources, runner.shares(chosen), runner.hyper(chosen)),
    }
    write_report(search.directory, results)
    return results


def make_design(search: Search) -> Design:
    """The design of a search, kept in its folder: an interrupted or larger search begins with the same mixtures.

    Raises:
        ValueError: the folder holds a search with other settings.
    """
    path, region_config = search.directory / _DESIGN, search.config.search
    stored: dict[str, Any] = {}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        _check_unchanged(search, stored["settings"])
    sizes = stored["sizes"] if stored else source_sizes(search)

    present = {source.name: float(source.weight) for source in search.proxy.data.sources}
    names = [search.names[index] for index in search.searched]
    total = sum(present.values())
    fixed = {name: weight / total for name, weight in present.items() if name not in names}
    searched_sizes = [sizes[name] for name in names]
    caps = share_caps(searched_sizes, _stage_samples(search) * (1 - sum(fixed.values())), region_config.max_epochs)
    region = Region(region_config.method, caps, region_config.seed)
    num_values = [len(values) for values in search.hyper.values()]
    earlier = [Point(tuple(shares), tuple(levels)) for shares, levels in stored.get("points", [])]
    points = tried_points(region, num_values, max(region_config.budget, len(earlier)), region_config.seed, earlier)
    rows = [[point.shares, point.levels] for point in points]
    content = {"settings": search.flat(), "sizes": sizes, "points": rows}
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    first = baselines(region, searched_sizes, [present[name] for name in names], len(num_values))
    return Design(sizes, fixed, region, first, points[: region_config.budget])


def _check_unchanged(search: Search, before: dict[str, Any]) -> None:
    now = search.flat()
    before = {key: default for key, default in search.defaults().items() if key in now} | before
    differing = [key for key in dict.fromkeys((*before, *now)) if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} {_shown(before.get(key))}, now {_shown(now.get(key))}" for key in differing[:5])
        raise ValueError(
            f"{search.directory} holds a search with {changes}. Set it back, or take another search_dir; only "
            "search.budget may change."
        )


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _stage_samples(search: Search) -> int:
    """The samples that the stage itself takes."""
    return batch_sizes(search.stage).num_samples(num_steps(search.stage))


def _print_plan(search: Search, design: Design, num_short: int, steps: int) -> None:
    config, check = search.config, search.config.rank_check
    stage_steps = num_steps(search.stage)
    longer = f" and {check.runs} of {check.steps:,}" if check is not None else ""
    print_line(
        f"{search.directory}: {num_short} runs of {num_steps(search.proxy):,} steps{longer}: {steps:,} steps in all, "
        f"{steps / stage_steps:.2g} times the {stage_steps:,} of {config.base}. Each run logs to runs/NAME/train.log."
    )
    least = max(MIN_BUDGET, RUNS_PER_PARAMETER * search.num_parameters)
    if len(design.points) < least:
        print_line(
            f"warning: search.budget is {len(design.points)}; a regression with {search.num_parameters} parameters "
            f"needs about {least} runs to rank mixtures."
        )


def _tried(number: int, point: Point) -> Run:
    return Run(f"mixture-{number + 1:03d}", point)


def _baselines(runner: Runner, design: Design) -> dict[str, Any]:
    """Equal shares with several seeds, then the other baselines; the spread of the former is the noise."""
    equal = [
        runner.run(Run(f"{EQUAL}-seed-{seed}", design.baselines[EQUAL], seed)).loss
        for seed in range(runner.search.config.repeats)
    ]
    losses = [loss for loss in equal if loss is not None]
    if len(losses) < len(equal):
        raise ValueError(
            f"{len(equal) - len(losses)} of {len(equal)} runs with equal shares diverged, so there is nothing to "
            "compare with; lower the learning rates in overrides, and take another search_dir."
        )
    mean, deviation = fmean(losses), stdev(losses)
    print_line(
        f"equal shares: {mean:.4f}, noise {deviation:.4f} (standard deviation over {len(losses)} seeds): smaller "
        "differences between single runs mean nothing."
    )
    for name, point in design.baselines.items():
        if name != EQUAL:
            loss = runner.run(Run(name, point)).loss
            print_line(f"{name}: {_loss(loss)}" + (f", equal shares {mean:.4f}" if loss is not None else ""))
    if same := [name for name in (SIZE, PRESENT) if name not in design.baselines]:
        print_line(f"{' and '.join(same)}: the same mixture as a baseline above.")
    return {"losses": losses, "mean": mean, "standard_deviation": deviation}


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _rank_check(runner: Runner, design: Design) -> dict[str, Any] | None:
    """Train the first mixtures short and long, and print how alike both rank them."""
    check = runner.search.config.rank_check
    if check is None:
        return None
    pairs: list[tuple[Result, Result]] = []
    for number, point in enumerate(design.points[: check.runs]):
        run = _tried(number, point)
        pairs.append((runner.run(run), runner.run(replace(run, name=f"{run.name}-long", steps=check.steps))))
    short, long = [], []
    for first, second in pairs:
        if first.loss is not None and second.loss is not None:
            short.append(first.loss)
            long.append(second.loss)
    correlation = spearman(short, long)
    steps = num_steps(runner.search.proxy)
    print_line(
        f"rank correlation of {steps:,} with {check.steps:,} steps over {len(short)} mixtures: "
        f"{'not defined' if correlation is None else f'{correlation:.2f}'}"
    )
    if correlation is None or correlation < MIN_CORRELATION:
        print_line(
            f"warning: runs of {steps:,} steps do not rank mixtures as runs of {check.steps:,} do, so what is found "
            "with them may not hold for longer training; take longer proxies."
        )
    return {"steps": [steps, check.steps], "short": short, "long": long, "correlation": correlation}


def _regression(runner: Runner, design: Design) -> tuple[dict[str, Any], Point | None]:
    """Fit the runs with the search's seed; the best point by it, or None where it does not rank them."""
    search = runner.search
    losses = {result.name: result.loss for result in runner.results}
    named = {f"{EQUAL}-seed-0" if name == EQUAL else name: point for name, point in design.baselines.items()}
    named |= {_tried(number, point).name: point for number, point in enumerate(design.points)}
    measured = {name: loss for name in named if (loss := losses[name]) is not None}
    num_values = [len(values) for values in search.hyper.values()]
    inputs = features([named[name] for name in measured], num_values)
    targets = np.array(list(measured.values()))
    is_enough = len(targets) >= _MIN_RUNS
    predictions = leave_one_out(inputs, targets) if is_enough else np.full(len(targets), targets.mean())
    correlation = spearman(targets, predictions)
    print_line(
        f"regression over {len(measured)} runs: leave-one-out rank correlation "
        f"{'not defined' if correlation is None else f'{correlation:.2f}'}"
    )
    model = fit_ridge(inputs, targets)
    columns = [f"log share of {search.names[index]}" for index in search.searched]
    columns += [f"{key} {value}" for key, values in search.hyper.items() for value in values[1:]]
    regression = {
        "names": list(measured), "measured": targets.tolist(), "predicted": predictions.tolist(),
        "correlation": correlation, "penalty": model.penalty,
        "coefficients": dict(zip(columns, model.coefficients.tolist(), strict=True)),
    }  # fmt: skip
    if no_prediction(correlation, len(measured)) is not None:
        return regression, None
    return regression, best_point(model, design.region.candidates(), num_values)


def _verdict(runner: Runner, design: Design, regression: dict[str, Any], best: Point | None) -> Verdict:
    """Train the best prediction and equal shares with seeds of their own, and compare them on the second set."""
    if (none := no_prediction(regression["correlation"], len(regression["names"]))) is not None:
        return none
    assert best is not None
    losses: dict[str, list[float | None]] = {}
    name = f"best-of-{len(design.points)}"
    for label, point in ((EQUAL, design.baselines[EQUAL]), (name, best)):
        losses[label] = [
            runner.run(Run(f"verdict-{label}-seed-{seed}", point, seed, held_out=VERDICT)).loss
            for seed in range(_VERDICT_SEED, _VERDICT_SEED + runner.search.config.repeats)
        ]
    return judge(losses[EQUAL], losses[name])
