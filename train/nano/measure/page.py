"""An HTML page of held-out images with their questions and nano's answers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from train.html_page import html_page, png_tag

_STYLE = """
body { max-width: none; margin: 16px }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px }
article { display: block; margin: 0 }
img { width: 120px; height: 120px; display: inline-block; margin-right: 6px }
p { margin: 4px 0 } .question { color: #555 } .wrong::after { content: "  ✗ expected: " attr(title); color: #a33 }
.right::after { content: "  ✓"; color: #283 }
"""


def write_page(path: Path, records: Sequence[dict[str, Any]], folder: Path) -> None:
    """One card per image, or pair of images, with its questions and answers.

    Args:
        records: rows of `evaluate.measure`; those about the same images share a card.
        folder: what the images' paths are relative to.
    """
    cards: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        cards.setdefault(tuple(record["images"]), []).append(record)
    articles = "\n".join(_card([folder / name for name in images], rows) for images, rows in cards.items())
    path.write_text(html_page("nano", f"<main>\n{articles}\n</main>", _STYLE), encoding="utf-8")


def _card(images: Sequence[Path], rows: Sequence[dict[str, Any]]) -> str:
    tags = "".join(png_tag(image.read_bytes()) for image in images)
    lines = "".join(
        f"<p class=question>{escape(row['question'])}</p><p class={'right' if row['right'] else 'wrong'} "
        f'title="{escape(row["accepted"][0])}">{escape(row["answer"])}</p>'
        for row in rows
    )
    return f"<article>{tags}{lines}</article>"
