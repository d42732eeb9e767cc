"""The results of a search: results.json, and a page with the plots."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from yi_vl.files import write_text

from ..html_page import html_page, png_tag
from .plots import draw_design, draw_losses_by_share, draw_predictions, draw_rank_check, draw_verdict

PAGE, RESULTS = "index.html", "results.json"
_STYLE = """
img { width: auto; height: auto; max-width: 100%; border: 0; }
article { display: block; } pre { overflow-x: auto; } td, th { padding: .1em .8em .1em 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } table { border-collapse: collapse; }
"""


def write_report(directory: Path, results: dict[str, Any]) -> None:
    """Write results.json and index.html."""
    write_text(directory / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    parts = [
        _section("Verdict", f"<p>{escape(results['verdict']['reason'])}</p><pre>{escape(results['yaml'])}</pre>"),
        _section("Design", f"<p>{escape(_summary(results))}</p>{_plot(draw_design(results))}"),
        _section("Baselines and noise", _baselines(results)),
        _section("Short against long runs", _rank_check(results)),
        _section("Held-out loss by a source's share", _plot(draw_losses_by_share(results))),
        _section("Measured and predicted", _regression(results)),
    ]
    if results["best"] is not None:
        parts.append(_section("The second held-out set", _judged(results)))
    write_text(directory / PAGE, html_page(f"Mixture: {directory}", "".join(parts), _STYLE))


def _section(title: str, body: str) -> str:
    return f"<article><h2>{escape(title)}</h2>{body}</article>"


def _plot(figure: Any) -> str:
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return png_tag(file.getvalue())


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = ["".join(f"<th>{escape(heading)}</th>" for heading in headings)]
    cells += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _summary(results: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {size:,}" for name, size in results["sources"].items())
    stage, runs = results["stage"], results["runs"]
    hours = sum(run["seconds"] for run in runs) / 3600
    return (
        f"{len(runs)} runs, {results['steps']:,} steps, {hours:.2g} hours, for the stage {stage['config']} of "
        f"{stage['steps']:,} steps and {stage['samples']:,} samples. Method {results['method']}. Samples: {sizes}."
    )


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _baselines(results: dict[str, Any]) -> str:
    runs = [run for run in results["runs"] if run["name"] in ("size", "present") or run["name"].startswith("equal-")]
    names = list(results["sources"])
    rows = [
        [run["name"], _loss(run["loss"]), *(f"{run['settings']['shares'][name]:.3f}" for name in names)] for run in runs
    ]
    noise, start = results["noise"], results["runs"][0]["start_loss"]
    text = (
        f"Before training the loss is {_loss(start)}. Equal shares reach {noise['mean']:.4f}; the standard deviation "
        f"over {len(noise['losses'])} seeds, {noise['standard_deviation']:.4f}, is the noise of a single run."
    )
    return f"<p>{escape(text)}</p>" + _table(["run", "held-out loss", *names], rows)


def _rank_check(results: dict[str, Any]) -> str:
    check = results["rank_check"]
    if check is None:
        return "<p>Not checked (rank_check): whether longer training ranks mixtures alike is not known.</p>"
    correlation = check["correlation"]
    is_low = correlation is None or correlation < 0.5
    shown = "not defined" if correlation is None else f"{correlation:.2f}"
    text = f"Rank correlation {shown} over {len(check['short'])} mixtures." + (
        " Short runs do not rank mixtures as longer ones do, so the result may not hold for longer training."
        if is_low
        else ""
    )
    return f"<p>{escape(text)}</p>{_plot(draw_rank_check(results))}"


def _regression(results: dict[str, Any]) -> str:
    regression = results["regression"]
    correlation = regression["correlation"]
    text = (
        f"Ridge regression on log shares over {len(regression['names'])} runs; each prediction is by a regression "
        f"without that run. Rank correlation {'not defined' if correlation is None else f'{correlation:.2f}'}."
    )
    rows = [[name, f"{value:+.4f}"] for name, value in regression["coefficients"].items()]
    table = _table(["term", "change of the held-out loss"], rows)
    return f"<p>{escape(text)}</p>{_plot(draw_predictions(results))}{table}"


def _judged(results: dict[str, Any]) -> str:
    best = results["best"]
    rows = [[name, f"{share:.3f}"] for name, share in best["shares"].items()]
    rows += [[key, str(value)] for key, value in best["hyper"].items()]
    return _plot(draw_verdict(results)) + _table(["predicted best mixture", ""], rows)
