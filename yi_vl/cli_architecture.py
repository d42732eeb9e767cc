"""The commands of `yi-vl` that write a model of another architecture: `expand | upcycle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import as_path, as_slice
from .loading import check, quick_imports

SourceArgument = Annotated[str, typer.Argument(metavar="SRC", help="A model folder or hub id, in any layout.")]
TargetArgument = Annotated[str, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")]


def expand(
    source: SourceArgument,
    target: TargetArgument,
    after_every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Behind every Nth layer a copy that adds nothing yet: the function is kept."),
    ] = None,
    double: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Behind layers A to B - 1 a copy of them all: the function is not kept."),
    ] = None,
) -> None:
    """Write a model with copies of some of its layers, to train these; in our layout, shard by shard."""
    folder = _new_folder(target)
    if (after_every is None) == (double is None):
        raise ValueError("say which layers to copy: --after-every N or --double A:B, one of the two.")
    doubled = None if double is None else as_slice(double, "--double")
    check(source)
    with quick_imports():
        from .expand import run_expansion
    run_expansion(source, folder, after_every, doubled)


def upcycle(
    source: SourceArgument,
    target: TargetArgument,
    experts: Annotated[
        int, typer.Option(metavar="N", help="Copies of each feed-forward layer, of which a token gets one.")
    ] = 1,
    slices: Annotated[
        int, typer.Option(metavar="G", help="Cut each copy in G: N*G experts, G per token; the function is kept.")
    ] = 1,
    every: Annotated[
        int | None,
        typer.Option(metavar="E", help="Full attention in the last of every E layers, a window in the others."),
    ] = None,
    window: Annotated[
        int | None, typer.Option(metavar="W", help="How many tokens a layer with a window sees, its own included.")
    ] = None,
    share: Annotated[
        int | None,
        typer.Option(metavar="S", help="S full-attention layers in a row share keys and values; 2 with --every."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="A token gets the fewest experts whose probabilities reach P, not G."),
    ] = None,
    max_experts: Annotated[
        int | None, typer.Option(metavar="M", help="But at most M; a quarter of all, and G or more, by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the routers' random weights.")] = 0,
) -> None:
    """Write a dense model with the hybrid decoder: windows, shared keys and values, experts; in our layout.

    Experts alone keep the function. Windows, sharing and top-p do not; they can also be switched on later, with the
    result as SRC.
    """
    folder = _new_folder(target)
    check(source)
    with quick_imports():
        from .upcycle import Changes, run_upcycling
    run_upcycling(source, folder, Changes(experts, slices, every, window, share, top_p, max_experts, seed))


def _new_folder(target: str) -> Path:
    folder = as_path(target, "OUT")
    if folder.exists():
        raise ValueError(f"{folder} exists already; choose another name, or remove it.")
    return folder
