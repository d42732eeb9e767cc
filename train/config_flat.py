"""The settings of a training config by their full keys."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any


def flat_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """All settings by their full key; those of a source by its name, as in `data.sources.NAME.weight`."""
    flat: dict[str, Any] = {}
    for field_ in fields(config):
        key, value = f"{prefix}{field_.name}", getattr(config, field_.name)
        if is_dataclass(value):
            flat |= flat_settings(value, f"{key}.")
        elif key in ("data.sources", "validation.sources"):
            for source in value:
                flat |= flat_settings(source, f"{key}.{source.name}.")
        else:
            flat[key] = value
    return flat
