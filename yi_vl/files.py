"""Files that appear only when they are complete, JSON lines, and SHA-256. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 20


@contextmanager
def atomic_path(path: Path, flush: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` for a file or a folder, which replaces `path` if the block raises nothing.

    Args:
        flush: to the disk before renaming; otherwise a power cut may leave the name without the content.

    Raises:
        OSError: the disk is full, or there is no permission.
    """
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)  # left by a process that was killed
    try:
        yield temporary
        if flush:
            for written in (*temporary.rglob("*"), temporary):
                sync_to_disk(written)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        if flush:
            sync_to_disk(path.parent)
    finally:
        _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears under its name only when it is complete."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json_lines(path: Path, drops_partial: bool = False) -> list[dict[str, Any]]:
    """The objects in a UTF-8 file, one per line; blank lines are skipped.

    Args:
        drops_partial: ignore a last line without a newline, which a killed process leaves behind.

    Raises:
        ValueError: the file cannot be read, or a line is not a JSON object; the message has its number.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    rows = []
    for number, line in enumerate(lines[:-1] if drops_partial else lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is a {type(row).__name__}, not an object.")
        rows.append(row)
    return rows


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line; the file appears under its name only when it is complete."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
