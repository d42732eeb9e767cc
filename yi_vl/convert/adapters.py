"""LoRA adapters, as the trainer and PEFT save them, merged into the checkpoint that they adapt, tensor by tensor.

A folder of adapters names its base in adapter_config.json. Called by loading.py; calls files.py and source.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import as_float, as_int
from .files import WeightFiles
from .json_files import read_json
from .names import TOWER
from .source import Checkpoint, LazyTensor, Piece

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN = {  # what a merge by `weight + scale * B @ A` would get wrong
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
}


def holds_adapters(folder: Path) -> bool:
    """Whether a folder is one of adapters, not of a whole model."""
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The folder or hub id of what the adapters adapt.

    Raises:
        ValueError: they do not say, or are of a kind that cannot be merged.
    """
    return str(_read_config(folder)["base_model_name_or_path"])


def merge(base: Checkpoint, folder: Path) -> Checkpoint:
    """`base` with its weights changed as the adapters in `folder` say, when they are read.

    Raises:
        ValueError: the adapters are damaged, or are not of this model.
    """
    config = _read_config(folder)
    files = WeightFiles.of(folder / _WEIGHTS)
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = dict(base.tensors)
    unknown = []
    for stored in files.entries:
        name = stored.removeprefix(_PREFIX)
        target = name.replace(".lora_A.", ".")
        if ".lora_B." in name:
            if stored.replace(".lora_B.", ".lora_A.") not in files.entries:
                unknown.append(stored)
        elif target not in tensors or not _fits(tensors[target], files, stored):
            unknown.append(stored)
        elif target == name:
            tensors[name] = replace(tensors[name], pieces=(Piece(files, stored),), added_rows=None)
        else:
            tensors[target] = replace(tensors[target], change=_adding(files, stored, scale))
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} of its tensors are not adapters of {base.folder}: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}. base_model_name_or_path in {_CONFIG} must name the model that they "
            "were trained on."
        )
    tower_learned = any(name.removeprefix(_PREFIX).startswith(TOWER) for name in files.entries)
    return replace(base, tensors=tensors, tower_copy={} if tower_learned else base.tower_copy)


def _fits(tensor: LazyTensor, files: WeightFiles, stored: str) -> bool:
    """Whether a whole tensor, or a pair A (rank, inputs), B (outputs, rank), has the shape of what it changes."""
    shape = files.entries[stored].shape
    if ".lora_A." not in stored:
        return shape == tuple(tensor.shape)
    other = files.entries.get(stored.replace(".lora_A.", ".lora_B."))
    return other is not None and (other.shape[0], shape[1]) == tuple(tensor.shape) and other.shape[1] == shape[0]


def _adding(files: WeightFiles, stored: str, scale: float) -> Callable[[Tensor], Tensor]:
    return partial(_add_product, files=files, names=(stored.replace(".lora_A.", ".lora_B."), stored), scale=scale)


def _add_product(weight: Tensor, files: WeightFiles, names: tuple[str, str], scale: float) -> Tensor:
    """weight + scale B A, rounded once."""
    left, right = (torch.empty(files.entries[name].shape) for name in names)
    for name, factor in zip(names, (left, right), strict=True):
        files.read_into(name, factor)
    return torch.addmm(weight.float(), left, right, alpha=scale).to(weight.dtype)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} describes no LoRA adapters; others cannot be merged.")
    for key, plain in _PLAIN.items():
        if config.get(key, plain) != plain:
            raise ValueError(f"{path}: {key} is {config[key]!r}; only adapters with {plain!r} can be merged.")
    missing = [key for key in ("r", "lora_alpha", "base_model_name_or_path") if not config.get(key)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    as_int(config["r"], f"{path}: r", 1)
    as_float(config["lora_alpha"], f"{path}: lora_alpha")
    return config
