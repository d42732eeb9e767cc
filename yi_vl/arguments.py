"""What callers pass as options and paths: taken as its value, or refused in one line that names it. No torch here."""

from __future__ import annotations

import math
import numbers
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HALF_PAIR = re.compile("[\ud800-\udfff]")


def as_int(value: Any, name: str, least: int, most: int | None = None) -> int:
    """A whole number: an int, a numpy integer, or an array or tensor without dimensions that holds one.

    Raises:
        ValueError: it is of another type (a bool as well), or not from `least` to `most`.
    """
    number = _unwrap(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise ValueError(f"{name} is {shown(value)}; expected a whole number.")
    number = int(number)
    if most is None and number < least:
        raise ValueError(f"{name} is {shown(number)}; it must be at least {least}.")
    if most is not None and not least <= number <= most:
        raise ValueError(f"{name} is {shown(number)}; it must be from {least:,} to {most:,}.")
    return number


def as_float(value: Any, name: str) -> float:
    """A finite number: an int, a float, a numpy scalar, or an array or tensor without dimensions that holds one.

    Raises:
        ValueError: it is of another type (a bool as well), NaN, infinite or too large for a float.
    """
    number = _unwrap(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ValueError(f"{name} is {shown(value)}; expected a number.")
    try:
        result = float(number)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{name} is {shown(value)}; expected a finite number.")
    return result


def as_bool(value: Any, name: str) -> bool:
    """
    Raises:
        ValueError: it is no bool; "False" would be true.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; expected True or False.")
    return value


def as_text(value: Any, name: str) -> str:
    """A text that can be encoded.

    Raises:
        ValueError: it is no text, or holds half a surrogate pair, which no encoding has.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; expected a text.")
    if half := _HALF_PAIR.search(value):
        raise ValueError(
            f"{name} holds half a surrogate pair, {half[0]!r}, at character {half.start()}; no encoding has it. "
            "Decode the text from its bytes again."
        )
    return value


def as_path(value: Any, name: str) -> Path:
    """A path with its `~` expanded; whether anything is there is not looked at.

    Raises:
        ValueError: it is no path, empty, of an unknown user, or cannot be a path on this system.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ValueError(f"{name} is {shown(value)}; expected a path.")
    text = os.fspath(value)
    if not text:
        raise ValueError(f"{name} is an empty path.")
    if "\0" in text:
        raise ValueError(f"{name} is {shown(text)}; a path holds no NUL character.")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is {shown(text)}; it holds half a surrogate pair and is no path.") from error
    except RuntimeError as error:
        raise ValueError(f"{name} is {shown(text)}: there is no such user. Give the whole path.") from error


def as_slice(value: str, name: str) -> tuple[int, int]:
    """The two numbers of a slice A:B; B is not part of it.

    Raises:
        ValueError: it is written otherwise.
    """
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", value)
    if match is None:
        raise ValueError(f"{name} is {shown(value)}; expected A:B, from A to before B, such as 12:28.")
    return int(match[1]), int(match[2])


def ranges(numbers: Sequence[int]) -> list[str]:
    """Numbers in ascending order as `trainable.language` takes layers: 3, 7 or 4-7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]


def stat(path: Path, name: str) -> os.stat_result | None:
    """The status of a path; None where there is nothing.

    Raises:
        ValueError: it cannot be looked at: it is too long, or in a folder without permission.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{name} cannot be opened: {error.strerror}.") from error


def as_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    """
    Raises:
        ValueError: it is none of the choices.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}.")
    return value


def shown(value: Any) -> str:
    """A value in a line of an error, shortened."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except Exception:  # an integer of thousands of digits, or somebody's own __repr__
        text = ""
    return text if 0 < len(text) <= 120 else f"a {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """The first line of another library's exception, or its name; of system errors the reason."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ")[:500] if lines else type(error).__name__


def _unwrap(value: Any) -> Any:
    """numpy's scalars, and arrays and tensors without dimensions, as the number they hold."""
    is_scalar = getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None))
    return value.item() if is_scalar else value
