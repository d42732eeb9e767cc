"""Several language models alone with the same budget, one after another, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from train.nano.measure.language import measure_runs
from train.nano.pretrain.language import LanguageRecipe, pretrain_language
from train.nano.pretrain.trainer import read_recipe, read_yaml


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
