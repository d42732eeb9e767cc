"""Make and inspect shards: `python -m train.shards llava | parquet | reference | check`.

A shard is a pure function of its chunk of the source. It gets its name when it is complete, and then its line in the
manifest, so a command that was interrupted at any moment resumes when it is repeated.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from yi_vl import program
from yi_vl.arguments import one_line
from yi_vl.files import sha256

from ..data.samples import read_sample
from .check import Contents, contents_table, inspect, problems
from .files import Manifest, Members, Shard, write_tar
from .sources import Chunk, Columns, LlavaSource, ParquetSource, Source

app = typer.Typer(help="Make WebDataset shards for the trainer, and inspect them.", add_completion=False)

_MIN_SEEN = 100  # samples before a broken fraction means anything
_NUM_SHOWN = 10  # of a long list

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the shards.")]
SizeOption = Annotated[int, typer.Option(min=1, help="Samples per shard.")]
ProcessesOption = Annotated[int | None, typer.Option(min=1, help="Number of processes; by default all cores.")]
BrokenOption = Annotated[
    float, typer.Option(min=0, max=1, help="Stop when a larger fraction of the samples cannot be used.")
]
IgnoreOption = Annotated[list[str] | None, typer.Option(help="A key of the samples to ignore; repeat for more.")]


@app.command()
def llava(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.json", help="Conversations in the format of LLaVA, ShareGPT or OpenAI.")
    ],
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="The folder that image paths are relative to.")],
    out: OutArgument,
    samples_per_shard: SizeOption = 1000,
    processes: ProcessesOption = None,
    max_broken: BrokenOption = 0.01,
    ignore: IgnoreOption = None,
    preference: Annotated[
        bool, typer.Option("--preference", help="The entries are preferences: a prompt, `chosen` and `rejected`.")
    ] = False,
) -> None:
    """From JSON or JSON lines and their image folder. Repeat an interrupted command to continue it."""
    source = LlavaSource(file, images, ignore or (), preference)
    if source.num_repeated_ids:
        _print(f"{file}: {source.num_repeated_ids:,} ids come again; the samples are kept apart by their numbers.")
    build(source, out, samples_per_shard, processes, max_broken)


@app.command()
def parquet(
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Parquet files, in order.")],
    out: OutArgument,
    image: Annotated[str, typer.Option(help="The column of images: bytes, {bytes, path}, or lists of them.")] = "image",
    caption: Annotated[str | None, typer.Option(help="The column of captions.")] = None,
    conversations: Annotated[str | None, typer.Option(help="The column of conversations, as lists or as JSON.")] = None,
    preference: Annotated[
        list[str] | None,
        typer.Option(help="A column of a preference, such as question, chosen and rejected, or of whole records."),
    ] = None,
    samples_per_shard: SizeOption = 1000,
    processes: ProcessesOption = None,
    max_broken: BrokenOption = 0.01,
    ignore: IgnoreOption = None,
) -> None:
    """From parquet files, with --caption, --conversations or --preference.

    Repeat an interrupted command to continue it.
    """
    if sum(map(bool, (caption, conversations, preference))) != 1:
        raise ValueError(
            "say which column holds the text: --caption NAME, --conversations NAME, or --preference NAME, once or more."
        )
    source = ParquetSource(files, Columns(image, caption, conversations, tuple(preference or ())), ignore or ())
    if source.unread_columns:
        _print(f"columns that are not read: {', '.join(source.unread_columns)}")
    build(source, out, samples_per_shard, processes, max_broken)


@app.command()
def reference(
    folder: Annotated[Path, typer.Argument(metavar="SHARDS", help="A folder of shards of preferences.")],
    out: OutArgument,
    model: Annotated[str, typer.Option(help="The model that training starts from: init_from.checkpoint.")],
    image_size: Annotated[int | None, typer.Option(min=1, help="As in the config; by default the model's.")] = None,
    fast_pixels: Annotated[bool, typer.Option(help="As data.fast_pixels in the config.")] = True,
    precision: Annotated[str, typer.Option(help="Of the products: bf16, fp16 or fp32.")] = "bf16",
    micro_batch: Annotated[int, typer.Option(min=1, help="Pairs per forward pass.")] = 8,
    ignore: IgnoreOption = None,
) -> None:
    """Copy shards of preferences with the log-probabilities of their answers under a model, for dpo.reference: shards.

    One GPU is used, if there is one. Repeat an interrupted command to continue it.
    """
    from transformers.utils import logging as transformers_logging

    from .reference import Scorer, add_references  # torch

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    scorer = Scorer(model, image_size, fast_pixels, precision, micro_batch, ignore or ())
    broken = add_references(folder, out, scorer, _progress)
    _list("without reference", broken)
    print(f"{out}: reference log-probabilities of {model}.")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A folder of tars, made here, by img2dataset or otherwise.")],
    processes: ProcessesOption = None,
    ignore: IgnoreOption = None,
) -> None:
    """Show what a folder of shards contains and check it against its manifest; the exit code is 2 on a mismatch."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder} holds no .tar files.")
    manifest = Manifest.read(folder)
    contents = Contents()
    with _pool(processes) as pool:
        jobs = [pool.submit(inspect, path, ignore or ()) for path in paths]
        with _progress("shards", len(paths)) as add_progress:
            for job in as_completed(jobs):
                contents += job.result()
                add_progress()
    mismatches = problems(contents, manifest)
    Console().print(contents_table(folder, contents, manifest, mismatches))
    _list("skipped", sorted(contents.notes))
    _list("cannot be used", sorted(contents.broken))
    _list("mismatch", mismatches)
    if mismatches:
        raise typer.Exit(2)


def build(source: Source, out: Path, samples_per_shard: int, processes: int | None, max_broken: float) -> None:
    """Write the shards of a source that are not complete yet.

    Raises:
        ValueError: there is nothing to write, OUT holds something else, too many samples cannot be used, or the disk
            is full. Complete shards stay.
    """
    chunks = {f"{number:05d}.tar": chunk for number, chunk in enumerate(source.chunks(samples_per_shard))}
    total = sum(map(len, chunks.values()))
    if not total:
        raise ValueError("the source holds no samples.")
    made_from = source.identity | {"samples_per_shard": samples_per_shard, "num_shards": len(chunks)}
    manifest = Manifest.open(out, made_from)
    manifest.shards = {name: manifest.shards[name] for name in chunks if manifest.has(name)}
    manifest.write()
    remaining = {name: chunk for name, chunk in chunks.items() if name not in manifest.shards}
    if len(remaining) < len(chunks):
        _print(f"{out}: {len(chunks) - len(remaining):,} of {len(chunks):,} shards are complete and kept.")

    broken = [line for shard in manifest.shards.values() for line in shard.broken]
    seen = sum(len(chunks[name]) for name in manifest.shards)
    num_new, started = total - seen, time.perf_counter()
    _stop_if_broken(broken, seen, total, max_broken)
    with _pool(processes) as pool:
        jobs = [pool.submit(_write_shard, out / name, chunk, source.format) for name, chunk in remaining.items()]
        with _progress("samples", total, seen) as add_progress:
            for job in as_completed(jobs):
                shard = job.result()
                manifest.add(shard)
                broken += shard.broken
                seen += len(chunks[shard.name])
                add_progress(len(chunks[shard.name]))
                _stop_if_broken(broken, seen, total, max_broken)
    seconds = time.perf_counter() - started
    _list("skipped", broken)
    num_bytes = sum(shard.bytes for shard in manifest.shards.values())
    print(
        f"{out}: {total - len(broken):,} samples in {len(chunks):,} shards, {num_bytes / 1e6:,.1f} MB; "
        f"{len(broken):,} skipped; {num_new / seconds:,.0f} samples/s."
    )


def _write_shard(path: Path, chunk: Chunk, sample_format: str) -> Shard:
    """In a worker process: write the samples that the trainer can read, and record why it cannot read the others."""
    num_samples, broken = 0, []

    def samples() -> Iterator[tuple[str, Members]]:
        nonlocal num_samples
        for index, (name, read) in enumerate(chunk, chunk.first):
            try:
                members = read()
                read_sample(members, sample_format)
            except ValueError as error:
                broken.append(f"{name}: {' '.join(str(error).split())}")
                continue
            num_samples += 1
            yield f"{index:09d}", members

    try:
        write_tar(path, samples())
        return Shard(path.name, num_samples, path.stat().st_size, sha256(path), broken)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be made: {one_line(error)}. Repeat the command to continue.") from error


def _stop_if_broken(broken: list[str], seen: int, total: int, max_broken: float) -> None:
    if seen >= min(_MIN_SEEN, total) and len(broken) > max_broken * seen:
        raise ValueError(
            f"{len(broken):,} of {seen:,} samples cannot be used, more than --max-broken {max_broken:g} allows; the "
            f"last: {broken[-1]}. The complete shards are kept."
        )


@contextmanager
def _pool(processes: int | None) -> Iterator[ProcessPoolExecutor]:
    """A process pool whose running jobs finish when the command is stopped; no others are started."""
    ignore_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(processes if processes is not None else os.cpu_count(), initializer=ignore_interrupts)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError("a process was killed; is there enough memory? Repeat the command to continue.") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _progress(name: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar; yields the function that moves it."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield partial(bar.advance, bar.add_task(name, total=total, completed=done))


def _list(title: str, lines: list[str]) -> None:
    for line in lines[:_NUM_SHOWN]:
        _print(f"{title}: {line}")
    if len(lines) > _NUM_SHOWN:
        _print(f"{title}: {len(lines) - _NUM_SHOWN:,} more")


def _print(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    program.run(app, "error")
