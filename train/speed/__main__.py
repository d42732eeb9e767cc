"""`python -m train.speed WHAT`: the trainer's speed beside a baseline, measured in one run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from yi_vl import program
from yi_vl.hardware import machine

app = typer.Typer(add_completion=False, help="Measure speed, side by side in one run.", no_args_is_help=True)
_STEPS = {"nano": 20, "300m": 4}
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Out = Annotated[
    Path | None, typer.Option(help="A folder to keep the shards in for the next run; by default they are deleted.")
]


@app.command()
def data(
    out: Out = None,
    num_samples: Annotated[int, typer.Option("--samples", min=16, help="Number of samples per loader.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Images and samples per second of one core, from shards of megapixel photographs."""
    from .data import compare, drift, make_shards

    rows: list[dict[str, Any]] = []
    with _folder(out) as folder:
        for image_format in ("jpg", "png"):
            shard = make_shards(folder, image_format, min(num_samples, 128))  # type: ignore[arg-type]
            for size_px in (224, 448):
                loaders = compare(shard, size_px, num_samples)
                mean, root = drift(shard, size_px)
                slow, fast = (rates["samples_per_second"] for rates in loaders.values())
                rows.append(
                    {"images": image_format, "size_px": size_px, "loaders": loaders, "ratio": fast / slow}
                    | {"drift_mean": mean, "drift_rms": root}
                )
    if as_json:
        typer.echo(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        return
    table = _table("of one core", "images/s", "samples/s", "ratio", "drift, mean", "rms")
    for row in rows:
        for index, (name, rates) in enumerate(row["loaders"].items()):
            last = [f"{row['ratio']:.2f}", f"{row['drift_mean']:.2f}", f"{row['drift_rms']:.2f}"] if index else [""] * 3
            numbers = [f"{rate:,.1f}" for rate in rates.values()]
            table.add_row(f"{row['images']} to {row['size_px']} px, {name}", *numbers, *last)
    console = Console()
    console.print(machine(), highlight=False)
    console.print(table)
    console.print("Drift: difference to the pixels of inference, of 255.", highlight=False)


@app.command()
def step(
    size: Annotated[
        Literal["nano", "300m"], typer.Option(help="The bundled model, or one of random weights.")
    ] = "nano",
    sample_format: Annotated[
        Literal["caption", "chat"],
        typer.Option("--format", help="caption: trains tower and projector; chat: trains everything."),
    ] = "chat",
    num_steps: Annotated[
        int | None, typer.Option("--steps", min=2, help="Steps of each loop; the first is not timed.")
    ] = None,
    precision: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="Precision; in fp32 the losses of both loops agree up to rounding.")
    ] = "bf16",
    compiles: Annotated[bool, typer.Option("--compile", help="As `compile: true` in a config.")] = False,
    as_json: AsJson = False,
) -> None:
    """Samples, tokens and model FLOP per second of training steps."""
    from transformers.utils import logging

    from .step import BATCHES, compare, make_checkpoint, make_work

    logging.disable_progress_bar()
    with _folder(None) as folder:
        steps = num_steps if num_steps is not None else _STEPS[size]
        checkpoint = make_checkpoint(folder, size)
        work = make_work(folder, checkpoint, sample_format, BATCHES[size], steps, precision, compiles)
        measured = compare(work)
    if as_json:
        typer.echo(
            json.dumps(
                {"machine": machine(), "size": size, "format": sample_format, "precision": precision} | measured,
                indent=1,
            )
        )
        return
    table = _table(f"{size}, {sample_format}, {precision}", "samples/s", "tokens/s", "TFLOP/s", "of matrix products")
    table.add_row("matrix products", "", "", f"{measured['matrix_tflops']:.2f}", "100%")
    for name, rates in measured["loops"].items():
        numbers = [
            f"{rates['samples_per_second']:,.2f}",
            f"{rates['tokens_per_second']:,.0f}",
            f"{rates['tflops']:.2f}",
        ]
        table.add_row(name, *numbers, f"{rates['mfu']:.0%}")
    console = Console()
    console.print(f"{machine()}; {measured['mean_tokens']:.0f} tokens a sample", highlight=False)
    console.print(table)
    console.print(
        f"ratio {measured['ratio']:.2f}; the losses of {steps} steps, from {measured['losses']['train'][0]:.3f} to "
        f"{measured['losses']['train'][-1]:.3f}, differ by {measured['largest_loss_difference']:.1e} at most",
        highlight=False,
    )


@app.command()
def memory(
    out: Out = None,
    num_samples: Annotated[int, typer.Option("--samples", min=100)] = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Resident memory while streaming many samples."""
    from .data import resident_memory

    rows = []
    with _folder(out) as folder:
        for done, megabytes in resident_memory(folder, num_samples):
            rows.append({"samples": done, "resident_mb": megabytes})
            if not as_json:
                typer.echo(f"{done:>12,} samples  {megabytes:8.1f} MB")
    growth = rows[-1]["resident_mb"] - rows[0]["resident_mb"]
    if as_json:
        typer.echo(json.dumps({"rows": rows, "growth_mb": growth}, indent=1))
        return
    typer.echo(f"{growth:+.1f} MB from the first row to the last")


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


if __name__ == "__main__":
    program.run(app, "error")
