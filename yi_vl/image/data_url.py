"""Encoded images as `data:` URLs, for HTML pages and APIs; source.py decodes them."""

from __future__ import annotations

import base64
import io

from PIL import Image


def data_url(content: bytes, media_type: str = "image/png") -> str:
    """A base64 `data:` URL of a file's content."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def png_bytes(image: Image.Image) -> bytes:
    """An image encoded as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
