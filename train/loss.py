"""The loss of a micro-batch: cross entropy summed over its supervised tokens; dpo.py: over pairs of answers.

B rows, S tokens, T tokens when packed, N images, D language width, K supervised tokens, V vocabulary, M metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from yi_vl.decoder.experts import RouterSums
from yi_vl.decoder.losses import router_losses
from yi_vl.model import YiVLForConditionalGeneration

from .attention.cpu import PACKED, GroupedPacking, round_up
from .attention.packing import VARLEN, Packing
from .data.batch import IGNORE
from .experts import has_experts, layer_sums, trains_routers
from .neftune import noise_scale, noisy_embeddings
from .optim import component_parameters

_CPU_TOKENS = 64  # K is rounded up to a multiple of this on a CPU; see attention/cpu.py
# By attention implementation; rows stay padded with any other.
_PACKINGS: dict[str, type[Packing]] = {PACKED: GroupedPacking, VARLEN: Packing}


class Predictions(NamedTuple):
    """Of the supervised tokens of a micro-batch."""

    logits: Tensor  # (K, V) float32
    targets: Tensor  # (K,)
    tokens: Tensor  # (K,) the index of each among the B*S tokens
    router_sums: tuple[RouterSums, ...] | None  # of experts in training mode
    unused_vision: Tensor | None  # a zero that depends on every vision parameter, without images


class Objective(nn.Module):
    """A model and its loss as one module, so that DDP and FSDP wrap both.

    Args:
        neftune: the noise of neftune.py in training mode; None: no noise.

    Attributes:
        metrics_name: of the metrics in metrics.jsonl.
        metric_names: what `forward` sums besides the loss and its terms.
    """

    metrics_name = ""
    metric_names: tuple[str, ...] = ()

    def __init__(self, model: YiVLForConditionalGeneration, num_sources: int, neftune: float | None = None) -> None:
        super().__init__()
        self.model = model
        self._neftune = neftune
        self._num_sources = num_sources
        self._trains_routers = trains_routers(model)
        self._expert_sums: Tensor | None = None  # (L, 3 + E)
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
        router_weight: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and detached (num_sources, 2 + M): each source's summed loss, terms and metrics.

        The terms are supervised tokens, which the trainer normalizes the loss of a step by.

        Args:
            input_ids, attention_mask, labels: (B, S), labels unshifted.
            pixel_values: (N, 3, H, W), or None.
            source_ids: (B,)
            router_weight: of the auxiliary loss of experts, which is a mean, in the summed loss.
        """
        predictions = self.predictions(
            self.model, input_ids, attention_mask, labels, pixel_values, shared_prefix_length
        )
        losses, metrics = self.token_losses(
            predictions, input_ids, attention_mask, labels, pixel_values, shared_prefix_length
        )
        per_source = self.sum_by_source(losses, source_ids[predictions.tokens // input_ids.shape[1]], metrics)
        return losses.sum() + self.added_loss(predictions, router_weight), per_source

    def predictions(
        self,
        model: YiVLForConditionalGeneration,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None,
        shared_prefix_length: int = 0,
        image_index: list[int] | None = None,
    ) -> Predictions:
        """The logits of the supervised tokens.

        Rows are padded on the right, so causal attention ignores padding without a mask. Packed rows have no padding;
        on a CPU the first `shared_prefix_length` tokens, the same in all rows, are computed once.

        Args:
            model: this objective's, or another with the same attention and image tokens.
            image_index: for each <image> in the rows its image among the N; None: each image is there once, in order.
        """
        is_own = model is self.model
        noise = self._noise_scale(input_ids, attention_mask) if is_own else None
        if noise is not None:
            shared_prefix_length = 0  # every row has noise of its own
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, S): the next token
        tokens = torch.arange(targets.numel(), device=targets.device).view_as(targets)  # (B, S)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        token_mask = attention_mask
        if self._packing is not None:
            packing = self._packing.of(attention_mask, shared_prefix_length)
            inputs = packing.inputs(input_ids)
            targets, tokens = packing.take(targets, IGNORE), packing.take(tokens, 0)  # (1, T)
            noise = packing.take(noise, 0) if noise is not None else None
            token_mask = packing.num_rows(attention_mask)
        if has_experts(model.config.text_config):
            inputs["token_mask"] = token_mask
        unused = self._unused_features(input_ids.device) if is_own and pixel_values is None else None
        if unused is not None and model.config.connector_config.is_cross_attention:
            inputs["unused_features"], unused = unused, None
        inputs |= _image_inputs(model, pixel_values, image_index)
        with noisy_embeddings(model.model.language_model, noise) if noise is not None else nullcontext():
            outputs = model.model(use_cache=False, **inputs)
        hidden = outputs.last_hidden_state.flatten(0, 1)  # (T, D)
        supervised = (targets != IGNORE).flatten().nonzero().squeeze(1)  # (K,)
        num_pads = round_up(len(supervised), self._multiple) - len(supervised)
        logits = model.lm_head(hidden.index_select(0, F.pad(supervised, (0, num_pads))))[: len(supervised)]  # (K, V)
        return Predictions(
            logits.float(), targets.flatten()[supervised], tokens.flatten()[supervised], outputs.router_sums,
            (unused * 0.0).sum() if unused is not None else None,  # multiplied first: a sum may overflow
        )  # fmt: skip

    def token_losses(self, predictions: Predictions, *_: Any) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss of each supervised token and its metrics, (K,) each; the inputs of the forward pass are unused."""
        return F.cross_entropy(predictions.logits, predictions.targets, reduction="none"), ()

    def added_loss(self, predictions: Predictions, router_weight: float) -> Tensor | float:
        """The experts' weighted auxiliary loss, if a router is trained, and unused vision; keeps the experts' sums."""
        unused = predictions.unused_vision if predictions.unused_vision is not None else 0.0
        if predictions.router_sums is None:
            return unused
        losses = router_losses(predictions.router_sums, self.model.config.text_config)  # (L,)
        sums = layer_sums(predictions.router_sums, losses)
        self._expert_sums = sums if self._expert_sums is None else self._expert_sums + sums
        return unused + router_weight * losses.mean() if self._trains_routers else unused

    def take_expert_sums(self) -> Tensor | None:
        """The sums over the forward passes since the last call, see `layer_sums`; None without experts."""
        sums, self._expert_sums = self._expert_sums, None
        return sums

    @torch.no_grad()
    def sum_by_source(self, losses: Tensor, source_ids: Tensor, metrics: Sequence[Tensor] = ()) -> Tensor:
        """Sums per source of the losses of some terms, of their number, and of their metrics.

        Args:
            losses, source_ids, metrics: (terms,) each.

        Returns:
            (num_sources, 2 + M)
        """
        values = torch.stack([losses, torch.ones_like(losses), *metrics], dim=1)  # (terms, 2 + M)
        return values.new_zeros(self._num_sources, values.shape[1]).index_add_(0, source_ids, values)

    def _noise_scale(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        if self._neftune is None or not self.training:
            return None
        config = self.model.config
        width = config.text_config.hidden_size
        return noise_scale(input_ids, attention_mask, config.image_token_id, width, self._neftune)

    def _unused_features(self, device: torch.device) -> Tensor | None:
        """Features of a blank image, (1, P, D), for a micro-batch without images.

        Under DDP and FSDP all ranks must take part in the exchange of the vision gradients and weights, or training
        hangs. None when the vision parameters are neither trained nor sharded.
        """
        of_component = component_parameters(self.model)
        parameters = chain(of_component["vision"], of_component["projector"])
        if not any(parameter.requires_grad or isinstance(parameter, DTensor) for parameter in parameters):
            return None
        size_px = self.model.config.vision_config.image_size
        return self.model.model.encode_images(torch.zeros(1, 3, size_px, size_px, device=device))


def _image_inputs(
    model: YiVLForConditionalGeneration, pixel_values: Tensor | None, image_index: list[int] | None
) -> dict[str, Any]:
    """The images as the model's arguments; those that several rows share are encoded once."""
    if pixel_values is None or image_index is None:
        return {"pixel_values": pixel_values}
    encoded = model.get_image_features(pixel_values)
    assert encoded.pooler_output is not None
    encoded.pooler_output = tuple(encoded.pooler_output[index] for index in image_index)  # type: ignore[assignment]
    return {"mm_encoder_outputs": {"image": encoded}}
