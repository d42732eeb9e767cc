"""Checkpoints in the official release's, llava-hf's and the native layout: reading any of them, and converting."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import base_of, holds_adapters, merge
    from .configuration import Layout, layout_of, read_configuration
    from .read import Checkpoint, TowerFrom, largest_difference, open_checkpoint, read_processor
    from .write import convert

__all__ = [
    "Checkpoint",
    "Layout",
    "TowerFrom",
    "base_of",
    "convert",
    "holds_adapters",
    "largest_difference",
    "layout_of",
    "merge",
    "open_checkpoint",
    "read_configuration",
    "read_processor",
]
_HOMES = {
    "adapters": ("base_of", "holds_adapters", "merge"),
    "configuration": ("Layout", "layout_of", "read_configuration"),
    "read": ("Checkpoint", "TowerFrom", "largest_difference", "open_checkpoint", "read_processor"),
    "write": ("convert",),
}


def __getattr__(name: str) -> Any:
    """Imported when it is used: a model that is not there is refused before torch is imported."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
