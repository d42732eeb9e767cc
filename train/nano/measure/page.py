"""A page of held-out pictures with what nano was asked and what it answered: for people to look at."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, "Noto Sans CJK SC", sans-serif; margin: 16px; background: #f6f6f4; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 12px }
article { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 10px }
img { width: 120px; height: 120px; border-radius: 4px; margin-right: 6px }
p { margin: 4px 0 } .asked { color: #555 } .wrong::after { content: "  ✗ expected: " attr(title); color: #a33 }
.right::after { content: "  ✓"; color: #283 }
"""


def write_sheet(path: Path, records: Sequence[dict[str, Any]], folder: Path) -> None:
    """One card per picture with its questions and answers; pictures are put into the page.

    Args:
        records: rows of `measure`; those about the same pictures share a card.
        folder: where the pictures' names are relative to.
    """
    cards: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        cards.setdefault(tuple(record["images"]), []).append(record)
    articles = "\n".join(_card([folder / name for name in images], rows) for images, rows in cards.items())
    head = f"<!doctype html><meta charset=utf-8><title>nano</title><style>{_STYLE}</style>"
    path.write_text(f"{head}<main>\n{articles}\n</main>\n", encoding="utf-8")


def _card(images: Sequence[Path], rows: Sequence[dict[str, Any]]) -> str:
    pictures = "".join(f'<img src="{_data_uri(image)}" alt="">' for image in images)
    lines = "".join(
        f"<p class=asked>{escape(row['question'])}</p><p class={'right' if row['right'] else 'wrong'} "
        f'title="{escape(row["accepted"][0])}">{escape(row["answer"])}</p>'
        for row in rows
    )
    return f"<article>{pictures}{lines}</article>"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
