"""Distillation (Hinton et al. 2015, arXiv 1503.02531): a model learns the token distributions of a frozen teacher.

The loss of a supervised token is (1 - w) x cross entropy + w T^2 KL(teacher || model), with both models' logits divided
by the temperature T; T^2 keeps its gradient's size the same for any T. Held-out loss is the cross entropy alone.

B rows, S tokens, N images, K supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from yi_vl.config import YiVLConfig
from yi_vl.model import YiVLForConditionalGeneration

from .config import InitConfig, LoraConfig, TrainableConfig, TrainConfig
from .config_decoder import DistillConfig
from .loss import Objective, Predictions


class DistillObjective(Objective):
    """A model and its loss beside a teacher.

    Args:
        teacher: gives the frozen teacher, which is no part of this module: it is neither saved nor sharded.
    """

    metrics_name = "distillation"
    metric_names = ("cross_entropy", "kl")

    def __init__(
        self,
        model: YiVLForConditionalGeneration,
        num_sources: int,
        config: DistillConfig,
        teacher: Callable[[], YiVLForConditionalGeneration],
        neftune: float | None = None,
    ) -> None:
        super().__init__(model, num_sources, neftune)
        self._config = config
        self._teacher = teacher

    def token_losses(  # type: ignore[override]
        self,
        predictions: Predictions,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None,
        shared_prefix_length: int,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss of each supervised token, (K,), its cross entropy and its KL; in eval mode the cross entropy twice
        and 0."""
        entropies, _ = super().token_losses(predictions)
        if not self.training:
            return entropies, (entropies, torch.zeros_like(entropies))
        with torch.no_grad():
            teacher = self.predictions(
                self._teacher(), input_ids, attention_mask, labels, pixel_values, shared_prefix_length
            )
        divergences = kl_divergences(teacher.logits, predictions.logits, self._config.temperature)
        weight = self._config.weight
        losses = (1 - weight) * entropies + weight * self._config.temperature**2 * divergences
        return losses, (entropies, divergences)


def kl_divergences(teacher: Tensor, model: Tensor, temperature: float) -> Tensor:
    """KL(teacher || model) of each token, from logits: (K, V), (K, V) -> (K,)"""
    targets = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(F.log_softmax(model / temperature, dim=-1), targets, log_target=True, reduction="none").sum(-1)


def teacher_config(config: TrainConfig, teacher: str) -> TrainConfig:
    """The config of a run that starts from the teacher as it is, at the run's image size."""
    return replace(
        config, init_from=InitConfig(checkpoint=teacher), trainable=TrainableConfig(), lora=LoraConfig(),
        chat_format=None,
    )  # fmt: skip


def check_teacher(teacher: YiVLConfig, model: YiVLConfig, name: str) -> None:
    """
    Raises:
        ValueError: the teacher has other tokens than the model, or other places for an image.
    """
    for what, of_teacher, of_model in (
        ("tokens", teacher.text_config.vocab_size, model.text_config.vocab_size),
        ("as image token", teacher.image_token_id, model.image_token_id),
        ("tokens an image", teacher.num_image_tokens, model.num_image_tokens),
    ):
        if of_teacher != of_model:
            raise ValueError(
                f"distill.teacher {name} has {of_teacher} {what}, the model that learns {of_model}; take as teacher "
                "the model that it is made from."
            )
