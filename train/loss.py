"""The loss of a micro-batch: cross entropy summed over its supervised tokens.

B samples, S tokens, T tokens when packed, N images, D language width, K supervised tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from yi_vl.model import YiVLForConditionalGeneration

from .attention.cpu import PACKED, GroupedPacking, round_up
from .attention.packing import VARLEN, Packing
from .data.loader import IGNORE
from .neftune import noise_scale, noisy_embeddings

_CPU_TOKENS = 64  # K is rounded up to a multiple of this on a CPU; see attention/cpu.py
# By attention implementation; rows stay padded with any other.
_PACKINGS: dict[str, type[Packing]] = {PACKED: GroupedPacking, VARLEN: Packing}


class Objective(nn.Module):
    """A model and its loss as one module, so that DDP and FSDP wrap both.

    Args:
        neftune: the noise of neftune.py in training mode; None: no noise.
    """

    def __init__(self, model: YiVLForConditionalGeneration, num_sources: int, neftune: float | None = None) -> None:
        super().__init__()
        self.model = model
        self._neftune = neftune
        self._num_sources = num_sources
        present = {type(module).__name__ for module in model.modules()}
        self._no_split_modules = [name for name in model._no_split_modules if name in present]  # FSDP shards by these
        attention = model.model.language_model.config._attn_implementation
        self._packing = _PACKINGS.get(attention)
        self._multiple = _CPU_TOKENS if attention == PACKED else 1

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None,
        source_ids: Tensor,
        shared_prefix_length: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and detached (num_sources, 2): each source's summed loss and supervised tokens.

        Rows are padded on the right, so causal attention ignores padding without a mask. Packed rows have no padding;
        on a CPU the first `shared_prefix_length` tokens, the same in all rows, are computed once.

        Args:
            input_ids, attention_mask, labels: (B, S), labels unshifted.
            pixel_values: (N, 3, H, W), or None.
            source_ids: (B,)
        """
        noise = self._noise_scale(input_ids, attention_mask)
        if noise is not None:
            shared_prefix_length = 0  # every row has noise of its own
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, S): the next token
        token_sources = source_ids.unsqueeze(1).expand_as(targets)  # (B, S)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if self._packing is not None:
            packing = self._packing.of(attention_mask, shared_prefix_length)
            inputs = packing.inputs(input_ids)
            targets, token_sources = packing.take(targets, IGNORE), packing.take(token_sources, 0)  # (1, T)
            noise = packing.take(noise, 0) if noise is not None else None
        unused_vision = self._zero_of_vision(input_ids.device) if pixel_values is None else None
        with noisy_embeddings(self.model.model.language_model, noise) if noise is not None else nullcontext():
            outputs = self.model.model(pixel_values=pixel_values, use_cache=False, **inputs)
        hidden = outputs.last_hidden_state  # (1, T, D)
        supervised = (targets != IGNORE).flatten().nonzero().squeeze(1)  # (K,)
        num_pads = round_up(len(supervised), self._multiple) - len(supervised)
        hidden = hidden.flatten(0, 1).index_select(0, F.pad(supervised, (0, num_pads)))  # (K, D)
        logits = self.model.lm_head(hidden)[: len(supervised)]  # (K, V)
        losses = F.cross_entropy(logits.float(), targets.flatten()[supervised], reduction="none")  # (K,)
        with torch.no_grad():
            per_source = torch.stack([losses, torch.ones_like(losses)], dim=1)  # (K, 2)
            per_source = per_source.new_zeros(self._num_sources, 2).index_add_(
                0, token_sources.flatten()[supervised], per_source
            )
        loss = losses.sum()
        return loss if unused_vision is None else loss + unused_vision, per_source

    def _noise_scale(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        if self._neftune is None or not self.training:
            return None
        config = self.model.config
        width = config.text_config.hidden_size
        return noise_scale(input_ids, attention_mask, config.image_token_id, width, self._neftune)

    def _zero_of_vision(self, device: torch.device) -> Tensor | None:
        """A zero that depends on every vision parameter, for a micro-batch without images.

        Under DDP and FSDP all ranks must take part in the exchange of the vision gradients and weights, or training
        hangs. None when the vision parameters are neither trained nor sharded.
        """
        model = self.model.model
        parameters = chain(model.vision_tower.parameters(), model.multi_modal_projector.parameters())
        if not any(parameter.requires_grad or isinstance(parameter, DTensor) for parameter in parameters):
            return None
        size_px = model.config.vision_config.image_size
        features = model.encode_images(torch.zeros(1, 3, size_px, size_px, device=device))  # (1, P, D)
        return (features * 0.0).sum()  # multiplied first: a sum may overflow
