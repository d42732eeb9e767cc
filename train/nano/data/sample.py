"""A composed sample: images, and the ground truth that questions and dense labels are made from."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from train.nano.data.labels import LABEL_IDS, UNKNOWN

Category = Literal["thing", "flag", "digit", "word", "lines", "scene", "unknown"]
CATEGORIES: tuple[Category, ...] = ("thing", "flag", "digit", "word", "scene")  # what nano has names for
TruthCategory = Literal["thing", "flag", "digit", "word", "scene", "same", "unknown"]
ItemCategory = Literal["thing", "flag", "digit", "letter", "shape", "unknown"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Item:
    """One item of an image. `name` is its key in labels.py; `box` is (x0, y0, x1, y1) in fractions of the side."""

    category: ItemCategory
    name: str
    box: Box
    colour: str | None = None  # of shapes only

    @property
    def label(self) -> str:
        """Its entry in `labels.LABELS`."""
        if self.category == "unknown":
            return UNKNOWN
        return f"shape {self.colour} {self.name}" if self.category == "shape" else f"{self.category} {self.name}"

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Truth:
    """The ground truth of a sample. Letters in reading order for a word; for category "same", one item per image; for
    "unknown" one item, or the whole image as one, that nano has no name for.
    """

    category: TruthCategory
    items: tuple[Item, ...]

    @property
    def word(self) -> str:
        """The printed word in capitals, however it is printed ("" where there is none)."""
        return "".join(item.name for item in self.items if item.category == "letter").upper()


@dataclass(frozen=True)
class Sample:
    """One RGB image (two for "same"), its truth, and for each item its outline as an L image the size of its box.

    An outline is None where the whole box counts as the item.
    """

    images: tuple[Image.Image, ...]
    truth: Truth
    outlines: tuple[Image.Image | None, ...]

    @property
    def image(self) -> Image.Image:
        """The only image; a "same" pair has two."""
        assert len(self.images) == 1, f"{len(self.images)} images, not one"
        return self.images[0]


def dense_labels(sample: Sample, grid: int, sub: int = 2) -> npt.NDArray[np.int64]:
    """(grid * sub, grid * sub) ids into `LABELS`: what lies at the centre of each of every cell's sub x sub parts."""
    assert len(sample.images) == 1, "dense labels are of one image"
    num_points = grid * sub
    points = (np.arange(num_points) + 0.5) / num_points
    labels = np.zeros((num_points, num_points), dtype=np.int64)
    for item, outline in zip(sample.truth.items, sample.outlines, strict=True):
        x0, y0, x1, y1 = item.box
        columns = np.flatnonzero((points >= x0) & (points < x1))
        rows = np.flatnonzero((points >= y0) & (points < y1))
        inside = np.ones((len(rows), len(columns)), dtype=bool)
        if outline is not None:
            pixels = np.asarray(outline)
            u = ((points[columns] - x0) / (x1 - x0) * pixels.shape[1]).astype(int)
            v = ((points[rows] - y0) / (y1 - y0) * pixels.shape[0]).astype(int)
            inside = pixels[np.ix_(v, u)] > 127
        block = labels[np.ix_(rows, columns)]
        labels[np.ix_(rows, columns)] = np.where(inside, LABEL_IDS[item.label], block)
    return labels
