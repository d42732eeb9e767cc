"""`python -m eval speed WHAT`: yi_vl and a baseline, measured side by side in one run on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from yi_vl.cli import QuantizeOption
from yi_vl.hardware import machine

app = typer.Typer(help="Measure speed, side by side in one run.", no_args_is_help=True)
PresetOption = Annotated[
    Literal["nano", "1b", "6b"], typer.Option(help="Whose size; all but nano have random weights.")
]
SizeOption = Annotated[Literal["nano", "1b", "6b"], typer.Option(help="Whose language model's size.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


_CONTEXTS = "1024,2048,4096,8192,16384,32768"


@app.command()
def chat(
    preset: PresetOption = "1b",
    image: Annotated[Path, typer.Option(help="What the chat is about.")] = Path("docs/images/scene.png"),
    turns: Annotated[int, typer.Option(min=2)] = 5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of every answer.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Time to first token, turn by turn, with and without prefix caching."""
    from .engine import compare_chat
    from .random_models import make

    show(compare_chat(make(preset), image, turns, new_tokens) | {"model": preset}, as_json)


@app.command("runner")
def runner_(
    model: Annotated[str, typer.Option(help='"nano", or a folder or hub id of a Yi-VL.')] = "nano",
    data: Annotated[str, typer.Option(help="Questions in MMMU's schema.")] = "data/nano/heldout/mmmu",
    num_questions: Annotated[int, typer.Option(min=1, help="So many of them, spread evenly.")] = 96,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    quantize: QuantizeOption = None,
    as_json: AsJson = False,
) -> None:
    """The evaluation's questions per second against a plain loop of transformers' `generate`, one by one."""
    from ..benchmarks import mmmu
    from ..models import ModelChoice
    from .runner import compare_runner

    if not Path(data).is_dir() and "/" in data and Path(data).parts[0] == "data":
        raise ValueError(f"{data} is not here. `python -m train.nano data` makes it, or name another with --data.")
    loaded = mmmu.load(data, "val")
    questions = [loaded[index * len(loaded) // num_questions] for index in range(min(num_questions, len(loaded)))]
    show(compare_runner(ModelChoice(model, quantize=quantize), questions, batch_size, max_new_tokens), as_json)


@app.command()
def decode(
    preset: PresetOption = "1b",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of one answer, beside transformers' `generate` and what the memory's bandwidth allows."""
    from .engine import compare_decode
    from .random_models import make

    show(compare_decode(make(preset), prompt_tokens, new_tokens) | {"model": preset}, as_json)


@app.command()
def batch(
    preset: PresetOption = "1b",
    rows: Annotated[int, typer.Option(min=2)] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of several answers at once, beside one."""
    from .engine import compare_batch
    from .random_models import make

    show(compare_batch(make(preset), rows, prompt_tokens, new_tokens) | {"model": preset}, as_json)


@app.command()
def prefill(
    preset: PresetOption = "1b",
    tokens: Annotated[int, typer.Option(min=1)] = 1100,
    as_json: AsJson = False,
) -> None:
    """FLOP/s of a prefill, beside the machine's rate for matrix products of the same shapes."""
    from .engine import compare_prefill
    from .random_models import make

    show(compare_prefill(make(preset), tokens) | {"model": preset}, as_json)


@app.command()
def quantize(
    preset: PresetOption = "1b",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    as_json: AsJson = False,
) -> None:
    """int8 and int4 beside bf16: tokens per second, prefill, memory, and the KL divergence of predictions."""
    from .quantize import checkpoint_of, compare_quantize

    with checkpoint_of(preset) as folder:
        show(compare_quantize(folder, prompt_tokens, new_tokens) | {"model": preset}, as_json)


@app.command()
def load(
    preset: PresetOption = "1b",
    as_json: AsJson = False,
) -> None:
    """Loading a checkpoint in bf16, int8 and int4: seconds, and the most memory held at once."""
    from .quantize import checkpoint_of, compare_load

    with checkpoint_of(preset) as folder:
        show(compare_load(folder) | {"model": preset}, as_json)


@app.command()
def server(
    preset: PresetOption = "nano",
    requests: Annotated[int, typer.Option(min=2, help="At once.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    images: Annotated[bool, typer.Option("--images/--text", help="Ask about one of two images, or of none.")] = True,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of concurrent requests over HTTP, beside one by one."""
    from .random_models import make
    from .server import compare_server

    show(compare_server(make(preset), requests, new_tokens, images) | {"model": preset}, as_json)


@app.command()
def ttft(
    preset: PresetOption = "nano",
    long_requests: Annotated[int, typer.Option(min=1)] = 15,
    long_tokens: Annotated[int, typer.Option(min=1, help="Of a long prompt.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Time to first token of a short request over HTTP: idle, and beside long ones."""
    from .random_models import make
    from .server import compare_first_token

    show(compare_first_token(make(preset), long_requests, long_tokens) | {"model": preset}, as_json)


@app.command()
def lookup(
    preset: PresetOption = "nano",
    image: Annotated[Path, typer.Option(help="What the chat is about.")] = Path("docs/images/scene.png"),
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    as_json: AsJson = False,
) -> None:
    """Prompt lookup: answers that repeat the prompt, and ones that do not, with and without drafts."""
    from .lookup import compare_lookup
    from .random_models import make

    show(compare_lookup(make(preset), image, new_tokens) | {"model": preset}, as_json)


@app.command()
def cache(
    layers: Annotated[int, typer.Option(min=1)] = 16,
    window: Annotated[int, typer.Option(min=2, help="Tokens that a sliding layer sees.")] = 512,
    every: Annotated[int, typer.Option(min=1, help="One of so many layers sees all tokens.")] = 4,
    share: Annotated[int, typer.Option(min=1, help="So many consecutive full layers share keys and values.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Memory of keys and values as the context grows: a dense decoder, and one of windows and shared ones."""
    from .cache import compare_cache

    show(compare_cache(layers, window, every, share), as_json)


@app.command()
def engines(
    preset: PresetOption = "nano",
    num_questions: Annotated[int, typer.Option(min=1, help="Asked in every round.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="At most, for every answer.")] = 32,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1, help="The median of so many.")] = 3,
    with_images: Annotated[
        bool, typer.Option("--images/--no-images", help="About an image each, or text only.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """yi_vl, transformers, vLLM and llama.cpp, as far as they are installed, on the same questions."""
    from .engines import compare_engines
    from .quantize import checkpoint_of

    with checkpoint_of(preset) as folder:
        measured = compare_engines(folder, num_questions, new_tokens, num_rounds, with_images)
    show(measured | {"model": preset}, as_json)


@app.command()
def decoder(
    preset: PresetOption = "1b",
    contexts: Annotated[str, typer.Option(help="Lengths in tokens, separated by commas.")] = _CONTEXTS,
    window: Annotated[int, typer.Option(min=2, help="What a sliding layer sees, in tokens.")] = 1024,
    num_rounds: Annotated[int, typer.Option("--rounds", min=1, help="The median of so many.")] = 5,
    image: Annotated[Path | None, typer.Option(help="Draw the curves there.")] = None,
    as_json: AsJson = False,
) -> None:
    """The hybrid decoder beside a dense Llama as the context grows: time per token, TTFT, KV cache. On a CPU."""
    import torch

    from .decoder import compare_decoder
    from .random_models import language_config

    config, lengths = language_config(preset), _lengths(contexts)
    measured = compare_decoder(config, lengths, window, num_rounds, torch.bfloat16, image)
    show(measured | {"model": preset}, as_json)


@app.command()
def experts(
    preset: PresetOption = "1b",
    rows: Annotated[str, typer.Option(help="Tokens computed at once, separated by commas.")] = "1,8,256",
    copies: Annotated[int, typer.Option(min=1, help="Of the dense layer.")] = 4,
    slices: Annotated[int, typer.Option(min=1, help="Of each copy: the experts.")] = 4,
    as_json: AsJson = False,
) -> None:
    """The kernels of transformers' experts beside a dense feed-forward layer of the same products. On a CPU."""
    import torch

    from .experts import compare_experts
    from .random_models import language_config

    measured = compare_experts(language_config(preset), copies, slices, _lengths(rows), torch.bfloat16)
    show(measured | {"model": preset}, as_json)


def _lengths(text: str) -> list[int]:
    lengths = [int(length) for length in text.split(",") if length.strip().isdecimal()]
    if len(lengths) != text.count(",") + 1 or 0 in lengths:
        raise ValueError(f"{text!r} is not a list of lengths; expected numbers of 1 or more like 1024,2048.")
    return lengths


def show(measured: dict[str, Any], as_json: bool) -> None:
    """Print a measurement as a table of its variants, or as JSON, and the machine that it was taken on."""
    measured = {"machine": machine(), **measured}
    if as_json:
        typer.echo(json.dumps(measured, indent=1))
        return
    typer.echo(f"{measured['what']}; {measured['machine']}\n")
    columns = list(next(iter(measured["variants"].values())))
    typer.echo("| | " + " | ".join(name.replace("_", " ") for name in columns) + " |\n|---|" + "---:|" * len(columns))
    for name, values in measured["variants"].items():
        typer.echo(f"| {name} | " + " | ".join(f"{values[column]:.3g}" for column in columns) + " |")
    rest = {key: value for key, value in measured.items() if key not in ("what", "machine", "variants")}
    for name, value in rest.items():
        if isinstance(value, list):
            typer.echo(f"\n{name.replace('_', ' ')}:\n" + "\n".join(f"- {line}" for line in value))
        else:
            typer.echo(f"\n{name.replace('_', ' ')}: " + (f"{value:.2f}" if isinstance(value, float) else str(value)))
