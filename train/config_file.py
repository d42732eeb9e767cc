"""Reads a training config: YAML and `key.sub=value` overrides, checked against the schema of `config.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from yi_vl.arguments import as_path, one_line

from .config import SourceConfig, TrainConfig
from .config_checks import check

Schema = TypeVar("Schema")

# old key -> new key
_RENAMED = {
    "optimiser": "optimizer",
    "bad_steps": "spike_guard",
    "answers": "generations",
    "form": "format",
    "warmup_ratio": "schedule.warmup",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a YAML file and `key.sub=value` overrides describe.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a wrong type, a missing value or a contradiction; one line.
    """
    merged = OmegaConf.structured(TrainConfig)
    with _named_errors(str(path)):
        merged = cast(DictConfig, OmegaConf.merge(merged, _read(path)))
    for override in overrides:
        key, equals, text = override.partition("=")
        where = f"command line ({override})"
        if not equals:
            raise ValueError(f"command line: {override!r} is not of the form key.sub=value.")
        value = _parse(lambda text=text: OmegaConf.create({"value": yaml.safe_load(text)})["value"], where)  # type: ignore[misc]
        with _named_errors(where):
            OmegaConf.update(merged, key, value, merge=True)
    try:
        OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
        config = cast(TrainConfig, OmegaConf.to_object(merged))
    except (MissingMandatoryValue, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {getattr(error, 'full_key', '')} is missing; {one_line(error)}.") from error
    config.run_dir = str(as_path(config.run_dir, f"{path}: run_dir"))
    for source in config.data.sources:
        source.weight = _as_weight(source, str(path))
    check(config, str(path))
    return config


def load_derived(base: str | Path, settings: dict[str, Any], where: str) -> TrainConfig:
    """The run of a YAML file with other settings, by their full keys; `steps` takes the place of `epochs`.

    Args:
        where: the file that they come from, for errors.

    Raises:
        ValueError: as `load_config`.
    """
    if "steps" in settings:
        settings = {"epochs": None, **settings}
    try:
        return load_config(base, [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()])
    except ValueError as error:
        raise ValueError(str(error).replace("command line (", f"{where}: overrides (", 1)) from error


def load_structured(schema: type[Schema], path: str | Path, overrides: Sequence[str], example: str) -> Schema:
    """A YAML file and `key.sub=value` overrides as a dataclass, of the tools that make many runs.

    Args:
        example: a file of the project that is one.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a wrong type or a missing value; one line.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such config file; an example is {example}.")
    try:
        content = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise ValueError(f"expected keys and values at the top, found {type(content).__name__}")
        if wrong := next((override for override in overrides if "=" not in override), None):
            raise ValueError(f"{wrong!r} on the command line is not of the form key.sub=value")
        merged = OmegaConf.merge(OmegaConf.structured(schema), content, OmegaConf.from_dotlist(list(overrides)))
        OmegaConf.to_container(merged, throw_on_missing=True)
        return cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(f"{path}: {key}{one_line(error)}.") from error
    except Exception as error:  # YAML's parser raises a family of its own
        raise ValueError(f"{path}: {' '.join(str(error).split()).rstrip('.')}.") from error


def to_yaml(config: TrainConfig) -> str:
    """The whole run as YAML that `load_config` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read(path: str | Path) -> DictConfig:
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such config file; the recipes are in train/configs/.")
    content = _parse(lambda: OmegaConf.load(path), str(path))
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: expected keys and values at the top, found {type(content).__name__}.")
    return content


def _parse(parse: Callable[[], Any], where: str) -> Any:
    try:
        return parse()
    except Exception as error:  # YAML's and OmegaConf's parsers raise a family of their own
        hint = "; quote a text that begins with *" if "scanning an alias" in str(error) else ""
        raise ValueError(f"{where}: cannot be read as YAML: {' '.join(str(error).split())}{hint}") from error


@contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """Turn OmegaConf's errors into one line with the key and its origin."""
    try:
        yield
    except (ConfigKeyError, ConfigAttributeError) as error:
        if old := next((key for key in str(error.full_key).split(".") if key in _RENAMED), None):
            raise ValueError(f"{where}: the key {old!r} is now called {_RENAMED[old]!r}; rename it.") from error
        fields = getattr(error.object_type, "__dataclass_fields__", {})
        raise ValueError(
            f"{where}: unknown key {error.full_key!r}; known here: {', '.join(fields) or 'nothing'}."
        ) from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{where}: {key}{one_line(error)}.") from error
    except (TypeError, ValueError, IndexError) as error:  # a list where keys belong, or the other way round
        raise ValueError(f"{where}: {one_line(error)}.") from error


def _as_weight(source: SourceConfig, where: str) -> float | list[float]:
    """The weight as a number, or as a list of two."""
    value = source.weight
    try:
        if isinstance(value, list):
            start, end = map(_as_number, value)
            return [start, end]
        return _as_number(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: the weight of source {source.name!r} is {value!r}; expected a number, or [start, end]."
        ) from error


def _as_number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)
