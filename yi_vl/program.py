"""How every program of the project runs and ends: `yi-vl`, `python -m eval`, `python -m train`, `python -m demo`."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any


def run(main: Callable[[], Any], name: str) -> None:
    """Run a program, and exit with the code that fits what happened.

    A `ValueError` or `OSError`, which is what users can cause, is one line on stderr and exit code 2; Ctrl-C is exit
    code 130; a closed pipe, as of `yi-vl ask ... | head -1`, is exit code 1. All other exceptions are passed on.

    Args:
        name: what the line on stderr starts with.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # escape what the terminal's encoding lacks
    try:
        try:
            main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        sys.exit(1)  # as typer does
    except (OSError, ValueError) as error:
        print_error(error, name)
        sys.exit(2)


def print_error(error: BaseException, name: str) -> None:
    """Print an error as one line on stderr."""
    print(f"{name}:", " ".join(str(error).split()), file=sys.stderr)
