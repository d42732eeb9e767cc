"""`python -m demo`: a chat about images in the browser, with the bundled nano or any Yi-VL."""

from __future__ import annotations

import ipaddress
import logging
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from yi_vl.arguments import as_path
from yi_vl.checkpoint.find import find
from yi_vl.cli import DeviceOption, DtypeOption, QuantizeOption
from yi_vl.program import run
from yi_vl.runtime import limit_spinning, use_huge_pages
from yi_vl.startup import quick_start

from .card import find_card
from .i18n import ANY_YI_VL, LANGUAGES, NANO

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def demo(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model folder or hub id; the bundled nano by default.")
    ] = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    about: Annotated[str | None, typer.Option(help="A sentence shown on the page that describes the model.")] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Other than loopback requires --auth.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port; by default the first free one from 7860.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Create a public link through Gradio's tunnel. Requires --auth.")
    ] = False,
    auth: Annotated[
        str | None, typer.Option(envvar="YI_VL_DEMO_AUTH", help="USER:PASSWORD required from visitors.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(help="Save conversations and images in this folder; the page then says so."),
    ] = None,
) -> None:
    account = _account(auth)
    if account is None and (share or not _is_loopback(host)):
        what = "--share shows" if share else f"--host {host} shows"
        raise ValueError(f"{what} the page to others, so it needs a password: add --auth USER:PASSWORD.")
    keep = _make_folder(keep) if keep else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that uploads are removed then too
    find(model)  # refused before the seconds that imports take
    with quick_start():
        from yi_vl.predict import load

        try:
            from .app import running
        except ModuleNotFoundError as error:
            raise ValueError(f'{error}. Install what the demo needs: pip install -e ".[demo]"') from error

        yi_vl = load(model, device=device, dtype=dtype, quantize=quantize)
    name = Path(model).name if model else "nano"
    of_model = ANY_YI_VL if model else NANO
    descriptions = dict.fromkeys(LANGUAGES, about) if about else of_model
    page = running(
        yi_vl,
        name,
        descriptions,
        keep,
        find_card(model),
        server_name=host,
        server_port=port,
        share=share,
        auth=account,
    )
    try:
        with page as (url, shared_url):
            if share and not shared_url:
                raise ValueError("--share: the tunnel could not be opened. Is there a way to the internet?")
            typer.echo(f"Open {shared_url or url} in a browser. Ctrl-C ends.")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        typer.echo()
    except OSError as error:
        reason = str(error).partition(".")[0]
        raise ValueError(f"the page cannot be served at {host}: {reason}. Choose another --host or --port.") from error


def _make_folder(keep: Path) -> Path:
    folder = as_path(keep, "--keep")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--keep {folder}: no such folder can be made: {error.strerror}.") from error
    return folder


def _account(auth: str | None) -> tuple[str, str] | None:
    if auth is None:
        return None
    user, _, password = auth.partition(":")
    if not user or not password:
        raise ValueError("--auth takes a name and a password with a colon between them: --auth USER:PASSWORD.")
    return user, password


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main() -> None:
    """The entry point of `python -m demo`."""
    use_huge_pages()
    limit_spinning()
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    run(partial(app, prog_name="python -m demo"), "demo")


if __name__ == "__main__":
    main()
