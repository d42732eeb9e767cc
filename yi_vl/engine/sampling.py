"""Sampling options, and the sampler that takes the next token of each request from its logits.

B requests in the batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..arguments import as_float, as_int, as_text, shown
from ..chat import STOP_STRING

_MAX_STOPS = 1000
_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-30, 1e30  # beyond float32 a temperature would be 0 or infinite


@dataclass(frozen=True)
class Sampling:
    """Generation options. None stands for a default; numbers may be numpy scalars.

    Args:
        max_new_tokens: at most so many, and no more than the context has room for.
        temperature: 0 is greedy decoding.
        top_p: sample only from the most probable tokens that add up to this probability.
        seed: of every request's own generator, whatever its batch; None takes a random one.
        stop: strings that end an answer and are not part of it, besides the prompt's own separator: one, or an iterable
            of at most 1000, which is consumed once.

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
    def stop_strings(self) -> tuple[str, ...]:
        """All texts that end an answer."""
        return (STOP_STRING, *self.stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def new_generator(self) -> torch.Generator | None:
        """A request's own random generator, so that requests in other slots change nothing; None if it is greedy."""
        if self.is_greedy:
            return None
        generator = torch.Generator("cpu")  # on the CPU, for the same draws on every device
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


class Sampler:
    """Takes each request's next token from its logits.

    Args:
        suppress_tokens: (V,) bool, true for tokens that are never generated.
    """

    def __init__(self, suppress_tokens: Tensor) -> None:
        self._suppress_tokens = suppress_tokens

    def greedy(self, logits: Tensor) -> Tensor:
        """(..., V) -> (...)"""
        return self._suppressed(logits).argmax(-1)

    def _suppressed(self, logits: Tensor) -> Tensor:
        return logits.float().masked_fill(self._suppress_tokens.to(logits.device), -math.inf)

    def __call__(
        self, logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
    ) -> Tensor:
        """(B, V) -> (B,), each with its own options, and sampled with its own generator."""
        logits = self._suppressed(logits)
        tokens = logits.argmax(-1)
        rows_of: dict[tuple[float, float], list[int]] = {}
        for row, sampling in enumerate(samplings):
            if not sampling.is_greedy:
                rows_of.setdefault((sampling.temperature, sampling.top_p), []).append(row)
        for (temperature, top_p), rows in rows_of.items():
            probabilities = _probabilities(logits[rows], temperature, top_p).cpu()
            sampled = [
                torch.multinomial(of_row, 1, generator=generators[row])
                for row, of_row in zip(rows, probabilities, strict=True)
            ]
            tokens[rows] = torch.cat(sampled).to(tokens.device)
        return tokens


def _probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """(B, V) -> (B, V)"""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(min(max(temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE))])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    logits = logits - logits.amax(-1, keepdim=True)  # a tiny temperature would overflow otherwise
    return warpers(None, logits).softmax(-1)  # type: ignore[arg-type]  # none of them looks at the ids


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
