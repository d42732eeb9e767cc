"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), eq. 7: the loss of pairs of answers.

The loss of a pair is -log sigmoid(chosen reward - rejected reward). The reward of an answer y to x is
beta (log p(y | x) - log p_ref(y | x)), where p_ref is the model that the run starts from.

P pairs of a micro-batch, which are 2P rows, S tokens, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from yi_vl.model import YiVLForConditionalGeneration

from .config import DpoConfig
from .data.batch import IGNORE
from .loss import Objective, Predictions

ReferenceContext = Callable[[], AbstractContextManager[YiVLForConditionalGeneration]]


class PreferenceObjective(Objective):
    """A model and its DPO loss, whose terms are pairs.

    Args:
        reference: gives the reference model while its context lasts; None: `forward` is given its log-probabilities.
    """

    metrics_name = "preference"
    metric_names = ("accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")

    def __init__(
        self,
        model: YiVLForConditionalGeneration,
        num_sources: int,
        config: DpoConfig,
        reference: ReferenceContext | None = None,
    ) -> None:
        super().__init__(model, num_sources)
        self._config = config
        self._reference = reference

    def forward(  # type: ignore[override]
        self,
        labels: Tensor,
        source_ids: Tensor,
        references: Sequence[tuple[float, float]] | None = None,
        router_weight: float = 0.0,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and detached (num_sources, 2 + M): each source's summed loss, pairs and metrics.

        Args:
            labels: (2P, S), rows 2i chosen and 2i + 1 rejected, supervised in the last answer.
            source_ids: (2P,)
            references: log-probabilities of the chosen and the rejected answers under the reference, of each pair; not
                a tensor, which FSDP would round to the weights' dtype.
            router_weight: as of `Objective`.
            inputs: the other arguments of `predictions`, with (2P, S) tensors.
        """
        # The policy first: autocast caches weights that it casts, and those cast without gradients have none.
        predictions = self.predictions(self.model, labels=labels, **inputs)
        policy = self._of_answers(predictions, labels)  # (P, 2)
        if references is not None:
            reference = torch.tensor(references, device=policy.device)  # (P, 2)
        else:
            assert self._reference is not None
            with torch.no_grad(), self._reference() as model:
                reference = self.answer_log_probabilities(model, labels, **inputs)
        num_tokens = (labels[:, 1:] != IGNORE).sum(1).view(-1, 2)  # (P, 2)
        losses, rewards = preference_losses(policy, reference, num_tokens, self._config)
        margins = rewards[:, 0] - rewards[:, 1]
        metrics = [(margins > 0).float(), margins, *rewards.unbind(1), *policy.unbind(1)]
        loss = losses.sum() + self.added_loss(predictions, router_weight)
        return loss, self.sum_by_source(losses, source_ids[::2], metrics)

    def answer_log_probabilities(self, model: YiVLForConditionalGeneration, labels: Tensor, **inputs: Any) -> Tensor:
        """Log-probabilities of the supervised tokens of each row, summed: (P, 2) of chosen and rejected answers."""
        return self._of_answers(self.predictions(model, labels=labels, **inputs), labels)

    def _of_answers(self, predictions: Predictions, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(predictions.logits, predictions.targets, reduction="none")
        by_token = losses.new_zeros(labels.numel()).index_copy(0, predictions.tokens, -losses)  # none is there twice
        return by_token.view(-1, 2, labels.shape[1]).sum(2)


def preference_losses(
    policy: Tensor, reference: Tensor, num_tokens: Tensor, config: DpoConfig
) -> tuple[Tensor, Tensor]:
    """The losses of some pairs, (P,), and the rewards of their answers, (P, 2).

    Args:
        policy, reference: (P, 2), log-probabilities of the chosen and the rejected answers.
        num_tokens: (P, 2), of the answers.
    """
    rewards = config.beta * (policy - reference)
    if config.length_normalized:
        rewards = rewards / num_tokens
    margins = rewards[:, 0] - rewards[:, 1]
    losses = -(1 - config.label_smoothing) * F.logsigmoid(margins) - config.label_smoothing * F.logsigmoid(-margins)
    if config.sft_weight:
        losses = losses - config.sft_weight * policy[:, 0] / num_tokens[:, 0]
    return losses, rewards
