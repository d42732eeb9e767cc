"""Composes images of things, flags, digits, words and scenes, with their ground truth, at any size.

The tower's pretraining calls it on the fly (about a millisecond at 224 px), the shard writer at 448 px. Images of the
split "train" are varied; those of "test" use held-out drawings, fonts and digits, plainly and mildly placed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from train.nano.data import paint
from train.nano.data.art import Art, Drawing
from train.nano.data.labels import COLOURS, DIGITS, FLAGS, THINGS
from train.nano.data.layout import choice, place_items, scene_items, word_width
from train.nano.data.packages import Split
from train.nano.data.sample import Category, Item, Sample, Truth, TruthCategory
from train.nano.data.unknown import UNKNOWN_STYLES, UnknownStyle, noise, page, photo
from train.nano.data.vocabulary import VOCABULARY

NUM_TEST_DIGITS = 360
_FONT_PX = 64
_LARGE_PX, _PATCH_PX = 448, 56  # two lines never share a patch
_NUM_ITEMS = {"few": (0.1, 0.25, 0.25, 0.2, 0.2), "many": (0.1, 0.2, 0.2, 0.14, 0.14, 0.07, 0.06, 0.05, 0.04)}  # scenes
_GLYPHS = 0.3  # share of drawings with one ink, where there are others
_RIGID_SHAPES = {"square": 10.0, "diamond": 10.0, "triangle": 14.0, "cross": 12.0, "heart": 16.0, "star": 30.0}
_Sprite = tuple[Image.Image, Image.Image | None]  # what is pasted, and its outline (None: the whole box counts)


@dataclass(frozen=True)
class _DrawnWord:
    """A printed word: its letters' boxes before a warp, its L mask after it, and the warp's (2, 3) map."""

    word: str
    boxes: list[tuple[int, int, int, int]]
    mask: Image.Image
    forward: npt.NDArray[np.float64]

    def letters(self, corner: tuple[int, int], size_px: int) -> Iterator[Item]:
        """Its letters with their boxes, the mask lying at `corner` of an image of `size_px`."""
        for letter, box in zip(self.word, self.boxes, strict=True):
            yield Item("letter", letter, _moved_box(box, self.forward, corner, size_px))


class Composer:
    """Composes images from `art`. Stateless but for caches: what comes out depends on the arguments alone."""

    def __init__(self, art: Art) -> None:
        self.art = art

    def compose(
        self, rng: np.random.Generator, category: Category, size_px: int, split: Split = "train", key: str | None = None
    ) -> Sample:
        """One square image of a category, `size_px` wide; `key` fixes the thing, flag, digit or word, else drawn."""
        if category == "scene":
            return self._scene(rng, size_px, split)
        if category == "word":
            return self._word(rng, size_px, split, key)
        if category == "lines":
            return self._lines(rng, size_px)
        if category == "unknown":
            return self.unknown(rng, size_px, split)
        if category == "digit":
            return self._single(rng, "digit", key or DIGITS[rng.integers(10)], size_px, split)
        classes = THINGS if category == "thing" else FLAGS
        return self._single(rng, category, key or choice(rng, tuple(classes)), size_px, split)

    def pair(self, rng: np.random.Generator, size_px: int, split: Split = "train") -> Sample:
        """Two images, half of the time of the same thing or flag."""
        category: Literal["thing", "flag"] = "thing" if rng.random() < 0.75 else "flag"
        keys = tuple(THINGS if category == "thing" else FLAGS)
        first = second = choice(rng, keys)
        if rng.random() < 0.5:
            similar = (first, *FLAGS[first].alike) if category == "flag" else (first,)
            second = choice(rng, tuple(key for key in keys if key not in similar))
        samples = [self.compose(rng, category, size_px, split, key) for key in (first, second)]
        items = tuple(sample.truth.items[0] for sample in samples)
        outlines = tuple(sample.outlines[0] for sample in samples)
        return Sample(tuple(sample.image for sample in samples), Truth("same", items), outlines)

    def all_test_digits(self, size_px: int, seed: int = 0) -> Iterator[Sample]:
        """Every held-out digit once."""
        for digit in DIGITS:
            for index in range(len(_digits()["test", digit])):
                rng = np.random.default_rng([seed, int(digit), index])
                yield self._single(rng, "digit", digit, size_px, "test", index)

    def all_test_samples(self, size_px: int, seed: int = 0) -> Iterator[Sample]:
        """Every thing and every flag once, from held-out drawings."""
        keys: list[tuple[Category, str]] = [("thing", key) for key in THINGS] + [("flag", key) for key in FLAGS]
        for index, (category, key) in enumerate(keys):
            yield self.compose(np.random.default_rng([seed, index]), category, size_px, "test", key)

    def unknown(
        self, rng: np.random.Generator, size_px: int, split: Split = "train", style: UnknownStyle | None = None
    ) -> Sample:
        """One image of what has no name here: other artwork half of the time, else one of the other styles."""
        style = style or rng.choice(UNKNOWN_STYLES, p=[0.5, 0.3, 0.05, 0.15])
        if style == "artwork":
            return self._single(rng, "unknown", "", size_px, split)
        if style == "photo":
            image = photo(rng, size_px, split)
        elif style == "noise":
            image = noise(rng, size_px)
        else:
            image = page(rng, size_px, [str(path) for path in self.art.fonts[split]])
        return Sample((image,), Truth("unknown", (Item("unknown", "", (0, 0, 1, 1)),)), (None,))

    def _drawing(self, rng: np.random.Generator, label: str, split: Split, canvas: Image.Image) -> Image.Image:
        drawings: list[Drawing] = self.art.of(split).get(label, [])
        if not drawings:
            raise ValueError(f"no {split} drawing of {label!r}: the artwork cache is incomplete; render it again")
        glyphs = [drawing for drawing in drawings if drawing.is_glyph]
        if 0 < len(glyphs) < len(drawings):
            is_glyph = rng.random() < _GLYPHS
            drawings = [drawing for drawing in drawings if drawing.is_glyph == is_glyph]
        drawing = drawings[rng.integers(len(drawings))]
        base = Image.fromarray(np.asarray(drawing.pixels))
        return paint.coloured_glyph(rng, base, paint.average(canvas)) if drawing.is_glyph else base

    def _sprite(
        self, rng: np.random.Generator, item: Item, split: Split, size_px: float, canvas: Image.Image
    ) -> _Sprite:
        """The item drawn, coloured, warped and cropped to its ink, its longer side `size_px`."""
        is_train = split == "train"
        distortion = paint.random_warp(rng) if is_train else paint.Warp()
        if item.category == "shape":
            assert item.colour is not None
            colour = paint.shifted(rng, COLOURS[item.colour][1], 14 if is_train else 6)
            base = paint.inked(paint.outline(item.name), colour)
            if is_train:
                limit = _RIGID_SHAPES.get(item.name, 0.0)
                distortion = paint.Warp(rotation=rng.uniform(-limit, limit), stretch=rng.uniform(0.93, 1.07))
        else:
            base = self._drawing(rng, item.label, split, canvas)
            if is_train and item.category == "flag" and base.getchannel("A").getextrema()[0] == 255:
                base = paint.restyle_flag(rng, base)
            if (
                is_train and item.category in ("thing", "unknown") and rng.random() < 0.5
            ):  # every artist has a way of facing things
                base = base.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if is_train and item.category in ("thing", "unknown"):
                base = paint.restyle_thing(rng, base)
            if is_train and rng.random() < 0.7:
                base = paint.jitter(rng, base)
        sprite, _ = paint.warp(base, size_px, distortion)
        alpha = sprite.getchannel("A")
        box = alpha.point(_OPAQUE).getbbox() or (0, 0, *sprite.size)
        return sprite.crop(box), None if item.category == "thing" else alpha.crop(box)

    def _single(
        self, rng: np.random.Generator, category: TruthCategory, key: str, size_px: int, split: Split, index: int = -1
    ) -> Sample:
        """One thing, flag or digit somewhere in the frame; `index` is of the written digits, a random one below 0."""
        is_train = split == "train"
        scale = rng.uniform(0.35, 1.0) if is_train else rng.uniform(0.6, 0.95)
        if category == "digit":
            item = Item("digit", key, (0, 0, 1, 1))
            canvas, ink = _canvas_and_ink(rng, size_px, split)
            distortion = paint.strong_warp(rng) if is_train else paint.Warp()
            mask, _ = paint.warp(_digit_mask(rng, key, split, index), scale * size_px, distortion)
            sprite: _Sprite = (paint.inked(mask, ink), None)
        else:
            item = Item(category, key, (0, 0, 1, 1))  # type: ignore[arg-type]
            canvas = _canvas(rng, size_px, split, [])
            sprite = self._sprite(rng, item, split, scale * size_px, canvas)
        room = [size_px - side for side in sprite[0].size]
        spread = (0.0, 1.0) if is_train else (0.4, 0.6)
        corner = [max(0, round(side * rng.uniform(*spread))) for side in room]
        return _finish(rng, category, canvas, [item], [sprite], [(corner[0], corner[1])], split)

    def _word(self, rng: np.random.Generator, size_px: int, split: Split, key: str | None) -> Sample:
        """One printed word in lower, Title or UPPER case, every letter with its box."""
        word = key or choice(rng, tuple(VOCABULARY))
        drawn = self._draw_word(rng, word, size_px, split)
        canvas, ink = _canvas_and_ink(rng, size_px, split)
        spread = (0.0, 1.0) if split == "train" else (0.35, 0.65)
        x, y = (round((size_px - side) * rng.uniform(*spread)) for side in drawn.mask.size)
        canvas.paste(ink, (x, y), drawn.mask)
        items = tuple(drawn.letters((x, y), size_px))
        return Sample((_aged(rng, canvas, split),), Truth("word", items), (None,) * len(items))

    def _lines(self, rng: np.random.Generator, size_px: int) -> Sample:
        """Words in lines, cut off at the sides, as large as alone in 448 px: many letters in a small image."""
        canvas, ink = _canvas_and_ink(rng, size_px, "train")
        items: list[Item] = []
        y = round(rng.uniform(-0.1, 0.1) * size_px)
        while y < 0.9 * size_px:
            drawn = self._draw_word(rng, choice(rng, tuple(VOCABULARY)), _LARGE_PX, "train")
            room = size_px - drawn.mask.width
            x = round(room / 2 + rng.uniform(-0.5, 0.5) * abs(room))
            canvas.paste(ink, (x, y), drawn.mask)
            items += [item for item in drawn.letters((x, y), size_px) if all(0 < side < 1 for side in item.centre)]
            y += max(drawn.mask.height, _PATCH_PX) + round(rng.uniform(0.0, 0.08) * size_px)
        return Sample((_aged(rng, canvas, "train"),), Truth("word", tuple(items)), (None,) * len(items))

    def _draw_word(self, rng: np.random.Generator, word: str, image_px: int, split: Split) -> _DrawnWord:
        """A word in some font and case, as large as it is alone in an image of `image_px`."""
        is_train = split == "train"
        shown = (word, word.title(), word.upper())[rng.choice(3, p=[0.5, 0.25, 0.25])]
        fonts = self.art.fonts[split]
        tracking = rng.uniform(0.0, 0.2) if is_train else 0.03
        mask, boxes = _word_mask(str(fonts[rng.integers(len(fonts))]), shown, tracking)
        distortion = paint.random_warp(rng, 6.0) if is_train else paint.Warp()
        scale = rng.uniform(0.75, 1.0) * word_width(len(word))
        return _DrawnWord(word, boxes, *paint.warp(mask, scale * image_px, distortion))

    def _scene(self, rng: np.random.Generator, size_px: int, split: Split) -> Sample:
        """One to five shapes and things, apart from each other; in large images of the training up to nine."""
        shares = _NUM_ITEMS["many" if split == "train" and size_px >= _LARGE_PX else "few"]
        num_items = int(rng.choice(len(shares), p=shares)) + 1
        items = scene_items(rng, num_items)
        canvas = _canvas(rng, size_px, split, [COLOURS[item.colour][1] for item in items if item.colour])
        corners: list[tuple[int, int]] = []
        sprites: list[_Sprite] = []
        for x, y, side in place_items(rng, num_items):
            sprite = self._sprite(rng, items[len(sprites)], split, side * size_px, canvas)
            sprites.append(sprite)
            width, height = sprite[0].size
            corners.append((round(x * size_px - width / 2), round(y * size_px - height / 2)))
        return _finish(rng, "scene", canvas, items, sprites, corners, split)


def _finish(
    rng: np.random.Generator,
    category: TruthCategory,
    canvas: Image.Image,
    items: list[Item],
    sprites: list[_Sprite],
    corners: list[tuple[int, int]],
    split: Split,
) -> Sample:
    """The sprites pasted at their corners, and the truth about it."""
    side = canvas.width
    placed = []
    for item, (sprite, _), (x, y) in zip(items, sprites, corners, strict=True):
        canvas.paste(sprite, (x, y), sprite)
        box = (x / side, y / side, (x + sprite.width) / side, (y + sprite.height) / side)
        placed.append(Item(item.category, item.name, box, item.colour))
    return Sample((_aged(rng, canvas, split),), Truth(category, tuple(placed)), tuple(mask for _, mask in sprites))


def _aged(rng: np.random.Generator, image: Image.Image, split: Split) -> Image.Image:
    return paint.soften(rng, image) if split == "train" and rng.random() < 0.12 else image


def _canvas(rng: np.random.Generator, size_px: int, split: Split, inks: list[paint.Colour]) -> Image.Image:
    """A background that the inks stand out from."""
    if split == "test":
        can_be_pale = COLOURS["white"][1] not in inks
        return Image.new("RGB", (size_px, size_px), paint.far_colour(rng, inks, 60.0, pale=can_be_pale))
    first, second = (paint.far_colour(rng, inks, 90.0) for _ in range(2))
    return paint.background(rng, size_px, first, second)


def _canvas_and_ink(rng: np.random.Generator, size_px: int, split: Split) -> tuple[Image.Image, paint.Colour]:
    """A background of two near colours and an ink far from both."""
    if split == "test":
        first = second = paint.pale_colour(rng)
        canvas = Image.new("RGB", (size_px, size_px), first)
    else:
        first = paint.random_colour(rng)
        second = paint.shifted(rng, first, 50)
        canvas = paint.background(rng, size_px, first, second)
    return canvas, paint.far_colour(rng, [first, second], 150.0 if split == "train" else 250.0)


_OPAQUE = [255 * (alpha > 40) for alpha in range(256)]


@cache
def _digits() -> dict[tuple[Split, str], list[Image.Image]]:
    """scikit-learn's 8 x 8 digits by split and value; the last 360, written by other people, are the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    digits: dict[tuple[Split, str], list[Image.Image]] = {}
    for index, (pixels, value) in enumerate(zip(data.images, data.target, strict=True)):
        split: Split = "test" if index >= len(data.target) - NUM_TEST_DIGITS else "train"
        image = Image.fromarray((pixels * 15.9).astype(np.uint8))
        digits.setdefault((split, str(value)), []).append(image)
    return digits


def _digit_mask(rng: np.random.Generator, digit: str, split: Split, index: int) -> Image.Image:
    """One written digit, enlarged smoothly, its stroke made thinner or thicker and its edge softer or sharper."""
    images = _digits()[split, digit]
    image = images[rng.integers(len(images)) if index < 0 else index].resize((96, 96), Image.Resampling.BICUBIC)
    threshold, gain = (rng.uniform(60, 130), rng.uniform(1.5, 6)) if split == "train" else (95, 3)
    mask = image.point(np.clip((np.arange(256) - threshold) * gain + 128, 0, 255).astype(int).tolist())
    return mask.crop(mask.point(_OPAQUE).getbbox())


@lru_cache(maxsize=256)
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(path), _FONT_PX, layout_engine=ImageFont.Layout.BASIC)


def _word_mask(font_path: str, shown: str, tracking: float) -> tuple[Image.Image, list[tuple[int, int, int, int]]]:
    """The L mask of a word, cropped to its ink, and each letter's box in it. `tracking` in font sizes."""
    font = _font(font_path)
    pen, starts = float(_FONT_PX), []
    for letter in shown:
        starts.append(pen)
        pen += font.getlength(letter) + tracking * _FONT_PX
    mask = Image.new("L", (int(pen) + _FONT_PX, 3 * _FONT_PX))
    draw = ImageDraw.Draw(mask)
    boxes = []
    for letter, x in zip(shown, starts, strict=True):
        draw.text((x, _FONT_PX), letter, font=font, fill=255)
        boxes.append(draw.textbbox((x, _FONT_PX), letter, font=font))
    left, top, right, bottom = mask.getbbox() or (0, 0, 1, 1)
    moved = [(int(x0) - left, int(y0) - top, int(x1) - left, int(y1) - top) for x0, y0, x1, y1 in boxes]
    return mask.crop((left, top, right, bottom)), moved


def _moved_box(
    box: tuple[int, int, int, int], forward: np.ndarray, corner: tuple[int, int], size_px: int
) -> tuple[float, float, float, float]:
    """A box of the unwarped word as a box of the frame, in fractions of its side."""
    x0, y0, x1, y1 = box
    points = forward[:, :2] @ np.array([[x0, x1, x0, x1], [y0, y0, y1, y1]]) + forward[:, 2:]
    points = (points + np.array(corner)[:, None]) / size_px
    low, high = points.min(axis=1), points.max(axis=1)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])
