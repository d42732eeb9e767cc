"""The options that all benchmark commands share: model, generation settings, number of questions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yi_vl.cli import QuantizeOption

from .chat_client import DEFAULT_TIMEOUT_SECONDS
from .models import ModelChoice, Settings

if TYPE_CHECKING:
    from .judge import JudgeChoice

JudgeOption = Annotated[
    str | None,
    typer.Option(
        help="URL of an OpenAI-compatible endpoint for an additional score by an LLM judge (API key: JUDGE_API_KEY, or "
        "else OPENAI_API_KEY)."
    ),
]
JudgeModelOption = Annotated[str | None, typer.Option(help="The judge's model.")]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0.001, help="Timeout in seconds of one request to an endpoint or judge.")
]


def judge_choice(url: str | None, model: str | None, timeout_seconds: float) -> JudgeChoice | None:
    """The judge that is asked for, if one is."""
    from .judge import JudgeChoice

    if url is None and model is None:
        return None
    if url is None or model is None:
        raise ValueError("--judge URL and --judge-model NAME go together; give both or neither.")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--judge is {url!r}, not the URL of an OpenAI-compatible endpoint.")
    return JudgeChoice(url, model, timeout_seconds)


@dataclass(frozen=True)
class Options:
    """Each field is an option of the command line."""

    model: Annotated[
        str,
        typer.Option(
            help='"nano", a folder or hub id of a Yi-VL or of any transformers image-text-to-text model, or the URL of '
            "an OpenAI-compatible endpoint (API key: OPENAI_API_KEY)."
        ),
    ] = "nano"
    endpoint_model: Annotated[str | None, typer.Option(help="Name of the endpoint's model; by default its first.")] = (
        None
    )
    device: Annotated[str | None, typer.Option(help='"cpu", "cuda:0", "auto"; by default the GPU of this process.')] = (
        None
    )
    quantize: QuantizeOption = None
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 16
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 128
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy decoding.")] = 0.0
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling: cumulative probability of the tokens sampled from.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option(help="Random seed for sampling.")] = None
    official_first_image: Annotated[
        bool,
        typer.Option(
            "--official-first-image",
            help="Show only the first image, before the prompt, as the official LLaVA run does.",
        ),
    ] = False
    timeout: TimeoutOption = DEFAULT_TIMEOUT_SECONDS
    judge: JudgeOption = None
    judge_model: JudgeModelOption = None
    limit: Annotated[int | None, typer.Option(min=1, help="Run only the first N questions.")] = None

    @property
    def choice(self) -> ModelChoice:
        return ModelChoice(self.model, self.endpoint_model, self.device, self.quantize, self.timeout)

    @property
    def judge_choice(self) -> JudgeChoice | None:
        return judge_choice(self.judge, self.judge_model, self.timeout)

    @property
    def settings(self) -> Settings:
        return Settings(self.max_new_tokens, self.temperature, self.top_p, self.seed)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer whose options are those of `Options` and then its own; it gets the former as `options`."""
    shared = inspect.signature(Options, eval_str=True).parameters
    specific = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "options"]

    def run(**given: Any) -> None:
        options = Options(**{name: given.pop(name) for name in shared})
        command(options=options, **given)

    run.__signature__ = inspect.Signature([*shared.values(), *specific])  # type: ignore[attr-defined]  # what typer reads
    run.__doc__ = command.__doc__
    return run
