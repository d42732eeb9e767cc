"""Sampling: what options are refused, suppressed tokens, temperature, top_p and seeds."""

from __future__ import annotations

import math

import pytest
import torch

from yi_vl.engine.sampler import Sampler
from yi_vl.engine.sampling import Sampling

VOCABULARY = 960
NO_SUPPRESSED_TOKENS = torch.zeros(VOCABULARY, dtype=torch.bool)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Sampling(**options)  # type: ignore[arg-type]


def test_suppressed_tokens_are_never_sampled() -> None:
    suppress_tokens = NO_SUPPRESSED_TOKENS.clone()
    suppress_tokens[[3, 5]] = True
    logits = torch.zeros(2, VOCABULARY)
    logits[:, [3, 5]] = 50.0
    logits[:, 8] = 9.0
    sampler, hot = Sampler(suppress_tokens), Sampling(temperature=2.0)
    assert sampler(logits, [Sampling()] * 2, [None, None]).tolist() == [8, 8]
    generators = [hot.new_generator() for _ in range(2)]
    assert not {3, 5} & {token for _ in range(50) for token in sampler(logits, [hot] * 2, generators).tolist()}


def test_temperature_and_top_p_shape_the_samples() -> None:
    logits = torch.full((1, VOCABULARY), -20.0)
    logits[0, :3] = torch.tensor([2.0, 1.0, 0.0])

    def share_of_first(**options: float) -> float:
        sampling = Sampling(seed=0, **options)  # type: ignore[arg-type]
        sampler, generators = Sampler(NO_SUPPRESSED_TOKENS), [sampling.new_generator()]
        return sum(sampler(logits, [sampling], generators).item() == 0 for _ in range(300)) / 300

    assert share_of_first(temperature=1.0) == pytest.approx(0.665, abs=0.08)
    assert share_of_first(temperature=0.5) == pytest.approx(0.867, abs=0.08)
    assert share_of_first(temperature=1.0, top_p=0.5) == 1.0
    assert share_of_first(temperature=1e-42) == 1.0


def test_a_seed_repeats_its_samples_in_every_row_and_leaves_the_global_generator_alone() -> None:
    logits = torch.randn(20, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()

    def sample(seed: int | None, num_rows: int) -> torch.Tensor:
        sampling = Sampling(temperature=1.0, seed=seed)
        sampler, samplings = Sampler(NO_SUPPRESSED_TOKENS), [sampling] * num_rows
        generators = [sampling.new_generator() for _ in range(num_rows)]
        return torch.stack([sampler(step.expand(num_rows, -1), samplings, generators) for step in logits])

    alone = sample(1, 1)
    assert torch.equal(sample(1, 3), alone.expand(-1, 3))
    assert not torch.equal(sample(2, 1), alone)
    assert not torch.equal(sample(None, 1), sample(None, 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_row_is_sampled_with_its_own_options() -> None:
    logits = torch.randn(30, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    all_options = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.5, top_p=0.8, seed=1),
        Sampling(temperature=1.0, seed=2),
        Sampling(),
    ]

    def sample(*samplings: Sampling) -> torch.Tensor:
        sampler, generators = Sampler(NO_SUPPRESSED_TOKENS), [sampling.new_generator() for sampling in samplings]
        return torch.stack([sampler(step.expand(len(samplings), -1), samplings, generators) for step in logits])

    alone = torch.cat([sample(sampling) for sampling in all_options], dim=1)
    assert torch.equal(sample(*all_options), alone)
    assert len({tuple(column) for column in alone.T.tolist()}) == 4  # the greedy ones are equal
