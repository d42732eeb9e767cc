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

from yi_vl.files import read_json_lines

from .scoring import RULES, Rules, Scored, chance, compare, count_outcomes, summarize
from .types import Benchmark, PublishedRow, Split

_RULES_TEXT: dict[Rules, str] = {
    "official": "official rules",
    "no_guess": "official, guesses wrong",
    "judge": "read by a judge",
}
_LABEL_CHARACTERS = 30  # of a model, so that the legend fits
_BAR_COLOURS = ("#0b6e99", "#74b3ce", "#d98324", "#7a7a7a", "#b8b8b8", "#4d4d4d")


def write_results(
    benchmark: Benchmark,
    scored: Sequence[Scored],
    out_dir: Path,
    config: Mapping[str, Any],
    split: Split | None = None,
    judge: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write everything but the page into `out_dir`; what results.json holds is returned.

    Args:
        config: how the predictions were made, as far as that is known; must name the "model".
        judge: who judged, and the "errors" by id where that failed.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    results = summarize_all(benchmark, scored, config, split, judge)
    has_golds = RULES[0] in results
    results["versions"] = {name: _version(name) for name in ("yi_vl", "torch", "transformers", "open_clip_torch")}
    results["versions"]["python"] = platform.python_version()
    results["git"] = _git_hash()
    _write(out_dir / "results.json", json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    _write(
        out_dir / "verdicts.jsonl",
        "".join(json.dumps(_verdict_row(item, judge), ensure_ascii=False) + "\n" for item in scored),
    )
    if has_golds:
        _write(out_dir / "results.md", markdown(benchmark, results))
        draw_chart(benchmark, results, out_dir / "results.png")
    return results


def summarize_all(
    benchmark: Benchmark,
    scored: Sequence[Scored],
    config: Mapping[str, Any],
    split: Split | None,
    judge: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The protocols' summaries, where the golds are known, beside chance and what became of the questions."""
    results: dict[str, Any] = {"benchmark": benchmark.NAME, "split": split, "config": dict(config)}
    results["chance"] = chance([item.answered.question for item in scored])
    results["responses"] = count_outcomes([item.answered for item in scored])
    if all(item.answered.question.gold for item in scored):
        results |= {rules: summarize(benchmark, scored, rules) for rules in RULES if rules != "judge"}
        if judge is not None:
            results["judge"] = {**judge, "failed": len(judge["errors"]), **summarize(benchmark, scored, "judge")}
    return results


def rules_of(results: Mapping[str, Any]) -> list[Rules]:
    """The protocols that results have scores by."""
    return [rules for rules in RULES if results.get(rules, {}).get("num")]


def compare_results(folders: Sequence[Path]) -> str:
    """Markdown: every pair of results, paired question by question, under each protocol that both have."""
    verdicts = {str(folder): _read_verdicts(folder) for folder in folders}
    lines = [
        "| | rules | questions | difference | 95% interval | only first right | only second right | p |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for first, second in combinations(verdicts, 2):
        for rules in (rules for rules in verdicts[first] if rules in verdicts[second]):
            comparison = compare(verdicts[first][rules], verdicts[second][rules])
            low, high = (f"{100 * value:+.1f}" for value in comparison["interval_95"])
            lines.append(
                f"| {first} − {second} | {rules} | {comparison['num']} | {100 * comparison['difference']:+.1f} "
                f"| {low} to {high} | {comparison['only_first_correct']} | {comparison['only_second_correct']} "
                f"| {comparison['p_value']:.3g} |"
            )
    return "\n".join(lines)


def _read_verdicts(folder: Path) -> dict[str, dict[str, bool]]:
    """Protocol -> id -> whether it is correct; a protocol of a judge has the judge's name in it."""
    verdicts: dict[str, dict[str, bool]] = {}
    for row in read_json_lines(folder / "verdicts.jsonl"):
        for rules in (rules for rules in RULES if row.get(rules, {}).get("correct") is not None):
            by = row[rules].get("by")
            verdicts.setdefault(f"{rules} {by}" if by else rules, {})[row["id"]] = row[rules]["correct"]
    if not verdicts:
        raise ValueError(f"{folder / 'verdicts.jsonl'} has no verdicts: no question's right answer is known.")
    return verdicts


def markdown(benchmark: Benchmark, results: Mapping[str, Any]) -> str:
    """The table of disciplines beside published rows, then that of subjects."""
    official = results["official"]
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
    for rules in rules_of(results):
        summary = results[rules]
        cells = [_discipline_percent(summary, name) for name in names]
        lines.append(
            f"| **{results['config']['model']}** ({_RULES_TEXT[rules]}) | **{_percent(summary['accuracy'])}** | "
            + " | ".join(cells) + " |"
        )  # fmt: skip
    lines.append(f"| chance | {_percent(results['chance'])} |" + " |" * len(names))
    for row in rows_of(benchmark, results):
        cells = [f"{row.scores[name]:.1f}" if name in row.scores else "" for name in names]
        lines.append(f"| {row.model} [^{row.model}] | {row.scores['Overall']:.1f} | " + " | ".join(cells) + " |")
    lines += ["", *(f"[^{row.model}]: {row.source}." for row in rows_of(benchmark, results)), ""]
    lines += [_summary_line(results), _responses_line(results["responses"]), ""]
    if any(len(group["subjects"]) > 1 for group in official["disciplines"].values()):
        lines += _subject_table(results)
    return "\n".join(lines)


def _summary_line(results: Mapping[str, Any]) -> str:
    official, no_guess = results["official"], results["no_guess"]
    line = (
        f"Official: {official['correct']} of {official['num']} (printed as {official['formatted']}), 95% interval "
        f"{_interval(official)}; {len(official['random_guesses'])} guessed at random. With guesses wrong: "
        f"{no_guess['correct']}, {_interval(no_guess)}."
    )
    if (judge := results.get("judge")) is not None:
        score = f"{judge['correct']} of {judge['num']}, {_interval(judge)}" if judge["num"] else "none"
        line += f" Judged by {judge['model']}: {score}; {judge['failed']} could not be judged and are not counted."
    return line


def _responses_line(counts: Mapping[str, int]) -> str:
    """What is not a whole answer, or an empty line."""
    counted = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if name != "num" and count]
    return f"Of {counts['num']} responses: {', '.join(counted)}." if counted else ""


def _subject_table(results: Mapping[str, Any]) -> list[str]:
    rules = rules_of(results)
    lines = [f"| subject | questions | {' | '.join(rules)} |".replace("_", " "), "|---|---:|" + "---:|" * len(rules)]
    for name, group in results["official"]["disciplines"].items():
        cells = [_discipline_percent(results[protocol], name) for protocol in rules]
        lines.append(f"| **{name}** | {group['num']} | {' | '.join(cells)} |")
        for subject, tally in group["subjects"].items():
            cells = [_discipline_percent(results[protocol], name, subject) for protocol in rules]
            lines.append(f"| {subject} | {tally['num']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _discipline_percent(summary: Mapping[str, Any], name: str, subject: str | None = None) -> str:
    """An accuracy in per cent; empty where a judge judged none of its questions."""
    tally = summary["disciplines"].get(name, {})
    tally = tally if subject is None else tally.get("subjects", {}).get(subject, {})
    return _percent(tally["accuracy"]) if tally else ""


def _interval(summary: Mapping[str, Any]) -> str:
    return " to ".join(map(_percent, summary["interval_95"]))


def draw_chart(benchmark: Benchmark, results: Mapping[str, Any], path: Path) -> None:
    """Bars by discipline: this model under each protocol, and the published rows that have disciplines or overall."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    official = results["official"]
    names = ["Overall", *official["disciplines"]]
    model = results["config"]["model"]
    shown = model if len(model) <= _LABEL_CHARACTERS else f"…{model[1 - _LABEL_CHARACTERS :]}"  # of a path, its end
    bars: list[tuple[str, list[float | None]]] = []
    for rules in rules_of(results):
        tallies = {"Overall": results[rules]} | results[rules]["disciplines"]
        heights = [100 * tallies[name]["accuracy"] if name in tallies else None for name in names]
        bars.append((f"{shown}, {_RULES_TEXT[rules]}", heights))
    bars += [(title, [row.scores.get(name) for name in names]) for title, row in _charted(benchmark, results)]
    figure, axes = plt.subplots(figsize=(max(7.0, 1.6 * len(names)), 4.2), layout="constrained")
    width = 0.84 / len(bars)
    for index, (label, heights) in enumerate(bars):
        drawn = [(column, height) for column, height in enumerate(heights) if height is not None]
        positions = [column + (index - (len(bars) - 1) / 2) * width for column, _ in drawn]
        containers = axes.bar(
            positions,
            [height for _, height in drawn],
            width * 0.92,
            label=label,
            color=_BAR_COLOURS[index % len(_BAR_COLOURS)],
        )
        axes.bar_label(containers, fmt="%.0f", fontsize=7, padding=1)
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
    """For each published model the row with the most scores; one of another split is labelled with it."""
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


def _verdict_row(item: Scored, judge: Mapping[str, Any] | None) -> dict[str, Any]:
    """`answer`: what of the response was scored."""
    question = item.answered.question
    verdicts = {rules: verdict for rules in RULES if (verdict := item.verdict(rules)) is not None}
    return {
        "id": question.id,
        "subject": question.subject,
        "question_type": question.question_type,
        "gold": question.gold,
        "response": item.answered.response,
        "answer": item.answered.answer,
        "outcome": item.answered.outcome,
        **{
            rules: {
                "parsed": verdict.parsed,
                "correct": verdict.is_correct if question.gold else None,
                **({"by": judge["title"]} if rules == "judge" and judge else {}),
            }
            for rules, verdict in verdicts.items()
        },
        "is_random_guess": item.official.is_guess,
    }


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
        completed = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return completed.stdout.strip()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
