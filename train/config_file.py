"""Reads a training config: YAML and `key.sub=value` overrides, checked against the schema of `config.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from yi_vl.arguments import as_path, one_line

from .config import (
    DPO,
    FROM_MODEL,
    FROM_SHARDS,
    INT4,
    LORA,
    OBJECTIVES,
    PRECISIONS,
    PREFERENCE,
    SAMPLE_FORMATS,
    DataConfig,
    DpoConfig,
    GenerationsConfig,
    TrainConfig,
    flat_settings,
)

# old key -> new key
_RENAMED = {"optimiser": "optimizer", "bad_steps": "spike_guard", "answers": "generations", "form": "format"}
_Require = Callable[[bool, str], None]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a YAML file and `key.sub=value` overrides describe.

    Raises:
        ValueError: no such file, not YAML, an unknown key, a wrong type, a missing value or a contradiction; one line.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such config file; the recipes are in train/configs/.")
    merged = OmegaConf.structured(TrainConfig)
    content = _parse(lambda: OmegaConf.load(path), str(path))
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: expected keys and values at the top, found {type(content).__name__}.")
    with _named_errors(str(path)):
        merged = cast(DictConfig, OmegaConf.merge(merged, content))
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
    _check(config, str(path))
    return config


def to_yaml(config: TrainConfig) -> str:
    """The whole run as YAML that `load_config` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _parse(parse: Callable[[], Any], where: str) -> Any:
    try:
        return parse()
    except Exception as error:  # YAML's and OmegaConf's parsers raise a family of their own
        raise ValueError(f"{where}: cannot be read as YAML: {' '.join(str(error).split())}") from error


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


def _check(config: TrainConfig, where: str) -> None:
    """Check what types cannot express."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{where}: {message}")

    _check_numbers(config, require)
    _check_init(config, require)
    require((config.steps is None) != (config.epochs is None), "give exactly one of steps and epochs.")
    require(config.epochs is None or config.samples is not None, "epochs needs samples, the number in one epoch.")
    precisions = ", ".join(PRECISIONS)
    require(config.precision in PRECISIONS, f"precision is {config.precision!r}; expected one of {precisions}.")
    _check_trainable(config, require)
    if config.generations is not None:
        _check_generations(config.generations, config.data, require)
    _check_data(config.data, require)
    _check_objective(config, require)


def _check_numbers(config: TrainConfig, require: _Require) -> None:
    settings = flat_settings(config)
    for key, value in settings.items():
        for number in value if isinstance(value, list) else [value]:
            is_finite = not isinstance(number, float) or math.isfinite(number)
            require(is_finite, f"{key} is {number}; expected a finite number.")
    for key in ("lr.vision", "lr.projector", "lr.language", "optimizer.weight_decay"):
        require(settings[key] >= 0, f"{key} is {settings[key]}; it must not be negative.")
    for key in (
        "steps", "epochs", "samples", "clip_norm", "image_size", "global_batch", "micro_batch", "max_tokens",
        "log_every", "optimizer.eps", "checkpoint.every_steps", "checkpoint.keep_last", "spike_guard.stop_after",
    ):  # fmt: skip
        require(settings[key] is None or settings[key] > 0, f"{key} is {settings[key]}; it must be positive.")
    require(0 <= config.seed < 1 << 31, f"seed is {config.seed}; expected 0 to {(1 << 31) - 1}.")
    require(0 <= config.warmup_ratio < 1, f"warmup_ratio is {config.warmup_ratio}; expected 0 to 1.")
    betas = config.optimizer.betas
    require(len(betas) == 2, f"optimizer.betas is {betas}; expected two numbers.")
    require(all(0 <= beta < 1 for beta in betas), f"optimizer.betas is {betas}; each is 0 to below 1.")
    ratio = config.spike_guard.max_norm_ratio
    require(ratio is None or ratio > 1, f"spike_guard.max_norm_ratio is {ratio}; expected more than 1, or null.")


def _check_init(config: TrainConfig, require: _Require) -> None:
    init = config.init_from
    has_parts = init.tower is not None or init.language_model is not None
    require((init.checkpoint is None) == has_parts, "init_from needs either checkpoint, or tower and language_model.")
    is_complete = init.tower is not None and init.language_model is not None
    require(not has_parts or is_complete, "init_from: a model from parts needs both tower and language_model.")


def _check_trainable(config: TrainConfig, require: _Require) -> None:
    trainable, lora = config.trainable, config.lora
    language = trainable.language
    require(language in (True, False, LORA), f"trainable.language is {language!r}; expected true, false or {LORA}.")
    is_any = bool(trainable.vision or trainable.projector or language)
    require(is_any, "trainable: nothing is; set a component to true.")
    require(lora.base in (None, INT4), f"lora.base is {lora.base!r}; expected null or {INT4}.")
    require(
        lora.base is None or language == LORA,
        f"lora.base is {lora.base}, but trainable.language is {language}: 4-bit weights cannot be trained, only "
        f"adapters on them; set trainable.language to {LORA}, or lora.base to null.",
    )
    if language == LORA:
        has_checkpoint = config.init_from.checkpoint is not None
        require(has_checkpoint, "trainable.language: lora adapts a checkpoint; name it in init_from.")
        require(lora.rank > 0, f"lora.rank is {lora.rank}; it must be positive.")
        require(lora.alpha > 0, f"lora.alpha is {lora.alpha}; it must be positive.")
        require(0 <= lora.dropout < 1, f"lora.dropout is {lora.dropout}; expected 0 to 1.")


def _check_generations(generations: GenerationsConfig, data: DataConfig, require: _Require) -> None:
    for key in ("every_steps", "count", "max_new_tokens"):
        value = getattr(generations, key)
        require(value > 0, f"generations.{key} is {value}; it must be positive.")
    expected, own_format = ", ".join(SAMPLE_FORMATS), generations.format
    is_known = own_format is None or own_format in SAMPLE_FORMATS
    require(is_known, f"generations.format is {own_format!r}; expected one of {expected}.")
    sample_format = own_format if own_format is not None else data.format
    require(
        sample_format != "text",
        "generations: samples of the format text have no prompt; set generations.format to another.",
    )


def _check_data(data: DataConfig, require: _Require) -> None:
    require(bool(data.sources), "data.sources is empty; list at least one with name and shards.")
    names = [source.name for source in data.sources]
    require(len(set(names)) == len(names), f"data.sources: names repeat ({', '.join(names)}).")
    require(data.workers >= 0, f"data.workers is {data.workers}; 0 or more.")
    require(data.shuffle_buffer >= 1, f"data.shuffle_buffer is {data.shuffle_buffer}; 1 (no shuffling) or more.")
    fraction = data.max_broken_fraction
    require(0 <= fraction <= 1, f"data.max_broken_fraction is {fraction}; expected 0 to 1.")
    for source in data.sources:
        sample_format = source.format if source.format is not None else data.format
        require(
            sample_format in SAMPLE_FORMATS,
            f"the format of source {source.name!r} is {sample_format!r}; expected one of {', '.join(SAMPLE_FORMATS)}.",
        )
        require(source.weight > 0, f"the weight of source {source.name!r} is {source.weight}; it must be positive.")
        require(
            source.max_samples is None or source.max_samples > 0,
            f"max_samples of source {source.name!r} is {source.max_samples}; it must be positive.",
        )


def _check_objective(config: TrainConfig, require: _Require) -> None:
    is_dpo, dpo, lora = config.objective == DPO, config.dpo, config.lora
    expected = ", ".join(OBJECTIVES)
    require(config.objective in OBJECTIVES, f"objective is {config.objective!r}; expected one of {expected}.")
    for source in config.data.sources:
        sample_format = source.format if source.format is not None else config.data.format
        require(
            is_dpo == (sample_format == PREFERENCE),
            f"the format of source {source.name!r} is {sample_format}, and objective is {config.objective}: pairs of "
            f"answers ({PREFERENCE}) are for objective {DPO}, and it takes nothing else.",
        )
    require(is_dpo or dpo == DpoConfig(), f"dpo has settings, but objective is {config.objective}; set it to {DPO}.")
    require(dpo.beta > 0, f"dpo.beta is {dpo.beta}; it must be positive.")
    require(0 <= dpo.label_smoothing < 0.5, f"dpo.label_smoothing is {dpo.label_smoothing}; expected 0 to below 0.5.")
    require(dpo.sft_weight >= 0, f"dpo.sft_weight is {dpo.sft_weight}; it must not be negative.")
    references = (FROM_MODEL, FROM_SHARDS)
    require(
        dpo.reference in references, f"dpo.reference is {dpo.reference!r}; expected one of {', '.join(references)}."
    )
    has_checkpoint = config.init_from.checkpoint is not None
    require(
        not is_dpo or has_checkpoint,
        f"objective: {DPO} compares with the model that it starts from; name a trained one in init_from.checkpoint.",
    )
    require(
        dpo.reference == FROM_MODEL or lora.base is None,
        f"dpo.reference is {FROM_SHARDS}, of unquantized weights, but lora.base is {lora.base}; set dpo.reference to "
        f"{FROM_MODEL}, which then takes no memory.",
    )
