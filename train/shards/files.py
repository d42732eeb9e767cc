"""Shards on disk: tars written atomically, and the manifest beside them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from yi_vl.files import atomic_path, write_json_lines

MANIFEST = "manifest.jsonl"
Members = dict[str, bytes]  # suffix -> content, of one sample


def write_tar(path: Path, samples: Iterable[tuple[str, Members]]) -> None:
    """A tar of `KEY.suffix` files, the same bytes for the same samples; in place only when it is complete."""
    # Without flushing, a power cut may leave the manifest's line without the shard.
    with atomic_path(path, flush=True) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in samples:
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


@dataclass(frozen=True)
class Shard:
    """A line of the manifest: a complete shard, and the samples skipped, each with its reason."""

    name: str
    samples: int
    bytes: int
    sha256: str
    broken: list[str] = field(default_factory=list)


@dataclass
class Manifest:
    """The manifest of a folder: what its shards were made from, then a line per shard.

    made_from: the source's identity, `samples_per_shard` and `num_shards`.

    Lines are only appended, and a line cut short by a crash is ignored: its shard is made again.
    """

    folder: Path
    made_from: dict[str, Any]
    shards: dict[str, Shard] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder; None when it has none.

        Raises:
            ValueError: it is not a manifest of shards.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        *lines, _unfinished = path.read_bytes().split(b"\n")
        try:
            entries = [json.loads(line) for line in lines]
            shards = {entry["name"]: Shard(**entry) for entry in entries[1:]}
            return cls(folder, entries[0]["made_from"], shards)
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is no manifest of shards ({error}); delete it or take another folder.") from error

    @classmethod
    def open(cls, folder: Path, made_from: dict[str, Any]) -> Manifest:
        """The manifest of a folder that is being made, or a new one.

        Raises:
            ValueError: the folder holds shards that were made from something else.
        """
        manifest = cls.read(folder)
        if manifest is None:
            if any(folder.glob("*.tar")):
                raise ValueError(
                    f"{folder} holds shards that were not made here (there is no manifest); take another folder."
                )
            return cls(folder, made_from)
        if manifest.made_from != made_from:
            raise ValueError(
                f"{folder} holds shards made from {manifest.made_from}, this would be {made_from}; take another "
                "folder, or delete it."
            )
        return manifest

    def write(self) -> None:
        """Write the whole file, atomically."""
        entries = [{"made_from": self.made_from}, *map(asdict, self.shards.values())]
        write_json_lines(self.folder / MANIFEST, entries)

    def add(self, shard: Shard) -> None:
        """One more line."""
        self.shards[shard.name] = shard
        with (self.folder / MANIFEST).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(shard), ensure_ascii=False) + "\n")

    def has(self, name: str) -> bool:
        """Whether the shard is complete: listed, and on disk in the size that is listed."""
        path = self.folder / name
        return name in self.shards and path.is_file() and path.stat().st_size == self.shards[name].bytes
