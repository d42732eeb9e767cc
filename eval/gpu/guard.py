"""How `python -m eval gpu` runs its parts.

They run in processes of their own, several of a group in one, which share what they make. A part that raises, runs
out of memory, takes too long or takes its process down is recorded, and the rest is run. What needs a package that is
not installed is skipped, and the package named.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

Size = Literal["6b", "nano"]
Status = Literal["ok", "failed", "skipped"]
_SECONDS_TO_END = 10  # for a process that has done its work, or has died


class Skipped(Exception):
    """A part cannot run here, and why."""


@dataclass(frozen=True)
class Measured:
    """A number with its unit, or a fact; beside it what it is compared with, in the same unit."""

    name: str
    value: float | str
    unit: str = ""
    limit: float | None = None
    limit_name: str = ""


@dataclass(frozen=True)
class Settings:
    """What a run measures, and where. `rates` are the device's own, known once `environment` has run."""

    device: str
    size: Size
    work: Path  # checkpoints and runs, removed at the end
    logs: Path
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        return self.device.startswith("cuda")


Run = Callable[[Settings, dict[str, Any]], Iterable[Measured]]  # the second argument is what a group's parts share


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Args:
        group: parts of one group that follow each other run in one process.
        seconds: its bound, the start of its process included.
        is_for_nano: whether it tries out code that no other part does.
    """

    name: str
    group: str
    seconds: int
    run: Run
    is_for_nano: bool = True


@dataclass
class Outcome:
    """What became of a part; what it measured before it failed is kept."""

    status: Status
    reason: str = ""
    seconds: float = 0.0
    measured: list[Measured] = field(default_factory=list)


def run_parts(
    parts: Sequence[Part], settings: Settings, minutes: float, report: Callable[[str, Outcome], None]
) -> dict[str, Outcome]:
    """Run all parts in their order; those for which no time is left are skipped."""
    deadline = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    waiting = list(parts)
    while waiting:
        first = waiting[0]
        if time.monotonic() < deadline:
            for name, outcome in _run_group(
                [part for part in waiting if part.group == first.group], settings, deadline
            ):
                outcomes[name] = outcome
                report(name, outcome)
                if name == "environment":
                    settings.rates.update({item.name: float(item.value) for item in outcome.measured if _is_rate(item)})
        else:
            outcomes[first.name] = Outcome("skipped", f"the {minutes:g} minutes were over")
            report(first.name, outcomes[first.name])
        waiting = [part for part in waiting if part.name not in outcomes]
    return {part.name: outcomes[part.name] for part in parts}


def _is_rate(measured: Measured) -> bool:
    return measured.unit in ("GB/s", "TFLOP/s")


def _run_group(group: Sequence[Part], settings: Settings, deadline: float) -> Iterator[tuple[str, Outcome]]:
    """Parts in one process, until one of them fails: its process, and all memory it holds, is given up."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    log = settings.logs / f"{group[0].name.replace(' ', '-')}.log"
    process = context.Process(target=_work, args=(list(group), settings, log, sending))
    process.start()
    sending.close()
    try:
        for part in group:
            started = time.monotonic()
            seconds = min(part.seconds, deadline - started)
            outcome = Outcome("failed", f"it was stopped after {seconds:.0f} seconds")
            try:
                if receiving.poll(max(0.0, seconds)):
                    outcome = receiving.recv()
            except EOFError:
                outcome = Outcome("failed", _cause_of_death(process, log))
            outcome.seconds = time.monotonic() - started
            yield part.name, outcome
            if outcome.status == "failed":
                return
        process.join(_SECONDS_TO_END)
    finally:
        _kill(process)


def _work(parts: Sequence[Part], settings: Settings, log: Path, results: Connection) -> None:
    """In the process of a group: its parts, until one fails. What libraries say goes to the log."""
    os.setsid()  # what a part starts is killed with it
    with log.open("w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    shared: dict[str, Any] = {}
    for part in parts:
        outcome = Outcome("ok")
        try:
            outcome.measured.extend(part.run(settings, shared))
        except Skipped as reason:
            outcome.status, outcome.reason = "skipped", str(reason)
        except ModuleNotFoundError as error:
            outcome.status, outcome.reason = "skipped", f"needs {error.name}"
        except Exception as error:  # whatever it is, it is this part's
            traceback.print_exc()
            outcome.status, outcome.reason = "failed", f"{type(error).__name__}: {first_line(error)}"
        results.send(outcome)
        if outcome.status == "failed":
            return


def first_line(error: object) -> str:
    """Of what a library says, what fits into a table."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def last_line(path: Path) -> str:
    """The last of a log that says anything."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _cause_of_death(process: Any, log: Path) -> str:
    process.join(_SECONDS_TO_END)
    code = process.exitcode
    ending = f"died of {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    output = last_line(log)
    return f"its process {ending}" + (f"; its last output: {output}" if output else "")


def _kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
