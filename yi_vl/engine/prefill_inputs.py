"""What the model takes of prompts that are prefilled together, chunk by chunk: tokens, and features of their images.

B prompts, R new tokens of the longest of them, S tokens of a prompt, P features per image, D language width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..model import YiVLForConditionalGeneration
from .prefix_cache import ImageKey, PrefixKey


@dataclass(frozen=True)
class NewTokens:
    """The tokens of a prompt that are not cached: all from index `start` on.

    Args:
        previous_image: digest of the last image before them, if they attend to it and its keys are not cached.
    """

    key: PrefixKey
    start: int
    previous_image: bytes | None = None

    def __len__(self) -> int:
        return len(self.key) - self.start

    @property
    def images(self) -> list[ImageKey]:
        """The images among them."""
        return [image for image in self.key.images if image.start >= self.start]

    @property
    def digests(self) -> list[bytes]:
        """Of the images whose features are needed."""
        previous = [] if self.previous_image is None else [self.previous_image]
        return previous + [image.digest for image in self.images]

    def token_ids(self, device: torch.device) -> Tensor:
        """(S - start,)"""
        return torch.from_numpy(self.key.token_ids[self.start :]).to(device)


class PrefillInputs(Protocol):
    """Of B prompts, each padded to R columns."""

    def chunk(self, start: int, stop: int) -> dict[str, Any]:
        """The model's arguments for some of the columns; chunks are asked for in their order."""


def prefill_inputs(
    model: YiVLForConditionalGeneration,
    rows: Sequence[NewTokens],
    first_columns: Sequence[int],
    features: Mapping[bytes, Tensor],
    device: torch.device,
) -> PrefillInputs:
    """
    Args:
        rows: of each prompt the new tokens, which begin at `first_columns`.
        features: (P, D) of each image that is needed, by its digest.
    """
    if model.config.connector_config.is_cross_attention:
        return _MarkedImages(rows, first_columns, features, device)
    return _EmbeddedImages(model, rows, first_columns, features, device)


def _num_columns(rows: Sequence[NewTokens]) -> int:
    return max(map(len, rows))


class _EmbeddedImages:
    """Image features are among the embeddings, and may be in several chunks."""

    def __init__(
        self,
        model: YiVLForConditionalGeneration,
        rows: Sequence[NewTokens],
        first_columns: Sequence[int],
        features: Mapping[bytes, Tensor],
        device: torch.device,
    ) -> None:
        self._model, self._features, self._device = model, features, device
        embeddings = []
        for row, first in zip(rows, first_columns, strict=True):
            padding = 0, 0, first, _num_columns(rows) - first - len(row)
            embeddings.append(F.pad(self._embed(row), padding))
        self._embeddings = torch.stack(embeddings)  # (B, R, D)

    def chunk(self, start: int, stop: int) -> dict[str, Any]:
        return {"inputs_embeds": self._embeddings[:, start:stop]}

    def _embed(self, row: NewTokens) -> Tensor:
        """(S - start, D)"""
        input_ids = row.token_ids(self._device).unsqueeze(0)
        embeddings = self._model.get_input_embeddings()(input_ids).to(self._device)
        if features := [self._features[image.digest] for image in row.images]:
            embeddings = self._model.model.insert_images(embeddings, input_ids, torch.stack(features))
        return embeddings[0]


class _MarkedImages:
    """A token marks where an image is, and the model attends to its features, see decoder/gated.py."""

    def __init__(
        self,
        rows: Sequence[NewTokens],
        first_columns: Sequence[int],
        features: Mapping[bytes, Tensor],
        device: torch.device,
    ) -> None:
        ids = torch.zeros(len(rows), _num_columns(rows), dtype=torch.long, device=device)
        self._images = []  # columns and features, in reading order
        for index, (row, first) in enumerate(zip(rows, first_columns, strict=True)):
            ids[index, first : first + len(row)] = row.token_ids(device)
            self._images += [(first + image.start - row.start, features[image.digest]) for image in row.images]
        self._input_ids = ids  # (B, R)
        digests = [row.previous_image for row in rows]
        self._previous_images = [None if digest is None else features[digest] for digest in digests]

    def chunk(self, start: int, stop: int) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": self._input_ids[:, start:stop]}
        if features := tuple(features for column, features in self._images if start <= column < stop):
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}  # type: ignore[arg-type]
        if start == 0 and any(features is not None for features in self._previous_images):
            inputs["previous_images"] = self._previous_images  # cached from then on
        return inputs
