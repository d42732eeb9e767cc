"""Images in, pixels out: sources, checks, decoding, and the one transform of training and inference."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .file import MAX_PIXELS, MAX_SIDE_PX, WEB_FORMATS
from .load import check_source, load_image, open_image
from .samples import ImageError
from .source import ImageSource

if TYPE_CHECKING:
    from .transform import TiledImage, YiVLImageProcessor, pad_and_resize

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE_PX",
    "WEB_FORMATS",
    "ImageError",
    "ImageSource",
    "TiledImage",
    "YiVLImageProcessor",
    "check_source",
    "load_image",
    "open_image",
    "pad_and_resize",
]


def __getattr__(name: str) -> Any:
    """The transform is imported when it is used: an image is checked before torch and transformers are imported."""
    if name not in ("TiledImage", "YiVLImageProcessor", "pad_and_resize"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".transform", __name__), name)
