"""`python -m train.mixture CONFIG key.sub=value ...`: search for the weights of a stage's sources by short runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from yi_vl import program

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def mixture(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as train/configs/mixture/nano.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="Settings that replace the file's.")
    ] = None,
) -> None:
    """Search for the weights of a stage's data sources by short training runs, and say whether they beat equal shares.

    Interrupted at any moment, the same command resumes. The page with all plots is SEARCH_DIR/index.html.
    """
    from .config import load_search

    search = load_search(config, overrides or ())
    from ..run_series import log_to_files
    from .search import run_search  # torch and transformers, after the settings are known to be right

    log_to_files()
    results = run_search(search)
    typer.echo(f"{results['verdict']['reason']}\n\n{results['yaml']}\n\nThe page: {search.directory}/index.html")


if __name__ == "__main__":
    program.run(app, "error")
