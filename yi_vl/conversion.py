"""What `yi-vl convert` does: write a checkpoint in another layout, compare it with its source, print the figures."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from .checkpoint import Checkpoint, Layout, TowerFrom, convert, largest_difference
from .checkpoint.gguf import GgufType, write_gguf
from .checkpoint.load import open_model
from .checkpoint.verify import verify_gguf, verify_layout, verify_logits
from .predict import load
from .quantize import Scheme


def run_conversion(
    source: str,
    target: Path | None,
    to: Layout | Literal["gguf"],
    type: GgufType,
    tower_from: TowerFrom,
    verify: bool,
    quantize: Scheme | None,
) -> None:
    """Convert `source` to the new folder `target`; without one, only compare the two copies of a release's tower.

    Args:
        type: of the language model's matrices in GGUF.
        verify: also compare what was written with its source.

    Raises:
        ValueError: as `convert`, `write_gguf` and the functions of `verify`.
    """
    checkpoint = open_model(source, tower_from)
    if verify and (target is None or checkpoint.tower_copy):
        difference, where = largest_difference(checkpoint)
        print(f"The two copies of the vision tower differ by {difference:g} at most (in {where}).")
    if target is None:
        return
    if quantize is not None:
        load(source, device="cpu", tower_from=tower_from, quantize=quantize).save(target)
    else:
        write(checkpoint, target, to, type)
    print(f"{target} is written.")
    if verify:
        if to == "gguf":
            figures = verify_gguf(checkpoint, target, type)
        elif quantize is not None:
            figures = verify_logits(source, target, tower_from, {quantize})
        else:
            figures = verify_layout(checkpoint, source, target, tower_from)
        print(f"Verified: {figures}.")


def write(checkpoint: Checkpoint, target: Path, to: Layout | Literal["gguf"], type: GgufType) -> None:
    """With a progress bar; what there is to know about the result is printed after it."""
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    notes: list[str] = []
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(f"{checkpoint.layout} to {to}")
    with ExitStack() as stack:

        def show(done: int, total: int) -> None:
            if not progress.live.is_started:  # not before all that can be refused is checked
                stack.enter_context(progress)
            progress.update(task, completed=done, total=total)

        if to == "gguf":
            notes = write_gguf(checkpoint, target, type, progress=show)
        else:
            convert(checkpoint, target, to, progress=show)
    for note in notes:
        print(f"yi-vl: {note}", file=sys.stderr)
