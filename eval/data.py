"""Rows of a benchmark: from the hub, a folder of its parquet files, or JSON lines with images beside them.

Rows that do not have the benchmark's schema are refused by name here, before any model is loaded.
"""

from __future__ import annotations

import ast
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .types import BenchmarkImage, Marker, Question

logger = logging.getLogger(__name__)


class Row:
    """One row and its source."""

    def __init__(
        self, values: Mapping[str, Any], source: str, images: Mapping[str, BenchmarkImage] | None = None
    ) -> None:
        self.values = values
        self.source = source
        self.images = {} if images is None else images  # column or file name -> image

    @property
    def id(self) -> str:
        return self.text("id")

    def text(self, column: str) -> str:
        """A column as text; numbers are written out, null is empty."""
        value = self.values.get(column)
        return "" if value is None else str(value)

    def literal_list(self, column: str) -> list[str]:
        """A column that holds the text of a Python list (a real list will do): parsed as a literal, never run."""
        value = self.values.get(column)
        if isinstance(value, str):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # an unescaped backslash of a formula is kept, and no fault
                    value = ast.literal_eval(value.strip() or "[]")
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
                raise self.error(f"{column} is {value[:80]!r}, not the text of a list") from None
        if value is None or not isinstance(value, (list, tuple)):
            raise self.error(f"{column} holds a {type(value).__name__}, not a list")
        return [str(item) for item in value]

    def lettered_options(self, column: str = "options") -> dict[str, str]:
        """The options of a multiple-choice question by letter, A first: from a list, the text of one, or an object.

        An option that is no text (a number, a list) is written out as Python writes it, which is how the official
        prompts show it: `[['A', 'B']]` is one option, `['A', 'B']`.

        Raises:
            ValueError: there are none, more than letters, or an object whose keys are not the first letters.
        """
        value = self.values.get(column)
        if isinstance(value, dict):
            options = {str(letter): str(option) for letter, option in value.items()}
        else:
            texts = self.literal_list(column)
            if len(texts) > len(ascii_uppercase):
                raise self.error(f"it has {len(texts)} options, more than the {len(ascii_uppercase)} letters")
            options = dict(zip(ascii_uppercase, texts))
        if not options:
            raise self.error("it is a multiple-choice question, but it has no options")
        if "".join(options) != ascii_uppercase[: len(options)]:
            raise self.error(f"its options are named {', '.join(options)[:80]}, not A, B, C and so on")
        return options

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.source}, question {self.values.get('id')!r}: {what}.")


def read_rows(
    data: str, splits: Sequence[str], columns: Sequence[str], configs: Sequence[str] | None = None
) -> list[Row]:
    """All rows of a split, in the order of files and rows.

    Args:
        data: a folder with `[CONFIG/]SPLIT-*.parquet` or, as the hub converts them, `[CONFIG/]SPLIT/*.parquet`, or a
            hub id.
        splits: what the split may be called.
        columns: those that every row must have.
        configs: read only these, which must all be there; by default whatever there is.

    Raises:
        ValueError: no such data, a missing column, a repeated id.
    """
    folder = Path(data).expanduser()
    tables = _local_tables(folder, splits, configs) if folder.is_dir() else _hub_tables(data, splits, configs)
    rows = [row for source, table in tables for row in _rows_of(source, table, columns)]
    return refuse_repeated(rows, data)


def refuse_repeated(rows: list[Row], source: str) -> list[Row]:
    """The rows, or an error that names ids which come more than once."""
    repeated = [key for key, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{source}: {len(repeated)} ids come more than once: {', '.join(repeated[:5])} ...")
    return rows


def _local_tables(folder: Path, splits: Sequence[str], configs: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    files = [path for path in sorted(folder.rglob("*.parquet")) if _is_of(path, splits, configs)]
    patterns = " or ".join(f"{split}-*.parquet" for split in splits)
    within = f" in folders named {', '.join(map(repr, configs))}" if configs else ""
    if not files:
        names = ", ".join(sorted({path.name for path in folder.rglob("*.parquet")})[:8]) or "no parquet files at all"
        raise ValueError(f"{folder} has no {patterns}{within}; it has {names}.")
    for path in files:
        try:
            yield str(path), Dataset.from_parquet(str(path), keep_in_memory=False)
        except Exception as error:  # pyarrow and datasets raise many kinds
            raise ValueError(f"{path} cannot be read as parquet: {error}") from error


def _is_of(path: Path, splits: Sequence[str], configs: Sequence[str] | None) -> bool:
    """Whether a parquet file belongs to a split, by its own name or its folder's, and to one of the configs."""
    is_in_split_folder = path.parent.name in splits
    config = path.parent.parent.name if is_in_split_folder else path.parent.name
    is_of_split = is_in_split_folder or re.split("[-.]", path.name)[0] in splits
    return is_of_split and (configs is None or config in configs)


def _hub_tables(data: str, splits: Sequence[str], configs: Sequence[str] | None) -> Iterator[tuple[str, Any]]:
    from datasets import get_dataset_config_names, load_dataset

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        raise ValueError(f"{data}: there is no such folder, and a hub id has the form owner/name.")
    try:
        for config in configs or get_dataset_config_names(data):
            yield f"{data} ({config})", load_dataset(data, config, split=splits[0])
    except Exception as error:  # network, hub and parsing errors of many kinds
        raise ValueError(f"{data} is no folder here, and it cannot be had from the hub: {error}") from error


def _rows_of(source: str, table: Any, columns: Sequence[str]) -> Iterator[Row]:
    from datasets import Image

    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise ValueError(
            f"{source} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}. "
            "Is it another benchmark, or another version of it?"
        )
    image_columns = [name for name in table.column_names if re.fullmatch(r"image(_\d+)?", name)]
    for name in image_columns:
        if isinstance(table.features[name], Image):
            table = table.cast_column(name, Image(decode=False))
    for index, values in enumerate(table.remove_columns(image_columns)):
        images = {}
        for name in image_columns:
            if _is_there(table, index, name):
                images[name] = BenchmarkImage(f"{values['id']}.{name}", partial(_read_image, table, index, name))
        yield Row(values, source, images)


def _is_there(table: Any, index: int, column: str) -> bool:
    value = table.data.column(column)[index]
    return value.is_valid and any(value.get(key) is not None and value[key].is_valid for key in ("bytes", "path"))


def _read_image(table: Any, index: int, column: str) -> bytes:
    value = table[index][column]
    if value.get("bytes"):
        return bytes(value["bytes"])
    path = Path(value["path"])
    if not path.is_file():
        raise ValueError(f"{table[index]['id']}: {column} holds no bytes, and there is no file {path}.")
    return path.read_bytes()


def images_of(row: Row, names: Sequence[str]) -> tuple[tuple[BenchmarkImage, ...], dict[str, int]]:
    """A row's images of some columns, and the index of each column's among them."""
    present = [name for name in names if name in row.images]
    return tuple(row.images[name] for name in present), {name: index for index, name in enumerate(present)}


def split_at_markers(
    row: Row, prompt: str, pattern: str, index_of: Mapping[str, int | None]
) -> tuple[str | Marker, ...]:
    """A prompt as text and markers; a marker whose image is missing is an error."""
    parts: list[str | Marker] = []
    end = 0
    for match in re.finditer(pattern, prompt):
        index = index_of.get(match[0])
        if index is None:
            raise row.error(f"the text speaks of {match[0]}, but the row has no such image")
        parts += [prompt[end : match.start()], Marker(match[0], index)]
        end = match.end()
    return tuple(part for part in (*parts, prompt[end:]) if part != "")


def warn_of_unshown(questions: Sequence[Question], pattern: str, source: str) -> None:
    """One warning, from the main process, that names the questions whose text speaks of an image that is not there."""
    unshown = [
        question.id
        for question in questions
        if any(isinstance(part, str) and re.search(pattern, part) for part in question.parts)
    ]
    if not unshown:
        return
    from accelerate import PartialState

    if PartialState().is_main_process:  # every process of a run loads the questions
        logger.warning(
            "%s: %d of %d questions speak of an image that their row does not have; there the text stays as it is: %s",
            source,
            len(unshown),
            len(questions),
            ", ".join(unshown[:5]) + (" ..." if len(unshown) > 5 else ""),
        )


def read_json(path: Path) -> Any:
    """A JSON file; `ValueError` when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
