"""From a conversation to the model's input: tokens, decoded images, and the key that names both.

S tokens, N images.
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

from ..chat import Encoded, TooLongError
from ..image import ImageSource, check_source
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
        if len(images) < 2:
            return self.to_prompt(encoded, [self._decode_image(image) for image in images])
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without holding the interpreter's lock
            return self.to_prompt(encoded, list(threads.map(self._decode_image, images)))

    def encode(self, messages: list[Message]) -> Encoded:
        """A conversation's tokens; its images are not looked at.

        Raises:
            ValueError: it is malformed.
            TooLongError: it leaves no room for an answer.
        """
        return self.processor.encode_messages(messages, max_tokens=self.max_tokens)

    def check(self, messages: list[Message]) -> None:
        """
        Raises:
            ValueError: a conversation cannot be answered; what shows only when images are fetched and decoded is not
                found.
        """
        self.encode(messages)
        for image in images_of(messages):
            check_source(image, self.allow_remote_images)

    def to_prompt(self, encoded: Encoded, images_uint8: Sequence[Tensor]) -> Prompt:
        """Tokens and images, (H, W, 3) uint8 each in reading order, as a prompt.

        Raises:
            TooLongError: it leaves no room for an answer.
        """
        num_tokens, patches = len(encoded.input_ids), self.processor.tokens_per_image
        if num_tokens > self.max_tokens:
            raise TooLongError(num_tokens, len(encoded.image_starts), patches, self.max_tokens)
        keys = tuple(
            ImageKey(hashlib.sha256(image.numpy().tobytes()).digest(), start, start + patches)
            for image, start in zip(images_uint8, encoded.image_starts, strict=True)
        )
        return Prompt(PrefixKey(np.array(encoded.input_ids, dtype=np.int64), keys), tuple(images_uint8))

    def _decode_image(self, image: ImageSource) -> Tensor:
        return self.processor.image_processor.to_uint8(image, allow_remote_images=self.allow_remote_images)
