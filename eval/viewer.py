"""A page of every question with its images, prompt, response, gold and verdicts. No server is needed.

All text reaches the page as data and is shown as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yi_vl.image import load_image

from .scoring import RULES, Scored
from .types import Verdict

_SIDE_PX = 640  # longest side of the copies beside the page


def write_page(scored: Sequence[Scored], title: str, out_dir: Path) -> Path:
    """Write `out_dir/page.html` and `out_dir/images/`."""
    rows = [_row(item, out_dir) for item in scored]
    data = json.dumps({"title": title, "rows": rows}, ensure_ascii=False).replace("<", "\\u003c")
    path = out_dir / "page.html"
    path.write_text(_TEMPLATE.replace("__DATA__", data), encoding="utf-8")
    return path


def _row(item: Scored, out_dir: Path) -> dict[str, Any]:
    question = item.answered.question
    return {
        "id": question.id,
        "subject": question.subject,
        "prompt": question.prompt,
        "response": item.answered.response,
        "gold": question.gold if isinstance(question.gold, str) else " / ".join(question.gold),
        "answer": item.answered.answer,
        **{rules: _shown_verdict(item.verdict(rules)) for rules in RULES},
        "is_random_guess": item.official.is_guess,
        "images": [_write_thumbnail(image.read(), out_dir) for image in question.images],
    }


def _shown_verdict(verdict: Verdict | None) -> str:
    """A class of the page's style sheet; "" where a judge was not asked, or failed."""
    return "" if verdict is None else "correct" if verdict.is_correct else "incorrect"


def _write_thumbnail(content: bytes, out_dir: Path) -> str:
    """A thumbnail of an image, as a path relative to the page; "" where it cannot be decoded."""
    path = out_dir / "images" / f"{hashlib.sha256(content).hexdigest()[:16]}.jpg"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        try:
            thumbnail = load_image(content)
        except ValueError:
            return ""
        thumbnail.thumbnail((_SIDE_PX, _SIDE_PX))
        thumbnail.save(path, quality=88)
    return str(path.relative_to(out_dir))


_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Answers</title>
<style>
  body { font: 16px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; }
  nav { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ccc; }
  button, select { font: inherit; padding: .2rem .7rem; }
  #images img { max-width: 100%; max-height: 24rem; margin: .5rem .5rem 0 0; border: 1px solid #ddd; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f2; padding: .7rem; margin: .3rem 0 1rem; font: inherit; }
  dt { font-weight: 600; }
  dd { margin: 0; }
  .correct::before { content: "✓ right"; color: #0a6b2d; }
  .incorrect::before { content: "✗ wrong"; color: #a12020; }
  .guessed::after { content: " (random guess: no answer was recognized)"; color: #777; }
</style>
<h1 id="title"></h1>
<nav>
  <button id="back" title="arrow left">← back</button><button id="next" title="arrow right">next →</button>
  <span id="position"></span>
  <select id="subject"><option value="">all subjects</option></select>
  <select id="verdict"><option value="">all answers</option><option value="incorrect">wrong</option><option value="correct">right</option>
    <option value="guessed">random guesses</option><option value="differ">the judge differs</option></select>
</nav>
<h2 id="id"></h2>
<div id="images"></div>
<dl>
  <dt>Prompt</dt><dd><pre id="prompt"></pre></dd>
  <dt>Response</dt><dd><pre id="response"></pre></dd>
  <dt>Answer in it</dt><dd><pre id="answer"></pre></dd>
  <dt>Gold</dt><dd><pre id="gold"></pre></dd>
  <dt>Official rules</dt><dd id="official"></dd>
  <dt>Official rules, guesses wrong</dt><dd id="no_guess"></dd>
  <dt>Judge</dt><dd id="judge"></dd>
</dl>
<script id="data" type="application/json">__DATA__</script>
<script>
const {title, rows} = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
let shown = rows, position = 0;
at("title").textContent = document.title = title;
for (const name of new Set(rows.map(row => row.subject))) at("subject").append(new Option(name, name));
const filters = {incorrect: row => row.no_guess === "incorrect", correct: row => row.no_guess === "correct", guessed: row => row.is_random_guess, differ: row => row.judge && row.judge !== row.no_guess};
function choose() {
  const test = filters[at("verdict").value], subject = at("subject").value;
  shown = rows.filter(row => (!subject || row.subject === subject) && (!test || test(row)));
  position = 0;
  show();
}
function show() {
  const row = shown[position];
  at("position").textContent = shown.length ? `${position + 1} of ${shown.length}` : "none";
  at("id").textContent = row ? row.id : "";
  at("images").replaceChildren(...(row ? row.images : []).filter(Boolean).map(name => Object.assign(new Image(), {src: name, alt: "image of the question"})));
  for (const key of ["prompt", "response", "answer", "gold"]) at(key).textContent = row ? row[key] : "";
  for (const key of ["official", "no_guess", "judge"]) at(key).className = row ? row[key] : "";
  if (row && row.is_random_guess) at("official").classList.add("guessed");
}
function step(by) { if (shown.length) { position = (position + by + shown.length) % shown.length; show(); } }
at("back").onclick = () => step(-1);
at("next").onclick = () => step(1);
at("subject").onchange = at("verdict").onchange = choose;
addEventListener("keydown", event => { if (event.key === "ArrowLeft") step(-1); if (event.key === "ArrowRight") step(1); });
show();
</script>
</html>
"""
