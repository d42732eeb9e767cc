"""Checkpoints in the official release's, llava-hf's and the native layout: reading any of them, and converting."""

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
