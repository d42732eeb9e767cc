"""From a conversation to the model's input: tokens, decoded images, and the key that names both.

S tokens, N inputs of the tower: images, or of one with tiles its thumbnail and these.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..encode import Encoded
from ..image import ImageSource, TiledImage
from ..messages import Message, as_messages, images_of
from ..processor import YiVLProcessor
from .prefix_cache import ImageKey, PrefixKey


@dataclass(frozen=True)
class Prompt:
    """A conversation that awaits an answer, as the model's input."""

    key: PrefixKey  # the ids of S tokens, and where the images are among them
    images_uint8: tuple[Tensor, ...] = ()  # N of (H, W, 3) uint8, on the CPU, in reading order

    def __len__(self) -> int:
        return len(self.key)

    @property
    def input_ids(self) -> Tensor:
        """(1, S) int64, on the CPU."""
        return torch.from_numpy(self.key.token_ids).unsqueeze(0)


class InputProcessor:
    """Makes prompts of conversations; safe to use from several threads.

    Args:
        max_tokens: of a prompt.
        allow_remote_images: fetch images that are given as http or https URLs, from the public internet only.
    """

    def __init__(self, processor: YiVLProcessor, max_tokens: int, allow_remote_images: bool) -> None:
        self.processor = processor
        self.max_tokens = max_tokens
        self.allow_remote_images = allow_remote_images

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """A conversation that awaits an answer as a prompt.

        Raises:
            ValueError: it is malformed or too long, or an image cannot be read.
        """
        checked = as_messages(messages)
        encoded = self.encode(checked)  # before images are decoded
        images = list(images_of(checked))
        if self.processor.image_processor.max_tiles:
            self.expand(encoded, [self._count_inputs(image) for image in images])
        if len(images) < 2:
            return self.to_prompt(encoded, [self._decode_image(image) for image in images])
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without holding the interpreter's lock
            return self.to_prompt(encoded, list(threads.map(self._decode_image, images)))

    def encode(self, messages: list[Message]) -> Encoded:
        """A conversation's tokens, without those of tiles; its images are not looked at.

        Raises:
            ValueError: it is malformed.
            TooLongError: it leaves no room for an answer.
        """
        return self.processor.encode_messages(messages, max_tokens=self.max_tokens)

    def expand(self, encoded: Encoded, num_inputs: Sequence[int]) -> Encoded:
        """The tokens of a conversation whose images are so many inputs of the tower each.

        Raises:
            TooLongError: it leaves no room for an answer.
        """
        return self.processor.expand(encoded, num_inputs, self.max_tokens)

    def check(self, messages: list[Message]) -> None:
        """
        Raises:
            ValueError: a conversation cannot be answered; what shows only when images are fetched and decoded is not
                found.
        """
        encoded = self.encode(messages)
        self.expand(encoded, [self._count_inputs(image) for image in images_of(messages)])

    def to_prompt(self, encoded: Encoded, images: Sequence[Sequence[Tensor]]) -> Prompt:
        """Tokens as `encode` gives them and images in reading order, as a prompt.

        Args:
            images: the inputs of the tower that each is, (H, W, 3) uint8, as `YiVLImageProcessor.to_inputs` gives them.

        Raises:
            TooLongError: it leaves no room for an answer.
        """
        expanded = self.expand(encoded, [len(inputs) for inputs in images])
        inputs_uint8 = tuple(each for inputs in images for each in inputs)
        keys = tuple(
            ImageKey(hashlib.sha256(each.numpy().tobytes()).digest(), start, start + self.processor.tokens_per_image)
            for each, start in zip(inputs_uint8, expanded.image_starts, strict=True)
        )
        return Prompt(PrefixKey(np.array(expanded.input_ids, dtype=np.int64), keys), inputs_uint8)

    def _count_inputs(self, image: ImageSource | TiledImage) -> int:
        return self.processor.image_processor.count_inputs(image, self.allow_remote_images)

    def _decode_image(self, image: ImageSource | TiledImage) -> list[Tensor]:
        return self.processor.image_processor.to_inputs(image, allow_remote_images=self.allow_remote_images)
