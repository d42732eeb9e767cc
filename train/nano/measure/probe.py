"""How much a vision tower knows: a linear classifier per skill over its patch features, measured on held-out artwork.

Features are those that the language model gets. The classifiers are trained on images of the training split, so that a
low score is the tower's: what a linear layer cannot read, the connector and the language model will hardly.
A thing, flag or digit is described by the mean over the patches that it covers; a letter by the patch that its centre
lies in, once as it is and once times where in the patch that is, as two letters may share one.

B images, P patches (G x G), Dv tower width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from train.nano.data.art import load_art
from train.nano.data.compose import Composer
from train.nano.data.labels import DIGITS, FLAGS, THINGS
from train.nano.data.sample import Category, Item, Sample
from train.nano.pretrain.join import read_tower
from yi_vl.files import atomic_path
from yi_vl.hardware import gpu_or_cpu
from yi_vl.image import YiVLImageProcessor
from yi_vl.vision import OpenClipTower

SIZE_PX = 448
_BATCH = 32
_NUM_TEST_WORDS = 200


@dataclass(frozen=True)
class ProbedSkill:
    """A skill, how many training images it needs per class (or in all, for words), and the share it should reach."""

    name: str
    category: Category
    num_train: int
    target: float


SKILLS = (
    ProbedSkill("things", "thing", 20, 0.80),
    ProbedSkill("flags", "flag", 12, 0.93),
    ProbedSkill("digits", "digit", 150, 0.98),
    ProbedSkill("characters", "word", 1500, 0.95),
)
Features = tuple[npt.NDArray[np.float32], npt.NDArray[np.str_]]  # (number of items, width), their classes


def probe_tower(model: Path, data_dir: Path, cache_dir: Path, scale: float = 1.0) -> str:
    """A Markdown table of the skills with their accuracy and target. Features are kept in `cache_dir`.

    Args:
        model: folder of a Yi-VL, or of a tower alone.
        scale: factor on the number of training images.

    Raises:
        ValueError: the folder has no tower.
    """
    tower = load_tower(model).to(gpu_or_cpu())  # type: ignore[arg-type]
    composer = Composer(load_art(data_dir))
    lines = ["| skill | held out | training items | accuracy | target |", "|---|---|---|---|---|"]
    for skill in SKILLS:
        train = _cached(tower, composer, skill, "train", cache_dir, scale)
        test = _cached(tower, composer, skill, "test", cache_dir, 1.0)
        accuracy = linear_accuracy(train, test)
        lines.append(f"| {skill.name} | {len(test[1])} | {len(train[1])} | {accuracy:.1%} | {skill.target:.0%} |")
    return "\n".join(lines) + "\n"


def load_tower(folder: Path) -> OpenClipTower:
    """The tower of a model, or a tower alone, for images of 448 px.

    Raises:
        ValueError: the folder has neither.
    """
    tower = read_tower(folder)
    if tower.config.image_size != SIZE_PX:
        tower.visual.resize_(SIZE_PX, tower.config.patch_size)
        tower.config.image_size = SIZE_PX
    return tower.eval()


def linear_accuracy(train: Features, test: Features) -> float:
    """Share of the test's items that a logistic regression on the training's features classifies correctly."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, tol=1e-3))
    return float(classifier.fit(*train).score(*test))


@torch.inference_mode()
def item_features(tower: OpenClipTower, samples: Iterator[Sample]) -> Features:
    """One row for each item of the samples, and the items' labels."""
    processor = YiVLImageProcessor()
    rows: list[npt.NDArray[np.float32]] = []
    labels: list[str] = []
    for batch in _batched(samples):
        pixels = torch.from_numpy(np.stack([np.asarray(sample.image) for sample in batch]))
        pixel_values = processor.to_pixel_values(pixels.to(tower.device))
        features = tower.visual(pixel_values, tower.config.feature_layer)  # (B, P, Dv)
        for sample, patches in zip(batch, features.cpu()):
            for item in sample.truth.items:
                rows.append(_describe(patches, item).numpy())
                labels.append(item.label)
    return np.stack(rows), np.array(labels)


def _describe(patches: Tensor, item: Item) -> Tensor:
    """(P, Dv) -> (Dv,), of a letter (2 Dv,)"""
    grid = int(len(patches) ** 0.5)
    cells = patches.view(grid, grid, -1)
    x, y = (min(side, 0.999) * grid for side in item.centre)
    if item.category == "letter":
        feature = cells[int(y), int(x)]
        return torch.cat([feature, feature * (2 * (x % 1) - 1)])
    x0, y0, x1, y1 = (max(0.0, side) * grid for side in item.box)
    columns, rows = slice(round(x0), max(round(x1), round(x0) + 1)), slice(round(y0), max(round(y1), round(y0) + 1))
    covered = cells[rows, columns]
    return covered.mean((0, 1)) if covered.numel() else cells[int(y), int(x)]


def _batched(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _cached(
    tower: OpenClipTower, composer: Composer, skill: ProbedSkill, split: str, cache_dir: Path, scale: float
) -> Features:
    path = cache_dir / f"{_digest(tower)}-{skill.name}-{split}-{scale:g}.npz"
    if not path.exists():
        samples = _test_samples(composer, skill) if split == "test" else _train_samples(composer, skill, scale)
        features, labels = item_features(tower, iter(track(samples, f"{skill.name}, {split}", total=None)))
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, features=features, labels=labels)
    with np.load(path) as content:
        return content["features"], content["labels"]


def _digest(tower: OpenClipTower) -> str:
    """Of the weights: another tower has other features."""
    digest = hashlib.sha256()
    for tensor in tower.state_dict().values():
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _train_samples(composer: Composer, skill: ProbedSkill, scale: float) -> Iterator[Sample]:
    number = max(1, round(skill.num_train * scale))
    for index, key in enumerate(_keys(skill)):
        for copy in range(number):
            rng = np.random.default_rng([7, index, copy])
            yield composer.compose(rng, skill.category, SIZE_PX, "train", key)


def _keys(skill: ProbedSkill) -> tuple[str | None, ...]:
    return {"thing": tuple(THINGS), "flag": tuple(FLAGS), "digit": tuple(DIGITS)}.get(skill.category, (None,))


def _test_samples(composer: Composer, skill: ProbedSkill) -> Iterator[Sample]:
    if skill.category == "digit":
        yield from composer.all_test_digits(SIZE_PX)
    elif skill.category == "word":
        for index in range(_NUM_TEST_WORDS):
            yield composer.compose(np.random.default_rng([8, index]), "word", SIZE_PX, "test")
    else:
        yield from (each for each in composer.all_test_samples(SIZE_PX) if each.truth.category == skill.category)
