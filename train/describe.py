"""Lines about what changes over a run, for the start-up table and train.plan."""

from __future__ import annotations

from .config import DPO, ScheduleConfig, TrainConfig, batch_sizes, num_steps
from .schedule import (
    COMPONENTS,
    CONSTANT,
    WSD,
    component_schedule,
    num_decay_steps,
    num_warmup_steps,
    source_weights,
)


def schedule_lines(config: TrainConfig) -> list[str]:
    """The learning rate of the trained components, and the sources' fractions if they change."""
    steps = num_steps(config)
    by_text: dict[str, list[str]] = {}
    for component in COMPONENTS:
        if getattr(config.trainable, component) is not False:
            text = describe_schedule(component_schedule(config.schedule, component), steps)
            by_text.setdefault(text, []).append(component)
    lines = [f"learning rate{_of(names, len(by_text) > 1)}: {text}" for text, names in by_text.items()]
    return [*lines, *([line] if (line := describe_sources(config)) else [])]


def describe_schedule(schedule: ScheduleConfig, steps: int) -> str:
    """As in `18 steps of warm-up, constant, linear to 0 in the last 60 steps`."""
    warmup, decay = num_warmup_steps(schedule, steps), num_decay_steps(schedule, steps)
    parts = [f"{warmup:,} steps of warm-up"] if warmup else []
    if schedule.shape in (CONSTANT, WSD):
        parts.append("constant")
    if schedule.shape == WSD:
        parts.append(f"linear to {schedule.final:g} in the last {decay:,} steps")
    elif schedule.shape != CONSTANT:
        parts.append(f"{schedule.shape} to {schedule.final:g}")
    return ", ".join(parts)


def describe_batches(config: TrainConfig) -> str:
    """As in `600 steps of 32 samples`, or `600 steps: 200 of 32 samples, 400 of 64`; preferences are pairs."""
    samples = "pairs" if config.objective == DPO else "samples"
    steps, sizes = num_steps(config), batch_sizes(config)
    (first_steps, first_size), *others = sizes.stretches(steps)
    unreached = [f"{start:,}" for start, _ in sizes.ramp if start >= steps]
    note = f" (batch_ramp: step {', '.join(unreached)} is after the end)" if unreached else ""
    if not others:
        return f"{steps:,} steps of {first_size:,} {samples}{note}"
    rest = "".join(f", {count:,} of {size:,}" for count, size in others)
    return f"{steps:,} steps: {first_steps:,} of {first_size:,} {samples}{rest}{note}"


def describe_sources(config: TrainConfig) -> str | None:
    """The fractions of the sources at the first and the last step; None if they do not change."""
    sources = config.data.sources
    if not any(isinstance(source.weight, list) for source in sources):
        return None
    start, end = (source_weights([source.weights for source in sources], progress) for progress in (0, 1))
    pairs = zip(sources, start / start.sum(), end / end.sum())
    return "sources: " + ", ".join(f"{source.name} {before:.1%} to {after:.1%}" for source, before, after in pairs)


def _of(names: list[str], is_needed: bool) -> str:
    return f" of {', '.join(names)}" if is_needed else ""
