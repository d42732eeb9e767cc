"""The official release, llava-hf's form and ours: reading any of them, and writing one as another, shard by shard.

`names.py` is what tensors are called, `files.py` what lies on disk, `source.py` a checkpoint in our terms, `target.py`
the writing; `adapters.py` merges LoRA adapters into what they adapt. Called by loading.py and cli.py.
"""

from .adapters import base_of, holds_adapters, merge
from .read import (
    Checkpoint,
    Kind,
    TowerFrom,
    kind_of,
    largest_difference,
    open_checkpoint,
    read_configuration,
    read_processor,
)
from .write import convert

__all__ = [
    "Checkpoint",
    "Kind",
    "TowerFrom",
    "base_of",
    "convert",
    "holds_adapters",
    "kind_of",
    "largest_difference",
    "merge",
    "open_checkpoint",
    "read_configuration",
    "read_processor",
]
