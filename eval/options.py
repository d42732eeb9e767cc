"""The options that every benchmark's command has: whose answers, generated how, over how many questions.

Called by __main__.py; calls models.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from yi_vl.cli import QuantizeOption

from .models import ModelChoice, Settings


@dataclass(frozen=True)
class Options:
    """Each field is an option of the command line."""

    model: Annotated[
        str,
        typer.Option(
            help='"nano", a folder or hub id of a Yi-VL or of any transformers image-text-to-text model, or the URL of '
            "an OpenAI-compatible endpoint (its key is taken from OPENAI_API_KEY)."
        ),
    ] = "nano"
    endpoint_model: Annotated[
        str | None, typer.Option(help="The model to ask for at an endpoint; by default its first.")
    ] = None
    device: Annotated[str | None, typer.Option(help='"cpu", "cuda:0", "auto"; by default the GPU of this process.')] = (
        None
    )
    quantize: QuantizeOption = None
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Greatest length of an answer, in tokens.")] = 128
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0
    top_p: Annotated[float, typer.Option(help="Draw only from the likeliest tokens that make up this probability.")] = (
        1.0
    )
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None
    official_first_image: Annotated[
        bool,
        typer.Option(
            "--official-first-image",
            help="Show only the first image, before the prompt, as the official LLaVA run does.",
        ),
    ] = False
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, to try something out.")] = None

    @property
    def choice(self) -> ModelChoice:
        return ModelChoice(self.model, self.endpoint_model, self.device, self.quantize)

    @property
    def settings(self) -> Settings:
        return Settings(self.max_new_tokens, self.temperature, self.top_p, self.seed)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer whose options are those of `Options` and then its own; it gets the former as `options`."""
    shared = inspect.signature(Options, eval_str=True).parameters
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]

    def run(**given: Any) -> None:
        options = Options(**{name: given.pop(name) for name in shared})
        command(options=options, **given)

    run.__signature__ = inspect.Signature([*shared.values(), *own])  # type: ignore[attr-defined]  # what typer reads
    run.__doc__ = command.__doc__
    return run
