"""The auxiliary losses and the metrics of experts, against values computed by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hybrid import hybrid_config, level_one
from processes import CONTEXT, finish, free_port
from torch import Tensor
from torch.nn import functional as F

from train.experts import expert_metrics, layer_sums
from train.metrics import flatten
from yi_vl.decoder.experts import RouterSums, router_sums
from yi_vl.decoder.losses import balance_loss, router_loss, router_losses

PROBABILITIES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
IDS = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1]])  # 2 is no expert, but a place that top-p leaves free


def sums_of(mask: Tensor | None = None, num_parts: int = 2, probabilities: Tensor = PROBABILITIES) -> RouterSums:
    return router_sums(
        probabilities, torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1]])[: len(probabilities)], mask, num_parts
    )


def test_losses_are_those_computed_by_hand() -> None:
    """f = (3/4, 1/4), P = (0.6, 0.4) of all; of the halves (1, 0), (0.75, 0.25) and (1/2, 1/2), (0.45, 0.55)."""
    probabilities = PROBABILITIES.clone().requires_grad_()
    sums = sums_of(probabilities=probabilities)
    whole, parts = 2 * (0.75 * 0.6 + 0.25 * 0.4), (2 * 0.75 + 2 * 0.5 * (0.45 + 0.55)) / 2
    entropy = -sum(p * math.log(p) for row in PROBABILITIES.tolist() for p in row) / 4
    config = hybrid_config(router_balance_weights=[0.2, 0.3, 0.5], router_entropy_weight=0.1)
    loss = router_loss([sums], config)
    assert loss.item() == pytest.approx(0.2 * whole + 0.3 * whole + 0.5 * parts + 0.1 * entropy)
    assert balance_loss(sums).item() == pytest.approx(parts)
    alone = hybrid_config(router_balance_weights=[0.0, 1.0, 0.0], router_entropy_weight=0.0)
    router_loss([sums], alone).backward()
    assert probabilities.grad is not None
    torch.testing.assert_close(probabilities.grad, torch.tensor([[2 * 0.75 / 4, 2 * 0.25 / 4]]).expand(4, 2))
    other = sums_of(probabilities=PROBABILITIES.flip(1))
    assert router_losses([sums, other], alone).tolist() == pytest.approx([whole, 2 * (0.75 * 0.6 + 0.25 * 0.4)])


def test_padding_does_not_count_and_a_token_may_stand_for_several() -> None:
    padded, ids = (torch.cat([x[:1], x[2:3], x[1:]]) for x in (PROBABILITIES, IDS))
    masked = router_sums(padded, ids, torch.tensor([[1, 0, 1, 1, 1]]), 2)
    for kept, expected in zip(masked, sums_of()):
        torch.testing.assert_close(kept, expected)
    assert masked.routed.sum(0).tolist() == [3, 3], "the place that top-p leaves free is no expert"
    twice = router_sums(*(torch.cat([x, x[:1]]) for x in (PROBABILITIES, IDS)), None, 1)
    for weighted, repeated in zip(sums_of(torch.tensor([[2, 1, 1, 1]]), num_parts=1), twice):
        torch.testing.assert_close(weighted, repeated)


def test_metrics_of_a_layer_are_those_computed_by_hand() -> None:
    """Expert 0 gets three tokens, expert 1 three, expert 2 none; one place of each of two tokens is free."""
    ids = torch.tensor([[0, 1], [0, 3], [1, 3], [0, 1]])
    sums = router_sums(F.pad(PROBABILITIES, (0, 1)), ids, None, 2)
    metrics = expert_metrics(2 * layer_sums([sums, sums], torch.tensor([0.5, 0.7])))
    assert metrics["experts_per_token"] == [1.5, 1.5] and metrics["unused_experts"] == [1, 1]
    assert metrics["max_load"] == pytest.approx([1.5, 1.5]) and metrics["auxiliary_loss"] == pytest.approx([0.5, 0.7])
    assert metrics["entropy"][0] == pytest.approx(sums.entropy.sum().item() / 4)
    assert flatten({"experts": metrics})["experts/auxiliary_loss/1"] == pytest.approx(0.7)


@pytest.mark.slow
def test_the_balance_over_ranks_is_that_of_all_tokens(tmp_path: Path) -> None:
    """On two ranks with other numbers of tokens; gradients averaged by tokens are those of one process."""
    port = free_port()
    ranks = [CONTEXT.Process(target=level_one, args=(rank, port, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert finish(ranks) == [0, 0]
    expected, gradient = level_one()
    for rank in range(2):
        loss, of_rank = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(of_rank, gradient)
