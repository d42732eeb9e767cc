"""The schema of a search for a data mixture, and its reader; the runs themselves have configs of `train/config.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING

from yi_vl.arguments import as_path

from ..config import (
    DataConfig,
    InitConfig,
    SourceConfig,
    TrainConfig,
    ValidationSourceConfig,
    num_steps,
)
from ..config_file import load_config, load_derived, load_structured
from ..config_flat import flat_settings

METHODS = DIRICHLET, GRID = "dirichlet", "grid"
MIN_BUDGET = 16
RUNS_PER_PARAMETER = 4
_RUN_PREFIXES = ("base.", "base with overrides.")  # of the stage's settings, and of a proxy's
# Settings that the search makes itself, for each run.
_OWN = ("run_dir", "seed", "resume", "validation", "generations")
_NOT_SEARCHED = (*_OWN, "data.sources", "steps", "epochs", "samples", "precision", "image_size", "image.")
_NO_RESULT = (  # of a training config: they do not change its losses
    "run_dir", "resume", "validation", "generations", "checkpoint.", "log_every", "log_samples", "trackers",
    "data.workers", "data.max_broken_fraction", "micro_batch", "compile", "activation_checkpointing",
)  # fmt: skip


@dataclass
class RegionConfig:
    """Which mixtures are tried.

    sources: names in `data.sources` of the base whose shares are searched (null: all); others keep their share.
    method: `dirichlet`: random mixtures around equal shares; `grid`: every source has a weight of 1, 1/2, ... 1/64, as
        in Yi's fine-tuning (arXiv 2403.04652).
    budget: number of mixtures tried, besides the baselines.
    max_epochs: no source is repeated more often in the stage itself, at the base's own length (null: no limit).
    sizes: samples of a source by name, where they cannot be counted, as behind a URL.
    seed: of the mixtures.
    """

    sources: list[str] | None = None
    method: str = DIRICHLET
    budget: int = MIN_BUDGET
    max_epochs: float | None = 4.0
    sizes: dict[str, int] = field(default_factory=dict)
    seed: int = 0


@dataclass
class HyperConfig:
    """A setting of the base that is searched at the same time; its present value always takes part."""

    key: str = MISSING
    values: list[Any] = MISSING


@dataclass
class HeldOutConfig:
    """Samples held out from training, as in `train.config.ValidationConfig`."""

    sources: list[ValidationSourceConfig] = MISSING
    samples: int = 64


@dataclass
class RankCheckConfig:
    """Whether short runs rank mixtures as longer ones do: the first `runs` mixtures are also trained for `steps`."""

    steps: int = MISSING
    runs: int = 8


@dataclass
class MixtureConfig:
    """A search.

    base: the config of the stage whose mixture is searched.
    overrides: settings of the base that make it a proxy, such as fewer steps.
    validation: the loss on it chooses; verdict: the loss on it judges the choice.
    repeats: seeds of equal shares, for the noise, and of each of the two that are judged.
    keep_models: keep the weights of finished runs.
    """

    search_dir: str = MISSING
    base: str = MISSING
    overrides: dict[str, Any] = field(default_factory=dict)
    search: RegionConfig = field(default_factory=RegionConfig)
    hyper: list[HyperConfig] = field(default_factory=list)
    validation: HeldOutConfig = MISSING
    verdict: HeldOutConfig = MISSING
    rank_check: RankCheckConfig | None = None
    repeats: int = 3
    keep_models: bool = False


@dataclass(frozen=True)
class Search:
    """A search's config, with that of its stage and that of a proxy.

    stage: the base without overrides.
    proxy: the base with them.
    hyper: every searched setting's values; the first is the proxy's.
    """

    path: str
    config: MixtureConfig
    stage: TrainConfig
    proxy: TrainConfig
    hyper: dict[str, list[Any]]

    @property
    def directory(self) -> Path:
        return Path(self.config.search_dir)

    @property
    def names(self) -> list[str]:
        """The sources of the stage, in its order."""
        return [source.name for source in self.proxy.data.sources]

    @property
    def searched(self) -> list[int]:
        """Indices of the sources whose shares are searched."""
        chosen = self.config.search.sources
        return [index for index, name in enumerate(self.names) if chosen is None or name in chosen]

    @property
    def num_parameters(self) -> int:
        """What the regression estimates, besides the mean."""
        return len(self.searched) + sum(len(values) - 1 for values in self.hyper.values())

    def run_config(self, settings: dict[str, Any]) -> TrainConfig:
        """The proxy's config with other settings, by their full keys.

        Raises:
            ValueError: one of them is wrong.
        """
        return load_derived(self.config.base, {**self.config.overrides, **settings}, self.path)

    def flat(self) -> dict[str, Any]:
        """All settings that results depend on, by their full keys; those of the stage begin with `base.`."""
        config = asdict(self.config)
        flat = dict(_flatten({key: value for key, value in config.items() if key not in ("base", "overrides")}))
        for key in ("search_dir", "search.budget", "keep_models"):
            flat.pop(key)
        for prefix, run in zip(_RUN_PREFIXES, (self.stage, self.proxy)):
            settings = flat_settings(run)
            flat |= {prefix + key: value for key, value in settings.items() if not key.startswith(_NO_RESULT)}
        return cast(dict[str, Any], json.loads(json.dumps(flat)))

    def defaults(self) -> dict[str, Any]:
        """By the keys of `flat`, the training settings where a config does not say: a search that was begun before
        there was such a setting had it so."""
        flat: dict[str, Any] = {}
        for prefix, run in zip(_RUN_PREFIXES, (self.stage, self.proxy)):
            sources = [SourceConfig(name=source.name) for source in run.data.sources]
            unset = TrainConfig(init_from=InitConfig(), data=DataConfig(sources=sources))
            flat |= {prefix + key: value for key, value in flat_settings(unset).items()}
        return cast(dict[str, Any], json.loads(json.dumps(flat)))


def load_search(path: str | Path, overrides: Sequence[str] = ()) -> Search:
    """The search that a YAML file and `key.sub=value` overrides describe.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a wrong type, a missing value or a contradiction; one line.
    """
    config = load_structured(MixtureConfig, path, overrides, "train/configs/mixture/nano.yaml")
    config.search_dir = str(as_path(config.search_dir, f"{path}: search_dir"))
    if reserved := [key for key in config.overrides if key.split(".")[0] in _OWN]:
        raise ValueError(f"{path}: overrides has {reserved[0]}, which the search sets itself; remove it.")
    stage, proxy = load_config(config.base), load_derived(config.base, config.overrides, str(path))
    settings = flat_settings(proxy)
    hyper: dict[str, list[Any]] = {}
    for setting in config.hyper:
        if setting.key not in settings or setting.key.startswith(_NOT_SEARCHED) or setting.key in hyper:
            raise ValueError(
                f"{path}: hyper has the key {setting.key!r}; expected a setting of {config.base}, once, such as "
                "lr.language; its sources, its length and what the search sets itself cannot be searched."
            )
        present = settings[setting.key]
        hyper[setting.key] = [present, *(value for value in setting.values if value != present)]
    search = Search(str(path), config, stage, proxy, hyper)
    _check(search)
    for key, values in hyper.items():
        for value in values:
            search.run_config({key: value})
    return search


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{prefix}.{key}" if prefix else key)


def _check(search: Search) -> None:
    """Check what types cannot express."""
    config, region = search.config, search.config.search

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{search.path}: {message}")

    require(region.method in METHODS, f"search.method is {region.method!r}; expected one of {', '.join(METHODS)}.")
    require(region.budget > 0, f"search.budget is {region.budget}; it must be positive.")
    limit = region.max_epochs
    require(limit is None or (math.isfinite(limit) and limit > 0), f"search.max_epochs is {limit}; expected above 0.")
    require(0 <= region.seed < 1 << 31, f"search.seed is {region.seed}; expected 0 to {(1 << 31) - 1}.")
    require(config.repeats >= 2, f"repeats is {config.repeats}; the noise needs at least 2 seeds.")
    _check_sources(search, require)
    for key, held_out in (("validation", config.validation), ("verdict", config.verdict)):
        names = [source.name for source in held_out.sources]
        require(bool(names), f"{key}.sources is empty; list at least one with name and shards.")
        require(len(set(names)) == len(names), f"{key}.sources: names repeat ({', '.join(names)}).")
        require(held_out.samples > 0, f"{key}.samples is {held_out.samples}; it must be positive.")
    if (check := config.rank_check) is not None:
        steps = num_steps(search.proxy)
        require(check.steps > steps, f"rank_check.steps is {check.steps}; expected more than a proxy's {steps}.")
        require(check.runs >= 3, f"rank_check.runs is {check.runs}; a rank correlation needs at least 3.")
        require(
            check.runs <= region.budget,
            f"rank_check.runs is {check.runs}; expected at most search.budget, {region.budget}.",
        )


def _check_sources(search: Search, require: Callable[[bool, str], None]) -> None:
    region, base = search.config.search, search.config.base
    for key, given in (("search.sources", region.sources or []), ("search.sizes", region.sizes)):
        unknown = [name for name in given if name not in search.names]
        require(not unknown, f"{key} has {', '.join(unknown)}; the sources of {base} are {', '.join(search.names)}.")
    for source in search.proxy.data.sources:
        require(
            isinstance(source.weight, (int, float)),
            f"the weight of source {source.name!r} of {base} is {source.weight}; a search needs one number: set "
            "data.sources in overrides.",
        )
    require(all(size > 0 for size in region.sizes.values()), f"search.sizes is {region.sizes}; they must be positive.")
    require(
        len(search.searched) > 1 or bool(search.hyper),
        f"search.sources leaves {len(search.searched)} of {len(search.names)} sources, and hyper is empty: there is "
        "nothing to search.",
    )
