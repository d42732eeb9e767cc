"""LoRA adapters, as the trainer and PEFT save them, merged into the checkpoint that they adapt, tensor by tensor.

A folder of adapters names its base in adapter_config.json. Only options whose merge is exactly what PEFT computes are
taken; any other, also one of a PEFT that is not out yet, is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import shown
from .json_files import read_json
from .key_map import EMBEDDING, HEAD, TOWER
from .read import Checkpoint, Piece
from .weight_files import WeightFiles

_CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B)(?:\.(weight|bias))?$")
# Initial values that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract theirs
# from it: their factors belong to weights that are in no file.
_INITIAL = (True, False, "gaussian", "eva", "mica", "orthogonal")
# What adapters were trained with, or where; the factors in the file say all that matters of it.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_bias",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_MERGED = {"alpha_pattern", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_rslora"}


def holds_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters, not a whole model."""
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The folder or hub id of what the adapters adapt.

    Raises:
        ValueError: adapter_config.json does not name it, or describes adapters that cannot be merged.
    """
    return str(_read_config(folder)["base_model_name_or_path"])


def merge(base: Checkpoint, folder: Path) -> Checkpoint:
    """`base` with the adapters in `folder` merged into its tensors when they are read.

    Raises:
        ValueError: the adapters are damaged, or are not of this model, or cannot be merged.
    """
    config = _read_config(folder)
    files = WeightFiles.of(
        next((folder / name for name in _WEIGHTS if (folder / name).is_file()), folder / _WEIGHTS[0])
    )
    tensors, targets, unknown = dict(base.tensors), set(), []
    replacements, factors = _sort_tensors(files)
    for stored, target in replacements.items():
        targets.add(target)
        if target not in tensors or files.entries[stored].shape != tuple(tensors[target].shape):
            unknown.append(stored)
        else:
            tensors[target] = replace(tensors[target], pieces=(Piece(files, stored),), added_rows=None)
    for module, parts in factors.items():
        changes = _changes(files, parts, _scale(folder, config, module, files, parts))
        for suffix, (shape, change) in changes.items():
            target = f"{module}.{suffix}"
            targets.add(target)
            if shape is None or target not in tensors or tuple(tensors[target].shape) != shape:
                unknown.append(f"{module} (LoRA of its {suffix})")
            else:
                tensors[target] = replace(tensors[target], change=change)
    _check(base, folder, targets, unknown)
    is_tower_trained = any(name.startswith(TOWER) for name in targets)
    return replace(base, tensors=tensors, tower_copy={} if is_tower_trained else base.tower_copy)


def _sort_tensors(files: WeightFiles) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """The model's tensor that each stored one replaces; and the factors of each module, by their names in PEFT."""
    replacements: dict[str, str] = {}
    factors: dict[str, dict[str, str]] = {}
    for stored in files.entries:
        name = stored.removeprefix(_PREFIX)
        if match := _LORA.search(name):
            factor = match[1] + (".bias" if match[2] == "bias" else "")
            factors.setdefault(name[: match.start()], {})[factor] = stored
        else:
            replacements[stored] = name.replace(".base_layer.", ".")
    return replacements, factors


_Change = tuple["tuple[int, ...] | None", Callable[[Tensor], Tensor]]


def _changes(files: WeightFiles, parts: Mapping[str, str], scale: float) -> dict[str, _Change]:
    """The changes of a module's tensors, by their last name; each with the shape of the tensor that it changes.

    The shape is None if the factors do not fit each other.
    """
    is_embedding = "embedding_A" in parts or "embedding_B" in parts
    first, second = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    shape = None
    if parts.keys() - {"B.bias"} == {first, second}:
        inner, outer = (files.entries[parts[name]].shape for name in (first, second))  # (rank, inputs), (outputs, rank)
        if len(inner) == len(outer) == 2 and inner[0] == outer[1]:
            shape = (inner[1], outer[0]) if is_embedding else (outer[0], inner[1])
    names = (parts.get(second, ""), parts.get(first, ""))
    changes: dict[str, _Change] = {
        "weight": (shape, partial(_add_product, files=files, names=names, scale=scale, is_transposed=is_embedding))
    }
    if "B.bias" in parts:
        bias = parts["B.bias"]
        changes["bias"] = (files.entries[bias].shape, partial(_add_scaled, files=files, name=bias, scale=scale))
    return changes


def _add_product(
    weight: Tensor, files: WeightFiles, names: tuple[str, str], scale: float, is_transposed: bool
) -> Tensor:
    """weight + scale B A, or its transpose, rounded once."""
    left, right = (_read(files, name) for name in names)
    factors = (right.T, left.T) if is_transposed else (left, right)
    return torch.addmm(weight.float(), *factors, alpha=scale).to(weight.dtype)


def _add_scaled(bias: Tensor, files: WeightFiles, name: str, scale: float) -> Tensor:
    return bias.float().add(_read(files, name), alpha=scale).to(bias.dtype)


def _read(files: WeightFiles, name: str) -> Tensor:
    tensor = torch.empty(files.entries[name].shape, device="cpu")
    files.read_into(name, tensor)
    return tensor


def _scale(folder: Path, config: dict[str, Any], module: str, files: WeightFiles, parts: Mapping[str, str]) -> float:
    """alpha / r of one module, of its own by `rank_pattern` and `alpha_pattern`, matched as PEFT matches them."""
    rank, alpha = (
        next((value for pattern, value in config[patterns].items() if _matches(folder, pattern, module)), config[key])
        for patterns, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    stored = next(
        (files.entries[name].shape[:1] for factor, name in parts.items() if factor in ("A", "embedding_A")), None
    )
    if stored is not None and stored != (rank,):
        raise ValueError(
            f"{folder}: the adapters of {module} have rank {stored[0]}, but {rank} by r and rank_pattern in {_CONFIG}."
        )
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _matches(folder: Path, pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise ValueError(f"{folder / _CONFIG}: {pattern!r} is no regular expression: {error}.") from error


def _check(base: Checkpoint, folder: Path, targets: set[str], unknown: list[str]) -> None:
    if base.config.tie_word_embeddings and targets & {EMBEDDING, HEAD}:
        raise ValueError(
            f"{folder} adapts the embeddings or the head of {base.folder}, which are one tensor there; adapters change "
            "only one of the two, and cannot be merged."
        )
    if unknown:
        raise ValueError(
            f"{folder}: {len(unknown)} of its tensors are not adapters of {base.folder}: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}. base_model_name_or_path in {_CONFIG} must name the model that they "
            "were trained on."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        peft_type = shown(config.get("peft_type"))
        raise ValueError(f"{path} describes no LoRA adapters (peft_type {peft_type}); others cannot be merged.")
    if not config.get("base_model_name_or_path"):
        raise ValueError(f"{path} lacks base_model_name_or_path.")
    if (initial := config.get("init_lora_weights", True)) not in _INITIAL:
        raise ValueError(
            f"{path}: init_lora_weights is {initial!r}, which changed the base's weights when training began. Save the "
            "adapters with PEFT's path_initial_model_for_weight_conversion, or merge them with PEFT."
        )
    for key, value in config.items():
        if key not in _WITHOUT_EFFECT | _MERGED and value not in (None, False, {}, [], ""):
            raise ValueError(
                f"{path}: {key} is {value!r}; adapters with it cannot be merged here, merge them with PEFT."
            )
    config |= {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    ranks = [config.get("r"), *_values(path, config, "rank_pattern")]
    alphas = [config.get("lora_alpha"), *_values(path, config, "alpha_pattern")]
    for key, values, least in (("r", ranks, 1), ("lora_alpha", alphas, -math.inf)):
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                raise ValueError(f"{path}: {key} is {value!r}, expected a number{' from 1 up' if key == 'r' else ''}.")
    return config


def _values(path: Path, config: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(config[key], dict):
        raise ValueError(f"{path}: {key} is {config[key]!r}, expected a value for each pattern of module names.")
    return list(config[key].values())
