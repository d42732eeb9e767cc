"""Whether the predicted best mixture is worth recommending, and the lines that use what is recommended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import yaml

from ..config import SourceConfig
from .regression import MIN_CORRELATION

KEEP_EQUAL = "keep equal shares"
_NUM_ERRORS = 2  # standard errors that a gain must exceed


@dataclass(frozen=True)
class Verdict:
    """
    gain: how much lower the mean loss of the best prediction is than that of equal shares, on the second held-out set.
    standard_error: of the gain; both None where it was not measured.
    """

    is_recommended: bool
    reason: str
    gain: float | None = None
    standard_error: float | None = None


def no_prediction(correlation: float | None, num_runs: int) -> Verdict | None:
    """The verdict where the regression gives no answer; None where it does."""
    if correlation is not None and correlation >= MIN_CORRELATION:
        return None
    shown = "not defined" if correlation is None else f"{correlation:.2f}"
    return Verdict(
        False,
        f"{KEEP_EQUAL}: the regression's leave-one-out rank correlation over {num_runs} runs is {shown}, below "
        f"{MIN_CORRELATION} (near -1 the mean predicts best), so it cannot tell mixtures apart. More runs, longer "
        "proxies or more held-out samples may help.",
    )


def judge(equal: Sequence[float | None], best: Sequence[float | None]) -> Verdict:
    """Compare losses on the second held-out set, of the same seeds in the same order; None is a run that diverged.

    The error is that of the mean difference of two runs with one seed: what the seed does to both is no doubt about the
    mixture.
    """
    if None in best:
        return Verdict(False, f"{KEEP_EQUAL}: a run of the predicted best mixture diverged.")
    if None in equal:
        return Verdict(False, f"{KEEP_EQUAL}: a run of equal shares diverged, so there is nothing to compare with.")
    before, after = ([loss for loss in losses if loss is not None] for losses in (equal, best))
    gains = [equal_loss - best_loss for equal_loss, best_loss in zip(before, after, strict=True)]
    gain, error = fmean(gains), stdev(gains) / math.sqrt(len(gains))
    numbers = (
        f"on the second held-out set its loss is {fmean(after):.4f}, that of equal shares {fmean(before):.4f}, "
        f"{'lower' if gain > 0 else 'higher'} by {abs(gain):.4f} seed by seed, with a standard error of {error:.4f}"
    )
    if gain > _NUM_ERRORS * error:
        return Verdict(True, f"take the predicted best mixture: {numbers}, more than two of them.", gain, error)
    doubt = "not more than two of them" if gain > 0 else "so it is no gain"
    return Verdict(False, f"{KEEP_EQUAL}: of the predicted best mixture, {numbers}, {doubt}.", gain, error)


def yaml_lines(sources: Sequence[SourceConfig], shares: dict[str, float], hyper: dict[str, Any]) -> str:
    """The settings of a training config that use a mixture.

    Args:
        hyper: by full key, as in lr.language.
    """
    settings: dict[str, Any] = {}
    for key, value in hyper.items():
        *parents, name = key.split(".")
        inner = settings
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    lines = [f"{key}: {_flow(value)}" for key, value in settings.items() if key != "data"]
    lines.append("data:")
    lines += [f"  {key}: {_flow(value)}" for key, value in settings.get("data", {}).items()]
    lines.append("  sources:")
    for source in sources:
        fields = {key: value for key, value in asdict(source).items() if value is not None}
        lines.append(f"    - {_flow(fields | {'weight': round(shares[source.name], 4)})}")
    return "\n".join(lines)


def _flow(value: Any) -> str:
    """YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return text.strip().removesuffix("\n...").strip()
