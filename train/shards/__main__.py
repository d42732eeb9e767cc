"""Make, inspect and filter shards: `python -m train.shards llava | parquet | reference | check | filter`.

A shard is a pure function of its chunk of the source. It gets its name when it is complete, and then its line in the
manifest, so a command that was interrupted at any moment resumes when it is repeated.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from yi_vl import program
from yi_vl.arguments import one_line
from yi_vl.files import sha256

from ..config import PREFERENCE, SAMPLE_FORMATS, SourceConfig
from ..data.samples import read_sample
from ..data.stream import expand_shards
from .check import Contents, contents_table, inspect, problems
from .files import Manifest, Members, Shard, write_tar
from .report import print_line, print_list, progress, stop_if_broken
from .sources import Chunk, Columns, LlavaSource, ParquetSource, Source

app = typer.Typer(help="Make WebDataset shards for the trainer, inspect and filter them.", add_completion=False)

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
        print_line(f"{file}: {source.num_repeated_ids:,} ids come again; the samples are kept apart by their numbers.")
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
        print_line(f"columns that are not read: {', '.join(source.unread_columns)}")
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
    broken = add_references(folder, out, scorer)
    print_list("without reference", broken)
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
        with progress("shards", len(paths)) as add_progress:
            for job in as_completed(jobs):
                contents += job.result()
                add_progress()
    mismatches = problems(contents, manifest)
    Console().print(contents_table(folder, contents, manifest, mismatches))
    print_list("skipped", sorted(contents.notes))
    print_list("cannot be used", sorted(contents.broken))
    print_list("mismatch", mismatches)
    if mismatches:
        raise typer.Exit(2)


@app.command("filter")
def filter_by_loss(
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="A folder of tars, or paths, globs or URLs as in a config.")
    ],
    out: OutArgument,
    model: Annotated[str, typer.Option(help="The model to score with: a folder or hub id.")],
    max_loss: Annotated[float | None, typer.Option(help="Keep samples of at most this loss per token.")] = None,
    min_loss: Annotated[float | None, typer.Option(help="Keep samples of at least this loss per token.")] = None,
    sample_format: Annotated[str, typer.Option("--format", help="chat, caption or text.")] = "chat",
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longer samples are not kept; by default the model's positions.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:1, ...; by default the GPU, else the CPU.")] = None,
    max_broken: BrokenOption = 0.01,
    ignore: IgnoreOption = None,
) -> None:
    """Keep the samples whose loss under a model is in a range. Repeat an interrupted command to continue it."""
    formats = [each for each in SAMPLE_FORMATS if each != PREFERENCE]
    if sample_format not in formats:
        raise ValueError(f"--format is {sample_format!r}; expected one of {', '.join(formats)}.")
    paths = _shard_paths(shards)

    from .filter import LossRange, Scorer, filter_shards  # torch and transformers, which no other command needs

    loss_range = LossRange(min_loss, max_loss)
    is_folder = Path(model).expanduser().is_dir()
    made_from: dict[str, object] = {
        "filter": [[Path(url).name, Path(url).stat().st_size] if Path(url).is_file() else [url, None] for url in paths],
        "model": str(Path(model).expanduser().absolute()) if is_folder else model,
        "format": sample_format,
        "min_loss": min_loss,
        "max_loss": max_loss,
        "max_tokens": max_tokens,
        "ignore": sorted(ignore or ()),
        "num_shards": len(paths),
    }
    manifest = Manifest.open(out, made_from)
    scorer = Scorer(model, sample_format, ignore or (), max_tokens, device)
    filter_shards(paths, out, scorer, loss_range, manifest, max_broken)


def _shard_paths(shards: str) -> list[str]:
    folder = Path(shards).expanduser()
    if not folder.is_dir():
        return [os.path.expanduser(url) for url in expand_shards(SourceConfig("shards", shards), "SHARDS")]
    if not (paths := sorted(map(str, folder.glob("*.tar")))):
        raise ValueError(f"{folder} holds no .tar files.")
    return paths


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
        print_line(f"{out}: {len(chunks) - len(remaining):,} of {len(chunks):,} shards are complete and kept.")

    broken = [line for shard in manifest.shards.values() for line in shard.broken]
    seen = sum(len(chunks[name]) for name in manifest.shards)
    num_new, started = total - seen, time.perf_counter()
    stop_if_broken(broken, seen, max_broken, total)
    with _pool(processes) as pool:
        jobs = [pool.submit(_write_shard, out / name, chunk, source.format) for name, chunk in remaining.items()]
        with progress("samples", total, seen) as add_progress:
            for job in as_completed(jobs):
                shard = job.result()
                manifest.add(shard)
                broken += shard.broken
                seen += len(chunks[shard.name])
                add_progress(len(chunks[shard.name]))
                stop_if_broken(broken, seen, max_broken, total)
    seconds = time.perf_counter() - started
    print_list("skipped", broken)
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


if __name__ == "__main__":
    program.run(app, "error")
