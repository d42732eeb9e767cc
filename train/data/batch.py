"""What a batch is: encoded samples, the padded tensors of one forward pass, and a rank's part of an optimizer step.

B rows of a micro-batch, S tokens, N images, with tiles all their thumbnails and tiles, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yi_vl.chat import Segment
from yi_vl.encode import Encoded

IGNORE = -100


@dataclass
class Sample:
    """An encoded sample, with its segments for inspection. A preference is a pair: two texts about the same images.

    reference: log-probabilities of the chosen and of the rejected answer under the reference model, if they are read.
    """

    name: str  # shard and key
    source: int
    segments: list[Segment]
    encoded: Encoded
    images: list[Tensor]  # (H, W, 3) uint8 each: of an image with tiles its thumbnail, then these
    rejected: Encoded | None = None
    reference: tuple[float, float] | None = None

    @property
    def rows(self) -> list[Encoded]:
        """Of a batch: the text, or the chosen one and the rejected one."""
        return [self.encoded] if self.rejected is None else [self.encoded, self.rejected]

    @property
    def num_tokens(self) -> int:
        """Of the longer row."""
        return max(len(row.input_ids) for row in self.rows)


@dataclass
class MicroBatch:
    """The inputs of one forward pass. Pairs are rows 2i (chosen) and 2i + 1 (rejected), whose images are there once."""

    input_ids: Tensor  # (B, S) int64
    attention_mask: Tensor  # (B, S) int64, 1 on real tokens
    labels: Tensor  # (B, S) int64, unshifted, IGNORE off the loss mask
    images: Tensor | None  # (N, H, W, 3) uint8
    source_ids: Tensor  # (B,) int64, index into data.sources
    shared_prefix_length: int  # first tokens that are the same in all rows: text, unsupervised
    num_pairs: int = 0
    image_index: list[int] | None = None  # of pairs: index into images of each <image> in the rows
    references: list[tuple[float, float]] | None = None  # of pairs: see `Sample.reference`

    @property
    def num_terms(self) -> int:
        """What the loss is a sum of: pairs, or supervised tokens."""
        return self.num_pairs if self.num_pairs else num_supervised(self.labels)


@dataclass
class StepBatch:
    """One rank's part of an optimizer step, and the stream's state after it; or an error that ends the stream."""

    micro_batches: list[MicroBatch]
    names: list[str]
    stream: int
    state: dict[str, Any]
    reports: list[str]
    error: str | None = None

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of this rank."""
        return sum(num_supervised(micro_batch.labels) for micro_batch in self.micro_batches)

    @property
    def num_terms(self) -> int:
        """What this rank's loss is a sum of: pairs, or supervised tokens."""
        return sum(micro_batch.num_terms for micro_batch in self.micro_batches)


def collate(samples: Sequence[Sample], pad_id: int) -> MicroBatch:
    """Right-padded tensors of some samples, or of some pairs."""
    rows = [row for sample in samples for row in sample.rows]
    width = max(len(row.input_ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.input_ids)
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
        labels[index, : len(ids)] = torch.where(torch.tensor(row.loss_mask), ids, IGNORE)
    images = [image for sample in samples for image in sample.images]
    micro_batch = MicroBatch(
        input_ids, attention_mask, labels, torch.stack(images) if images else None,
        torch.tensor([sample.source for sample in samples for _ in sample.rows]),
        _shared_prefix_length(rows, input_ids, labels),
    )  # fmt: skip
    if samples[0].rejected is not None:
        _set_pairs_(micro_batch, samples)
    return micro_batch


def _set_pairs_(micro_batch: MicroBatch, samples: Sequence[Sample]) -> None:
    micro_batch.num_pairs = len(samples)
    index: list[int] = []
    first = 0
    for sample in samples:
        index += 2 * list(range(first, first + len(sample.images)))  # the chosen row's, then the rejected row's
        first += len(sample.images)
    micro_batch.image_index = index
    references = [sample.reference for sample in samples if sample.reference is not None]
    micro_batch.references = references if references else None


def num_supervised(labels: Tensor) -> int:
    """Supervised tokens; the first of a row has no prediction."""
    return int((labels[:, 1:] != IGNORE).sum())


def _shared_prefix_length(rows: Sequence[Encoded], input_ids: Tensor, labels: Tensor) -> int:
    """Length of the text that all rows begin with, such as the system prompt, minus its last token."""
    shortest = min(len(row.input_ids) for row in rows)
    first_image = min((start for row in rows for start in row.image_starts[:1]), default=shortest)
    differs = (input_ids != input_ids[:1]).any(0) | (labels != IGNORE).any(0)  # (S,)
    first = int(differs.int().argmax()) if differs.any() else shortest
    return max(0, min(first, first_image, shortest) - 1)
