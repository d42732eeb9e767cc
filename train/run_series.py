"""Training runs one after another in one process: each an ordinary one in a folder of its own, its output in train.log.

A finished one leaves `result.json`, and is not repeated.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from yi_vl.files import write_text

from .checkpoint import BEST, FINAL, checkpoints
from .config import TrainConfig
from .config_file import to_yaml
from .spike_guard import DivergedError
from .trainer import train

_RESULT = "result.json"
_LOG = "train.log"


@dataclass(frozen=True)
class Ended:
    """How a run ended that was not stopped.

    seconds: since it was started or resumed.
    """

    seconds: float
    has_diverged: bool


def log_to_files() -> None:
    """Let this process print its own lines alone: what runs and transformers say is in the runs' logs, or left out."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    logging.getLogger().setLevel(logging.INFO)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def train_in_series(config: TrainConfig, name: str) -> Ended:
    """Train or resume a run, and free its memory; what it prints goes to train.log in its folder.

    Args:
        name: of the run, for errors.

    Raises:
        ValueError: the run needs the user's attention.
        SystemExit: a signal was received, and a checkpoint saved.
    """
    directory = Path(config.run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "config.yaml", to_yaml(config))
    start, has_diverged = time.monotonic(), False
    log = directory / _LOG
    try:
        with _output_to(log):
            train(config)
    except DivergedError:
        has_diverged = True
    except ValueError as error:
        raise ValueError(f"run {name}: {error} (log: {log})") from error
    finally:
        free_memory()
    return Ended(round(time.monotonic() - start, 1), has_diverged)


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """Write result.json of a finished run."""
    write_text(directory / _RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def read_result(directory: Path) -> dict[str, Any] | None:
    """What `write_result` wrote, None if the run is not finished.

    Raises:
        ValueError: it is unreadable.
    """
    path = directory / _RESULT
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(result, dict):
            raise TypeError
    except (ValueError, TypeError) as error:
        raise unreadable(directory) from error
    return result


def unreadable(directory: Path) -> ValueError:
    """The error that the result.json of a run is not one."""
    return ValueError(f"{directory / _RESULT} is not a run's result; delete {directory} to repeat the run.")


def delete_models(directory: Path, keeps_final: bool = False) -> None:
    """Delete the checkpoints of a run and, unless it is kept, the finished model; config, metrics and result stay."""
    link = directory / BEST
    if link.is_symlink():
        link.unlink()
    for path in [*checkpoints(directory), *([] if keeps_final else [directory / FINAL])]:
        if path.is_dir():
            shutil.rmtree(path)


def print_line(line: str) -> None:
    """On stderr."""
    print(line, file=sys.stderr, flush=True)


def approximate(seconds: float) -> str:
    """As in `about 5 min`."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Append what is printed and logged to a file."""
    with path.open("a", encoding="utf-8") as file, redirect_stderr(file), redirect_stdout(file):
        handler = logging.StreamHandler(file)
        logging.getLogger().addHandler(handler)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(handler)


def free_memory() -> None:
    """Of the run before, which holds cycles of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
