"""The JSON files of a checkpoint: read within bounds, and their numbers checked before anything is made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..arguments import as_float, as_int, one_line, shown

_MAX_BYTES = 1 << 26  # an index of a million tensors
MAX_EXPERTS = 1 << 12  # of a layer
_SECTIONS = ("text_config", "vision_config", "connector_config")
_SIZES = {  # by name in any layout's configuration: the least and the most that it may be
    "num_hidden_layers": (1, 1000),
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "vocab_size": (1, 1 << 24),
    "max_position_embeddings": (1, 1 << 30),
    "image_size": (1, 1 << 14),
    "patch_size": (1, 1 << 14),
    "image_token_id": (0, 1 << 24),
    "image_token_index": (0, 1 << 24),
    "feature_layer": (-1000, 1000),
    "num_labels": (0, 1 << 16),
    "num_experts": (0, MAX_EXPERTS),
    "num_tokens": (1, 1 << 16),  # of a connector, as are the next
    "num_layers": (1, 1000),
    "num_heads": (1, 1 << 12),
    "every": (1, 1000),
}
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "rope_theta")


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: there is no such file, it is too large, or it holds no JSON object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        if (num_bytes := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"it has {num_bytes:,} bytes, expected {_MAX_BYTES:,} at most")
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read: it is nested too deeply.") from error
    except (OSError, ValueError) as error:  # JSON's and Unicode's are ValueErrors
        raise ValueError(f"{path} cannot be read: {one_line(error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no configuration, but {shown(content)}.")
    return content


def check_numbers(config: dict[str, Any], path: Path) -> None:
    """Check the sizes in a configuration of any layout, which memory is later taken by.

    Raises:
        ValueError: one is of another type or out of its range.
    """
    for section, values in [("", config), *((f"{name}.", config.get(name)) for name in _SECTIONS)]:
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {section[:-1]} is {shown(values)}; expected an object.")
        for name, (least, most) in _SIZES.items():
            if values.get(name) is not None:
                as_int(values[name], f"{path}: {section}{name}", least, most)
        for name in _POSITIVE:
            if values.get(name) is not None and as_float(values[name], f"{path}: {section}{name}") <= 0:
                raise ValueError(f"{path}: {section}{name} is {values[name]}; it must be greater than 0.")
