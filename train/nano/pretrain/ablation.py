"""The table of several language models alone, and their training with the same budget, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from train.nano.pretrain.language import LanguageRecipe, load_run, pretrain_language
from train.nano.pretrain.mosaic_model import MosaicLanguageModel, megabytes
from train.nano.pretrain.tasks import greedy_answers, measure_tasks, task_scores
from train.nano.pretrain.trainer import read_recipe, read_yaml
from train.nano.pretrain.trees import TreeEncoder
from train.nano.text.mosaic_texts import TASKS, TextQuestion


def ablate(path: Path, out_dir: Path, num_questions: int) -> str:
    """Train every run of the file in `out_dir`, finished ones not again, and return the Markdown table of all.

    Args:
        path: YAML with `base`, settings of all runs, and `runs`, for each run's name the settings that differ.

    Raises:
        ValueError: the file is not that, or a recipe in it is wrong.
    """
    content = read_yaml(path)
    runs = content.get("runs")
    if not isinstance(runs, DictConfig) or set(content) - {"base", "runs"} or not runs:
        raise ValueError(
            f"{path}: expected `base` and `runs` with at least one run, found {', '.join(map(str, content))}."
        )
    base = overrides(content.get("base") or {})
    recipes = {
        str(name): read_recipe(LanguageRecipe, None, base + overrides(changes or {})) for name, changes in runs.items()
    }
    for name, recipe in recipes.items():
        pretrain_language(out_dir / name, recipe)
    return measure_runs([out_dir / name for name in recipes], num_questions)


def overrides(settings: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """{"shape": {"width": 320}} -> ["shape.width=320"]"""
    flat: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat += overrides(value, f"{name}.") if isinstance(value, Mapping | DictConfig) else [f"{name}={value}"]
    return flat


def measure_runs(run_dirs: Sequence[Path], num_per_task: int, num_examples: int = 0) -> str:
    """Markdown: the table of all runs, after some wrong answers of each.

    Raises:
        ValueError: a folder has no run.
    """
    runs: dict[str, tuple[float, dict[str, float]]] = {}
    lines = []
    for run_dir in run_dirs:
        model, encoder, recipe, step = load_run(run_dir)
        scored = measure_tasks(model, encoder, recipe.layout, num_per_task)
        runs[f"{run_dir.name}, step {step}"] = megabytes(recipe.shape), task_scores(scored)
        wrong = [each.question for each in scored if not each.is_correct]
        lines += _examples(model, encoder, wrong[:: max(1, len(wrong) // max(1, num_examples))][:num_examples])
    return "\n".join([*lines, "", table(runs)]) if lines else table(runs)


def _examples(model: MosaicLanguageModel, encoder: TreeEncoder, questions: Sequence[TextQuestion]) -> list[str]:
    answers = greedy_answers(model, encoder, [question.text for question in questions])
    lines = []
    for question, answer in zip(questions, answers):
        prompt, expected = (turn["value"].replace("\n", " ") for turn in question.text.conversations[0])
        lines.append(f"{question.task}: {prompt[-90:]} | expected {expected!r}, answered {encoder.text(answer)!r}")
    return lines


def table(runs: dict[str, tuple[float, dict[str, float]]]) -> str:
    """Markdown: a row for each run with the whole model's MB, for each task "English / Chinese" in percent."""
    lines = ["| run | MB in bfloat16 | " + " | ".join(TASKS) + " |", "|---|---|" + "---|" * len(TASKS)]
    for name, (size_mb, scores) in runs.items():
        cells = [
            " / ".join(f"{100 * scores[key]:.1f}" for lang in ("en", "zh") if (key := f"{task} {lang}") in scores)
            for task in TASKS
        ]
        lines.append(f"| {name} | {size_mb:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
