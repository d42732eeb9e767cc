"""A page to leaf through: every question with its pictures, prompt, answer, gold and verdicts. No server is needed.

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
    """Write `out_dir/page.html` and `out_dir/pictures/`."""
    rows = [_row(one, out_dir) for one in scored]
    data = json.dumps({"title": title, "rows": rows}, ensure_ascii=False).replace("<", "\\u003c")
    path = out_dir / "page.html"
    path.write_text(_TEMPLATE.replace("__DATA__", data), encoding="utf-8")
    return path


def _row(one: Scored, out_dir: Path) -> dict[str, Any]:
    question = one.answered.question
    return {
        "id": question.id,
        "subject": question.subject,
        "prompt": question.prompt,
        "said": one.answered.said,
        "gold": question.gold if isinstance(question.gold, str) else " / ".join(question.gold),
        "answer": one.answered.answer,
        **{rules: _shown_verdict(one.verdict(rules)) for rules in RULES},
        "drawn": one.official.is_guess,
        "pictures": [_copy(picture.read(), out_dir) for picture in question.pictures],
    }


def _shown_verdict(verdict: Verdict | None) -> str:
    """A class of the page's style sheet; "" where a judge was not asked, or failed."""
    return "" if verdict is None else "right" if verdict.is_right else "wrong"


def _copy(content: bytes, out_dir: Path) -> str:
    """A small copy of a picture, by its name relative to the page; "" where it is none."""

    path = out_dir / "pictures" / f"{hashlib.sha256(content).hexdigest()[:16]}.jpg"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        try:
            image = load_image(content)
        except ValueError:
            return ""
        image.thumbnail((_SIDE_PX, _SIDE_PX))
        image.save(path, quality=88)
    return str(path.relative_to(out_dir))


_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Answers</title>
<style>
  body { font: 16px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; }
  nav { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ccc; }
  button, select { font: inherit; padding: .2rem .7rem; }
  #pictures img { max-width: 100%; max-height: 24rem; margin: .5rem .5rem 0 0; border: 1px solid #ddd; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f2; padding: .7rem; margin: .3rem 0 1rem; font: inherit; }
  dt { font-weight: 600; }
  dd { margin: 0; }
  .right::before { content: "✓ right"; color: #0a6b2d; }
  .wrong::before { content: "✗ wrong"; color: #a12020; }
  .drawn::after { content: " (drawn: no answer was recognised)"; color: #777; }
</style>
<h1 id="title"></h1>
<nav>
  <button id="back" title="arrow left">← back</button><button id="next" title="arrow right">next →</button>
  <span id="place"></span>
  <select id="subject"><option value="">all subjects</option></select>
  <select id="verdict"><option value="">all answers</option><option value="wrong">wrong</option><option value="right">right</option>
    <option value="drawn">left to the draw</option><option value="differ">the judge differs</option></select>
</nav>
<h2 id="id"></h2>
<div id="pictures"></div>
<dl>
  <dt>Prompt</dt><dd><pre id="prompt"></pre></dd>
  <dt>Response</dt><dd><pre id="said"></pre></dd>
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
let shown = rows, place = 0;
at("title").textContent = document.title = title;
for (const name of new Set(rows.map(row => row.subject))) at("subject").append(new Option(name, name));
const wanted = {wrong: row => row.no_guess === "wrong", right: row => row.no_guess === "right", drawn: row => row.drawn, differ: row => row.judge && row.judge !== row.no_guess};
function choose() {
  const test = wanted[at("verdict").value], subject = at("subject").value;
  shown = rows.filter(row => (!subject || row.subject === subject) && (!test || test(row)));
  place = 0;
  show();
}
function show() {
  const row = shown[place];
  at("place").textContent = shown.length ? `${place + 1} of ${shown.length}` : "none";
  at("id").textContent = row ? row.id : "";
  at("pictures").replaceChildren(...(row ? row.pictures : []).filter(Boolean).map(name => Object.assign(new Image(), {src: name, alt: "picture of the question"})));
  for (const key of ["prompt", "said", "answer", "gold"]) at(key).textContent = row ? row[key] : "";
  for (const key of ["official", "no_guess", "judge"]) at(key).className = row ? row[key] : "";
  if (row && row.drawn) at("official").classList.add("drawn");
}
function step(by) { if (shown.length) { place = (place + by + shown.length) % shown.length; show(); } }
at("back").onclick = () => step(-1);
at("next").onclick = () => step(1);
at("subject").onchange = at("verdict").onchange = choose;
addEventListener("keydown", event => { if (event.key === "ArrowLeft") step(-1); if (event.key === "ArrowRight") step(1); });
show();
</script>
</html>
"""
