"""What is left on disk after a scoring: results.json, a Markdown table as papers lay it out, a chart, verdicts."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any

from .data import read_jsonl
from .question import Benchmark, PublishedRow, Split
from .scoring import RULES, Rules, Scored, chance, compare, summarise

_RULES_TEXT = {"official": "official rules", "strict": "strict rules"}
_BAR_COLOURS = ("#0b6e99", "#74b3ce", "#d98324", "#7a7a7a", "#b8b8b8", "#4d4d4d")


def write_results(
    benchmark: Benchmark,
    scored: Sequence[Scored],
    out_dir: Path,
    config: Mapping[str, Any],
    split: Split | None = None,
) -> dict[str, Any]:
    """Write everything but the page into `out_dir`; what results.json holds is returned.

    Args:
        config: how the predictions were made, as far as that is known; must name the "model".
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    results = summarise_all(benchmark, scored, config, split)
    has_golds = RULES[0] in results
    results["versions"] = {name: _version(name) for name in ("yi_vl", "torch", "transformers", "open_clip_torch")}
    results["versions"]["python"] = platform.python_version()
    results["git"] = _git_hash()
    _write(out_dir / "results.json", json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    _write(
        out_dir / "verdicts.jsonl", "".join(json.dumps(_verdict_row(one), ensure_ascii=False) + "\n" for one in scored)
    )
    if has_golds:
        _write(out_dir / "results.md", markdown(benchmark, results))
        draw_chart(benchmark, results, out_dir / "results.png")
    return results


def summarise_all(
    benchmark: Benchmark, scored: Sequence[Scored], config: Mapping[str, Any], split: Split | None
) -> dict[str, Any]:
    """Both protocols' summaries, where the golds are known, beside chance."""
    results: dict[str, Any] = {"benchmark": benchmark.NAME, "split": split, "config": dict(config)}
    results["chance"] = chance([one.answered.question for one in scored])
    if all(one.answered.question.gold for one in scored):
        results |= {rules: summarise(benchmark, scored, rules) for rules in RULES}
    return results


def comparison(folders: Sequence[Path]) -> str:
    """Markdown: every pair of results, paired question by question, under both rules."""
    verdicts = {str(folder): _read_verdicts(folder) for folder in folders}
    lines = [
        "| | rules | questions | difference | 95% interval | only first right | only second right | p |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for first, second in combinations(verdicts, 2):
        for rules in RULES:
            found = compare(verdicts[first][rules], verdicts[second][rules])
            low, high = (f"{100 * value:+.1f}" for value in found["interval_95"])
            lines.append(
                f"| {first} − {second} | {rules} | {found['num']} | {100 * found['difference']:+.1f} | {low} to {high} "
                f"| {found['only_first_right']} | {found['only_second_right']} | {found['p_value']:.3g} |"
            )
    return "\n".join(lines)


def _read_verdicts(folder: Path) -> dict[Rules, dict[str, bool]]:
    rows = read_jsonl(folder / "verdicts.jsonl")
    return {rules: {row["id"]: row[rules]["right"] for row in rows} for rules in RULES}


def markdown(benchmark: Benchmark, results: Mapping[str, Any]) -> str:
    """The table of disciplines beside published rows, then that of subjects."""
    official, strict = (results[rules] for rules in RULES)
    names = list(official["disciplines"])
    lines = [
        f"## {benchmark.NAME} {results['split'] or ''}".rstrip(),
        "",
        "| | Overall | " + " | ".join(names) + " |",
        "|---|" + "---:|" * (1 + len(names)),
        f"| questions | {official['num']} | "
        + " | ".join(str(official["disciplines"][n]["num"]) for n in names)
        + " |",
    ]
    for rules, summary in ((RULES[0], official), (RULES[1], strict)):
        cells = [_percent(summary["disciplines"][name]["accuracy"]) for name in names]
        lines.append(
            f"| **{results['config']['model']}** ({_RULES_TEXT[rules]}) | **{_percent(summary['accuracy'])}** | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    lines.append(f"| chance | {_percent(results['chance'])} |" + " |" * len(names))
    for row in rows_of(benchmark, results):
        cells = [f"{row.scores[name]:.1f}" if name in row.scores else "" for name in names]
        lines.append(f"| {row.model} [^{row.model}] | {row.scores['Overall']:.1f} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[^{row.model}]: {row.source}." for row in rows_of(benchmark, results)), ""]
    low, high = (_percent(value) for value in official["interval_95"])
    low_strict, high_strict = (_percent(value) for value in strict["interval_95"])
    lines += [
        f"Official: {official['right']} of {official['num']} (printed as {official['printed']}), 95% interval {low} to "
        f"{high}; {len(official['drawn'])} left to the official draw. Strict: {strict['right']}, {low_strict} to "
        f"{high_strict}; {strict['unparsed']} without a meaning count as wrong.",
        "",
    ]
    if any(len(group["subjects"]) > 1 for group in official["disciplines"].values()):
        lines += ["| subject | questions | official | strict |", "|---|---:|---:|---:|"]
        for name, group in official["disciplines"].items():
            lines.append(_subject_line(f"**{name}**", group, strict["disciplines"][name]))
            for subject, tally in group["subjects"].items():
                lines.append(_subject_line(subject, tally, strict["disciplines"][name]["subjects"][subject]))
        lines.append("")
    return "\n".join(lines)


def draw_chart(benchmark: Benchmark, results: Mapping[str, Any], path: Path) -> None:
    """Bars by discipline: this model under both rules, and the published rows that have disciplines or an overall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    official, strict = (results[rules] for rules in RULES)
    names = ["Overall", *official["disciplines"]]
    model = results["config"]["model"]
    bars = []
    for rules, summary in ((RULES[0], official), (RULES[1], strict)):
        heights = [summary["accuracy"], *(tally["accuracy"] for tally in summary["disciplines"].values())]
        bars.append((f"{model}, {_RULES_TEXT[rules]}", [100 * height for height in heights]))
    bars += [(title, [row.scores.get(name) for name in names]) for title, row in _charted(benchmark, results)]  # type: ignore[misc]
    figure, axes = plt.subplots(figsize=(max(7.0, 1.6 * len(names)), 4.2), layout="constrained")
    width = 0.84 / len(bars)
    for index, (label, heights) in enumerate(bars):
        there = [(place, height) for place, height in enumerate(heights) if height is not None]
        places = [place + (index - (len(bars) - 1) / 2) * width for place, _ in there]
        drawn = axes.bar(
            places,
            [height for _, height in there],
            width * 0.92,
            label=label,
            color=_BAR_COLOURS[index % len(_BAR_COLOURS)],
        )
        axes.bar_label(drawn, fmt="%.0f", fontsize=7, padding=1)
    low, high = (100 * value for value in official["interval_95"])
    axes.vlines(-(len(bars) - 1) / 2 * width, low, high, color="black", linewidth=1)
    axes.axhline(100 * results["chance"], color="grey", linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(range(len(names)), [_wrapped(benchmark.LABELS.get(name, name)) for name in names], fontsize=9)
    axes.set_ylabel("right answers, %")
    axes.set_ylim(0, 100)
    axes.set_title(f"{benchmark.NAME} {results['split'] or ''} ({official['num']} questions)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def rows_of(benchmark: Benchmark, results: Mapping[str, Any]) -> list[PublishedRow]:
    """The published rows that this result may stand beside: of the same split, over the same disciplines."""
    is_the_benchmark = set(results["official"]["disciplines"]) == set(benchmark.GROUPS)
    return [row for row in benchmark.PUBLISHED if row.split == results["split"]] if is_the_benchmark else []


def _charted(benchmark: Benchmark, results: Mapping[str, Any]) -> list[tuple[str, PublishedRow]]:
    """For each published model the row that says most; one of another split says so."""
    chosen: dict[str, PublishedRow] = {}
    for row in benchmark.PUBLISHED if rows_of(benchmark, results) else ():
        best = chosen.get(row.model)
        if best is None or (len(row.scores), row.split == results["split"]) > (
            len(best.scores),
            best.split == results["split"],
        ):
            chosen[row.model] = row
    return [
        (row.model if row.split == results["split"] else f"{row.model} ({row.split})", row) for row in chosen.values()
    ]


def _verdict_row(one: Scored) -> dict[str, Any]:
    question = one.answered.question
    return {
        "id": question.id,
        "subject": question.subject,
        "kind": question.kind,
        "gold": question.gold,
        "said": one.answered.said,
        **{
            rules: {
                "meaning": verdict.meaning,
                "right": verdict.is_right if question.gold else None,
                "parsed": verdict.is_parsed,
            }
            for rules, verdict in (("official", one.official), ("strict", one.strict))
        },
        "drawn": not one.official.is_parsed,
    }


def _subject_line(name: str, official: Mapping[str, Any], strict: Mapping[str, Any]) -> str:
    return f"| {name} | {official['num']} | {_percent(official['accuracy'])} | {_percent(strict['accuracy'])} |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _wrapped(name: str) -> str:
    return name.replace(" and ", " &\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is run without being installed; the git hash tells
        return None


def _git_hash() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
