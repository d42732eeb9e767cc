"""Models on ModelScope, by `ms://owner/name`; the package `modelscope` fetches them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..arguments import one_line, shown

_PREFIX = "ms://"


def is_modelscope(source: object) -> bool:
    """Whether a name is of a model on ModelScope."""
    return isinstance(source, str) and source.startswith(_PREFIX)


def check_modelscope(source: str) -> str:
    """The name itself. Nothing is fetched.

    Raises:
        ValueError: it has another form, or `modelscope` is not installed.
    """
    parts = source.removeprefix(_PREFIX).split("/")
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"{shown(source)}: a model on ModelScope has the form {_PREFIX}owner/name.")
    if find_spec("modelscope") is None:
        raise ValueError(f"{source} is on ModelScope, and modelscope is not installed: pip install modelscope.")
    return source


def fetch_modelscope(source: str, patterns: Sequence[str]) -> Path:
    """The folder of a model in ModelScope's cache, after fetching what is missing of the files of these patterns.

    Raises:
        ValueError: it cannot be had.
    """
    check_modelscope(source)
    try:
        from modelscope import snapshot_download  # type: ignore[import-not-found]

        return Path(snapshot_download(source.removeprefix(_PREFIX), allow_patterns=list(patterns)))
    except Exception as error:  # its own kinds, requests', and those of a broken installation
        raise ValueError(f"{source} cannot be had from ModelScope: {one_line(error)}.") from error
