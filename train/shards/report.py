"""What the commands print while they run, and when too much is broken to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_MIN_SEEN = 100  # samples before a broken fraction means anything
_NUM_SHOWN = 10  # of a long list


@contextmanager
def progress(name: str, total: int | None, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; yields the function that moves it.

    Args:
        total: None: it is not known.
    """
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield partial(bar.advance, bar.add_task(name, total=total, completed=done))


def print_list(title: str, lines: Sequence[str]) -> None:
    """The first lines of a list, and how many more there are."""
    for line in lines[:_NUM_SHOWN]:
        print_line(f"{title}: {line}")
    if len(lines) > _NUM_SHOWN:
        print_line(f"{title}: {len(lines) - _NUM_SHOWN:,} more")


def print_line(line: str) -> None:
    """On stderr."""
    typer.echo(line, err=True)


def stop_if_broken(broken: Sequence[str], seen: int, max_broken: float, total: int = _MIN_SEEN) -> None:
    """
    Args:
        total: samples of the whole source, as far as known.

    Raises:
        ValueError: of the samples seen, a larger fraction than `max_broken` is broken.
    """
    if seen >= min(_MIN_SEEN, total) and len(broken) > max_broken * seen:
        raise ValueError(
            f"{len(broken):,} of {seen:,} samples cannot be used, more than --max-broken {max_broken:g} allows; the "
            f"last: {broken[-1]}. The complete shards are kept."
        )
