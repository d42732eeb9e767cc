"""Reference log-probabilities of preferences, computed once and written beside them: KEY.ref.json.

The forward pass is the trainer's, so that at the first step of a run rewards are zero but for rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from yi_vl.checkpoint.find import find
from yi_vl.checkpoint.load import read_config
from yi_vl.files import sha256

from ..config import (
    DPO,
    FROM_SHARDS,
    PRECISIONS,
    PREFERENCE,
    DataConfig,
    DpoConfig,
    InitConfig,
    SourceConfig,
    TrainableConfig,
    TrainConfig,
)
from ..data.batch import Sample, collate
from ..data.encoder import SampleEncoder
from ..data.reference import ReferenceModel, to_member
from ..data.samples import REFERENCE_SUFFIX, sample_name
from ..data.shard_reader import RawSample, read_shard
from ..distributed import build_accelerator
from ..dpo import PreferenceObjective
from ..init import fingerprint
from ..setup import build_model
from .files import Manifest, Members, Shard, write_tar
from .report import progress

_SAMPLES_AT_ONCE = 256  # sorted by length and scored together


class Scorer:
    """A model that computes log-probabilities of answers as the trainer does.

    Args:
        image_size: None: the model's.

    Raises:
        ValueError: the model cannot be loaded, or the precision is unknown.
    """

    def __init__(
        self, model: str, image_size: int | None, fast_pixels: bool, precision: str, micro_batch: int,
        ignore: Collection[str] = (),
    ) -> None:  # fmt: skip
        if precision not in PRECISIONS:
            raise ValueError(f"--precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
        model_config = read_config(find(model))
        source = SourceConfig(name="preferences", shards="", format=PREFERENCE)
        config = TrainConfig(
            run_dir="", init_from=InitConfig(checkpoint=model), objective=DPO, dpo=DpoConfig(reference=FROM_SHARDS),
            image_size=image_size if image_size is not None else model_config.vision_config.image_size,
            trainable=TrainableConfig(vision=False, projector=False, language=False), precision=precision,
            max_tokens=model_config.text_config.max_position_embeddings,
            data=DataConfig(format=PREFERENCE, sources=[source], ignore=list(ignore), fast_pixels=fast_pixels),
        )  # fmt: skip
        self._accelerator = build_accelerator(config)
        self._model, self._processor, _ = build_model(config, self._accelerator, None)
        self._model.to(self._accelerator.device).eval()  # type: ignore[arg-type]
        self._objective = PreferenceObjective(self._model, 1, config.dpo)
        self._encoder = SampleEncoder(self._processor, config.data, config.max_tokens)
        self._micro_batch = micro_batch
        max_tiles = self._processor.image_processor.max_tiles
        self.model = ReferenceModel(fingerprint(model), config.image_size, fast_pixels, max_tiles)

    def encode(self, raw: RawSample) -> Sample:
        """
        Raises:
            ValueError: it cannot be trained on.
        """
        return self._encoder.encode(raw, 0)

    @torch.no_grad()
    def score(self, samples: list[Sample]) -> list[tuple[float, float]]:
        """Log-probabilities of the chosen and of the rejected answer of each sample."""
        order = sorted(range(len(samples)), key=lambda index: samples[index].num_tokens)
        scores: dict[int, tuple[float, float]] = {}
        pad_id, device = self._processor.tokenizer.pad_token_id or 0, self._accelerator.device
        for start in range(0, len(order), self._micro_batch):
            indices = order[start : start + self._micro_batch]
            batch = collate([samples[index] for index in indices], pad_id)
            pixels = None
            if batch.images is not None:
                pixels = self._processor.image_processor.to_pixel_values(batch.images.to(device))
            with self._accelerator.autocast():
                pairs = self._objective.answer_log_probabilities(
                    self._model, batch.labels.to(device), input_ids=batch.input_ids.to(device),
                    attention_mask=batch.attention_mask.to(device), pixel_values=pixels,
                    shared_prefix_length=batch.shared_prefix_length, image_index=batch.image_index,
                )  # fmt: skip
            scores |= zip(indices, map(tuple, pairs.tolist()))
        return [scores[index] for index in range(len(samples))]


def add_references(folder: Path, out: Path, scorer: Scorer) -> list[str]:
    """Copy the shards of a folder that are not complete in `out` yet, with references. Broken samples are left as is.

    Returns:
        The samples without a reference, each with its reason.

    Raises:
        ValueError: there are no shards, one cannot be read, or `out` holds something else.
    """
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise ValueError(f"{folder} holds no .tar files.")
    if out.resolve() == folder.resolve():
        raise ValueError(f"{out} holds the shards themselves; take another folder for those with references.")
    made_from = {
        "reference": scorer.model.record, "shards": [[path.name, path.stat().st_size] for path in paths],
        "num_shards": len(paths),
    }  # fmt: skip
    manifest = Manifest.open(out, made_from)
    out.mkdir(parents=True, exist_ok=True)
    manifest.shards = {path.name: manifest.shards[path.name] for path in paths if manifest.has(path.name)}
    manifest.write()
    with progress("shards", len(paths), len(manifest.shards)) as add_progress:
        for path in paths:
            if path.name not in manifest.shards:
                manifest.add(_write_shard(path, out / path.name, scorer))
                add_progress()
    return [line for shard in manifest.shards.values() for line in shard.broken]


def _write_shard(path: Path, target: Path, scorer: Scorer) -> Shard:
    broken: list[str] = []
    num_samples = 0

    def samples() -> Iterator[tuple[str, Members]]:
        nonlocal num_samples
        raws = read_shard(str(path))
        while chunk := list(islice(raws, _SAMPLES_AT_ONCE)):
            num_samples += len(chunk)
            yield from _with_references(chunk, scorer, broken)

    write_tar(target, samples())
    return Shard(target.name, num_samples, target.stat().st_size, sha256(target), broken)


def _with_references(raws: list[RawSample], scorer: Scorer, broken: list[str]) -> Iterator[tuple[str, Members]]:
    encoded: dict[int, Sample] = {}
    for index, raw in enumerate(raws):
        if "__error__" in raw:
            raise ValueError(f"{sample_name(raw)}: {raw['__error__']}; repair the shard, or leave it out.")
        try:
            encoded[index] = scorer.encode(raw)
        except ValueError as error:
            broken.append(f"{sample_name(raw)}: {' '.join(str(error).split())}")
    scores = dict(zip(encoded, scorer.score(list(encoded.values()))))
    for index, raw in enumerate(raws):
        members: dict[str, Any] = {name: content for name, content in raw.items() if not name.startswith("__")}
        members.pop(REFERENCE_SUFFIX, None)
        if index in scores:
            members[REFERENCE_SUFFIX] = to_member(*scores[index], scorer.model)
        yield raw["__key__"], members
