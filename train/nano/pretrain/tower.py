"""Pretraining of the vision tower by point classification. (The real stage 1 starts from a trained OpenCLIP.)

Captions alone would not train a tower in minutes on a CPU; labels do. A small head, discarded afterwards, classifies
random points of each image (a thing, a flag, a digit, a letter, a coloured shape, background) from the features of the
patch that the point lies in: those of the penultimate block, which the language model gets.
Some batches are 448 px, with the position grid resized on the fly: every fourth at first, all towards the end.

B images, K points each, P patches, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from train.nano.data.art import DATA_DIR, Art, load_art
from train.nano.data.compose import Composer
from train.nano.data.labels import LABELS
from train.nano.data.sample import Category, Sample, dense_labels
from train.nano.pretrain.trainer import LoopRecipe, prepare_run, train_loop
from yi_vl.config import preset
from yi_vl.hardware import gpu_or_cpu
from yi_vl.image import YiVLImageProcessor
from yi_vl.vision import OpenClipTower, resize_position_grid

Batch = TypeVar("Batch")
_NUM_WORDS, _MOST_LETTERS, _POINTS_PER_ITEM = 100, 8, 16  # of the held-out measurement
_POINTS = 32  # points along a side from which the K are drawn; a multiple of both grids (4 and 8)


@dataclass
class TowerRecipe(LoopRecipe):
    """How the tower is pretrained."""

    num_steps: int = 7000
    warmup_steps: int = 300
    decay_fraction: float = 0.5
    save_every: int = 100
    measure_every: int = 1000
    num_workers: int = 2
    batch_size: int = 64  # images at 224 px; half as many at 448
    large_every: int = 4  # batches; one of them is of 448 px
    late_large_every: int = 1  # the same from `late_from` on
    late_from: float = 0.9  # fraction of all steps
    num_points: int = 48
    label_smoothing: float = 0.05
    num_threads: int = 1

    def is_large(self, index: int) -> bool:
        """Whether batch `index` is one of 448 px."""
        every = self.late_large_every if index >= self.late_from * self.num_steps else self.large_every
        return index % every == every - 1


# By image size. At 224 px a patch has more letters of a whole word than signs can tell.
CATEGORY_SHARES: dict[int, dict[Category, float]] = {
    224: {"thing": 0.28, "flag": 0.2, "digit": 0.07, "lines": 0.3, "scene": 0.1, "unknown": 0.05},
    448: {"thing": 0.24, "flag": 0.17, "digit": 0.08, "word": 0.34, "scene": 0.12, "unknown": 0.05},
}


@dataclass(frozen=True)
class PointBatch:
    """`pixels` (B, H, W, 3) uint8; `points` (B, K, 2) integer (row, column) of a 32 x 32 lattice; `labels` (B, K)."""

    pixels: Tensor
    points: Tensor
    labels: Tensor


class TowerModule(nn.Module):
    """A module with a vision `tower`, whose first input is pixel values."""

    tower: OpenClipTower

    def at_size(self, pixel_values: Tensor, *inputs: Tensor) -> Tensor:
        """`forward` for images of any size: the position grid is resized, as it will be between the stages."""
        grid = pixel_values.shape[-1] // self.tower.config.patch_size
        name = "tower.visual.positional_embedding"
        positions = resize_position_grid(self.get_parameter(name), grid)
        output: Tensor = functional_call(self, {name: positions}, (pixel_values, *inputs))
        return output


class PointHead(TowerModule):
    """A tower and the head that classifies points. Only the tower is kept."""

    def __init__(self, tower: OpenClipTower) -> None:
        super().__init__()
        width = tower.config.hidden_size
        self.tower = tower
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.within = nn.Linear(8, 2 * width)
        self.classify = nn.Linear(2 * width, len(LABELS))

    def forward(self, pixel_values: Tensor, points: Tensor) -> Tensor:
        """(B, 3, H, W), (B, K, 2) -> logits (B, K, L)"""
        features = self.tower.visual(pixel_values, self.tower.config.feature_layer)  # (B, P, Dv)
        grid = pixel_values.shape[-1] // self.tower.config.patch_size
        position = (points.float() + 0.5) * grid / _POINTS  # (B, K, 2), in patches
        patch = position.long()
        index = (patch[..., 0] * grid + patch[..., 1]).unsqueeze(-1).expand(-1, -1, features.shape[-1])
        angle = 2 * torch.pi * (position - patch)  # where within the patch
        waves = torch.cat([angle.sin(), angle.cos(), (angle / 2).sin(), (angle / 2).cos()], dim=-1)  # (B, K, 8)
        hidden = self.widen(self.norm(features.gather(1, index))) + self.within(waves.to(features.dtype))
        logits: Tensor = self.classify(F.gelu(hidden))
        return logits.float()


class SampleStream(IterableDataset[Batch]):
    """A seeded stream of the batches from a step on, composed on the fly and put into tensors by `make_batch`."""

    def __init__(
        self,
        art: Art,
        recipe: TowerRecipe,
        make_batch: Callable[[np.random.Generator, list[Sample]], Batch],
        first: int = 0,
    ) -> None:
        self.art, self.recipe, self.make_batch, self.first = art, recipe, make_batch, first

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        composer = Composer(self.art)
        for index in range(self.first + offset, self.recipe.num_steps, stride):
            rng = np.random.default_rng([self.recipe.seed, index])
            size_px, count = 224, self.recipe.batch_size
            if self.recipe.is_large(index):
                size_px, count = 448, count // 2
            shares = CATEGORY_SHARES[size_px]
            categories = rng.choice(list(shares), size=count, p=list(shares.values()))
            samples = [composer.compose(rng, category, size_px) for category in categories]
            yield self.make_batch(rng, samples)

    def batches(self) -> Iterator[Batch]:
        """The same, composed in processes of their own."""
        workers = self.recipe.num_workers
        return iter(DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))


def point_batch(rng: np.random.Generator, samples: list[Sample], num_points: int) -> PointBatch:
    """Half of the points on items, the rest anywhere."""
    pixels, points, labels = [], [], []
    for sample in samples:
        lattice = dense_labels(sample, _POINTS, sub=1)
        on_items = np.flatnonzero(lattice)
        chosen = rng.integers(_POINTS**2, size=num_points)
        if len(on_items):
            chosen[: num_points // 2] = rng.choice(on_items, size=num_points // 2)
        pixels.append(np.asarray(sample.image))
        points.append(np.stack(np.unravel_index(chosen, lattice.shape), axis=-1))
        labels.append(lattice.reshape(-1)[chosen])
    return PointBatch(*(torch.from_numpy(np.stack(rows)) for rows in (pixels, points, labels)))


def pretrain_tower(out_dir: Path, recipe: TowerRecipe, data_dir: Path = DATA_DIR) -> OpenClipTower:
    """Train a tower from random weights, or continue to; `out_dir` gets it, and its accuracy on what is held out.

    Raises:
        ValueError: the folder has a run of another recipe.
    """
    prepare_run(out_dir, recipe, recipe.num_threads, recipe.seed)
    art = load_art(data_dir)
    config = preset("nano").vision_config
    config.image_size = 224
    head = PointHead(OpenClipTower(config)).train()
    head.to(device=gpu_or_cpu(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in head.tower.visual.unused_modules(config.feature_layer):
        module.requires_grad_(False)
    processor = YiVLImageProcessor()
    make_batch = partial(point_batch, num_points=recipe.num_points)
    train_loop(
        out_dir,
        head,
        recipe,
        lambda first: SampleStream(art, recipe, make_batch, first).batches(),
        lambda batch: _loss(head, processor, batch, recipe.label_smoothing),
        lambda: {category: score_heldout(head, art, category) for category in ("thing", "flag", "digit", "word")},
        layers=head.get_submodule("tower.visual.transformer"),
    )
    head.tower.save_pretrained(out_dir)
    return head.tower


def _loss(head: PointHead, processor: YiVLImageProcessor, batch: PointBatch, label_smoothing: float) -> Tensor:
    # For as few tokens as here plain attention has the much faster backward pass on CPU.
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(batch.pixels.device.type, torch.bfloat16):
        logits = head.at_size(processor.to_pixel_values(batch.pixels), batch.points)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), label_smoothing=label_smoothing)


@torch.inference_mode()
def score_heldout(head: PointHead, art: Art, category: Category, size_px: int = 448) -> float:
    """Accuracy on held-out images of a category: of an image's class, or of the letters of a word.

    Log-probabilities are summed over points on an item, among the classes of its category.
    """
    samples = _heldout(Composer(art), category, size_px)
    prefix = "letter" if category == "word" else category
    ids = [index for index, label in enumerate(LABELS) if label.startswith(prefix)]
    processor, device = YiVLImageProcessor(), head.norm.weight.device
    was_training = head.training
    head.eval()
    correct: list[bool] = []
    for start in range(0, len(samples), 32):
        chunk = samples[start : start + 32]
        pixels = processor.to_pixel_values(torch.from_numpy(np.stack([np.asarray(each.image) for each in chunk])))
        points = torch.stack([_item_points(each) for each in chunk])  # (B, items * 16, 2)
        with torch.autocast(device.type, torch.bfloat16):
            logits = head.at_size(pixels.to(device), points.to(device))
        scores = logits.log_softmax(-1)[..., ids].unflatten(1, (-1, _POINTS_PER_ITEM)).sum(2)  # (B, items, labels)
        for sample, best in zip(chunk, scores.argmax(-1).tolist(), strict=True):
            correct += [LABELS[ids[i]] == item.label for i, item in zip(best, sample.truth.items)]
    head.train(was_training)
    return round(sum(correct) / len(correct), 4)


def _heldout(composer: Composer, category: Category, size_px: int) -> list[Sample]:
    if category == "digit":
        return list(composer.all_test_digits(size_px))
    if category == "word":
        return [
            composer.compose(np.random.default_rng([1, index]), "word", size_px, "test") for index in range(_NUM_WORDS)
        ]
    return [sample for sample in composer.all_test_samples(size_px) if sample.truth.category == category]


def _item_points(sample: Sample) -> Tensor:
    """(items * 16, 2) points on a 4 x 4 grid within each item's box; words have eight items, the last repeated."""
    points = []
    items = sample.truth.items
    num_items = _MOST_LETTERS if sample.truth.category == "word" else 1
    for index in range(num_items):
        x0, y0, x1, y1 = items[min(index, len(items) - 1)].box
        inner = np.linspace(0.25, 0.75, 4)
        rows, columns = (np.clip(low + inner * (high - low), 0, 0.999) * _POINTS for low, high in ((y0, y1), (x0, x1)))
        points.append(np.stack(np.meshgrid(rows.astype(int), columns.astype(int), indexing="ij"), -1).reshape(-1, 2))
    return torch.from_numpy(np.concatenate(points))
