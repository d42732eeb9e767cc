"""Image features by the hash of the pixels: an image that was encoded recently is not encoded again.

N images, P patches, D language width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..model import YiVLForConditionalGeneration
from ..processor import YiVLProcessor
from .prefix_cache import LRUCache

_MAX_BYTES = 256 << 20  # 31 images of the 6B, in bf16


class ImageFeatures:
    """Encodes images, and caches their features."""

    def __init__(self, model: YiVLForConditionalGeneration, processor: YiVLProcessor) -> None:
        self._model = model
        self._to_pixel_values = processor.image_processor.to_pixel_values
        self._cache: LRUCache[Tensor] = LRUCache(_MAX_BYTES)  # digest -> (P, D)

    def cached(self, digests: Sequence[bytes]) -> dict[bytes, Tensor]:
        """The features (P, D) of those of the images that are cached."""
        return {digest: features for digest in digests if (features := self._cache.get(digest)) is not None}

    def encode(self, images_uint8: Mapping[bytes, Tensor], device: torch.device) -> dict[bytes, Tensor]:
        """The features (P, D) of N images, (H, W, 3) uint8 on the CPU each, by their digest."""
        pixels = self._to_pixel_values(torch.stack(list(images_uint8.values()))).to(device, self._model.dtype)
        features = dict(zip(images_uint8, self._model.model.encode_images(pixels), strict=True))
        for digest, encoded in features.items():
            self._cache.put(digest, encoded.clone(), encoded.nbytes)
        return features
