"""The schema of a comparison of connectors, and its reader; the runs themselves have configs of `train/config.py`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from train.config import TrainConfig, num_steps
from train.config_file import load_derived, load_structured
from yi_vl.arguments import as_path

EXAMPLE = "train/configs/nano/connectors.yaml"
# Settings of the stages that the comparison makes itself, for each run.
_OWN = ("run_dir", "seed", "resume", "init_from", "generations")
_NAME = re.compile(r"[\w.-]+")


@dataclass
class StageConfig:
    """
    base: the config of a training run.
    overrides: its settings that are replaced, by their full keys.
    """

    base: str = MISSING
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class ComparisonConfig:
    """
    directory: of the runs and the results.
    model: where every run starts, but for its connector.
    connectors: each a name, and the settings of `init_from.connector`; at will `lr`, its learning rate in all stages.
    stages: by name, in the order in which they are trained; the first begins with the fresh connector.
    seeds: runs of each connector.
    heldout: the folder of the held-out questions.
    questions: asked of each skill, half of them in Chinese; null: all.
    speed_rounds: in each the time to first token of all connectors is measured in turns.
    """

    directory: str = MISSING
    model: str = MISSING
    connectors: list[dict[str, Any]] = MISSING
    stages: dict[str, StageConfig] = MISSING
    seeds: int = 3
    heldout: str = "data/nano/heldout"
    questions: int | None = 120
    speed_rounds: int = 21


@dataclass(frozen=True)
class Comparison:
    """A comparison's config, and the file that it was read from."""

    path: str
    config: ComparisonConfig

    @property
    def directory(self) -> Path:
        return Path(self.config.directory)

    @property
    def names(self) -> list[str]:
        """Of the connectors, in their order."""
        return [connector["name"] for connector in self.config.connectors]

    @property
    def num_steps(self) -> int:
        """Of one run, all its stages."""
        return sum(map(num_steps, self.stage_configs(self.names[0], 0).values()))

    def run_directory(self, name: str, seed: int) -> Path:
        return self.directory / "runs" / f"{name}-seed-{seed}"

    def stage_configs(self, name: str, seed: int) -> dict[str, TrainConfig]:
        """The training runs of a connector and a seed, by the name of their stage.

        Raises:
            ValueError: a setting is wrong.
        """
        connector = next(connector for connector in self.config.connectors if connector["name"] == name)
        fresh: dict[str, Any] | None = {key: value for key, value in connector.items() if key not in ("name", "lr")}
        rate = {"lr.projector": connector["lr"]} if "lr" in connector else {}
        start = self.config.model
        configs = {}
        for stage, stage_config in self.config.stages.items():
            run_dir = self.run_directory(name, seed) / stage
            settings = {
                **stage_config.overrides,
                **rate,
                "run_dir": str(run_dir),
                "seed": seed,
                "init_from": {"checkpoint": start, "tower": None, "language_model": None, "connector": fresh},
                "generations": None,
            }
            try:
                configs[stage] = load_derived(stage_config.base, settings, f"stage {stage}")
            except ValueError as error:
                raise ValueError(f"{self.path}: connector {name!r}: {error}") from error
            start, fresh = str(run_dir / "final"), None
        return configs


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """The comparison that a YAML file and `key.sub=value` overrides describe.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a wrong type, a missing value or a contradiction; one line.
    """
    config = load_structured(ComparisonConfig, path, overrides, EXAMPLE)
    config.directory = str(as_path(config.directory, f"{path}: directory"))
    comparison = Comparison(str(path), config)
    _check(comparison)
    for name in comparison.names:
        comparison.stage_configs(name, 0)
    return comparison


def _check(comparison: Comparison) -> None:
    """Check what types cannot express."""
    config = comparison.config

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{comparison.path}: {message}")

    require(bool(config.connectors), "connectors is empty; list at least one with name and type.")
    for connector in config.connectors:
        name = connector.get("name")
        is_name = isinstance(name, str) and _NAME.fullmatch(name) is not None
        require(
            is_name and "type" in connector,
            f"connectors has {connector}; expected a name of letters, digits, '.', '_' and '-', and a type.",
        )
    names = comparison.names
    require(len(set(names)) == len(names), f"connectors: names repeat ({', '.join(names)}).")
    require(bool(config.stages), "stages is empty; expected at least one with its base, a training config.")
    for stage, stage_config in config.stages.items():
        require(_NAME.fullmatch(stage) is not None, f"stages has the name {stage!r}; expected letters and digits.")
        reserved = [key for key in stage_config.overrides if key.split(".")[0] in _OWN]
        require(
            not reserved,
            f"stages.{stage}.overrides has {', '.join(reserved)}, which the comparison sets itself; remove it.",
        )
    for key in ("seeds", "speed_rounds"):
        value = getattr(config, key)
        require(value > 0, f"{key} is {value}; it must be positive.")
    require(
        config.questions is None or config.questions > 1,
        f"questions is {config.questions}; expected at least 2 of each skill, one of each language, or null.",
    )
