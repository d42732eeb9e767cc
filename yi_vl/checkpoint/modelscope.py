"""Models on ModelScope, by `ms://owner/name`; the package `modelscope` fetches them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..arguments import one_line, shown

_PREFIX = "ms://"
_NAME = re.compile(r"(?!\.+/)[\w.-]+/(?!\.+$)[\w.-]+", re.ASCII)  # owner/name, neither of dots alone
_REFUSALS = (401, 403, 404)  # HTTP status codes
_logger = logging.getLogger(__name__)


def is_modelscope(source: object) -> bool:
    """Whether a name is of a model on ModelScope."""
    return isinstance(source, str) and source.startswith(_PREFIX)


def check_modelscope(source: str) -> str:
    """The name itself. Nothing is fetched.

    Raises:
        ValueError: it has another form, or `modelscope` is not installed.
    """
    if not _NAME.fullmatch(source.removeprefix(_PREFIX)):
        raise ValueError(f"{shown(source)}: a model on ModelScope has the form {_PREFIX}owner/name.")
    if find_spec("modelscope") is None:
        raise ValueError(f"{source} is on ModelScope, and modelscope is not installed: pip install modelscope.")
    return source


def fetch_modelscope(source: str, files: Sequence[str], weights: Sequence[str] = ()) -> Path:
    """The folder of a model in ModelScope's cache, after fetching what is missing or has changed.

    If ModelScope refuses or cannot be reached, a copy in the cache is used, with a warning.

    Args:
        files: patterns of the configuration's and the tokenizer's files.
        weights: patterns of the weight files; by default none are fetched.

    Raises:
        ValueError: it cannot be fetched, and there is no copy in the cache.
    """
    check_modelscope(source)
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found]
    except Exception as error:  # it imports much, of any version
        raise ValueError(
            f"{source} is on ModelScope, and the installed modelscope cannot be imported: {one_line(error)}. "
            "Update it (pip install -U modelscope)."
        ) from error
    name = source.removeprefix(_PREFIX)
    with _silent_loggers():
        cached = _cached_folder(snapshot_download, name, weights)
        if cached is None:
            _logger.warning("Fetching %s from ModelScope ...", source)
        try:
            return Path(snapshot_download(name, allow_patterns=[*files, *weights]))
        except Exception as error:  # its own kinds, and those of requests
            if cached is None or hasattr(error, "failed_files"):  # these had changed, and their copies are removed
                raise ValueError(f"{source} could not be fetched from ModelScope: {_reason(error)}.") from error
            _logger.warning("%s is used as it is in the cache; ModelScope: %s.", source, _reason(error))
            return cached


def _cached_folder(snapshot_download: Any, name: str, weights: Sequence[str]) -> Path | None:
    """The folder of a model's copy in the cache, if any; with some of its weights, if these are asked for."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # there is none, which releases say with different exceptions
        return None
    is_usable = (folder / "config.json").is_file() and (not weights or any(any(folder.glob(each)) for each in weights))
    return folder if is_usable else None


def _reason(error: Exception) -> str:
    """Why nothing could be fetched and what to do, in one line."""
    failed = getattr(error, "failed_files", None)
    if failed:
        name, cause = next(iter(failed.items()))
        return f"{name} failed ({one_line(_root(cause))}); the files that are complete are kept, so try again"
    if getattr(getattr(error, "response", None), "status_code", None) in _REFUSALS:
        return "there is no model of this name, or it is private and MODELSCOPE_API_TOKEN must be set"
    is_local = getattr(error, "strerror", None)  # the disk is full, the cache cannot be written
    return one_line(_root(error)) + ("" if is_local else "; check the connection")


def _root(error: BaseException) -> BaseException:
    """The exception that a chain began with: its text is of the system or the server, not of three libraries."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return error


@contextmanager
def _silent_loggers() -> Iterator[None]:
    """Without the package's log on stderr: exceptions hold the same, and progress bars show the rest."""
    loggers = [logging.getLogger(name) for name in ("modelscope", "modelscope_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
