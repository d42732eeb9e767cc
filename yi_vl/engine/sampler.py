"""The sampler: takes the next token of each request from its logits.

B requests in the batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .sampling import Sampling

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-30, 1e30  # beyond float32 a temperature would be 0 or infinite


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
