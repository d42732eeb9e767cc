"""Which image each token attends to, and the cache of its keys and values.

B rows, S new tokens, N images: those in the cache and new ones, R tokens that attend to an image, L of the longest run
of tokens that attend to the same image, H key-value heads, P features per image, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class ImageKeysLayer(DynamicLayer):
    """Keys and values of the last image of each row, (B, H, P, E): what tokens to come attend to.

    It stands behind the layers of self-attention, one for each layer of cross-attention. Its length in tokens is 0, and
    removing tokens does not change it.

    Attributes:
        has_image: (B,) bool; in the other rows keys and values are arbitrary, but finite. None before the first image.
    """

    supports_early_init = False
    has_image: Tensor | None = None

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, last_images: Tensor, has_image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add new images, and keep the last of each row.

        Args:
            key_states, value_states: of the new images, (N, H, P, E).
            last_images: (B,) its index among the B images stored, if there are any, and the new ones behind them.
            has_image: (B,) bool.

        Returns:
            Keys and values of the images stored and the new ones.
        """
        if self.is_initialized:
            key_states = torch.cat([self.keys, key_states])  # type: ignore[list-item]
            value_states = torch.cat([self.values, value_states])  # type: ignore[list-item]
        self.set(key_states[last_images], value_states[last_images], has_image)
        return key_states, value_states

    def set(self, keys: Tensor, values: Tensor, has_image: Tensor) -> None:
        """Replace what is stored: (B, H, P, E) each, and (B,) bool."""
        self.device, self.is_initialized = keys.device, True
        self.keys, self.values, self.has_image = keys, values, has_image

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: generated tokens, which are removed, are no images."""

    def reset(self) -> None:
        self.keys = self.values = self.has_image = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            assert self.keys is not None and self.values is not None and self.has_image is not None
            indices = indices.to(self.keys.device)
            self.set(self.keys[indices], self.values[indices], self.has_image[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            assert self.keys is not None and self.values is not None and self.has_image is not None
            parts = (part.repeat_interleave(repeats, dim=0) for part in (self.keys, self.values, self.has_image))
            self.set(*parts)


def image_layers(cache: Cache, num_layers: int, num_cross_layers: int) -> list[ImageKeysLayer]:
    """The layers of image keys of a cache, behind those of its `num_layers` self-attention layers; added where they are
    not there yet.

    Raises:
        ValueError: it is a static cache.
    """
    if cache.is_compileable:
        raise ValueError(
            "A static cache has a fixed number of layers, and gated cross-attention adds some; leave "
            "cache_implementation out."
        )
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers += [ImageKeysLayer() for _ in range(num_layers + num_cross_layers - len(cache.layers))]
    layers = cache.layers[num_layers:]
    assert all(isinstance(layer, ImageKeysLayer) for layer in layers)
    return layers  # type: ignore[return-value]


@dataclass(frozen=True)
class ImageRuns:
    """Tokens that attend to an image, in runs of those that attend to the same.

    A run's queries attend to its image's keys in one product, without a mask; shorter runs are padded.
    """

    tokens: Tensor  # (R,) indices into the B*S tokens, ascending
    padded: Tensor  # (N*L,) each run's tokens as indices into the R; arbitrary at padding
    packed: Tensor  # (R,) the inverse: indices into the N*L
    last_images: Tensor  # (B,) of each row the last of the N images, for `ImageKeysLayer`
    has_image: Tensor  # (B,) bool, whether there is one
    is_used: bool = True  # False: the tokens stay as they are, whatever the blocks compute

    @classmethod
    def of(cls, images: Tensor, num_images: int, last_images: Tensor) -> ImageRuns:
        """
        Args:
            images: (B, S) the image that each token attends to; -1 for none.
            last_images: (B,) the last image of each row; -1 for none.
        """
        tokens = (images.flatten() >= 0).nonzero().squeeze(1)
        runs = images.flatten()[tokens]  # (R,) each is of consecutive tokens, in any order of images
        order = torch.arange(len(runs), device=runs.device)
        is_first = torch.ones_like(runs, dtype=torch.bool)
        is_first[1:] = runs[1:] != runs[:-1]
        ranks = order - order.where(is_first, 0).cummax(0).values if len(runs) else order  # within their run
        longest = int(ranks.max()) + 1 if len(runs) else 0
        packed = runs * longest + ranks
        padded = torch.zeros(num_images * longest, dtype=torch.long, device=runs.device)
        padded[packed] = order
        return cls(tokens, padded, packed, last_images.clamp(min=0), last_images >= 0)

    @classmethod
    def of_rows(cls, has_image: Tensor, num_tokens: int) -> ImageRuns:
        """Of `num_tokens` tokens of each row without a new image: all of a row attend to that in the cache, if any.

        A decode step takes this way: a tenth of the time of the general one.
        """
        columns = torch.arange(len(has_image) * num_tokens, device=has_image.device).view(-1, num_tokens)
        tokens = columns[has_image].flatten()
        padded = torch.zeros(columns.numel(), dtype=torch.long, device=has_image.device)
        padded[tokens] = torch.arange(len(tokens), device=has_image.device)
        return cls(tokens, padded, tokens, torch.arange(len(has_image), device=has_image.device), has_image)

    @classmethod
    def unused(cls, num_rows: int, device: torch.device) -> ImageRuns:
        """One token and one image, whose result is dropped."""
        index = torch.zeros(1, dtype=torch.long, device=device)
        rows = torch.zeros(num_rows, dtype=torch.long, device=device)
        return cls(index, index, index, rows, rows.bool(), is_used=False)


def images_of_tokens(
    is_image: Tensor, first_images: Tensor, num_before: int, position_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The image that each token attends to, (B, S), and the last image of each row, (B,); -1 for none.

    It is the last one whose marker is not after the token; before the first marker of a row it is `first_images`.

    Args:
        is_image: (B, S) bool, the markers of new images.
        first_images: (B,) -1 for none.
        num_before: images before the new ones, which are counted in reading order.
        position_ids: (B, S) where a row may hold several samples, which begin where positions do not go on; else None.
    """
    num_rows, num_tokens = is_image.shape
    counts = is_image.flatten().cumsum(0)  # of images so far, over all rows
    is_first = torch.zeros_like(is_image)
    is_first[:, 0] = True
    if position_ids is not None:
        is_first[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
    order = torch.arange(counts.numel(), device=counts.device)
    starts = order.where(is_first.flatten(), 0).cummax(0).values  # of each token's sample
    has_new = counts > (counts - is_image.flatten().long())[starts]
    before = first_images.repeat_interleave(num_tokens)
    images = (counts - 1 + num_before).where(has_new, before).view(num_rows, num_tokens)
    ends = counts.view(num_rows, num_tokens)[:, -1]
    last = (ends - 1 + num_before).where(is_image.any(1), first_images)
    return images, last
