"""What shards are made from: a LLaVA-style JSON file with its image folder, or parquet files.

A source is cut into chunks, one for each shard. A chunk is small, is sent to another process, and there yields its
samples: a name for people, and a function that reads the sample or says why it cannot be used.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

from yi_vl.image import load_image, open_image

from .shard_files import Members, digest

Reader = Callable[[], Members]  # raises ValueError
_SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more behind it
_ROWS_AT_ONCE = 64


class Chunk(Protocol):
    """The samples of one shard: `first` is the index of its first one in the whole source."""

    @property
    def first(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[str, Reader]]: ...


class Source(Protocol):
    """Something to make shards from.

    form: what its samples are to the trainer, see `config.DataConfig`.
    identity: by which an interrupted run is known again; JSON.
    """

    form: str
    identity: dict[str, Any]

    def chunks(self, size: int) -> list[Chunk]:
        """All samples in order, at most `size` in a chunk."""
        ...


@dataclass(frozen=True)
class LlavaChunk:
    first: int
    entries: list[Any]
    images: Path

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, Reader]]:
        for index, entry in enumerate(self.entries, self.first):
            name = f"entry {index}"
            if isinstance(entry, dict) and "id" in entry:
                name += f", id {str(entry['id'])[:80]!r}"
            yield name, partial(_from_llava_entry, entry, self.images)


class LlavaSource:
    """A JSON list of {"id", "image", "conversations"}; `image` is a path inside the folder, a list of such, or absent.

    Samples are numbered in order, so an id may come twice without two samples becoming one.

    Raises:
        ValueError: there is no such file or folder, or the file is not a JSON list.
    """

    form = "chat"

    def __init__(self, path: Path, images: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file.")
        if not images.is_dir():
            raise ValueError(f"{images}: there is no such image folder.")
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(entries, list):
            raise ValueError(f"{path}: expected a list of conversations, found {type(entries).__name__}.")
        self._entries, self._images = entries, images
        self.identity = {"llava": path.name, "sha256": digest(path)}
        ids = Counter(str(entry["id"]) for entry in entries if isinstance(entry, dict) and "id" in entry)
        self.num_repeated_ids = sum(count - 1 for count in ids.values())

    def chunks(self, size: int) -> list[Chunk]:
        starts = range(0, len(self._entries), size)
        return [LlavaChunk(start, self._entries[start : start + size], self._images) for start in starts]


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
        """Those of one row group, which begins at `row`; no more of it is held than a few rows."""
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=self.columns.names):
            if row >= self.stop:
                return
            wanted = batch.slice(max(0, self.start - row), max(0, self.stop - max(row, self.start)))
            for index, values in enumerate(wanted.to_pylist(), max(row, self.start)):
                yield f"{self.path.name} row {index}", partial(_from_row, values, self.columns, self.path.parent)
            row += batch.num_rows


class ParquetSource:
    """Rows with a picture (bytes, {"bytes", "path"}, a list of either, or none) and a caption or a conversation.

    Raises:
        ValueError: a file is missing or not parquet, or a column is not in it.
    """

    def __init__(self, paths: list[Path], columns: Columns) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.form = "caption" if columns.conversations is None else "chat"
        self._columns = columns
        self._num_rows: dict[Path, int] = {}
        for path in paths:
            try:
                schema, metadata = pq.read_schema(path), pq.read_metadata(path)
            except (OSError, pa.ArrowInvalid) as error:
                raise ValueError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error
            if missing := [name for name in columns.names if name not in schema.names]:
                raise ValueError(f"{path} has no column {missing[0]!r}; it has {', '.join(schema.names)}.")
            self._num_rows[path] = metadata.num_rows
        files = [[path.name, path.stat().st_size, num_rows] for path, num_rows in self._num_rows.items()]
        self.identity = {"parquet": files, "columns": columns.names, "form": self.form}

    def chunks(self, size: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        first = 0
        for path, num_rows in self._num_rows.items():  # a shard is of one file
            for start in range(0, num_rows, size):
                stop = min(start + size, num_rows)
                chunks.append(ParquetChunk(first + start, path, start, stop, self._columns))
            first += num_rows
        return chunks


def _from_llava_entry(entry: Any, images: Path) -> Members:
    if not isinstance(entry, dict):
        raise ValueError(f"it is a {type(entry).__name__}; expected an object with `conversations`")
    names = entry.get("image")
    names = [names] if isinstance(names, str) and names else names if names else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its `image` is neither a path nor a list of paths")
    kept = {key: entry[key] for key in ("id", "conversations") if key in entry}
    return _pictures([_read_inside(images, name) for name in names]) | {"json": _json(kept)}


def _from_row(values: dict[str, Any], columns: Columns, folder: Path) -> Members:
    found = values[columns.image]
    found = found if isinstance(found, list) else [] if found is None else [found]
    members = _pictures([_picture_bytes(picture, folder) for picture in found])
    if columns.caption is not None:
        caption = values[columns.caption]
        if not isinstance(caption, str):
            raise ValueError(f"its {columns.caption!r} is {type(caption).__name__}, not text")
        if not found:
            raise ValueError("it has no picture")
        return members | {"txt": caption.encode()}
    assert columns.conversations is not None
    conversations = values[columns.conversations]
    if isinstance(conversations, str):
        conversations = json.loads(conversations)
    return members | {"json": _json({"conversations": conversations})}


def _picture_bytes(value: Any, folder: Path) -> bytes:
    """Those of a cell: bytes, or {"bytes", "path"}, of which the path counts when there are no bytes."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return _read_inside(folder, value)
    if not isinstance(value, bytes):
        raise ValueError(f"its picture is {type(value).__name__}; expected bytes or {{bytes, path}}")
    return value


def _read_inside(folder: Path, name: str) -> bytes:
    """A file of the folder. Links in it are followed: they were put there by its owner, unlike the name."""
    path = PureWindowsPath(name)  # knows the separators and roots of all systems
    if path.anchor or ".." in path.parts:
        raise ValueError(f"the image path {name!r} leads out of the image folder")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise ValueError(f"the image {name!r} cannot be read: {error.strerror}") from error


def _pictures(contents: list[bytes]) -> Members:
    """The members of some encoded pictures, each decoded once to see that it can be."""
    members: Members = {}
    for index, content in enumerate(contents):
        with open_image(content) as image:
            suffix = _SUFFIX_OF_FORMAT.get(image.format or "")
            picture = load_image(image)
        if suffix is None:  # a format that the trainer does not look for
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            suffix, content = "png", buffer.getvalue()
        members[suffix if len(contents) == 1 else f"{index}.{suffix}"] = content
    return members


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
