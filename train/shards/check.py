"""What a shard holds, as the trainer will see it, and whether that agrees with the manifest.

Samples are read with the trainer's functions, so what is counted here is what can be trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from yi_vl.chat import Segment
from yi_vl.files import sha256
from yi_vl.image import load_image, open_image

from ..config import PREFERENCE, SAMPLE_FORMATS
from ..data.samples import REFERENCE_SUFFIX, read_sample, sample_name
from ..data.shard_reader import RawSample, read_shard
from .files import Manifest


@dataclass
class Contents:
    """Of one shard or of many: `+=` adds one to another."""

    shards: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # name -> samples, bytes, SHA-256
    counts: Counter[str] = field(default_factory=Counter)  # samples, of each format, with a reference, without an image
    formats: Counter[str] = field(default_factory=Counter)  # of the images
    sides_px: Counter[int] = field(default_factory=Counter)  # the images' longer sides
    broken: list[str] = field(default_factory=list)  # samples, each with its reason
    unreadable: list[str] = field(default_factory=list)  # shards, likewise
    notes: list[str] = field(default_factory=list)  # of the reader

    def __iadd__(self, other: Contents) -> Contents:
        self.shards |= other.shards
        self.counts += other.counts
        self.formats += other.formats
        self.sides_px += other.sides_px
        self.broken += other.broken
        self.unreadable += other.unreadable
        self.notes += other.notes
        return self


def inspect(path: Path, ignore: Collection[str] = ()) -> Contents:
    """One shard: every sample is read in all formats, every image decoded."""
    contents = Contents()
    for raw in read_shard(str(path)):
        if "__lost__" in raw:
            contents.unreadable.append(f"{path.name} cannot be read to its end: {raw['__error__']}")
            continue
        contents.notes += [raw["__note__"]] if "__note__" in raw else []
        contents.counts["samples"] += "__error__" not in raw
        try:
            sample_formats, encoded_images = _usable_formats(raw, ignore)
            for encoded in encoded_images:
                with open_image(encoded) as image:
                    load_image(image)
                contents.formats[image.format or "?"] += 1
                contents.sides_px[max(image.size)] += 1
        except ValueError as error:
            contents.broken.append(f"{sample_name(raw)}: {' '.join(str(error).split())}")
            continue
        contents.counts.update(sample_formats)
        contents.counts["without an image"] += not encoded_images
        contents.counts["with a reference"] += REFERENCE_SUFFIX in raw
    contents.shards[path.name] = (contents.counts["samples"], path.stat().st_size, sha256(path))
    return contents


def problems(contents: Contents, manifest: Manifest | None) -> list[str]:
    """Unreadable shards and, with a manifest, all differences from it."""
    mismatches = list(contents.unreadable)
    if manifest is None:
        return mismatches
    if len(manifest.shards) < manifest.made_from["num_shards"]:
        mismatches.append(f"{len(manifest.shards)} of {manifest.made_from['num_shards']} shards are made so far")
    for name in sorted(manifest.shards.keys() | contents.shards.keys()):
        if name not in contents.shards:
            mismatches.append(f"{name} is in the manifest but not here")
            continue
        if name not in manifest.shards:
            mismatches.append(f"{name} is here but not in the manifest")
            continue
        shard = manifest.shards[name]
        recorded = {"samples": shard.samples, "bytes": shard.bytes, "SHA-256": shard.sha256}
        for (what, expected), actual in zip(recorded.items(), contents.shards[name]):
            if actual != expected:
                mismatches.append(f"{name}: {what} {actual}, the manifest has {expected}")
    return mismatches


def contents_table(folder: Path, contents: Contents, manifest: Manifest | None, mismatches: list[str]) -> Table:
    """The counts, to print."""
    counts, sides = contents.counts, contents.sides_px
    num_bytes = sum(num_bytes for _, num_bytes, _ in contents.shards.values())
    formats = ", ".join(f"{count:,} {name}" for name, count in contents.formats.most_common())
    table = Table(title=Text(str(folder)), title_justify="left", show_header=False)
    table.add_row("shards", f"{len(contents.shards):,}, {num_bytes / 1e6:,.1f} MB")
    table.add_row("samples", f"{counts['samples']:,}")
    table.add_row("captions", f"{counts['caption']:,} can be trained on in the format caption")
    table.add_row("conversations", f"{counts['chat']:,} in the format chat")
    table.add_row("texts", f"{counts['text']:,} in the format text")
    if counts[PREFERENCE]:
        table.add_row("preferences", f"{counts[PREFERENCE]:,} in the format {PREFERENCE}")
        table.add_row("with a reference", f"{counts['with a reference']:,} (.{REFERENCE_SUFFIX})")
    table.add_row("without an image", f"{counts['without an image']:,}")
    table.add_row("images", f"{sides.total():,}: {formats}" if sides else "0")
    if sides:
        table.add_row("longer side", f"{min(sides)} to {max(sides)} px, half of them at most {_median(sides)} px")
    table.add_row("cannot be used", f"{len(contents.broken):,}")
    table.add_row("manifest", f"{len(mismatches):,} mismatches" if mismatches else "agrees" if manifest else "none")
    return table


def _usable_formats(raw: RawSample, ignore: Collection[str]) -> tuple[list[str], list[bytes]]:
    """The formats that a sample can be read in, and its images.

    Raises:
        ValueError: in none; the reason is that of the format its members suggest.
    """
    read: dict[str, tuple[list[Segment], list[bytes]]] = {}
    errors: dict[str, ValueError] = {}
    for sample_format in SAMPLE_FORMATS:
        try:
            read[sample_format] = read_sample(raw, sample_format, ignore)
        except ValueError as error:
            errors[sample_format] = error
    if not read:
        is_json = "json" in raw and "txt" not in raw
        raise errors[PREFERENCE if is_json and b'"rejected' in raw["json"] else "chat" if is_json else "caption"]
    return list(read), next(iter(read.values()))[1]


def _median(counts: Counter[int]) -> int:
    below = 0
    for value in sorted(counts):
        below += counts[value]
        if 2 * below >= counts.total():
            return value
    raise AssertionError("a median of nothing")
