"""Checkpoints: complete, atomic, found without being named.

`run_dir/step-00001000/` is a model directory that `from_pretrained` takes, with `config.yaml` and `training_state.pt`
beside the weights; `run_dir/final/` is the finished model. A directory gets its name when all of it is on the disk.
Called by loop.py; calls yi_vl's model and processor.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

STATE_FILE = "training_state.pt"
FINAL = "final"


def save_checkpoint(
    directory: Path, model: YiVLForConditionalGeneration, processor: YiVLProcessor, config_yaml: str,
    state: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Write a checkpoint under a temporary name, flush it to the disk, then give it its name.

    Args:
        state: what continuing needs besides the weights; None for a finished model.

    Raises:
        ValueError: the disk does not take it; checkpoints written earlier are untouched.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
        if state is not None:
            torch.save(state, temporary / STATE_FILE)
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        _flush(directory.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(
            f"The checkpoint {directory} cannot be written: {error}; earlier ones are untouched."
        ) from error


def load_state(directory: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = directory / STATE_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever it comes to
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}); delete {directory} to continue from the one before."
        ) from error


def load_model(directory: str | Path) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """A checkpoint's model, in float32, and its processor.

    Raises:
        ValueError: there is no checkpoint of ours in `directory`, or it is damaged.
    """
    path = Path(directory)
    processor = load_processor(path)
    try:
        model, report = YiVLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error
    wrong = {kind: sorted(map(str, entries))[:3] for kind, entries in report.items() if entries}
    if wrong:
        raise ValueError(f"{path} does not fit its own config.json: {wrong}.")
    return model, processor


def load_processor(path: Path) -> YiVLProcessor:
    """A checkpoint's processor.

    Raises:
        ValueError: there is no checkpoint of ours in `path`.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no checkpoint (no config.json): first train what this run starts from.")
    try:
        return YiVLProcessor.from_pretrained(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The processor in {path} cannot be loaded: {str(error).splitlines()[0]}") from error


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints that a run can go on from, oldest first."""
    return sorted(path for path in run_dir.glob("step-*") if (path / STATE_FILE).is_file())


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"step-{step:08d}"


def delete_old(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints, and what interrupted saves left behind."""
    for path in (*checkpoints(run_dir)[:-keep_last], *run_dir.glob(".*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def rng_state() -> dict[str, Any]:
    """All random states of this process, in types that load with weights_only."""
    kind, keys, *rest = np.random.get_state()  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
