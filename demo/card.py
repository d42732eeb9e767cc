"""A model's card, and the licence that it names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yi_vl

_NANO = Path(yi_vl.__file__).parent / "nano"


@dataclass(frozen=True)
class Card:
    """A model card: `text` (Markdown) of a local folder, or the `url` of a hub id's page; both empty if there is none.

    `licence` is the identifier that the card's front matter gives, or empty.
    """

    text: str = ""
    url: str = ""
    licence: str = ""


def find_card(model: str | None) -> Card:
    """The card of a model folder or hub id; of the bundled nano for None."""
    folder = Path(model) if model else _NANO
    if not folder.exists():
        return Card(url=f"https://huggingface.co/{model}")
    try:
        written = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a folder needs no card, nor a file
        return Card()
    front = re.match(r"---\n(.*?)\n---\n", written, re.DOTALL)
    licence = re.search(r"^license:\s*[\"']?([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return Card(text=written[front.end() if front else 0 :], licence=licence[1] if licence else "")
