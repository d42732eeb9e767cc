"""The loss of a micro-batch: cross entropy summed over its supervised tokens.

B samples, S tokens, p tokens of common prefix, N images, D language width, K supervised tokens, V vocabulary.
Called by loop.py; calls yi_vl's model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from yi_vl.model import YiVLForConditionalGeneration

from .data import IGNORE


class Objective(nn.Module):
    """A model and its loss as one module, so that whatever wraps modules for many devices wraps both."""

    def __init__(self, model: YiVLForConditionalGeneration, num_sources: int) -> None:
        super().__init__()
        self.model = model
        self._num_sources = num_sources

    def forward(
        self, input_ids: Tensor, labels: Tensor, pixel_values: Tensor | None, sources: Tensor, prefix: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and detached (num_sources, 2): each source's summed loss and supervised tokens.

        Rows are padded on the right, so causal attention alone keeps padding out and no mask is needed. The `prefix` that
        all rows share depends on nothing that differs between them: it runs once, and every row attends to it.
        """
        cache = None
        if prefix:
            cache = DynamicCache(config=self.model.config.text_config)
            self.model.model.language_model(input_ids=input_ids[:1, :prefix], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(input_ids.shape[0])
        hidden = self.model.model(
            input_ids=input_ids[:, prefix:],
            pixel_values=pixel_values,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state  # (B, S - p, D)
        targets = labels[:, prefix + 1 :]  # (B, S - p - 1)
        is_supervised = targets != IGNORE
        logits = self.model.lm_head(hidden[:, :-1][is_supervised])  # (K, V)
        losses = F.cross_entropy(logits.float(), targets[is_supervised], reduction="none")  # (K,)
        rows = sources.unsqueeze(1).expand_as(targets)[is_supervised]  # (K,)
        with torch.no_grad():
            per_source = torch.stack([losses, torch.ones_like(losses)], dim=1)  # (K, 2)
            per_source = per_source.new_zeros(self._num_sources, 2).index_add_(0, rows, per_source)
        return losses.sum(), per_source
