"""Alignment of tower and projector with the language model: a patch's feature is pulled to its sign's embedding.

The language model was trained on images as mosaics of signs (text/mosaic.py). The target of a patch is the embedding of
its sign plus that of its cell, so that the first stage starts from aligned image features: from captions alone
that alignment would take hours on a CPU. The language model itself does not run.

B images, P patches each, D language width, L signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.nano.data.art import Art, load_art
from train.nano.data.compose import Composer
from train.nano.data.labels import BACKGROUND
from train.nano.data.sample import CATEGORIES, Category, Sample
from train.nano.pretrain.join import join
from train.nano.pretrain.language import load_signs
from train.nano.pretrain.tower import SampleStream, TowerModule, TowerRecipe
from train.nano.pretrain.trainer import prepare_run, to_device, train_loop
from train.nano.pretrain.trees import GRIDS, first_cell
from train.nano.text.mosaic import SIGN_IDS, ideal_cells
from yi_vl.connector import Connector
from yi_vl.hardware import gpu_or_cpu
from yi_vl.image import YiVLImageProcessor
from yi_vl.vision import OpenClipTower

RECIPE = TowerRecipe(num_steps=3400, learning_rate=8e-4, warmup_steps=100, large_every=2, late_from=0.45)
_IGNORED = -100
_SHARPNESS = 16.0  # logits per squared distance between two signs


@dataclass(frozen=True)
class SignBatch:
    """`pixels` (B, H, W, 3) uint8; `signs` (B, P) numbers of signs, -100 for patches that no sign can tell."""

    pixels: Tensor
    signs: Tensor


class TowerAndProjector(TowerModule):
    """The model's vision tower and projector."""

    def __init__(self, tower: OpenClipTower, projector: Connector) -> None:
        super().__init__()
        self.tower, self.projector = tower, projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P, D)"""
        features: Tensor = self.projector(self.tower.visual(pixel_values, self.tower.config.feature_layer))
        return features.float()


def sign_batch(rng: np.random.Generator, samples: list[Sample], patch_size_px: int) -> SignBatch:
    """The ideal mosaic of each image, without the errors that the language model is trained on."""
    pixels = np.stack([np.asarray(sample.image) for sample in samples])
    grid = pixels.shape[1] // patch_size_px
    signs = np.full((len(samples), grid * grid), _IGNORED)
    for row, sample in zip(signs, samples, strict=True):
        row[:] = [_IGNORED if name is None else SIGN_IDS[name] for name in ideal_cells(sample.truth, grid).flat]
    return SignBatch(torch.from_numpy(pixels), torch.from_numpy(signs))


def match(language_dir: Path, tower_dir: Path, out_dir: Path, data_dir: Path, recipe: TowerRecipe = RECIPE) -> None:
    """Join the language model and the tower with a projector trained on signs, or continue to.

    Args:
        out_dir: gets the run, and the model that stage 1 starts from.

    Raises:
        ValueError: the folder has a run of another recipe.
    """
    prepare_run(out_dir, recipe, recipe.num_threads, recipe.seed)
    art = load_art(data_dir)
    model, processor = join(language_dir, tower_dir)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    embeddings, codes = _targets(language_dir)
    device = gpu_or_cpu()
    embeddings, codes = embeddings.to(device), {size: code.to(device) for size, code in codes.items()}
    with torch.no_grad():  # the projector's output starts at the scale of the embeddings
        projector.norm_2.weight.fill_(embeddings.std().item())
    encoder = TowerAndProjector(tower, projector).train().to(device)
    make_batch = partial(sign_batch, patch_size_px=tower.config.patch_size)
    train_loop(
        out_dir,
        encoder,
        recipe,
        lambda first: SampleStream(art, recipe, make_batch, first).batches(),
        lambda batch: _loss(encoder, batch, embeddings, codes, recipe.label_smoothing),
        lambda: {category: score_signs(encoder, embeddings, codes, art, category) for category in CATEGORIES},
        layers=tower.visual.transformer,
    )
    model.eval().save_pretrained(out_dir)
    processor.save_pretrained(out_dir)


def _targets(language_dir: Path) -> tuple[Tensor, dict[int, Tensor]]:
    """The signs' embeddings, (L, D), and for each number of patches what a patch's place adds, (P, D)."""
    signs, cells = load_signs(language_dir)
    return signs, {grid**2: cells[first_cell(grid) :][: grid**2] for grid in GRIDS}


def _loss(
    encoder: TowerAndProjector, batch: SignBatch, embeddings: Tensor, codes: dict[int, Tensor], label_smoothing: float
) -> Tensor:
    # For as few tokens as here plain attention has the much faster backward pass on CPU.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(embeddings.device.type, torch.bfloat16):
        features = encoder.at_size(YiVLImageProcessor().to_pixel_values(batch.pixels))
    return sign_loss(features - codes[features.shape[1]], batch.signs, embeddings, label_smoothing)


def sign_loss(features: Tensor, signs: Tensor, embeddings: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Distance of (B, P, D) features to the (L, D) embeddings of their signs (B, P), plus cross-entropy of the nearest.

    Every image has the same weight, and in it the patches that show an item as much as the background: a word covers
    few patches, a flag many.
    """
    has_sign = signs != _IGNORED
    is_shown = has_sign & (signs != SIGN_IDS[BACKGROUND])
    is_empty = has_sign & ~is_shown
    parts = [which / which.sum(1, keepdim=True).clamp(min=1) for which in (is_shown, is_empty)]
    weight = parts[0] + parts[1]  # (B, P)
    distances = _distances(features[has_sign], embeddings)  # (M, L)
    sign_ids = signs[has_sign]  # (M,)
    nearest = F.cross_entropy(-_SHARPNESS * distances, sign_ids, reduction="none", label_smoothing=label_smoothing)
    distance = distances.gather(1, sign_ids[:, None]).squeeze(1)
    return (weight[has_sign] * (nearest + distance)).sum() / weight.sum()


def _distances(features: Tensor, embeddings: Tensor) -> Tensor:
    """(M, D), (L, D) -> squared distances (M, L), in units of the mean one between two signs"""
    unit = 2 * embeddings.var(dim=0).sum()
    return torch.cdist(features, embeddings).pow(2) / unit


@torch.inference_mode()
def score_signs(
    encoder: TowerAndProjector,
    embeddings: Tensor,
    codes: dict[int, Tensor],
    art: Art,
    category: Category,
    num_samples: int = 64,
) -> float:
    """Accuracy of the nearest sign over the patches of held-out 448 px images that show an item."""
    composer, rng = Composer(art), np.random.default_rng(0)
    samples = [composer.compose(rng, category, 448, "test") for _ in range(num_samples)]
    batch = to_device(sign_batch(rng, samples, encoder.tower.config.patch_size), embeddings.device)
    encoder.eval()
    with torch.autocast(embeddings.device.type, torch.bfloat16):
        features = encoder.at_size(YiVLImageProcessor().to_pixel_values(batch.pixels))
    encoder.train()
    features = features - codes[features.shape[1]]
    shown = (batch.signs != _IGNORED) & (batch.signs != SIGN_IDS[BACKGROUND])
    nearest = _distances(features[shown], embeddings).argmin(-1)
    return round((nearest == batch.signs[shown]).float().mean().item(), 4)
