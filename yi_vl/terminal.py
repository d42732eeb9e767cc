"""Input and output of `yi-vl ask` and `yi-vl chat` in a terminal."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .predict import Conversation


def open_images(images: list[str]) -> list[Any]:
    """Paths, and in the place of - the standard input."""
    if images.count("-") > 1:
        raise ValueError("- is the standard input, which holds one image; give it once.")
    if "-" in images and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError('- is an image from a pipe, but nothing is piped in: cat image.png | yi-vl ask - "What?"')
    return [sys.stdin.buffer if image == "-" else image for image in images]


def split_paths(argument: str) -> list[str]:
    """The paths after /image: one, blanks included, where there is such a file; else as a shell reads them."""
    if os.path.isfile(os.path.expanduser(argument)):
        return [argument]
    try:
        return shlex.split(argument) or [argument]
    except ValueError:  # a quotation mark that is not closed, as in a file's name
        return [argument]


def print_turn(conversation: Conversation, question: str, images: list[Any], options: dict[str, Any]) -> None:
    """Print the answer to a question as it is generated; Ctrl-C stops it."""
    pieces = conversation.stream(question, images, **options)
    try:
        print_stream(pieces)
    except KeyboardInterrupt:
        pieces.close()
        print(" [stopped]")


def read_lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  line editing and history for input()

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves.")
            continue
        if line:
            yield line


def print_stream(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come, and a line end."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
