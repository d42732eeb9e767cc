"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings of the text, during training only.

A row of L text tokens of width D gets noise from [-alpha, alpha] / sqrt(L D) on each of their L D numbers, so that its
norm is about alpha / sqrt(3) for any L and D. Image tokens get none and do not count in L: their features are no
embeddings but the projector's output, and a text gets the same noise with an image as without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def noise_scale(input_ids: Tensor, attention_mask: Tensor, image_token_id: int, width: int, alpha: float) -> Tensor:
    """The largest noise of every token, 0 at image tokens and padding: (B, S), (B, S) -> (B, S) float32"""
    is_text = attention_mask.bool() & (input_ids != image_token_id)  # (B, S)
    num_text = is_text.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    return is_text * (alpha / (num_text * width).float().sqrt())


@contextmanager
def noisy_embeddings(language_model: nn.Module, scale: Tensor) -> Iterator[None]:
    """Within the block the language model gets its `inputs_embeds` with noise from torch's random state.

    Args:
        scale: (B, S), or (1, T) of a packed sequence.
    """

    def add_noise(_: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds = inputs["inputs_embeds"]  # (B, S, D)
        noise = torch.empty_like(embeds).uniform_(-1, 1) * scale.unsqueeze(-1).to(embeds.dtype)
        return args, inputs | {"inputs_embeds": embeds + noise}

    hook = language_model.register_forward_pre_hook(add_noise, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
