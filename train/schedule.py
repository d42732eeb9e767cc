"""What changes over a run: learning rates, batch size and sampling weights, each a pure function of the step.

A step is numbered by the steps done before it: from 0 to num_steps - 1. Nothing here has a state, so a resumed run
continues exactly, and data workers know the size of a step that they make ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .config import ScheduleConfig

COMPONENTS = ("vision", "projector", "language")
COSINE, LINEAR, CONSTANT, WSD = SHAPES = ("cosine", "linear", "constant", "wsd")


def component_schedule(schedule: ScheduleConfig, component: str) -> ScheduleConfig:
    """The run's schedule with what differs for one of `COMPONENTS`."""
    changes = getattr(schedule, component)
    values = {field.name: getattr(changes, field.name) for field in fields(changes)}
    return replace(schedule, **{name: value for name, value in values.items() if value is not None})


def num_warmup_steps(schedule: ScheduleConfig, num_steps: int) -> int:
    """Steps of linear warm-up: `warmup` is a fraction of the steps below 1, else their number."""
    return int(num_steps * schedule.warmup if schedule.warmup < 1 else schedule.warmup)


def num_decay_steps(schedule: ScheduleConfig, num_steps: int) -> int:
    """The last steps, over which the rate falls to `final`: all after warm-up, except for `wsd` and `constant`."""
    if schedule.shape == CONSTANT:
        return 0
    if schedule.shape == WSD:
        return round(num_steps * schedule.decay_fraction)
    return num_steps - num_warmup_steps(schedule, num_steps)


def learning_rate_factor(step: int, num_steps: int, schedule: ScheduleConfig) -> float:
    """The factor on the peak learning rate: 1 at the last step of warm-up, `final` after the last step of the run."""
    num_warmup = num_warmup_steps(schedule, num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    num_decay = num_decay_steps(schedule, num_steps)
    num_decayed = step - (num_steps - num_decay)
    if num_decayed <= 0:
        return 1.0
    progress = num_decayed / num_decay
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.shape == COSINE else 1 - progress
    return schedule.final + (1 - schedule.final) * remaining


@dataclass(frozen=True)
class BatchSizes:
    """The samples of each step.

    Args:
        first: of the steps before the first entry of `ramp`.
        ramp: (step, size): from that step on. Steps are positive and increase.
    """

    first: int
    ramp: tuple[tuple[int, int], ...] = ()

    def size(self, step: int) -> int:
        """The samples of a step."""
        return next((size for start, size in reversed(self.ramp) if step >= start), self.first)

    def stretches(self, num_steps: int) -> Iterator[tuple[int, int]]:
        """(number of steps, their size) of each stretch of equal steps, up to the end of the run."""
        start, size = 0, self.first
        for next_start, next_size in (*self.ramp, (num_steps, 0)):
            if (end := min(next_start, num_steps)) > start:
                yield end - start, size
            start, size = end, next_size

    def num_samples(self, num_steps: int) -> int:
        """Samples of the first `num_steps` steps."""
        return sum(steps * size for steps, size in self.stretches(num_steps))

    def num_steps(self, num_samples: int) -> int:
        """Whole steps that so many samples suffice for."""
        start, size = 0, self.first
        for next_start, next_size in self.ramp:
            num_needed = (next_start - start) * size
            if num_needed > num_samples:
                break
            num_samples -= num_needed
            start, size = next_start, next_size
        return start + num_samples // size

    def split(self, num_parts: int, parts: str) -> BatchSizes:
        """The sizes on one of so many ranks or GPUs, as `parts` calls them.

        Raises:
            ValueError: one of the sizes cannot be divided.
        """
        for key, size in (("global_batch", self.first), *(("batch_ramp:", size) for _, size in self.ramp)):
            if size % num_parts:
                raise ValueError(f"{key} {size} does not divide by {num_parts} {parts}.")
        ramp = tuple((start, size // num_parts) for start, size in self.ramp)
        return BatchSizes(self.first // num_parts, ramp)


def run_progress(step: int, num_steps: int) -> float:
    """0 at the first step of the run, 1 at its last and after it."""
    return min(1.0, step / max(1, num_steps - 1))


def source_weights(weights: Sequence[tuple[float, float]], progress: float) -> NDArray[np.float64]:
    """(num_sources,) Weights that go linearly from the first number of each pair to the second.

    Args:
        progress: from 0 to 1; see `run_progress`.
    """
    import numpy as np  # which a command line's --help does without

    start, end = np.array(weights, dtype=np.float64).T
    return np.asarray(start + (end - start) * progress)


def mean_fractions(weights: Sequence[tuple[float, float]], sizes: BatchSizes, num_steps: int) -> NDArray[np.float64]:
    """(num_sources,) Fractions of the samples of a whole run, from at most 1,000 of its steps."""
    import numpy as np

    steps = np.linspace(0, num_steps - 1, min(num_steps, 1000)).round().astype(int).tolist()
    at_steps = np.array([source_weights(weights, run_progress(step, num_steps)) for step in steps])
    fractions = at_steps / at_steps.sum(1, keepdims=True)
    return np.asarray(np.average(fractions, axis=0, weights=[sizes.size(step) for step in steps]))
