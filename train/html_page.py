"""HTML pages without outside files: images are `data:` URLs."""

from __future__ import annotations

from html import escape

from PIL import Image
from torch import Tensor

from yi_vl.image.data_url import data_url, png_bytes

_STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; margin: 2em auto; max-width: 70em; color: #222;
  background: #fafafa; }
article { display: flex; gap: 1.2em; margin: 1em 0; padding: 1em; background: white; border: 1px solid #ddd;
  border-radius: 8px; }
img { width: 224px; height: 224px; display: block; margin-bottom: .4em; border: 1px solid #ccc; }
p { white-space: pre-wrap; margin: 0 0 .6em; } small { color: #666; display: block; overflow-wrap: anywhere; }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """A whole document.

    Args:
        body: HTML.
        style: CSS besides that of all pages: body, article, img, p and small.
    """
    head = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}{style}</style>"
    return f"{head}{body}\n"


def image_tag(image_uint8: Tensor) -> str:
    """An <img> that holds an (H, W, 3) uint8 image."""
    return png_tag(png_bytes(Image.fromarray(image_uint8.numpy())))


def png_tag(content: bytes) -> str:
    """An <img> that holds a PNG file."""
    return f'<img alt="" src="{data_url(content)}">'
