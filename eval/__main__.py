"""`python -m eval COMMAND`: what is measured about a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def commands() -> None:
    """So that a single command still has a name."""


@app.command("full-size")
def full_size(
    folder: Annotated[Path, typer.Argument(help="The checkpoint; made of random weights where it does not exist.")],
    size: Annotated[Literal["6b", "34b"], typer.Option(help="Whose shapes.")] = "6b",
    tokenizer: Annotated[
        Path, typer.Option(help="A folder with tokenizer.model and tokenizer_config.json, for a checkpoint to be made.")
    ] = Path("tests/official_tiny/checkpoint"),
    image: Annotated[Path, typer.Option(help="What is asked about.")] = Path("docs/pictures/tiger.png"),
    new_tokens: Annotated[int, typer.Option(help="How many tokens to say.")] = 16,
) -> None:
    """Load a checkpoint of the released shapes and layout and answer with it: seconds, peak memory, tokens a second."""
    from .full_size import make, measure

    if not folder.exists():
        typer.echo(f"Writing {folder}: random weights in the shapes and layout of Yi-VL-{size.upper()} ...", err=True)
        make(folder, size, tokenizer)
    for name, value in measure(folder, image, new_tokens).items():
        typer.echo(f"{name:<34}{value}")


if __name__ == "__main__":
    try:
        app(prog_name="python -m eval")
    except ValueError as error:
        print("eval:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
