"""A toy Yi-VL that cuts images into tiles, and images for it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from tiny import IMAGE_SIZE_PX, tiny_model, tiny_processor

from yi_vl.predict import YiVL
from yi_vl.processor import YiVLProcessor

SIZE = IMAGE_SIZE_PX
COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiled_processor(max_tiles: int = 4) -> YiVLProcessor:
    processor = tiny_processor()
    processor.image_processor.max_tiles = max_tiles
    return processor


def tiled_yi_vl() -> YiVL:
    """Up to four tiles."""
    return YiVL(tiny_model(max_position_embeddings=1024), tiled_processor())


def ask(images: list[Any], text: str = "What is this?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
