"""A run's checkpoints: written atomically, verified by checksums, and found by their step.

`run_dir/step-00001000/` is a model directory that `from_pretrained` takes, or PEFT's for adapters, with `config.yaml`,
`training_state.pt` and the SHA-256 of all files (`sha256sum -c SHA256SUMS`); `run_dir/final/` is the finished model,
and `run_dir/best` a link to the checkpoint with the lowest held-out loss.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from yi_vl.arguments import one_line
from yi_vl.files import atomic_path, sha256, sync_to_disk
from yi_vl.generation import set_end_tokens_
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

if TYPE_CHECKING:
    from .lora import Adapters

STATE_FILE = "training_state.pt"
SUMS_FILE = "SHA256SUMS"
FINAL = "final"
BEST = "best"
_DAMAGED = "damaged-"  # prefix of a checkpoint that must not be resumed from


def save_checkpoint(
    directory: Path, model: YiVLForConditionalGeneration | Adapters, weights: dict[str, Tensor],
    processor: YiVLProcessor, config_yaml: str, state: dict[str, Any] | None,
) -> None:  # fmt: skip
    """Write a checkpoint under a temporary name, flush it to the disk, and rename it.

    Args:
        model: the whole model, or its adapters.
        weights: the model's full state dict; its own parameters may be sharded over ranks.
        state: what resuming needs besides the weights; None for a finished model.

    Raises:
        ValueError: it cannot be written; earlier checkpoints are untouched.
    """
    try:
        with atomic_path(directory, flush=True) as temporary:
            temporary.mkdir()
            if isinstance(model, YiVLForConditionalGeneration) and model.generation_config is not None:
                set_end_tokens_(model.generation_config, processor.tokenizer, processor.chat_format)
            model.save_pretrained(temporary, state_dict=weights)
            processor.save_pretrained(temporary)
            (temporary / "config.yaml").write_text(config_yaml, encoding="utf-8")
            if state is not None:
                torch.save(state, temporary / STATE_FILE)
                _write_sums(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library reports a full disk in its own way
        if "DataLoader worker" in str(error):  # torch's signal handler raises wherever the process is when one dies
            raise
        raise ValueError(
            f"The checkpoint {directory} cannot be written: {one_line(error)}; earlier ones are untouched."
        ) from error


def newest_good(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is intact (None if there is no checkpoint), and a line about each damaged newer one.

    Damaged ones are renamed, so that later saves do not meet them.

    Raises:
        ValueError: all checkpoints are damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(run_dir)):
        reason = _damage(path)
        if reason is None:
            return path, [_rename_damaged(*entry) + f"; resuming from {path} instead." for entry in damaged]
        damaged.append((path, reason))
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
        raise ValueError(f"No checkpoint in {run_dir} is whole ({reasons}); delete them, or take another run_dir.")
    return None, []


def load_state(directory: Path, lazily: bool = False) -> dict[str, Any]:
    """The `state` that `save_checkpoint` was given.

    Args:
        lazily: leave the tensors on the disk until they are used.
    """
    state: dict[str, Any] = torch.load(directory / STATE_FILE, map_location="cpu", weights_only=True, mmap=lazily)
    return state


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints that a run can resume from, oldest first."""
    return sorted(run_dir.glob("step-*"))


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a `checkpoint_path`."""
    return int(checkpoint.name.removeprefix("step-"))


def delete_old(run_dir: Path, keep_last: int) -> None:
    """Delete all but the best and the newest `keep_last` checkpoints, and the remains of interrupted saves."""
    best = best_checkpoint(run_dir)
    old = [path for path in checkpoints(run_dir)[:-keep_last] if path != best]
    for path in (*old, *run_dir.glob(".*.tmp")):
        shutil.rmtree(path, ignore_errors=True)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that `run_dir/best` links to; None if there is none."""
    link = run_dir / BEST
    return run_dir / os.readlink(link) if link.is_symlink() and link.is_dir() else None


def is_best(run_dir: Path, loss: float | None, validation: dict[int, dict[str, Any]]) -> bool:
    """Whether a held-out loss is lower than that of the best checkpoint so far.

    Args:
        validation: the rows of earlier steps; see `metrics.validation_rows`.
    """
    best = best_checkpoint(run_dir)
    before = validation.get(step_of(best), {}).get("validation_loss") if best is not None else None
    return loss is not None and (before is None or loss < before)


def mark_best(run_dir: Path, step: int, keep_last: int) -> None:
    """Link `run_dir/best` to the checkpoint of a step, and delete old ones, the best before it among them.

    The link is replaced in one step, so it always leads to a complete checkpoint.

    Raises:
        ValueError: the file system cannot hold the link.
    """
    link, temporary, directory = run_dir / BEST, run_dir / f".{BEST}.tmp", checkpoint_path(run_dir, step)
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(directory.name)
        if link.is_dir() and not link.is_symlink():  # a program that copied the run has followed the link
            shutil.rmtree(link)
        os.replace(temporary, link)
        sync_to_disk(run_dir)
    except OSError as error:
        raise ValueError(
            f"{link} cannot be linked to {directory.name}: {one_line(error)}; set checkpoint.keep_best to false."
        ) from error
    delete_old(run_dir, keep_last)


def last_checkpoint_line(run_dir: Path) -> str:
    """A line for the user about where a run would resume."""
    saved = checkpoints(run_dir)
    if not saved:
        return "No checkpoint was saved yet; started again, the run begins from step 0."
    return f"The last good checkpoint is {saved[-1]}; started again, the run resumes from it."


def rng_state() -> dict[str, Any]:
    """All random states of this process, in types that load with weights_only."""
    state: Any = np.random.get_state()  # a tuple, as `legacy` is true
    algorithm, numbers, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [algorithm, numbers.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # this rank's GPU
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    algorithm, numbers, *rest = state["numpy"]
    np.random.set_state((algorithm, np.array(numbers, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():  # the run may resume with fewer GPUs, or none
        torch.cuda.set_rng_state(state["cuda"][0])


def _rename_damaged(path: Path, reason: str) -> str:
    aside = path.with_name(_DAMAGED + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return f"{path} is damaged ({reason}) and now called {aside.name}"


def _write_sums(directory: Path) -> None:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(directory).as_posix()}\n" for path in paths]
    (directory / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def _damage(directory: Path) -> str | None:
    """The reason why a checkpoint is damaged; None if all files match their checksums."""
    try:
        lines = (directory / SUMS_FILE).read_text(encoding="utf-8").splitlines()
        for line in lines:
            expected, _, name = line.partition("  ")
            if sha256(directory / name) != expected:
                return f"{name} is not as it was written"
    except (OSError, UnicodeDecodeError) as error:
        return " ".join(str(error).split())
    return None if lines else f"{SUMS_FILE} is empty"
