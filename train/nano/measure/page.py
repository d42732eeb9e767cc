"""HTML pages to leaf through: held-out images with their questions and a model's answers, right or wrong, by skill."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from train.html_page import html_page
from train.nano.text.dialogue import is_not_sure
from yi_vl.files import write_text
from yi_vl.image.data_url import data_url

_MOST_CARDS = 160  # of a skill, spread evenly over its images
_THUMBNAIL_PX = 168
_STYLE = """
body { max-width: 76em; margin: 1.2em auto; padding: 0 1em }
nav a { display: inline-block; margin: 0 .4em .4em 0; padding: .15em .7em; border: 1px solid #ccc; border-radius: 1em;
  background: white; color: #246; text-decoration: none } nav a[aria-current] { background: #246; color: white }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21em, 1fr)); gap: .8em; margin-top: .8em }
article { margin: 0; gap: .8em; padding: .7em } img { width: 112px; height: 112px; margin: 0 }
dl { margin: 0; min-width: 0; overflow-wrap: anywhere } dt { color: #666; font-size: 90% } dd { margin: 0 0 .4em }
.right::before { content: "✓ "; color: #283 } .wrong::before { content: "✗ "; color: #b33 }
.wrong small { color: #b33 } body:has(#wrong:checked) article:not(:has(.wrong)) { display: none }
table { border-collapse: collapse; background: white } td, th { border: 1px solid #ddd; padding: .3em .8em;
  text-align: right } td:first-child, th:first-child { text-align: left }
"""


def write_pages(folder: Path, title: str, records: Sequence[dict[str, Any]], heldout: Path) -> Path:
    """`folder/index.html`, a table of the skills, and one page for each; returns the first.

    Args:
        records: rows of `evaluate.measure`; those about the same images share a card.
        heldout: what the images' paths are relative to.
    """
    by_skill: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_skill.setdefault(record["skill"], []).append(record)
    for skill, rows in by_skill.items():
        write_text(folder / f"{skill}.html", _skill_page(title, skill, list(by_skill), rows, heldout))
    index = folder / "index.html"
    table = "".join(_table_row(skill, rows) for skill, rows in by_skill.items())
    names = ("skill", "questions", "English", "Chinese", "not sure", "its cost")
    header = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>"
    body = f"<h1>{escape(title)}</h1>{_navigation(list(by_skill), '')}<table>{header}{table}</table>"
    write_text(index, html_page(title, body, _STYLE))
    return index


def _skill_page(title: str, skill: str, skills: Sequence[str], rows: Sequence[dict[str, Any]], heldout: Path) -> str:
    cards: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cards.setdefault(tuple(row["images"]), []).append(row)
    shown = list(cards.items())[:: -(-len(cards) // _MOST_CARDS)]
    articles = "\n".join(_card([heldout / name for name in images], answered) for images, answered in shown)
    only = "<label><input type=checkbox id=wrong> only what is wrong</label>"
    count = f"{len(shown)} of {len(cards)} images, {_right(rows)} of {len(rows)} answers right"
    body = f"<h1>{escape(title)}</h1>{_navigation(skills, skill)}<p>{count} {only}</p><main>\n{articles}\n</main>"
    return html_page(f"{title}: {skill}", body, _STYLE)


def _navigation(skills: Sequence[str], current: str) -> str:
    links = [("index", "all"), *((skill, skill) for skill in skills)]
    tags = []
    for name, text in links:
        is_current = " aria-current=page" if name == (current or "index") else ""
        tags.append(f'<a href="{escape(name)}.html"{is_current}>{escape(text)}</a>')
    return f"<nav>{''.join(tags)}</nav>"


def _table_row(skill: str, rows: Sequence[dict[str, Any]]) -> str:
    by_lang = [_right([row for row in rows if row["lang"] == lang]) for lang in ("en", "zh")]
    not_sure = _percent([is_not_sure(row["answer"]) for row in rows])
    cost = _percent([row.get("otherwise_right", False) for row in rows])
    cells = [f'<a href="{escape(skill)}.html">{escape(skill)}</a>', len(rows), *by_lang, not_sure, cost]
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _right(rows: Sequence[dict[str, Any]]) -> str:
    return _percent([row["right"] for row in rows])


def _percent(values: Sequence[bool]) -> str:
    return f"{100 * sum(values) / len(values):.1f}%" if values else "–"


def _card(images: Sequence[Path], rows: Sequence[dict[str, Any]]) -> str:
    tags = "".join(f'<img alt="" src="{_thumbnail(image)}">' for image in images)
    return f"<article><div>{tags}</div><dl>{''.join(map(_answer, rows))}</dl></article>"


def _answer(row: dict[str, Any]) -> str:
    verdict = "right" if row["right"] else "wrong"
    expected = "" if row["right"] else f"<small>expected: {escape(row['accepted'][0])}</small>"
    if "otherwise" in row:
        expected += f"<small>otherwise: {escape(row['otherwise'])}</small>"
    return f"<dt>{escape(row['question'])}</dt><dd class={verdict}>{escape(row['answer'])}{expected}</dd>"


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return data_url(buffer.getvalue(), "image/jpeg")
