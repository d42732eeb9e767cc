"""Where a model is, by its name; torch is not needed to find out."""

from __future__ import annotations

import os
from pathlib import Path
from stat import S_ISDIR

from ..arguments import as_path, shown, stat
from .modelscope import check_modelscope, is_modelscope

_BUNDLED = Path(__file__).parents[1] / "nano"


def find(path: str | os.PathLike | None) -> str:
    """A model folder, or a hub id, `ms://owner/name` on ModelScope; the bundled model's folder for None."""
    if path is None:
        if not (_BUNDLED / "config.json").exists():
            raise ValueError(
                f"The bundled nano model is not in this installation ({_BUNDLED} has no config.json). Train it "
                "(`python -m train.nano`), or name another model."
            )
        return str(_BUNDLED)
    if is_modelscope(path):
        return check_modelscope(str(path))
    folder = as_path(path, "the model")
    status = stat(folder, str(path))
    if status is not None and S_ISDIR(status.st_mode):
        return str(folder)
    if status is not None:
        raise ValueError(f"{folder} is a file; a model is a folder with a config.json, or a hub id.")
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise ValueError(f"{shown(str(path))}: there is no such folder, and a hub id has the form owner/name.")
    return str(path)
