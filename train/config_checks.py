"""What a training config must hold beyond its types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

from yi_vl.chat import CHAT_FORMATS

from .config import (
    DPO,
    FROM_MODEL,
    FROM_SHARDS,
    INT4,
    LIKELIHOOD,
    LONG_TEXTS,
    LORA,
    OBJECTIVES,
    PRECISIONS,
    PREFERENCE,
    ROPE_SCALINGS,
    SAMPLE_FORMATS,
    SKIP,
    ConnectorConfig,
    DataConfig,
    DpoConfig,
    GenerationsConfig,
    RopeConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
    ValidationSourceConfig,
    num_steps,
)
from .config_decoder import DistillConfig, ExpertsConfig, check_routing
from .config_flat import flat_settings
from .config_image import check_image
from .schedule import COMPONENTS, SHAPES, component_schedule, num_decay_steps, num_warmup_steps
from .trainable import parse_language

_MIN_ROW_TOKENS = 4  # a piece of a document has two or more, of which all but the first are supervised
_Require = Callable[[bool, str], None]


def check(config: TrainConfig, where: str) -> None:
    """Check what types cannot express.

    Args:
        where: the config's file, for errors.

    Raises:
        ValueError: a value is out of range, or settings contradict each other; one line.
    """

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(f"{where}: {message}")

    _check_numbers(config, require)
    _check_init(config, require)
    check_image(config.image, require)
    require((config.steps is None) != (config.epochs is None), "give exactly one of steps and epochs.")
    require(config.epochs is None or config.samples is not None, "epochs needs samples, the number in one epoch.")
    _check_batch_ramp(config.batch_ramp, require)
    _check_schedule(config, require)
    precisions = ", ".join(PRECISIONS)
    require(config.precision in PRECISIONS, f"precision is {config.precision!r}; expected one of {precisions}.")
    _check_trainable(config, require)
    check_routing(config.experts, require)
    require(
        config.data.long_text == SKIP or config.max_tokens >= _MIN_ROW_TOKENS,
        f"max_tokens is {config.max_tokens}; data.long_text: {config.data.long_text} needs {_MIN_ROW_TOKENS} or more.",
    )
    if config.validation is not None:
        _check_validation(config.validation, config.data, require)
    require(
        config.validation is not None or not config.checkpoint.keep_best,
        "checkpoint.keep_best is true, but there is no validation to choose the best checkpoint by; give validation, "
        "or set checkpoint.keep_best to false.",
    )
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
        "steps", "epochs", "samples", "clip_norm", "neftune", "image_size", "global_batch", "micro_batch", "max_tokens",
        "log_every", "optimizer.eps", "checkpoint.every_steps", "checkpoint.keep_last", "spike_guard.stop_after",
    ):  # fmt: skip
        require(settings[key] is None or settings[key] > 0, f"{key} is {settings[key]}; it must be positive.")
    require(0 <= config.seed < 1 << 31, f"seed is {config.seed}; expected 0 to {(1 << 31) - 1}.")
    betas = config.optimizer.betas
    require(len(betas) == 2, f"optimizer.betas is {betas}; expected two numbers.")
    require(all(0 <= beta < 1 for beta in betas), f"optimizer.betas is {betas}; each is 0 to below 1.")
    ratio = config.spike_guard.max_norm_ratio
    require(ratio is None or ratio > 1, f"spike_guard.max_norm_ratio is {ratio}; expected more than 1, or null.")


def _check_batch_ramp(ramp: list[list[int]], require: _Require) -> None:
    expected = "expected [[step, size], ...] with increasing steps above 0 and positive sizes"
    require(all(len(entry) == 2 for entry in ramp), f"batch_ramp is {ramp}; {expected}.")
    steps = [step for step, _ in ramp]
    is_increasing = all(before < after for before, after in zip([0, *steps], steps))
    require(is_increasing and all(size > 0 for _, size in ramp), f"batch_ramp is {ramp}; {expected}.")


def _check_schedule(config: TrainConfig, require: _Require) -> None:
    schedule, steps = config.schedule, num_steps(config)
    settings = {key: value for key, value in flat_settings(schedule, "schedule.").items() if value is not None}
    for key, value in settings.items():
        name = key.rpartition(".")[2]
        if name == "shape":
            require(value in SHAPES, f"{key} is {value!r}; expected one of {', '.join(SHAPES)}.")
        elif name == "warmup":
            is_known = 0 <= value < 1 or (value >= 1 and value == int(value))
            require(is_known, f"{key} is {value:g}; expected a fraction of the steps below 1, or a number of steps.")
        elif name == "decay_fraction":
            require(0 < value <= 1, f"{key} is {value:g}; expected more than 0, to 1.")
        else:
            require(0 <= value <= 1, f"{key} is {value:g}; expected 0 to 1.")
    for component in COMPONENTS:
        adjusted = component_schedule(schedule, component)
        warmup, decay = num_warmup_steps(adjusted, steps), num_decay_steps(adjusted, steps)
        require(
            warmup <= steps,
            f"schedule: the warm-up of {component} takes {warmup} steps, the run has {steps}; lower schedule.warmup.",
        )
        require(
            warmup + decay <= steps,
            f"schedule: {component} has {warmup} steps of warm-up and {decay} of decay, the run has {steps}; lower "
            "schedule.warmup or schedule.decay_fraction.",
        )


def _check_init(config: TrainConfig, require: _Require) -> None:
    init = config.init_from
    has_parts = init.tower is not None or init.language_model is not None
    require((init.checkpoint is None) == has_parts, "init_from needs either checkpoint, or tower and language_model.")
    is_complete = init.tower is not None and init.language_model is not None
    require(not has_parts or is_complete, "init_from: a model from parts needs both tower and language_model.")
    if init.rope is not None:
        _check_rope(init.rope, require)
    if init.connector is not None:
        _check_connector(init.connector, require)
    is_known = config.chat_format is None or config.chat_format in CHAT_FORMATS
    require(is_known, f"chat_format is {config.chat_format!r}; expected one of {', '.join(CHAT_FORMATS)}, or null.")
    routing = None if config.experts == ExpertsConfig() else config.experts
    for key, value in (
        ("chat_format", config.chat_format),
        ("init_from.rope", init.rope),
        ("init_from.connector", init.connector),
        ("experts", routing),
        ("image.tiles", config.image.tiles),
    ):
        require(
            value is None or config.trainable.language != LORA,
            f"{key} cannot be set with trainable.language: lora: adapters are loaded into the checkpoint that they "
            "adapt, and have its chat format, positions, connector, routing and tiles; leave it out.",
        )


def _check_connector(connector: ConnectorConfig, require: _Require) -> None:
    from yi_vl.connector.config import ConnectorConfig as ModelConnectorConfig  # takes a second to import

    try:
        ModelConnectorConfig(**asdict(connector))
    except ValueError as error:
        require(False, f"init_from.connector: {error}")


def _check_rope(rope: RopeConfig, require: _Require) -> None:
    scalings = ", ".join(ROPE_SCALINGS)
    is_known = rope.scaling is None or rope.scaling in ROPE_SCALINGS
    require(is_known, f"init_from.rope.scaling is {rope.scaling!r}; expected one of {scalings}, or null.")
    require(
        (rope.scaling is None) == (rope.factor is None),
        "init_from.rope: scaling and factor are given together, or not.",
    )
    require(rope.factor is None or rope.factor >= 1, f"init_from.rope.factor is {rope.factor}; expected 1 or more.")
    for key in ("theta", "max_positions"):
        value = getattr(rope, key)
        require(value is None or value > 0, f"init_from.rope.{key} is {value}; it must be positive.")
    is_any = rope.theta is not None or rope.scaling is not None or rope.max_positions is not None
    require(is_any, "init_from.rope is empty; give theta, scaling and factor, or max_positions, or set it to null.")


def _check_trainable(config: TrainConfig, require: _Require) -> None:
    trainable, lora = config.trainable, config.lora
    try:
        trainable.language = parse_language(trainable.language)
    except ValueError as error:
        require(False, str(error))
    language = trainable.language
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


def _check_validation(validation: ValidationConfig, data: DataConfig, require: _Require) -> None:
    sources = validation.sources
    require(bool(sources), "validation.sources is empty; list at least one with name and shards, or omit validation.")
    names = [source.name for source in sources]
    require(len(set(names)) == len(names), f"validation.sources: names repeat ({', '.join(names)}).")
    for key in ("every_steps", "samples"):
        value = getattr(validation, key)
        require(value > 0, f"validation.{key} is {value}; it must be positive.")
    for source in sources:
        key, limit = f"validation.sources.{source.name}", source.max_samples
        require(limit is None or limit > 0, f"{key}.max_samples is {limit}; it must be positive.")
        sample_format = source.format if source.format is not None else data.format
        choices = ", ".join(SAMPLE_FORMATS)
        require(sample_format in SAMPLE_FORMATS, f"{key}.format is {sample_format!r}; expected one of {choices}.")


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
    choices = ", ".join(LONG_TEXTS)
    require(data.long_text in LONG_TEXTS, f"data.long_text is {data.long_text!r}; expected one of {choices}.")
    fraction = data.max_broken_fraction
    require(0 <= fraction <= 1, f"data.max_broken_fraction is {fraction}; expected 0 to 1.")
    for source in data.sources:
        sample_format = source.format if source.format is not None else data.format
        require(
            sample_format in SAMPLE_FORMATS,
            f"the format of source {source.name!r} is {sample_format!r}; expected one of {', '.join(SAMPLE_FORMATS)}.",
        )
        require(
            min(source.weights) >= 0 and max(source.weights) > 0,
            f"the weight of source {source.name!r} is {source.weight}; it must be positive"
            + ("." if source.weights[0] == source.weights[1] else ", or one end of it 0."),
        )
        require(
            source.max_samples is None or source.max_samples > 0,
            f"max_samples of source {source.name!r} is {source.max_samples}; it must be positive.",
        )
    for end, index in (("start", 0), ("end", 1)):
        is_any = any(source.weights[index] > 0 for source in data.sources)
        require(is_any, f"data.sources: all weights are 0 at the {end}; give one source a positive weight there.")


def _check_objective(config: TrainConfig, require: _Require) -> None:
    is_dpo, dpo, lora = config.objective == DPO, config.dpo, config.lora
    expected = ", ".join(OBJECTIVES)
    require(config.objective in OBJECTIVES, f"objective is {config.objective!r}; expected one of {expected}.")
    sources: list[SourceConfig | ValidationSourceConfig] = [*config.data.sources]
    sources += config.validation.sources if config.validation is not None else []
    for source in sources:
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
    _check_distill(config.distill, is_dpo, require)
    references = (FROM_MODEL, FROM_SHARDS)
    require(
        dpo.reference in references, f"dpo.reference is {dpo.reference!r}; expected one of {', '.join(references)}."
    )
    require(not is_dpo or config.neftune is None, f"neftune is for objective {LIKELIHOOD}; with {DPO} set it to null.")
    for key, value in (("chat_format", config.chat_format), ("init_from.rope", config.init_from.rope)):
        require(
            dpo.reference == FROM_MODEL or value is None,
            f"{key} is set, but the log-probabilities that dpo.reference: {FROM_SHARDS} reads are of the model as it "
            f"is; leave it out, or set dpo.reference to {FROM_MODEL}.",
        )
    has_checkpoint = config.init_from.checkpoint is not None
    require(
        not is_dpo or has_checkpoint,
        f"objective: {DPO} compares with the model that it starts from; name a trained one in init_from.checkpoint.",
    )
    require(
        not is_dpo or config.init_from.connector is None,
        f"init_from.connector makes a connector that knows nothing yet, and objective: {DPO} compares with what the "
        "model knows at the start; train it first, and leave init_from.connector out.",
    )
    require(
        dpo.reference == FROM_MODEL or lora.base is None,
        f"dpo.reference is {FROM_SHARDS}, of unquantized weights, but lora.base is {lora.base}; set dpo.reference to "
        f"{FROM_MODEL}, which then takes no memory.",
    )


def _check_distill(distill: DistillConfig, is_dpo: bool, require: _Require) -> None:
    has_teacher, weight, temperature = distill.teacher is not None, distill.weight, distill.temperature
    require(has_teacher or distill == DistillConfig(), "distill has settings, but no teacher; name distill.teacher.")
    require(not has_teacher or not is_dpo, f"distill is for objective {LIKELIHOOD}; with {DPO} leave it out.")
    require(0 < weight <= 1, f"distill.weight is {weight}; expected more than 0, to 1.")
    require(temperature > 0, f"distill.temperature is {temperature}; it must be positive.")
