"""How many samples the sources hold, and that held-out shards are not trained on."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

from ..config import SourceConfig, ValidationSourceConfig
from ..data.shard_reader import samples_in_manifest
from ..data.stream import expand_shards
from .config import Search


def source_sizes(search: Search) -> dict[str, int]:
    """The samples in an epoch of each source.

    Raises:
        ValueError: shards are missing, unreadable, or not on this machine and without `search.sizes`.
    """
    sizes = {}
    for source in search.proxy.data.sources:
        given = search.config.search.sizes.get(source.name)
        size = given if given is not None else sum(_num_samples(shard, source.name) for shard in expand_shards(source))
        sizes[source.name] = size if source.max_samples is None else min(size, source.max_samples)
        if not size:
            raise ValueError(f"data.sources: {source.name!r} holds no samples ({source.shards}).")
    return sizes


def check_held_out(search: Search) -> None:
    """
    Raises:
        ValueError: a shard is missing, or in two of: the training data, the validation, the verdict.
    """
    config = search.config
    used = [
        ("data.sources", _shards(search.proxy.data.sources, "data.sources")),
        ("validation.sources", _shards(config.validation.sources, "validation.sources")),
        ("verdict.sources", _shards(config.verdict.sources, "verdict.sources")),
    ]
    for index, (key, shards) in enumerate(used):
        for other, earlier in used[:index]:
            if both := sorted(shards & earlier):
                raise ValueError(
                    f"{search.path}: {both[0]} is in {other} and in {key}; samples for training, for choosing and for "
                    "judging must differ. Take other shards, and set data.sources in overrides where needed."
                )


def _shards(sources: Iterable[SourceConfig | ValidationSourceConfig], key: str) -> set[str]:
    shards = (shard for source in sources for shard in expand_shards(source, key))
    return {os.path.realpath(os.path.expanduser(shard)) if _is_local(shard) else shard for shard in shards}


def _is_local(shard: str) -> bool:
    return not shard.startswith("pipe:") and "://" not in shard


def _num_samples(shard: str, name: str) -> int:
    """By the manifest beside a shard, or by the names of its members."""
    if not _is_local(shard):
        raise ValueError(f"The samples of source {name!r} cannot be counted at {shard}; give search.sizes.{name}.")
    if (number := samples_in_manifest(shard)) is not None:
        return number
    keys = set()
    try:
        with tarfile.open(Path(shard).expanduser()) as archive:
            for member in archive:
                if member.isfile():
                    folder, base = os.path.split(member.name)
                    keys.add((folder, base.partition(".")[0]))
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{shard}: its samples cannot be counted: {error}; give search.sizes.{name}.") from error
    return len(keys)
