"""The results of a comparison: results.json, table.md, table_zh.md and accuracy.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from yi_vl.files import write_text

from .plot import draw_accuracy
from .runs import Result

RESULTS, TABLE, TABLE_ZH, PLOT = "results.json", "table.md", "table_zh.md", "accuracy.png"
ALL = "all"
_ENGLISH = {
    "connector": "connector",
    "tokens_per_image": "tokens per image",
    "parameters": "parameters",
    "loss": "held-out loss",
    "samples_per_second": "samples/s",
    "ttft_ms": "TTFT, ms",
    "constant": "constant answer",
    "below": "Percent of correct answers, mean ± standard error over the seeds ({seeds}); questions of each skill: "
    "{questions}. The constant answer is, for each topic, the one that is most often correct. TTFT: {machine}.",
    "diverged": "Runs of {name} that diverged and are left out: {count}.",
}  # fmt: skip
_CHINESE = {
    "connector": "连接器",
    "tokens_per_image": "每张图像的 token 数",
    "parameters": "参数量",
    "loss": "留出集损失",
    "samples_per_second": "样本/秒",
    "ttft_ms": "TTFT（毫秒）",
    "constant": "固定答案",
    "below": "回答正确的百分比，各种子（{seeds} 个）的均值 ± 标准误；每项技能 {questions} 题。"
    "“固定答案”是对每类问题始终给出最常正确的那个答案。TTFT：{machine}。",
    "diverged": "{name} 有 {count} 次训练发散，未计入。",
}  # fmt: skip
_SKILLS_ZH = {
    "digits": "数字", "flags": "国旗", "same": "异同", "scenes": "场景",
    "things": "物体", "unknown": "未知", "words": "文字", ALL: "全部",
}  # fmt: skip


def write_report(
    directory: Path, runs: Sequence[Result], speed: dict[str, Any], constant: dict[str, float], names: Sequence[str]
) -> dict[str, Any]:
    """Write all files; returns what results.json holds.

    Args:
        speed: of `read_speed`.
        constant: of `constant_accuracy`.
        names: of the connectors, in the order of the table.
    """
    results = {
        "connectors": {name: _summary([run for run in runs if run.connector == name], speed) for name in names},
        "constant_answer": constant,
        "machine": speed.get("machine"),
        "runs": [asdict(run) for run in runs],
    }
    write_text(directory / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(directory / TABLE, table(results, _ENGLISH, {}))
    write_text(directory / TABLE_ZH, table(results, _CHINESE, _SKILLS_ZH))
    draw_accuracy(results, directory / PLOT)
    return results


def _summary(runs: Sequence[Result], speed: dict[str, Any]) -> dict[str, Any]:
    """One connector: its numbers, those that vary over seeds as {"mean", "standard_error", "count"}."""
    finished = [run for run in runs if run.scores]
    skills = list(finished[0].scores) if finished else []
    milliseconds = speed.get("milliseconds", {}).get(runs[0].connector) if runs else None
    return {
        "tokens_per_image": finished[0].tokens_per_image if finished else None,
        "parameters": finished[0].parameters if finished else None,
        "accuracy": {skill: _statistics([run.scores[skill]["both"] for run in finished]) for skill in skills},
        "loss": _statistics([run.loss for run in finished if run.loss is not None]),
        "samples_per_second": _statistics([run.samples_per_second for run in finished if run.samples_per_second]),
        "ttft_ms": median(milliseconds) if milliseconds else None,
        "num_diverged": len(runs) - len(finished),
    }


def _statistics(values: Sequence[float]) -> dict[str, Any] | None:
    """The standard error is None of a single value."""
    if not values:
        return None
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "standard_error": error, "count": len(values)}


def table(results: dict[str, Any], texts: dict[str, str], skill_names: dict[str, str]) -> str:
    """Markdown: a row per connector, the last one of a constant answer; below it what the numbers are."""
    summaries = {name: row for name, row in results["connectors"].items() if row["accuracy"] or row["num_diverged"]}
    skills = sorted(results["constant_answer"], key=lambda skill: (skill == ALL, skill))
    before, after = ("tokens_per_image", "parameters"), ("loss", "samples_per_second", "ttft_ms")
    headings = [texts["connector"], *(texts[key] for key in before)]
    headings += [skill_names.get(skill, skill) for skill in skills] + [texts[key] for key in after]
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    for name, row in summaries.items():
        cells = [name, _whole(row["tokens_per_image"]), _whole(row["parameters"])]
        cells += [_spread(row["accuracy"].get(skill), 1, 100) for skill in skills]
        cells += [_spread(row["loss"], 3), _spread(row["samples_per_second"], 1)]
        cells.append("–" if row["ttft_ms"] is None else f"{row['ttft_ms']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    constant = [f"{100 * results['constant_answer'][skill]:.1f}" for skill in skills]
    lines.append(f"| {' | '.join([texts['constant'], '', '', *constant, '', '', ''])} |")
    lines += ["", texts["below"].format(**_counts(results))]
    lines += [
        texts["diverged"].format(name=name, count=row["num_diverged"])
        for name, row in summaries.items()
        if row["num_diverged"]
    ]
    return "\n".join(lines) + "\n"


def _counts(results: dict[str, Any]) -> dict[str, str]:
    """Seeds and questions per skill, as in `2-3` where they differ."""
    finished = [run for run in results["runs"] if run["scores"]]
    seeds = [row["accuracy"][ALL]["count"] for row in results["connectors"].values() if row["accuracy"]]
    questions = [score["count"] for run in finished for skill, score in run["scores"].items() if skill != ALL]
    shown = {"machine": results["machine"] or "–"}
    for key, numbers in (("seeds", seeds), ("questions", questions)):
        shown[key] = "-".join(dict.fromkeys(str(number) for number in (min(numbers), max(numbers)))) if numbers else "0"
    return shown


def _whole(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _spread(statistics: dict[str, Any] | None, digits: int, factor: float = 1.0) -> str:
    if statistics is None:
        return "–"
    mean, error = statistics["mean"], statistics["standard_error"]
    shown = f"{factor * mean:.{digits}f}"
    return shown if error is None else f"{shown} ± {factor * error:.{digits}f}"
