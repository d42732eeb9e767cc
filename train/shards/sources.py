"""Sources of shards: conversations in JSON or JSON lines with their image folder, or parquet files.

A source is split into chunks, one per shard. A chunk is small, is sent to a worker process, and there yields its
samples: a name for messages, and a function that reads the sample or raises the reason why it cannot be used.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from yi_vl.files import sha256

from ..config import PREFERENCE
from ..data.conversations import Conversation, has_text, is_empty, read_conversation
from ..data.preferences import Preference, read_preference
from ..data.samples import parse_json
from .files import Members
from .images import image_bytes, image_members

Reader = Callable[[], Members]  # raises ValueError
_ROWS_AT_ONCE = 64


class Chunk(Protocol):
    """The samples of one shard: `first` is the index of its first one in the whole source."""

    @property
    def first(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[str, Reader]]: ...


class Source(Protocol):
    """Something to make shards from.

    format: the trainer's for its samples, see `config.DataConfig`.
    identity: JSON that an interrupted command is resumed by.
    """

    format: str
    identity: dict[str, Any]

    def chunks(self, size: int) -> list[Chunk]:
        """All samples in order, at most `size` in a chunk."""
        ...


@dataclass(frozen=True)
class LlavaChunk:
    first: int
    entries: list[Any]
    images: Path
    ignore: frozenset[str]
    format: str

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, Reader]]:
        for index, entry in enumerate(self.entries, self.first):
            name = f"entry {index}"
            if isinstance(entry, dict) and "id" in entry:
                name += f", id {str(entry['id'])[:80]!r}"
            yield name, partial(_from_entry, entry, self.images, self.ignore, self.format)


@dataclass(frozen=True)
class BadLine:
    """A line of JSON lines that is not JSON, with the reason."""

    reason: str


class LlavaSource:
    """Conversations as `read_conversation`, or preferences as `read_preference` reads them, in a JSON list or in JSON
    lines, compressed by gzip or not.

    Their images are paths inside the folder, or `data:` URLs. Samples are numbered in order, so ids need not be
    unique.

    Args:
        ignore: keys to ignore.
        is_preference: whether the entries are preferences.

    Raises:
        ValueError: there is no such file or folder, or the file is neither a JSON list nor JSON lines.
    """

    def __init__(self, path: Path, images: Path, ignore: Collection[str] = (), is_preference: bool = False) -> None:
        self.format = PREFERENCE if is_preference else "chat"
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file.")
        if not images.is_dir():
            raise ValueError(f"{images}: there is no such image folder.")
        self._entries, self._images, self._ignore = _read_entries(path), images, frozenset(ignore)
        self.identity = {"llava": path.name, "sha256": sha256(path)}
        if is_preference:
            self.identity["format"] = self.format
        if ignore:
            self.identity["ignore"] = ",".join(sorted(ignore))
        ids = Counter(str(entry["id"]) for entry in self._entries if isinstance(entry, dict) and "id" in entry)
        self.num_repeated_ids = sum(count - 1 for count in ids.values())

    def chunks(self, size: int) -> list[Chunk]:
        starts = range(0, len(self._entries), size)
        pieces = [(start, self._entries[start : start + size]) for start in starts]
        return [LlavaChunk(start, entries, self._images, self._ignore, self.format) for start, entries in pieces]


def _read_entries(path: Path) -> list[Any]:
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        text = content.decode(json.detect_encoding(content))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and _is_record(lines[0]):
        return [_parse_line(line, number) for number, line in enumerate(lines, 1)]
    entries = parse_json(text, str(path))
    if isinstance(entries, dict) and len(lines) == 1 and entries:
        return [entries]  # JSON lines of one line
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of conversations, found {type(entries).__name__}.")
    return entries


def _is_record(line: str) -> bool:
    """Whether the first of several lines is a whole JSON object or list."""
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def _parse_line(line: str, number: int) -> Any:
    try:
        return parse_json(line, f"line {number}")
    except ValueError as error:
        return BadLine(str(error))


@dataclass(frozen=True)
class Columns:
    """Which columns of a parquet file to read: one of `caption`, `conversations` and `preference` is given.

    preference: one column of whole records, or those that make up a record, such as question, chosen and rejected.
    """

    image: str
    caption: str | None = None
    conversations: str | None = None
    preference: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, self.caption, self.conversations, *self.preference) if name is not None]

    @property
    def format(self) -> str:
        """The trainer's for these samples."""
        return PREFERENCE if self.preference else "caption" if self.conversations is None else "chat"


@dataclass(frozen=True)
class ParquetChunk:
    """Rows `start` to `stop` of one file."""

    first: int
    path: Path
    start: int
    stop: int
    columns: Columns
    ignore: frozenset[str]

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[str, Reader]]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            row = 0
            for group in range(file.num_row_groups):
                num_rows = file.metadata.row_group(group).num_rows
                if row < self.stop and self.start < row + num_rows:
                    yield from self._rows(file, group, row)
                row += num_rows

    def _rows(self, file: Any, group: int, row: int) -> Iterator[tuple[str, Reader]]:
        """Rows of one row group, which begins at `row`; only a few of them are in memory."""
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self.columns.names):
            if row >= self.stop:
                return
            selected = batch.slice(max(0, self.start - row), max(0, self.stop - max(row, self.start)))
            for index, values in enumerate(selected.to_pylist(), max(row, self.start)):
                read = partial(_from_row, values, self.columns, self.path.parent, self.ignore)
                yield f"{self.path.name} row {index}", read
            row += batch.num_rows


class ParquetSource:
    """Rows with an image (bytes, {"bytes", "path"}, a list of either, or none) and a text: see `Columns`.

    Raises:
        ValueError: a file is missing or not parquet, or a column is not in it.
    """

    def __init__(self, paths: list[Path], columns: Columns, ignore: Collection[str] = ()) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.format = columns.format
        self._columns, self._ignore = columns, frozenset(ignore)
        self._num_rows: dict[Path, int] = {}
        self.unread_columns: list[str] = []
        for path in paths:
            try:
                schema, metadata = pq.read_schema(path), pq.read_metadata(path)
            except (OSError, pa.ArrowInvalid) as error:
                raise ValueError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error
            if missing := [name for name in columns.names if name not in schema.names]:
                raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(schema.names)}.")
            self._num_rows[path] = metadata.num_rows
            unread = [name for name in schema.names if name not in (*columns.names, *self.unread_columns)]
            self.unread_columns += unread
        files = [[path.name, path.stat().st_size, num_rows] for path, num_rows in self._num_rows.items()]
        self.identity = {"parquet": files, "columns": columns.names, "form": self.format}
        if ignore:
            self.identity["ignore"] = ",".join(sorted(ignore))

    def chunks(self, size: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        first = 0
        for path, num_rows in self._num_rows.items():  # a shard is of one file
            for start in range(0, num_rows, size):
                stop = min(start + size, num_rows)
                chunks.append(ParquetChunk(first + start, path, start, stop, self._columns, self._ignore))
            first += num_rows
        return chunks


def _from_entry(entry: Any, images: Path, ignore: frozenset[str], sample_format: str) -> Members:
    if isinstance(entry, BadLine):
        raise ValueError(entry.reason)
    read = read_preference if sample_format == PREFERENCE else read_conversation
    sample: Conversation | Preference = read(entry, ignore)
    contents = [image_bytes(image, images) for image in sample.images or ()]
    identity = {"id": entry["id"]} if isinstance(entry, dict) and "id" in entry else {}
    return image_members(contents) | {"json": _json(identity, sample)}


def _from_row(values: dict[str, Any], columns: Columns, folder: Path, ignore: frozenset[str]) -> Members:
    images = values[columns.image]
    images = images if isinstance(images, list) else [] if is_empty(images) else [images]
    if columns.caption is not None:
        caption = values[columns.caption]
        if not isinstance(caption, str):
            raise ValueError(f"its {columns.caption!r} is {type(caption).__name__}, not text")
        if not has_text(caption):
            raise ValueError(f"its {columns.caption!r} is empty")
        if not images:
            raise ValueError("it has no image")
        return image_members([image_bytes(image, folder) for image in images]) | {"txt": caption.encode()}
    sample = _read_row(values, columns, ignore, len(images))
    if sample.images is not None and images and len(sample.images) != len(images):
        raise ValueError(f"its {columns.image!r} holds {len(images)} images, but its text names {len(sample.images)}")
    members = image_members([image_bytes(image, folder) for image in images or sample.images or ()])
    return members | {"json": _json({}, sample)}


def _read_row(
    values: dict[str, Any], columns: Columns, ignore: frozenset[str], num_images: int
) -> Conversation | Preference:
    """The conversation or preference of a row."""
    if len(columns.preference) > 1:
        return read_preference({name: values[name] for name in columns.preference}, ignore, num_images)
    name = columns.preference[0] if columns.preference else columns.conversations
    assert name is not None
    record = values[name]
    if isinstance(record, str):
        record = parse_json(record, f"its {name!r}")
    if columns.preference:
        return read_preference(record, ignore, num_images)
    return read_conversation(record, ignore)


def _json(identity: dict[str, Any], sample: Conversation | Preference) -> bytes:
    return json.dumps(identity | sample.record, ensure_ascii=False).encode()
