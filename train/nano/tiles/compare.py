"""What tiles bring nano on pages of small words: the same further training with and without, on several seeds.

Data, runs and results lie in one folder; what is complete is kept, and an interrupted run is resumed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from train.checkpoint import FINAL
from train.config_file import load_config
from train.metrics import METRICS_FILE, read_metrics, training_rows
from train.nano.data.art import load_art
from train.nano.data.compose import Composer
from train.nano.measure.evaluate import measure, read_questions, scores
from train.nano.tiles.pages import PAGE_PX, build_pages
from train.run_series import print_line, read_result, train_in_series, write_result
from yi_vl import load
from yi_vl.files import write_json_lines, write_text
from yi_vl.image.tiles import choose_grid, num_inputs

CONFIG = Path("train/configs/nano/tiles.yaml")
NUM_HELDOUT = 150  # pages of either kind
_RELEASED, _TRAINED = "nano", "trained"


@dataclass(frozen=True)
class Arm:
    """A column of the table: nano as it is, or trained on the pages, with so many tiles."""

    name: str
    is_trained: bool
    tiles: int

    @property
    def title(self) -> str:
        return f"{self.name}, {f'up to {self.tiles} tiles' if self.tiles else 'no tiles'}"


def arms(tiles: int) -> tuple[Arm, ...]:
    """All columns."""
    return tuple(Arm(name, name == _TRAINED, number) for name in (_RELEASED, _TRAINED) for number in (0, tiles))


def compare(data_dir: Path, out: Path, tiles: int, steps: int, num_seeds: int, global_batch: int = 32) -> str:
    """Train and measure what is not there yet; the table in Markdown.

    Args:
        data_dir: nano's data, for its fonts.
        out: folder for pages, runs, `results.json` and `table.md`.
    """
    build_pages(Composer(load_art(data_dir)), out / "data", steps * global_batch, NUM_HELDOUT)
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in arms(tiles):
        seeds = range(num_seeds) if arm.is_trained else range(1)
        results[arm.title] = [_result(arm, out, steps, seed) for seed in seeds]
        write_text(out / "results.json", json.dumps({"steps": steps, "arms": results}, indent=1))
    markdown = table(results)
    write_text(out / "table.md", markdown)
    return markdown


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row per kind of pages and of cost, a column per arm; of several seeds the mean and the deviation.

    Args:
        results: of each arm, by its title, one for each seed.
    """
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    skills = {skill: entry["count"] for skill, entry in next(iter(results.values()))[0]["scores"].items()}
    for skill, count in skills.items():
        cells = [_spread([100 * each["scores"][skill]["both"] for each in arm], "%") for arm in results.values()]
        lines.append(f"| {skill} ({count} questions) | " + " | ".join(cells) + " |")
    for name, key in (("tokens of a page", "image_tokens"), ("samples/s in training", "samples_per_second")):
        cells = [_spread([each[key] for each in arm if each[key] is not None], "") for arm in results.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _result(arm: Arm, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """Scores and costs of one model, which is trained if need be."""
    name = f"tiles-{arm.tiles}-steps-{steps}-seed-{seed}" if arm.is_trained else f"nano-tiles-{arm.tiles}"
    directory = out / "runs" / name
    if (stored := read_result(directory)) is not None:
        return stored
    print_line(name)
    model, rate = None, None
    if arm.is_trained:
        _train(directory, out, arm.tiles, steps, seed)
        model = directory / FINAL
        rate = median(row["samples_per_second"] for row in training_rows(read_metrics(directory / METRICS_FILE)))
    yi_vl = load(model, image_tiles=None if arm.is_trained else arm.tiles)
    records = measure(yi_vl, read_questions(out / "data" / "heldout"))
    grid = choose_grid((PAGE_PX, PAGE_PX), yi_vl.processor.image_processor.size_px, arm.tiles)
    result = {
        "scores": scores(records), "samples_per_second": rate,
        "image_tokens": num_inputs(grid) * yi_vl.processor.tokens_per_image,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    write_json_lines(directory / "answers.jsonl", records)
    write_result(directory, result)
    return result


def _train(run_dir: Path, out: Path, tiles: int, steps: int, seed: int) -> None:
    """
    Raises:
        ValueError: the run needs the user's attention, or it diverged.
        SystemExit: a signal was received; the same command resumes.
    """
    overrides = (
        f"run_dir={run_dir}", f"image.tiles={tiles}", f"steps={steps}", f"seed={seed}",
        f"data.sources=[{{name: pages, shards: '{out}/data/pages/*.tar'}}]",
    )  # fmt: skip
    if train_in_series(load_config(CONFIG, overrides), run_dir.name).has_diverged:
        raise ValueError(f"{run_dir} diverged; lower lr in {CONFIG}, and take another --out.")


def _spread(values: list[float], unit: str) -> str:
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 and stdev(values) > 0 else ""
    mean = fmean(values)
    return f"{mean:.0f}{deviation}{unit}" if mean == int(mean) else f"{mean:.1f}{deviation}{unit}"
