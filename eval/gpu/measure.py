"""`python -m eval gpu`: measurements on a GPU, part by part, within a bound of minutes."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from yi_vl.files import write_text

from . import parts as inference
from . import train as training
from .guard import Outcome, Part, Settings, Size, run_parts
from .report import markdown, status_line

PARTS = (*inference.PARTS, *training.PARTS)
JSON_FILE, TABLE_FILE = "gpu.json", "gpu.md"


def measure(
    out: Path, device: str, size: Size, names: Sequence[str] = (), minutes: float = 10, parts: Sequence[Part] = PARTS
) -> dict[str, Outcome]:
    """Run the parts of these names, or whose first word they are (none given: all); leave files and logs in `out`.

    The files are rewritten after each part, so that a killed run leaves its results.

    Raises:
        ValueError: no part is called so, or there is no such device.
    """
    names_of = {part.name: {part.name, part.name.split()[0]} for part in parts}
    if unknown := set(names) - set().union(*names_of.values()):
        raise ValueError(f"there is no part {sorted(unknown)[0]!r}; there are {', '.join(names_of)}.")
    _check_device(device)
    out = out.absolute()
    settings = Settings(device, size, out / "work", out / "logs")
    for folder in (settings.work, settings.logs):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    started = time.monotonic()
    outcomes: dict[str, Outcome] = {}

    def report(name: str, outcome: Outcome) -> None:
        outcomes[name] = outcome
        print(status_line(name, outcome), file=sys.stderr, flush=True)
        _write(out, settings, time.monotonic() - started, outcomes)

    chosen = [
        part for part in parts if (names_of[part.name] & set(names) if names else size != "nano" or part.is_for_nano)
    ]
    try:
        return run_parts(chosen, settings, minutes, report)
    finally:
        shutil.rmtree(settings.work, ignore_errors=True)


def _check_device(device: str) -> None:
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device here; --device cpu --size nano tries the command out without one.")


def _write(out: Path, settings: Settings, seconds: float, outcomes: Mapping[str, Outcome]) -> None:
    content = {
        "command": "python -m eval gpu",
        "device": settings.device,
        "size": settings.size,
        "seconds": seconds,
        "parts": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    texts = {
        JSON_FILE: json.dumps(content, indent=1, ensure_ascii=False) + "\n",
        TABLE_FILE: markdown(settings, seconds, outcomes),
    }
    for name, text in texts.items():
        write_text(out / name, text)
