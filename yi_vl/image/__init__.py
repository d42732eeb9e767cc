"""Images in, pixels out: sources, checks, decoding, and the one transform of training and inference."""

from .file import MAX_PIXELS, MAX_SIDE_PX, WEB_FORMATS
from .samples import ImageError
from .source import ImageSource
from .transform import YiVLImageProcessor, check_source, load_image, open_image, pad_and_resize

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE_PX",
    "WEB_FORMATS",
    "ImageError",
    "ImageSource",
    "YiVLImageProcessor",
    "check_source",
    "load_image",
    "open_image",
    "pad_and_resize",
]
