"""Sampling options. No torch here: a wrong option is refused before it is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..arguments import as_float, as_int, as_text, shown

if TYPE_CHECKING:
    import torch

_MAX_STOPS = 1000


@dataclass(frozen=True)
class Sampling:
    """Generation options. None stands for a default; numbers may be numpy scalars.

    Args:
        max_new_tokens: at most so many, and no more than the context has room for.
        temperature: 0 is greedy decoding.
        top_p: sample only from the most probable tokens that add up to this probability.
        seed: of every request's own generator, whatever its batch; None takes a random one.
        stop: strings that end an answer and are not part of it, besides what ends one in the model's chat format: one,
            or an iterable of at most 1000, which is consumed once.

    Raises:
        ValueError: a value is of another type, or out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[Any], Any]] = {
            "max_new_tokens": lambda value: as_int(value, "max_new_tokens", 1),
            "temperature": lambda value: as_float(value, "temperature"),
            "top_p": lambda value: as_float(value, "top_p"),
            "seed": lambda value: as_int(value, "seed", 0, 2**63 - 1),
            "stop": _as_stops,
        }
        for field in fields(self):
            value = getattr(self, field.name)
            value = field.default if value is None else checks[field.name](value)
            object.__setattr__(self, field.name, value)  # the class is frozen
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be greater than 0 and at most 1.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def new_generator(self) -> torch.Generator | None:
        """A request's own random generator, so that requests in other slots change nothing; None if it is greedy."""
        if self.is_greedy:
            return None
        import torch

        generator = torch.Generator("cpu")  # on the CPU, for the same draws on every device
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def _as_stops(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = [stop]
    is_list = isinstance(stop, Iterable) and getattr(stop, "ndim", 1) == 1  # an array of none iterates over nothing
    if not is_list or isinstance(stop, (bytes, bytearray, Mapping)):
        raise ValueError(f"stop is {shown(stop)}; expected a text, or a list of texts.")
    texts = tuple(as_text(text, f"stop[{index}]") for index, text in enumerate(islice(stop, _MAX_STOPS + 1)))
    if len(texts) > _MAX_STOPS:
        raise ValueError(f"stop holds more than {_MAX_STOPS} texts; give fewer.")
    if not all(texts):
        raise ValueError(f"stop is {shown(list(texts))}; a text that ends an answer must not be empty.")
    return texts
