"""The table of `python -m eval gpu`, to be read and to be pasted."""

from __future__ import annotations

from collections.abc import Mapping

from .guard import Measured, Outcome, Settings


def markdown(settings: Settings, seconds: float, outcomes: Mapping[str, Outcome]) -> str:
    """What was measured, a row each; facts of the machine above it, what failed or was skipped below."""
    environment = outcomes.get("environment", Outcome("skipped"))
    facts = ", ".join(
        value if name == "machine" else f"{name} {value}"
        for name, value in ((item.name, item.value) for item in environment.measured)
        if isinstance(value, str) and value != "not installed"
    )
    counts = ", ".join(
        f"{sum(outcome.status == status for outcome in outcomes.values())} {status}"
        for status in ("ok", "failed", "skipped")
    )
    lines = [
        f"`python -m eval gpu --device {settings.device} --size {settings.size}`, {seconds:.0f} s: {counts}.",
        *(["", f"{facts}."] if facts else []),
        "",
        "| part | what | measured | beside | share |",
        "|---|---|---:|---|---:|",
    ]
    for name, outcome in outcomes.items():
        rows = [item for item in outcome.measured if name != "environment" or not isinstance(item.value, str)]
        lines += [_row(name, item) for item in rows]
    missing = [f"- {name}: {outcome.status}: {outcome.reason}" for name, outcome in outcomes.items() if outcome.reason]
    return "\n".join([*lines, *(["", *missing] if missing else [])]) + "\n"


def _row(part: str, measured: Measured) -> str:
    beside = share = ""
    if measured.limit is not None and isinstance(measured.value, float):
        beside = f"{_number(measured.limit)} {measured.unit}".strip() + f", {measured.limit_name}"
        share = f"{measured.value / measured.limit:.1%}" if measured.limit else ""
    value = measured.value if isinstance(measured.value, str) else f"{_number(measured.value)} {measured.unit}".strip()
    return f"| {part} | {_cell(measured.name)} | {_cell(value)} | {_cell(beside)} | {share} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def status_line(name: str, outcome: Outcome) -> str:
    """A part's end, for people who wait."""
    return f"{name:<30}{outcome.status:<9}{outcome.seconds:6.1f} s  {outcome.reason}".rstrip()
