"""From a folder or a hub id to a model and its processor, or one line that says why not.

Layouts are told apart by what config.json holds, never by a name; a loader for another layout branches off here.
Called by predict.py and cli.py; calls config.py, model.py and processor.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import cached_file

from .config import YiVLConfig
from .model import YiVLForConditionalGeneration
from .processor import YiVLProcessor

_BUNDLED = Path(__file__).parent / "nano"
_WHAT_TO_GIVE = "Give a folder that `save_pretrained` or the trainer wrote, or the hub id of one."
_SMALL_PARAMETERS = 200_000_000  # below this fp32 on a CPU: 4.7 ms per nano token, in bf16 6.2 and on many CPUs more


def load_model(
    path: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """A model in evaluation mode, and its processor.

    Args:
        path: a folder or hub id in this project's format; the bundled nano by default.
        device: "cpu", "cuda:1", ...; "auto" spreads the model over all there is. By default the GPU, else the CPU.
        dtype: of the weights. By default bfloat16, but float32 for a small model on a CPU.

    Raises:
        ValueError: there is no such model, it is in another format, it is incomplete, or its parts do not fit together.
    """
    source = find(path)
    read_config(source)
    model = _load_weights(source, device or _default_device(), dtype or "auto")
    if dtype is None:
        is_small_on_cpu = model.device.type == "cpu" and model.num_parameters() < _SMALL_PARAMETERS
        wanted = torch.float32 if is_small_on_cpu else torch.bfloat16
        if model.dtype != wanted:  # a model spread over devices must not be touched without need
            model.to(dtype=wanted)  # type: ignore[call-arg]
    try:
        processor = YiVLProcessor.from_pretrained(source)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: the tokenizer or the image settings cannot be loaded: {_one_line(error)}"
        ) from error
    return model, processor


def find(path: str | os.PathLike | None) -> str:
    """A model folder, or a hub id; the bundled model's folder for None."""
    if path is None:
        if not (_BUNDLED / "config.json").exists():
            raise ValueError(
                f"The bundled nano model is not in this installation ({_BUNDLED} has no config.json). Train it "
                "(`python -m train.nano`), or name another model."
            )
        return str(_BUNDLED)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; a model is a folder with a config.json, or a hub id.")
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise ValueError(f"{path}: there is no such folder, and a hub id has the form owner/name.")
    return str(path)


def read_config(source: str) -> YiVLConfig:
    """The configuration of a model folder or hub id; only its config.json is read.

    Raises:
        ValueError: there is none, or it is of another format.
    """
    file = Path(source) / "config.json" if os.path.isdir(source) else _fetch_config(source)
    if not file.exists():
        raise ValueError(f"{source} has no config.json, so it is not a model. {_WHAT_TO_GIVE}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error
    if not isinstance(found, dict) or found.get("model_type") != YiVLConfig.model_type:
        raise ValueError(
            f"{source} holds {_describe_layout(found)}, expected a config.json with model_type "
            f"{YiVLConfig.model_type!r}. {_WHAT_TO_GIVE}"
        )
    return YiVLConfig.from_dict(found)


def check_fit(config: YiVLConfig, processor: YiVLProcessor) -> None:
    """Raise when model and processor were not made for each other."""
    vision = config.vision_config
    for what, in_model, in_processor in (
        ("the image token's id", config.image_token_id, processor.image_token_id),
        ("the image size in pixels", vision.image_size, processor.image_processor.size_px),
        ("the patch size in pixels", vision.patch_size, processor.patch_size),
    ):
        if in_model != in_processor:
            raise ValueError(
                f"Model and processor do not fit: {what} is {in_model} in one, {in_processor} in the other."
            )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(processor.tokenizer)} tokens, the model only {config.text_config.vocab_size}."
        )


def _fetch_config(hub_id: str) -> Path:
    try:
        return Path(str(cached_file(hub_id, "config.json")))
    except OSError as error:
        raise ValueError(
            f"{hub_id} is no folder here, and its config.json cannot be had from the hub either: {_one_line(error)}. "
            + _WHAT_TO_GIVE
        ) from error


def _describe_layout(found: Any) -> str:
    """Which layout a config.json is of, by its content: where loaders for further layouts branch off."""
    if not isinstance(found, dict) or "model_type" not in found:
        return "a config.json without a model_type"
    if any(key.startswith("mm_") for key in found):
        return "a model in the official Yi-VL layout (keys named mm_*), which must be converted first"
    if found["model_type"] == "llava" and "vision_config" in found:
        return "a model in transformers' llava layout, which must be converted first"
    return f"a model of type {found['model_type']!r}"


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _load_weights(source: str, device: str | torch.device, dtype: torch.dtype | str) -> YiVLForConditionalGeneration:
    try:
        loaded: Any = YiVLForConditionalGeneration.from_pretrained(
            source, dtype=dtype, device_map=device, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:  # absent, of the wrong shape or kind, cut short
        raise ValueError(f"{source}: the weights cannot be loaded: {_one_line(error)}") from error
    model, report = loaded
    problems = [
        f"{len(report[kind])} tensors are {kind.removesuffix('_keys')} ("
        + ", ".join(map(str, sorted(report[kind])))
        + ")"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report[kind]
    ]
    if problems:
        raise ValueError(f"{source}: the weights do not fit config.json: {'; '.join(problems)}.")
    return model.eval()


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".: ")
