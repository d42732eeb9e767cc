"""The samples of a tar, in order, with an error in place of what cannot be read, and an estimate of how much that is.

webdataset opens the shard and groups its members to samples. The tar itself is read here, as Python's tarfile ends an
archive at a damaged header as if it were complete.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext, group_by_keys

from ..shards.files import Manifest

# __url__, __key__, and suffix -> bytes of each member; __note__, a line for the user.
# Or __error__, the reason, and, if that concerns the rest of the shard, __lost__, the number of samples in it.
RawSample = dict[str, Any]

_JUNK = re.compile(r"(.*/)?(\._[^/]*|__MACOSX(/.*)?|\.DS_Store|Thumbs\.db|desktop\.ini)$", re.IGNORECASE)
_METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's own
_BLOCK_BYTES = 1 << 16


def read_shard(url: str) -> Iterator[RawSample]:
    """The samples of a tar; in place of what cannot be read, a sample with `__error__`."""
    shard = _Shard(url)
    num_samples = 0
    suffixes: set[str] = set()  # of the sample before
    for sample in group_by_keys(shard.members(), handler=shard.note_error):
        yield from shard.take_errors()
        if shard.end is not None and not _is_whole(sample, suffixes, shard.key_at_end):
            break
        num_samples += 1
        suffixes = set(sample)
        if shard.junk is not None:
            sample["__note__"] = f"{url}: {shard.junk} and others of its kind are the system's, not data; skipped"
            shard.junk = None
        yield sample
    yield from shard.take_errors()
    if shard.end is not None:
        text, num_lost = _loss(shard, shard.end, num_samples)
        yield shard.error(text) | {"__lost__": num_lost}


def _is_whole(sample: RawSample, suffixes_before: set[str], key_at_end: str | None) -> bool:
    """Whether the last sample of a truncated shard has all its members, as far as that is known."""
    if key_at_end is not None:
        return bool(key_at_end != sample["__key__"])
    return not suffixes_before or suffixes_before == set(sample)


class _StrictTarInfo(tarfile.TarInfo):
    """A damaged or missing header is an error wherever it stands; only a block of zeros ends an archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError("it is cut off" if not buf else str(error)) from error


class _Shard:
    """One reading of a shard.

    Attributes:
        junk: the name of a member that an operating system has put there, until it is reported.
        end: why it was not read to its end.
        key_at_end: of the member that could not be read to its end, where that is known.
        num_bytes, num_read: its size and how far it was read, where that is known.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.junk: str | None = None
        self.end: str | None = None
        self.key_at_end: str | None = None
        self.num_bytes: int | None = None
        self.num_read = 0
        self._has_said_junk = False
        self._errors: list[str] = []

    def members(self) -> Iterator[dict[str, Any]]:
        """As webdataset's `group_by_keys` takes them."""
        path = os.path.expanduser(self.url)
        try:
            if os.path.isfile(path):
                self.num_bytes = os.path.getsize(path)
            if self.num_bytes == 0:
                raise tarfile.ReadError("it is empty (0 bytes)")
            with gopen(path) as stream:
                yield from self._walk(stream)
        except Exception as error:  # tarfile, decompressors, curl and pipes have families of their own
            self.end = _line(error)

    def _walk(self, stream: IO[bytes]) -> Iterator[dict[str, Any]]:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as archive:
            is_compressed = archive.fileobj.comptype != "tar"  # type: ignore[union-attr, attr-defined]
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                self.num_read = stream.tell() if is_compressed and self.num_bytes is not None else archive.offset
                name = member.name
                if member.isdir() or _METADATA.match(name):
                    continue
                if _JUNK.fullmatch(name):
                    self.junk = self.junk if self._has_said_junk else name
                    self._has_said_junk = True
                elif not member.isreg():
                    self._errors.append(f"{name} is a link or a device, not a file; it is not read")
                elif base_plus_ext(name)[0] is None:
                    self._errors.append(f"{name} is not named KEY.suffix; it is not read")
                else:
                    file = archive.extractfile(member)
                    assert file is not None
                    self.key_at_end = base_plus_ext(name)[0]
                    yield {"fname": name, "data": file.read(), "__url__": self.url}
                    self.key_at_end = None
            while block := archive.fileobj.read(_BLOCK_BYTES):  # type: ignore[union-attr]
                if block.strip(b"\0"):
                    self.end = "there is more behind its end mark, as in tars that were joined by cat; not read"
                    self.key_at_end = ""  # of no sample: all are whole
                    return

    def note_error(self, error: Exception) -> bool:
        """webdataset's handler: a member that comes twice."""
        text = str(error.args[0]) if error.args else ""
        self._errors.append(text.partition(" dict_keys")[0])
        return True

    def take_errors(self) -> Iterator[RawSample]:
        while self._errors:
            yield self.error(self._errors.pop(0))

    def error(self, text: str) -> RawSample:
        return {"__url__": self.url, "__key__": "", "__error__": " ".join(text.split())[:400]}


def _loss(shard: _Shard, reason: str, num_samples: int) -> tuple[str, int]:
    """What is lost after the position where reading ended: a text, and a number of samples, at least 1.

    From the manifest beside the shard; without one an estimate from the remaining bytes.
    """
    text = f"{reason}; {num_samples:,} samples were read"
    expected = samples_in_manifest(shard.url)
    if expected is not None:
        lost = max(1, expected - num_samples)
        return f"{text}, {lost:,} of {expected:,} are lost by its manifest", lost
    left = (shard.num_bytes or 0) - shard.num_read
    if shard.num_bytes is None or left <= 0:
        return f"{text}, how many more it held is not known", 1
    lost = max(1, round(left / shard.num_read * num_samples)) if shard.num_read else 1
    return f"{text}, {left:,} of {shard.num_bytes:,} bytes are left: about {lost:,} samples are lost", lost


def samples_in_manifest(url: str) -> int | None:
    """The number of samples in a shard by the manifest beside it; None without one."""
    path = Path(url).expanduser()
    if not path.is_file():
        return None
    try:
        manifest = Manifest.read(path.parent)
    except ValueError:  # of another program
        return None
    return manifest.shards[path.name].samples if manifest is not None and path.name in manifest.shards else None


def _line(error: Exception) -> str:
    text = str(error.args[0]) if len(error.args) == 1 else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"
