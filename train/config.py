"""What a training run is: structured settings, read from YAML and the command line, refused when they make no sense.

Stages of a recipe are files; nothing here knows of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from yi_vl.arguments import as_path

FORMS = ("caption", "chat", "text")
LORA = "lora"
INT4 = "int4"
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class TowerConfig:
    """An open_clip vision tower: its model name, and a pretrained tag or weight file (null: random weights)."""

    name: str = MISSING
    pretrained: str | None = None


@dataclass
class InitConfig:
    """Where the weights come from: a checkpoint, or a tower and a language model with a fresh projector.

    checkpoint: a folder or hub id in any layout that `yi_vl.load` reads; LoRA adapters are merged.
    """

    checkpoint: str | None = None
    tower: TowerConfig | None = None
    language_model: str | None = None


@dataclass
class TrainableConfig:
    """Which components learn. Frozen ones keep their weights and their batch statistics to the last bit.

    language: `lora` freezes it and adds adapters that learn instead; see `lora`.
    """

    vision: bool = True
    projector: bool = True
    language: bool | str = True


@dataclass
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) on every linear layer of the language model's blocks, its head excepted.

    A layer's output gains alpha / rank x B A x: A (rank, inputs), B (outputs, rank). dropout: of x, on that path.
    base: how the frozen layers are held: null, as all weights are; or `int4`, in four bits (QLoRA, arXiv 2305.14314).
    """

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.05
    base: str | None = None


@dataclass
class LearningRateConfig:
    """The peak learning rate of each component."""

    vision: float = 1e-4
    projector: float = 1e-4
    language: float = 1e-4


@dataclass
class OptimiserConfig:
    """AdamW. Norms, biases and single vectors are never decayed."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class SourceConfig:
    """A set of shards.

    shards: paths, globs, URLs or `pipe:` commands with {000..999} braces; several joined by `::`, as in webdataset.
    weight: its share of the stream, relative to the other sources'.
    max_samples: after so many samples its epoch ends and the next begins, in another order.
    form: null takes data.form.
    """

    name: str = MISSING
    shards: str = MISSING
    weight: float = 1.0
    max_samples: int | None = None
    form: str | None = None


@dataclass
class DataConfig:
    """The stream of samples.

    form: for sources that do not say; `caption` (images with KEY.txt, or the one answer of KEY.json; plain form),
        `chat` (KEY.json, `###` form) or `text` (KEY.txt alone, plain form).
    ignore: suffixes of members, and keys of KEY.json, that are not read and would make a sample a broken one.
    workers: loading processes per rank; 0 loads in the training process.
    shuffle_buffer: samples per worker that are permuted together, shared by the sources in proportion to their weights.
    max_broken_fraction: the run stops when more than this part of a worker's samples cannot be used.
    fast_pixels: decode large JPEGs scaled and resize with torch, see pixels.py; false makes inference's pixels exactly.
    """

    form: str = "caption"
    sources: list[SourceConfig] = MISSING
    workers: int = 2
    shuffle_buffer: int = 1000
    max_broken_fraction: float = 0.01
    ignore: list[str] = field(default_factory=list)
    fast_pixels: bool = True


@dataclass
class CheckpointConfig:
    """When to save, and how many of the newest checkpoints to keep; the finished model is saved in any case."""

    every_steps: int = 1000
    keep_last: int = 2


@dataclass
class BadStepsConfig:
    """Steps that would spoil the weights are left out: no update, counted as `steps_skipped` in metrics.jsonl.

    max_norm_ratio: a gradient norm that is not finite is bad, and so is one this many times the median of the last 100
        (null: never).
    stop_after: the run stops after so many bad steps in a row.
    """

    max_norm_ratio: float | None = 100.0
    stop_after: int = 10


@dataclass
class AnswersConfig:
    """Held-out samples that the model is asked about every so many steps, for people to look at.

    shards: as a source's, but not among those that are trained on; the first `count` samples are asked.
    form: null takes data.form; a caption is asked for as it is learned, after the picture alone.
    """

    shards: str = MISSING
    form: str | None = None
    every_steps: int = 500
    count: int = 4
    max_new_tokens: int = 64


@dataclass
class TrainConfig:
    """A training run. Exactly one of `steps` and `epochs`; `epochs` needs `samples`, the length of one epoch."""

    run_dir: str = MISSING
    seed: int = 0
    resume: bool = True  # go on from the newest complete checkpoint in run_dir; false refuses a run_dir with one
    init_from: InitConfig = MISSING
    image_size: int = 448
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)  # for trainable.language: lora
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    warmup_ratio: float = 0.03  # of the steps, linear from 0; then cosine to 0
    clip_norm: float | None = 1.0
    global_batch: int = MISSING  # samples per optimiser step, over all ranks
    micro_batch: int = MISSING  # samples at once on one rank
    steps: int | None = None
    epochs: float | None = None
    samples: int | None = None
    max_tokens: int = 2048  # longer samples are skipped and counted, never cut
    precision: str = "bf16"
    activation_checkpointing: bool = False  # keep layers' inputs only and run layers again backward; see train.plan
    compile: bool = False  # the language model's layers; about a minute at the start, then 15% less time on a CPU
    data: DataConfig = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    answers: AnswersConfig | None = None
    bad_steps: BadStepsConfig = field(default_factory=BadStepsConfig)
    log_every: int = 10
    log_samples: bool = False  # the names of each step's samples, in run_dir/samples-RANK.jsonl
    trackers: list[str] = field(default_factory=list)


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
        raise ValueError(f"{path}: {getattr(error, 'full_key', '')} is missing; {_first_line(error)}") from error
    config.run_dir = str(as_path(config.run_dir, f"{path}: run_dir"))
    _check(config, str(path))
    return config


def to_yaml(config: TrainConfig) -> str:
    """The whole run as YAML that `load_config` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """All settings by their full key; those of a source by its name, as in `data.sources.NAME.weight`."""
    flat: dict[str, Any] = {}
    for field_ in fields(config):
        key, value = f"{prefix}{field_.name}", getattr(config, field_.name)
        if is_dataclass(value):
            flat |= flat_settings(value, f"{key}.")
        elif key == "data.sources":
            for source in value:
                flat |= flat_settings(source, f"{key}.{source.name}.")
        else:
            flat[key] = value
    return flat


def num_steps(config: TrainConfig) -> int:
    """Optimiser steps of the run."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None and config.samples is not None
    return max(1, int(config.samples * config.epochs) // config.global_batch)


def exit_on_user_error(main: Any) -> None:
    """Run a command; what the user got wrong becomes one line on stderr and exit code 2."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _parse(parse: Callable[[], Any], where: str) -> Any:
    try:
        return parse()
    except Exception as error:  # YAML's and OmegaConf's parsers raise a family of their own
        raise ValueError(f"{where}: cannot be read as YAML: {' '.join(str(error).split())}") from error


@contextmanager
def _named_errors(where: str) -> Iterator[None]:
    """What OmegaConf refuses, as one line with the key and where it was written."""
    try:
        yield
    except (ConfigKeyError, ConfigAttributeError) as error:
        fields = getattr(error.object_type, "__dataclass_fields__", {})
        raise ValueError(
            f"{where}: unknown key {error.full_key!r}; known here: {', '.join(fields) or 'nothing'}."
        ) from error
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{where}: {key}{_first_line(error)}") from error
    except (TypeError, ValueError, IndexError) as error:  # a list where keys belong, or the other way round
        raise ValueError(f"{where}: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _check(config: TrainConfig, where: str) -> None:
    """What types cannot say."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{where}: {message}")

    _check_numbers(config, require)
    init = config.init_from
    parts = init.tower is not None or init.language_model is not None
    require((init.checkpoint is None) == parts, "init_from needs either checkpoint, or tower and language_model.")
    require(
        not parts or (init.tower is not None and init.language_model is not None),
        "init_from: a model from parts needs both tower and language_model.",
    )
    require((config.steps is None) != (config.epochs is None), "give exactly one of steps and epochs.")
    require(config.epochs is None or config.samples is not None, "epochs needs samples, the number in one epoch.")
    for key in (
        "steps",
        "epochs",
        "samples",
        "clip_norm",
        "image_size",
        "global_batch",
        "micro_batch",
        "max_tokens",
        "log_every",
    ):
        value = getattr(config, key)
        require(value is None or value > 0, f"{key} is {value}; it must be positive.")
    require(
        config.precision in PRECISIONS, f"precision is {config.precision!r}; expected one of {', '.join(PRECISIONS)}."
    )
    require(0 <= config.warmup_ratio < 1, f"warmup_ratio is {config.warmup_ratio}; expected 0 to 1.")
    optimiser = config.optimiser
    require(len(optimiser.betas) == 2, f"optimiser.betas is {optimiser.betas}; expected two numbers.")
    require(
        all(0 <= beta < 1 for beta in optimiser.betas), f"optimiser.betas is {optimiser.betas}; each is 0 to below 1."
    )
    require(optimiser.eps > 0, f"optimiser.eps is {optimiser.eps}; it must be positive.")
    require(
        config.checkpoint.every_steps > 0 and config.checkpoint.keep_last > 0,
        "checkpoint.every_steps and checkpoint.keep_last must be positive.",
    )
    bad = config.bad_steps
    require(
        bad.max_norm_ratio is None or bad.max_norm_ratio > 1,
        f"bad_steps.max_norm_ratio is {bad.max_norm_ratio}; expected more than 1, or null.",
    )
    require(bad.stop_after > 0, f"bad_steps.stop_after is {bad.stop_after}; it must be positive.")
    trains = config.trainable
    require(
        trains.language in (True, False, LORA),
        f"trainable.language is {trains.language!r}; expected true, false or {LORA}.",
    )
    require(
        bool(trains.vision or trains.projector or trains.language), "trainable: nothing is; set a component to true."
    )
    require(config.lora.base in (None, INT4), f"lora.base is {config.lora.base!r}; expected null or {INT4}.")
    require(
        config.lora.base is None or trains.language == LORA,
        f"lora.base is {config.lora.base}, but trainable.language is {trains.language}: weights in four bits cannot "
        f"learn, only adapters on them; set trainable.language to {LORA}, or lora.base to null.",
    )
    if trains.language == LORA:
        require(init.checkpoint is not None, "trainable.language: lora adapts a checkpoint; name it in init_from.")
        _check_lora(config.lora, require)
    if config.answers is not None:
        _check_answers(config.answers, config.data, require)
    _check_data(config.data, require)


def _check_numbers(config: TrainConfig, require: Any) -> None:
    settings = flat_settings(config)
    for key, value in settings.items():
        for number in value if isinstance(value, list) else [value]:
            require(
                not isinstance(number, float) or math.isfinite(number), f"{key} is {number}; expected a finite number."
            )
    for key in ("lr.vision", "lr.projector", "lr.language", "optimiser.weight_decay"):
        require(settings[key] >= 0, f"{key} is {settings[key]}; it must not be negative.")
    require(0 <= config.seed < 1 << 31, f"seed is {config.seed}; expected 0 to {(1 << 31) - 1}.")


def _check_lora(lora: LoraConfig, require: Any) -> None:
    require(lora.rank > 0, f"lora.rank is {lora.rank}; it must be positive.")
    require(lora.alpha > 0, f"lora.alpha is {lora.alpha}; it must be positive.")
    require(0 <= lora.dropout < 1, f"lora.dropout is {lora.dropout}; expected 0 to 1.")


def _check_answers(answers: AnswersConfig, data: DataConfig, require: Any) -> None:
    for key in ("every_steps", "count", "max_new_tokens"):
        value = getattr(answers, key)
        require(value > 0, f"answers.{key} is {value}; it must be positive.")
    form = answers.form
    require(form in (None, *FORMS), f"answers.form is {form!r}; expected one of {', '.join(FORMS)}.")
    form = form if form is not None else data.form
    require(form != "text", "answers: samples of the form text have nothing to ask; set answers.form to another.")


def _check_data(data: DataConfig, require: Any) -> None:
    require(bool(data.sources), "data.sources is empty; list at least one with name and shards.")
    names = [source.name for source in data.sources]
    require(len(set(names)) == len(names), f"data.sources: names repeat ({', '.join(names)}).")
    require(data.workers >= 0, f"data.workers is {data.workers}; 0 or more.")
    require(data.shuffle_buffer >= 1, f"data.shuffle_buffer is {data.shuffle_buffer}; 1 (no shuffling) or more.")
    fraction = data.max_broken_fraction
    require(0 <= fraction <= 1, f"data.max_broken_fraction is {fraction}; expected 0 to 1.")
    for source in data.sources:
        form = source.form if source.form is not None else data.form
        require(form in FORMS, f"the form of source {source.name!r} is {form!r}; expected one of {', '.join(FORMS)}.")
        require(source.weight > 0, f"the weight of source {source.name!r} is {source.weight}; it must be positive.")
        require(
            source.max_samples is None or source.max_samples > 0,
            f"max_samples of source {source.name!r} is {source.max_samples}; it must be positive.",
        )
