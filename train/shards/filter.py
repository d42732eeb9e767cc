"""Keeps the samples of shards whose loss under a model is in a range.

A shard that is written is a pure function of the shard read, the model and the range, so an interrupted command
resumes. Kept samples are copied member by member; their names are in lower case, as the trainer reads them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yi_vl.arguments import one_line
from yi_vl.checkpoint.fit import check_fit
from yi_vl.checkpoint.load import load_model
from yi_vl.files import read_json_lines, sha256, write_json_lines

from ..config import DataConfig, SourceConfig
from ..data.batch import collate, num_supervised
from ..data.encoder import SampleEncoder, TooLong
from ..data.samples import sample_name
from ..data.shard_reader import RawSample, read_shard, samples_in_manifest
from ..loss import Objective
from .files import Manifest, Members, Shard, write_tar
from .report import print_line, print_list, progress, stop_if_broken

SCORES, HISTOGRAM = "scores.jsonl", "losses.png"
_BROKEN, _TOO_LONG = "broken", "too long"
_NUM_BINS = 60


@dataclass(frozen=True)
class LossRange:
    """The losses to keep, bounds included; None: no bound."""

    least: float | None
    most: float | None

    def __post_init__(self) -> None:
        if self.least is None and self.most is None:
            raise ValueError("say which samples to keep: --max-loss X, --min-loss X, or both.")
        for name, bound in (("--min-loss", self.least), ("--max-loss", self.most)):
            if bound is not None and not math.isfinite(bound):
                raise ValueError(f"{name} is {bound}; expected a finite number.")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"--min-loss {self.least:g} is above --max-loss {self.most:g}; nothing would be kept.")

    def position(self, loss: float) -> str:
        """`kept`, `above --max-loss` or `below --min-loss`."""
        if self.most is not None and not loss <= self.most:
            return "above --max-loss"
        return "below --min-loss" if self.least is not None and loss < self.least else "kept"


class Scorer:
    """The loss of samples under a model, as the trainer's validation measures it.

    Args:
        model: whatever `yi_vl.load` takes.
        max_tokens: longer samples are not scored; None: as many as the model has positions.

    Raises:
        ValueError: there is no such model, or it has fewer positions.
    """

    def __init__(
        self, model: str, sample_format: str, ignore: Collection[str] = (), max_tokens: int | None = None,
        device: str | None = None,
    ) -> None:  # fmt: skip
        self._model, self._processor = load_model(model, device)
        check_fit(self._model.config, self._processor)
        limit = self._model.config.text_config.max_position_embeddings
        if max_tokens is not None and max_tokens > limit:
            raise ValueError(f"--max-tokens is {max_tokens}, but the model has {limit} positions.")
        data = DataConfig(
            sample_format, [SourceConfig("filter", "")], ignore=list(ignore), fast_pixels=False
        )  # pixels of inference
        self._encoder = SampleEncoder(self._processor, data, max_tokens if max_tokens is not None else limit)
        self._objective = Objective(self._model, 1).eval()

    @torch.inference_mode()
    def loss(self, raw: RawSample) -> float:
        """Mean cross entropy of the sample's supervised tokens.

        Raises:
            TooLong: it has more than max_tokens tokens.
            ValueError: it cannot be used, with the reason.
        """
        pad_id = self._processor.tokenizer.pad_token_id
        batch = collate([self._encoder.encode(raw, 0)], pad_id if pad_id is not None else 0)
        device, pixel_values = self._model.device, None
        if batch.images is not None:
            weights = next(self._model.model.vision_tower.parameters())
            to_pixel_values = self._processor.image_processor.to_pixel_values
            pixel_values = to_pixel_values(batch.images.to(weights.device)).to(weights.dtype)
        total, _ = self._objective(
            batch.input_ids.to(device), batch.attention_mask.to(device), batch.labels.to(device), pixel_values,
            batch.source_ids.to(device),
        )  # fmt: skip
        loss = float(total) / num_supervised(batch.labels)
        if not math.isfinite(loss):
            raise ValueError("its loss is NaN or infinite")
        return loss


def filter_shards(
    shards: Sequence[str], out: Path, scorer: Scorer, loss_range: LossRange, manifest: Manifest, max_broken: float
) -> None:
    """Write the filtered shards that are not complete yet, all scores, their histogram and a summary.

    Args:
        manifest: of OUT, opened for this command.

    Raises:
        ValueError: too many samples are broken, or the disk is full. Complete shards stay.
    """
    names = [f"{number:05d}.tar" for number in range(len(shards))]
    manifest.shards = {name: manifest.shards[name] for name in names if manifest.has(name)}
    manifest.write()
    path = out / SCORES
    rows = read_json_lines(path, drops_partial=True) if path.exists() else []
    rows = [row for row in rows if row["shard"] in manifest.shards]  # others are of a shard that was interrupted
    write_json_lines(path, rows)
    if manifest.shards:
        print_line(f"{out}: {len(manifest.shards):,} of {len(names):,} shards are complete and kept.")
    num_before, started = len(rows), time.perf_counter()
    counts = [samples_in_manifest(url) for url in shards]
    total = None if None in counts else sum(count for count in counts if count is not None)
    with progress("samples", total, len(rows)) as add_progress:
        for name, url in zip(names, shards):
            if name in manifest.shards:
                continue
            shard, shard_rows = _filter_shard(url, out / name, scorer, loss_range, add_progress)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in shard_rows)
                file.flush()
                os.fsync(file.fileno())  # before the manifest's line, which says that they are here
            manifest.add(shard)
            rows += shard_rows
            broken = [f"{row['name']}: {row['reason']}" for row in rows if row.get("skipped") == _BROKEN]
            stop_if_broken(broken, len(rows), max_broken)
    seconds = time.perf_counter() - started
    print_list("skipped", [f"{row['name']}: {row['reason']}" for row in rows if "skipped" in row])
    draw_histogram(out, rows, loss_range)
    print(_summary(out, rows, loss_range, len(names), (len(rows) - num_before) / seconds))


def _filter_shard(
    url: str, path: Path, scorer: Scorer, loss_range: LossRange, add_progress: Callable[..., None]
) -> tuple[Shard, list[dict[str, Any]]]:
    """Write one shard; its line of the manifest, and the rows of all samples."""
    rows: list[dict[str, Any]] = []

    def kept() -> Iterator[tuple[str, Members]]:
        for raw in read_shard(url):
            row = _score(raw, scorer, loss_range) | {"shard": path.name}
            rows.append(row)
            add_progress()
            if row["kept"]:
                yield raw["__key__"], {suffix: raw[suffix] for suffix in raw if not suffix.startswith("__")}

    try:
        write_tar(path, kept())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be made: {one_line(error)}. Repeat the command to continue.") from error
    broken = [f"{row['name']}: {row['reason']}" for row in rows if "skipped" in row]
    num_kept = sum(row["kept"] for row in rows)
    return Shard(path.name, num_kept, path.stat().st_size, sha256(path), broken), rows


def _score(raw: RawSample, scorer: Scorer, loss_range: LossRange) -> dict[str, Any]:
    """A row of scores.jsonl."""
    row: dict[str, Any] = {"name": sample_name(raw), "loss": None, "kept": False}
    try:
        row["loss"] = scorer.loss(raw)
    except ValueError as error:
        reason = " ".join(str(error).split())
        return row | {"skipped": _TOO_LONG if isinstance(error, TooLong) else _BROKEN, "reason": reason}
    return row | {"kept": loss_range.position(row["loss"]) == "kept"}


def _summary(
    out: Path, rows: Sequence[dict[str, Any]], loss_range: LossRange, num_shards: int, per_second: float
) -> str:
    reasons = Counter(row.get("skipped") or loss_range.position(row["loss"]) for row in rows)
    num_kept = reasons.pop("kept", 0)
    others = "".join(f"; {count:,} {reason}" for reason, count in sorted(reasons.items()))
    percent = 100 * num_kept / len(rows) if rows else 0
    return (
        f"{out}: kept {num_kept:,} of {len(rows):,} samples ({percent:.1f}%) in {num_shards:,} shards{others}; "
        f"{per_second:,.1f} samples/s; scores in {SCORES}, histogram in {HISTOGRAM}."
    )


def draw_histogram(out: Path, rows: Sequence[dict[str, Any]], loss_range: LossRange) -> None:
    """losses.png: how many samples have which loss, and which of them are kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [row for row in rows if row["loss"] is not None]
    losses = [[row["loss"] for row in scored if row["kept"] is is_kept] for is_kept in (True, False)]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    labels = [f"{name}: {len(members):,}" for name, members in zip(("kept", "not kept"), losses)]
    axes.hist(losses, bins=_NUM_BINS, stacked=True, label=labels, color=("tab:green", "tab:red"))
    for bound in (loss_range.least, loss_range.most):
        if bound is not None:
            axes.axvline(bound, color="black", linewidth=0.8)
    axes.set_xlabel("loss per supervised token")
    axes.set_ylabel("samples")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(str(out))
    figure.savefig(out / HISTOGRAM, dpi=120)
    pyplot.close(figure)
