"""Sources of shards: conversations in JSON or JSON lines with their image folder, or parquet files.

A source is split into chunks, one per shard. A chunk is small, is sent to a worker process, and there yields its
samples: a name for messages, and a function that reads the sample or raises the reason why it cannot be used.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

from yi_vl.files import sha256
from yi_vl.image import load_image, open_image
from yi_vl.image.data_url import png_bytes

from ..data.conversations import Conversation, has_text, is_empty, read_conversation
from ..data.samples import parse_json
from .files import Members

Reader = Callable[[], Members]  # raises ValueError
_SUFFIX_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}  # MPO: a JPEG that is followed by more images
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

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, Reader]]:
        for index, entry in enumerate(self.entries, self.first):
            name = f"entry {index}"
            if isinstance(entry, dict) and "id" in entry:
                name += f", id {str(entry['id'])[:80]!r}"
            yield name, partial(_from_entry, entry, self.images, self.ignore)


@dataclass(frozen=True)
class BadLine:
    """A line of JSON lines that is not JSON, with the reason."""

    reason: str


class LlavaSource:
    """Conversations as `read_conversation` reads them, in a JSON list or in JSON lines, compressed by gzip or not.

    Their images are paths inside the folder, or `data:` URLs. Samples are numbered in order, so ids need not be
    unique.

    Args:
        ignore: keys to ignore.

    Raises:
        ValueError: there is no such file or folder, or the file is neither a JSON list nor JSON lines.
    """

    format = "chat"

    def __init__(self, path: Path, images: Path, ignore: Collection[str] = ()) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file.")
        if not images.is_dir():
            raise ValueError(f"{images}: there is no such image folder.")
        self._entries, self._images, self._ignore = _read_entries(path), images, frozenset(ignore)
        self.identity = {"llava": path.name, "sha256": sha256(path)}
        if ignore:
            self.identity["ignore"] = ",".join(sorted(ignore))
        ids = Counter(str(entry["id"]) for entry in self._entries if isinstance(entry, dict) and "id" in entry)
        self.num_repeated_ids = sum(count - 1 for count in ids.values())

    def chunks(self, size: int) -> list[Chunk]:
        starts = range(0, len(self._entries), size)
        return [LlavaChunk(start, self._entries[start : start + size], self._images, self._ignore) for start in starts]


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
    """Which columns of a parquet file to read. One of `caption` and `conversations` is None."""

    image: str
    caption: str | None
    conversations: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, self.caption, self.conversations) if name is not None]


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
    """Rows with an image (bytes, {"bytes", "path"}, a list of either, or none) and a caption or a conversation.

    Raises:
        ValueError: a file is missing or not parquet, or a column is not in it.
    """

    def __init__(self, paths: list[Path], columns: Columns, ignore: Collection[str] = ()) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.format = "caption" if columns.conversations is None else "chat"
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


def _from_entry(entry: Any, images: Path, ignore: frozenset[str]) -> Members:
    if isinstance(entry, BadLine):
        raise ValueError(entry.reason)
    conversation = read_conversation(entry, ignore)
    contents = [_image_bytes(image, images) for image in conversation.images or ()]
    identity = {"id": entry["id"]} if isinstance(entry, dict) and "id" in entry else {}
    return _image_members(contents) | {"json": _json(identity, conversation)}


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
        return _image_members([_image_bytes(image, folder) for image in images]) | {"txt": caption.encode()}
    assert columns.conversations is not None
    record = values[columns.conversations]
    if isinstance(record, str):
        record = parse_json(record, f"its {columns.conversations!r}")
    conversation = read_conversation(record, ignore)
    if conversation.images is not None and images and len(conversation.images) != len(images):
        num_named = len(conversation.images)
        raise ValueError(f"its {columns.image!r} holds {len(images)} images, but its text names {num_named}")
    members = _image_members([_image_bytes(image, folder) for image in images or conversation.images or ()])
    return members | {"json": _json({}, conversation)}


def _image_bytes(value: Any, folder: Path) -> bytes:
    """The file that a cell or key holds or names: bytes, a path, a data: URL, or {"bytes", "path"} (bytes first)."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return _decode_data_url(value) if value.startswith("data:") else _read_inside(folder, value)
    if not isinstance(value, bytes):
        raise ValueError(f"its image is {type(value).__name__}; expected bytes or {{bytes, path}}")
    return value


def _decode_data_url(url: str) -> bytes:
    head, _, coded = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"its image is the URL {url[:40]!r}...; of data: URLs those in base64 are read")
    try:
        return base64.b64decode(coded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its image is a data: URL that is damaged: {error}") from error


def _read_inside(folder: Path, name: str) -> bytes:
    """A file of the folder. Symbolic links are followed, as the owner of the folder made them, unlike the name."""
    if re.match(r"[a-z][a-z0-9+.-]+://", name, re.IGNORECASE):
        raise ValueError(f"the image {name[:200]!r} is a URL, and nothing is downloaded; put it into the image folder")
    path = PureWindowsPath(name)  # knows the separators and roots of all systems
    if path.anchor or ".." in path.parts:
        raise ValueError(f"the image path {name!r} leads out of the image folder")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"the image {name!r} cannot be read: {error.strerror}") from error


def _image_members(contents: list[bytes]) -> Members:
    """The members of some encoded images, each of which is decoded once as a check."""
    members: Members = {}
    for index, content in enumerate(contents):
        with open_image(content) as image:
            suffix = _SUFFIX_OF_FORMAT.get(image.format or "")
            decoded = load_image(image)
        if suffix is None:  # a format that the trainer does not read
            suffix, content = "png", png_bytes(decoded)
        members[suffix if len(contents) == 1 else f"{index}.{suffix}"] = content
    return members


def _json(identity: dict[str, Any], conversation: Conversation) -> bytes:
    return json.dumps(identity | {"messages": conversation.messages}, ensure_ascii=False).encode()
