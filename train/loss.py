"""The loss of a micro-batch: cross entropy summed over its supervised tokens.

B samples, S tokens, T tokens when packed, N images, D language width, K supervised tokens, V vocabulary.
Called by loop.py; calls packing.py, cpu.py and yi_vl's model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yi_vl.model import YiVLForConditionalGeneration

from .attention.cpu import PACKED, GroupedPacking, round_up
from .attention.packing import VARLEN, Packing
from .data.loader import IGNORE

_CPU_TOKENS = 64  # K is rounded up to a multiple of this on a CPU; see cpu.py
# By how the language model attends; with any other attention rows stay padded.
_PACKINGS: dict[str, type[Packing]] = {PACKED: GroupedPacking, VARLEN: Packing}


class Objective(nn.Module):
    """A model and its loss as one module, so that whatever wraps modules for many devices wraps both."""

    def __init__(self, model: YiVLForConditionalGeneration, num_sources: int) -> None:
        super().__init__()
        self.model = model
        self._num_sources = num_sources
        present = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = [name for name in model._no_split_modules if name in present]  # what FSDP spreads by
        attention = model.model.language_model.config._attn_implementation
        self._packing = _PACKINGS.get(attention)
        self._multiple = _CPU_TOKENS if attention == PACKED else 1

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None,
        sources: Tensor,
        prefix: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and detached (num_sources, 2): each source's summed loss and supervised tokens.

        Rows are padded on the right, so causal attention alone keeps padding out and no mask is needed. Packed, there
        is no padding; on a CPU the `prefix` that all rows share runs once, as nothing in it differs between them.
        """
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, S): what each token is to predict
        rows = sources.unsqueeze(1).expand_as(targets)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self._packing is not None:
            packing = self._packing.of(attention_mask, prefix)
            inputs = packing.inputs(input_ids)
            targets, rows = packing.take(targets, IGNORE), packing.take(rows, 0)  # (1, T)
        hidden = self.model.model(pixel_values=pixel_values, use_cache=False, **inputs).last_hidden_state  # (1, T, D)
        wanted = (targets != IGNORE).flatten().nonzero().squeeze(1)  # (K,)
        num_pads = round_up(len(wanted), self._multiple) - len(wanted)
        hidden = hidden.flatten(0, 1).index_select(0, F.pad(wanted, (0, num_pads)))  # (K, D)
        logits = self.model.lm_head(hidden)[: len(wanted)]  # (K, V)
        losses = F.cross_entropy(logits.float(), targets.flatten()[wanted], reduction="none")  # (K,)
        with torch.no_grad():
            per_source = torch.stack([losses, torch.ones_like(losses)], dim=1)  # (K, 2)
            per_source = per_source.new_zeros(self._num_sources, 2).index_add_(0, rows.flatten()[wanted], per_source)
        return losses.sum(), per_source
