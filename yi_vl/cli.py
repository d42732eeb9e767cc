"""The command line: `yi-vl ask | chat | serve | info | convert | expand | upcycle`.

Heavy imports happen inside the commands, so that `yi-vl --help` is instant.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import cli_architecture
from .arguments import as_path
from .loading import check, load_quickly, quick_imports
from .program import print_error, run
from .runtime import limit_spinning, use_huge_pages
from .terminal import open_images, print_stream, print_turn, read_lines, split_paths

_PRESETS = ("6b", "34b", "6b-1.5", "9b-1.5", "34b-1.5", "nano")  # config.PRESETS, which takes a second to import
_CHAT_HELP = (
    "/image PATH... adds images to the next question, /clear starts a new chat, /exit leaves; Ctrl-C stops an answer."
)

app = typer.Typer(
    help="Ask a Yi-VL model about images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="A model folder or hub id; the bundled nano by default.")
]
QuantizeOption = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(help="Quantize the language model's linear layers: smaller, faster, a little less exact."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ..., or auto for all there is; by default the GPU, else the CPU.")
]
DtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="Of the weights; by default bfloat16, but float32 for a small model on a CPU."),
]
RemoteImagesOption = Annotated[
    bool, typer.Option("--allow-remote-images", help="Fetch images given as http(s) URLs, from the public internet.")
]
TilesOption = Annotated[
    int | None, typer.Option(help="Most tiles of a large image, 0 for none; by default as the model was trained.")
]
SystemOption = Annotated[str | None, typer.Option(help="Text before the conversation; Yi-VL's own by default.")]
LengthOption = Annotated[int, typer.Option(help="Maximum number of new tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")]
TopPOption = Annotated[
    float, typer.Option(help="Nucleus sampling: only from the likeliest tokens of this total probability.")
]
SeedOption = Annotated[int | None, typer.Option(help="Makes an answer with a temperature repeatable.")]


def main() -> None:
    """The entry point of `yi-vl`."""
    use_huge_pages()
    limit_spinning()
    run(partial(app, prog_name="yi-vl"), "yi-vl")


def _print_version(is_given: bool) -> None:
    if is_given:
        from importlib.metadata import PackageNotFoundError, version

        with contextlib.suppress(PackageNotFoundError):
            print(f"yi-vl {version('yi_vl')}")
            raise typer.Exit
        print("yi-vl, not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ask a Yi-VL model about images."""


def _sampling_options(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict[str, Any]:
    return {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}


@app.command()
def ask(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[IMAGE]... QUESTION", help="Images, - for one from a pipe; then the question."),
    ],
    model: ModelOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    image_tiles: TilesOption = None,
    system: SystemOption = None,
    max_new_tokens: LengthOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    allow_remote_images: RemoteImagesOption = False,
) -> None:
    """Answer one question about some images, or about none."""
    *images, question = arguments
    if os.path.isfile(question):
        raise ValueError(f'the last argument is the question, but {question} is a file. Add: "What is this?"')
    if re.fullmatch(r"https?://\S+", question, re.IGNORECASE):
        raise ValueError('the last argument is the question, but it is a URL. Add: "What is this?"')
    if not question.strip():
        raise ValueError("The question is empty.")
    opened = open_images(images)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    check(model, opened, allow_remote_images, options)
    yi_vl = load_quickly(model, quantize, device, dtype, allow_remote_images, image_tiles)
    print_stream(yi_vl.stream(opened, question, system=system, **options))


@app.command()
def chat(
    images: Annotated[list[str] | None, typer.Argument(help="Images for the first question.")] = None,
    model: ModelOption = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    image_tiles: TilesOption = None,
    system: SystemOption = None,
    max_new_tokens: LengthOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = None,
    allow_remote_images: RemoteImagesOption = False,
) -> None:
    """Talk about images; the model remembers the conversation."""
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    check(model, images or (), allow_remote_images, options)
    yi_vl = load_quickly(model, quantize, device, dtype, allow_remote_images, image_tiles)
    pending_images = [yi_vl.prepare_image(image) for image in images or ()]
    conversation = yi_vl.chat(system)
    print(_CHAT_HELP)
    for line in read_lines():
        command, _, argument = line.partition(" ")
        try:
            if command == "/exit":
                return
            if command == "/clear":
                conversation, pending_images = yi_vl.chat(system), []
            elif command == "/image":
                pending_images += [yi_vl.prepare_image(path) for path in split_paths(argument.strip())]
            elif command.startswith("/"):
                print(_CHAT_HELP)
            else:
                print_turn(conversation, line, pending_images, options)
                pending_images = []
        except ValueError as error:  # the chat goes on, and images stay for the next question
            print_error(error, "yi-vl")


@app.command()
def serve(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A model folder or hub id; else nano.")] = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    image_tiles: TilesOption = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default its folder or id.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="YI_VL_API_KEY",
            show_envvar=True,
            help="A bearer key that clients must show; repeat it for several. Other users see options in `ps`.",
        ),
    ] = None,
    api_key_file: Annotated[str | None, typer.Option(help="A file of such keys, one a line.")] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Let web pages of this origin ask, like https://example.org; * for all. Repeatable."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Additional Host header to accept, *.example.org for all below one, * for all. Repeatable."),
    ] = None,
    ssl_certfile: Annotated[str | None, typer.Option(help="A PEM certificate chain: serve https.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Its private key, if that is another file.")] = None,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch images from the public internet for clients.")
    ] = False,
    max_batch_size: Annotated[int, typer.Option(min=1, help="How many answers are generated at once.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="How many requests beyond those may wait.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most new tokens a client may request.")] = 2048,
    shutdown_seconds: Annotated[
        int, typer.Option(min=0, help="Seconds that running answers may continue after Ctrl-C.")
    ] = 5,
) -> None:
    """Answer OpenAI's clients over HTTP: /v1/chat/completions, /v1/models, /healthz, /metrics."""
    check(model)
    try:
        for package in ("fastapi", "httpx", "prometheus_client", "uvicorn"):  # before a model is loaded
            importlib.import_module(package)
        from .server.launch import run as run_server
        from .server.protocol import Limits
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is missing; serving needs: pip install "yi_vl[serve]"') from error
    if name is None:
        name = "nano" if model is None else _name_of(model)
    run_server(
        lambda: load_quickly(model, quantize, device, dtype, image_tiles=image_tiles),
        name,
        host=host,
        port=port,
        api_keys=api_key or (),
        api_key_file=api_key_file,
        cors_origins=cors_origin or (),
        allowed_hosts=allowed_host or (),
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        shutdown_seconds=shutdown_seconds,
        allow_remote_images=allow_remote_images,
        limits=Limits(max_batch_size=max_batch_size, num_waiting=max_waiting, max_tokens=max_tokens),
    )


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{', '.join(_PRESETS)}, a model folder, or a hub id.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor's name and shape instead.")] = False,
) -> None:
    """What a model is made of: configuration, parameters, memory. No weights are read."""
    from .checkpoint.find import find

    source = None if model in _PRESETS else find(model)
    with quick_imports():
        from rich.console import Console

        from .checkpoint.load import fetch, read_config
        from .checkpoint.summary import tensor_shapes
        from .config import preset
        from .hybrid_info import hybrid_table
        from .info import config_table, size_tables

    folder = None if source is None else fetch(source, with_weights=False)
    config = preset(model) if folder is None else read_config(str(folder))
    if tensors:
        for name, shape in tensor_shapes(config, folder).items():
            print(f"{name:<72}{' x '.join(map(str, shape))}")
        return
    console = Console()
    for table in (config_table(model, config, folder), *hybrid_table(config), *size_tables(config, folder)):
        console.print(table)


@app.command("convert")
def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model folder or hub id, in any layout.")],
    target: Annotated[str | None, typer.Argument(metavar="DST", help="A folder that does not exist yet.")] = None,
    to: Annotated[
        Literal["yi-vl", "official", "llava-hf", "gguf"],
        typer.Option(help="The layout to write; gguf is for llama.cpp, Ollama and LM Studio."),
    ] = "yi-vl",
    type: Annotated[
        Literal["f16", "bf16", "f32", "q8_0", "q4_k_m"] | None,
        typer.Option(help="Of the language model's matrices, with --to gguf; f16 by default."),
    ] = None,
    tower_from: Annotated[
        Literal["vit", "shards"],
        typer.Option(help="An official release holds the vision tower twice; the official code takes vit."),
    ] = "vit",
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare what was written with SRC, and the two copies of a release's tower."),
    ] = False,
    quantize: QuantizeOption = None,
) -> None:
    """Write a model in another layout, shard by shard; DST appears when it is complete.

    With --quantize it is written in our layout, for CPUs. With --verify it is read back and compared: exit code 2 if
    more than rounding differs. Without DST, --verify compares the two copies of the vision tower in a release.
    """
    folder = None if target is None else as_path(target, "DST")
    _check_conversion(folder, to, type, verify, quantize)
    check(source)
    with quick_imports():
        from .conversion import run_conversion
    run_conversion(source, folder, to, type or "f16", tower_from, verify, quantize)


app.command()(cli_architecture.expand)
app.command()(cli_architecture.upcycle)


def _check_conversion(folder: Path | None, to: str, type: str | None, verify: bool, quantize: str | None) -> None:
    """Refuse options that contradict each other."""
    if folder is None and not verify:
        raise ValueError("say where to write to: yi-vl convert SRC DST --to " + to)
    if folder is not None and folder.exists():
        raise ValueError(f"{folder} exists already; choose another name, or remove it.")
    if quantize is not None and to != "yi-vl":
        raise ValueError(f"--quantize writes our layout, and {to!r} has no place for quantized weights.")
    if type is not None and to != "gguf":
        raise ValueError(f"--type {type} is for --to gguf; the layout {to!r} keeps the types of its source.")


def _name_of(model: str) -> str:
    folder = as_path(model, "the model")
    return folder.resolve().name if folder.is_dir() else model
