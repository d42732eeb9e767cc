"""The model and processor that a run's `init_from` and `image_size` describe."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from yi_vl.arguments import one_line
from yi_vl.checkpoint import holds_adapters
from yi_vl.checkpoint.assemble import from_parts, replace_connector_
from yi_vl.checkpoint.find import find
from yi_vl.checkpoint.fit import check_fit, check_tiles
from yi_vl.checkpoint.load import fetch, load_model, load_processor, read_config
from yi_vl.config import OpenClipVisionConfig, YiVLConfig, check_rope
from yi_vl.connector.config import ConnectorConfig as ModelConnectorConfig
from yi_vl.files import sha256
from yi_vl.image import YiVLImageProcessor
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

from .config import INT4, LORA, ConnectorConfig, RopeConfig, TrainConfig
from .experts import check_experts
from .qlora import read_int4

_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def initial_model(config: TrainConfig, device: torch.device) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """The model, its position grid resized to `image_size` where that differs, and its processor.

    Its rotary positions are those of `init_from.rope`, its chat format that of `chat_format`, the tiles of images those
    of `image.tiles`, where they are given.

    It is in float32 on the CPU; with an int4 base as of `read_int4`, on `device`.

    Raises:
        ValueError: the weights are not there or do not fit, or cannot be quantized; or the tokenizer lacks a token of
            the chat format.
    """
    init = config.init_from
    if init.checkpoint is not None:
        if config.trainable.language == LORA:
            _check_adaptable(init.checkpoint)
        if config.lora.base == INT4:
            _check_unquantized(init.checkpoint)
            check_experts(read_config(find(init.checkpoint)).text_config, config, init.checkpoint)
            model, processor = read_int4(init.checkpoint, config.precision, device)
            check_fit(model.config, processor)
        else:
            model, processor = load_float32(init.checkpoint)
    else:
        assert init.tower is not None and init.language_model is not None  # load_config checks it
        model, tokenizer = from_parts(init.tower.name, init.tower.pretrained, init.language_model, config.image_size)
        image_processor = YiVLImageProcessor(config.image_size)
        processor = YiVLProcessor(image_processor, tokenizer, patch_size=model.config.vision_config.patch_size)
    if init.connector is not None:
        replace_connector_(model, ModelConnectorConfig(**asdict(init.connector)))
    processor.num_image_tokens = model.config.connector_config.num_prompt_tokens
    if model.config.vision_config.image_size != config.image_size:
        model.model.vision_tower.resize_grid_(config.image_size)
        model.config.vision_config.image_size = config.image_size
    processor.image_processor.size_px = config.image_size
    _as_configured(processor, config)
    check_tiles(model.config, processor.image_processor.max_tiles)
    if init.rope is not None:
        _set_model_rope_(model, init.rope)
        num_positions = model.config.text_config.max_position_embeddings
        processor.tokenizer.model_max_length = max(num_positions, processor.tokenizer.model_max_length)
    check_positions(model.config, config)
    return model, processor


def load_float32(path: str | Path) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """Any model that `yi_vl.load` reads, in float32 on the CPU, and its processor.

    Raises:
        ValueError: as `yi_vl.load`, or the model is quantized.
    """
    _check_unquantized(path)
    model, processor = load_model(path, device="cpu", dtype=torch.float32)
    check_fit(model.config, processor)
    return model, processor


def fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits of a model's weight files, whatever their names: the same for copies.

    Raises:
        ValueError: the model is not there, or has no weight files.
    """
    folder = fetch(find(path), with_weights=True)
    files = sorted(file for file in folder.rglob("*") if file.suffix in _WEIGHT_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{path} holds no weights ({', '.join(_WEIGHT_SUFFIXES)}).")
    return hashlib.sha256("".join(sorted(map(sha256, files))).encode()).hexdigest()[:16]


def set_connector_(model_config: YiVLConfig, connector: ConnectorConfig | None) -> None:
    """Change the connector in a model's configuration; None changes nothing."""
    if connector is not None:
        model_config.set_connector_(ModelConnectorConfig(**asdict(connector)))


def set_rope_(text_config: Any, rope: RopeConfig | None) -> None:
    """Change the rotary positions in a language model's configuration; None changes nothing.

    `factor` is relative to the positions that the model was first trained with.
    """
    if rope is None:
        return
    parameters = dict(text_config.rope_parameters)
    trained = parameters.get("original_max_position_embeddings", text_config.max_position_embeddings)
    theta = rope.theta if rope.theta is not None else parameters["rope_theta"]
    max_positions = rope.max_positions
    if rope.scaling is not None and rope.factor is not None:
        parameters = {"rope_type": rope.scaling, "factor": rope.factor}
        if rope.scaling == "yarn":
            parameters["original_max_position_embeddings"] = trained
        if max_positions is None:
            max_positions = int(trained * rope.factor)
    text_config.rope_parameters = parameters | {"rope_theta": theta}
    if max_positions is not None:
        text_config.max_position_embeddings = max_positions
    check_rope(text_config)


def _set_model_rope_(model: YiVLForConditionalGeneration, rope: RopeConfig) -> None:
    set_rope_(model.config.text_config, rope)
    rotary = model.model.language_model.rotary_emb
    model.model.language_model.rotary_emb = type(rotary)(model.config.text_config).to(rotary.inv_freq.device)


def check_positions(model_config: YiVLConfig, config: TrainConfig) -> None:
    """
    Raises:
        ValueError: samples may be longer than what the language model has positions for.
    """
    limit = model_config.text_config.max_position_embeddings
    if config.max_tokens > limit:
        raise ValueError(
            f"max_tokens is {config.max_tokens}, but the language model has {limit} positions; see init_from.rope for "
            "more."
        )


def initial_processor(config: TrainConfig) -> YiVLProcessor:
    """The processor alone: no weights are read.

    Raises:
        ValueError: it is not there.
    """
    init = config.init_from
    if init.checkpoint is not None:
        processor = load_processor(init.checkpoint)
        processor.image_processor.size_px = config.image_size
        return _with_settings(processor, config)
    assert init.tower is not None and init.language_model is not None
    try:
        tokenizer = prepare_tokenizer(init.language_model)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of {init.language_model!r} cannot be loaded: {one_line(error)}.") from error
    patch_size = OpenClipVisionConfig.from_open_clip(init.tower.name).patch_size
    processor = YiVLProcessor(YiVLImageProcessor(config.image_size), tokenizer, patch_size=patch_size)
    return _with_settings(processor, config)


def _with_settings(processor: YiVLProcessor, config: TrainConfig) -> YiVLProcessor:
    if (connector := config.init_from.connector) is not None:
        processor.num_image_tokens = ModelConnectorConfig(**asdict(connector)).num_prompt_tokens
    return _as_configured(processor, config)


def _as_configured(processor: YiVLProcessor, config: TrainConfig) -> YiVLProcessor:
    """With the run's chat format and tiles, where it has any."""
    if config.chat_format is not None:
        processor.set_chat_format_(config.chat_format)  # type: ignore[arg-type]  # which config_file has checked
    if config.image.tiles is not None:
        processor.image_processor.max_tiles = config.image.tiles
    return processor


def _check_unquantized(path: str | Path) -> None:
    if getattr(read_config(find(path)), "quantization_config", None) is not None:
        raise ValueError(f"{path} is quantised and cannot be trained; start from the original (see lora.base).")


def _check_adaptable(path: str | Path) -> None:
    if holds_adapters(fetch(find(path), with_weights=False)):
        raise ValueError(
            f"{path} holds adapters, and adapters of adapters cannot be loaded. Merge them first "
            f"(yi-vl convert {path} MERGED) and start from the merged model."
        )
