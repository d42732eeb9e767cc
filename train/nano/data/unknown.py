"""Images of what nano has no name for, to be answered with "I am not sure.": photographs, noise, pages, other artwork.

Photographs of the training are parts of the free ones that scikit-image has, in other colours, and imitations: broad
shapes under uneven light, out of focus and grainy. Those of the test are parts of the two that scikit-learn has. Pages
are lines of small print. The artwork is of classes that are not in `classes.tsv`; those of the test are in no training.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from train.nano.data import paint
from train.nano.data.packages import Split
from train.nano.data.vocabulary import VOCABULARY

UnknownStyle = Literal["artwork", "photo", "noise", "page"]
UNKNOWN_STYLES: tuple[UnknownStyle, ...] = get_args(UnknownStyle)
_PHOTOS = (  # functions of skimage.data, of images in the public domain or CC0
    "astronaut", "brick", "camera", "chelsea", "clock", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "retina", "rocket",
)  # fmt: skip
_IMITATED, _IN_FRONT = 0.3, 0.4  # of the photographs of the training, and of the others
_TEST_EVERY = 3  # of the icons one is for the test

# Icon names, of nothing that resembles a thing of classes.py.
_ICONS = """
brain lungs bone tooth foot leg ear nose eyes mouth tongue flexed-biceps thumbs-up waving-hand clapping-hands
handshake folded-hands skull ghost alien robot clown-face pile-of-poo dna microbe magnet telescope microscope
satellite-antenna syringe pill stethoscope thermometer test-tube petri-dish bathtub shower broom soap sponge
toothbrush scissors paperclip pushpin straight-ruler calendar clipboard bar-chart scroll label money-bag
dollar-banknote credit-card receipt abacus glasses sunglasses necktie jeans scarf gloves coat socks bikini
womans-sandal high-heeled-shoe running-shoe backpack handbag briefcase graduation-cap military-helmet lipstick
chess-pawn joker kite yo-yo puzzle-piece game-die bullseye bowling video-game joystick slot-machine ferris-wheel
roller-coaster statue-of-liberty volcano mount-fuji stadium door bed couch-and-lamp chair mirror window sled skis
ice-skate boomerang diving-mask fishing-pole sauropod t-rex dragon unicorn bat eagle peacock flamingo parrot swan dodo
hedgehog kangaroo badger beaver otter sloth skunk llama giraffe hippopotamus rhinoceros deer zebra shrimp lobster
squid oyster shark dolphin lizard scorpion mosquito fly worm cockroach peach mango coconut melon blueberries olive
bell-pepper broccoli garlic onion potato peanuts chestnut bagel pretzel pancakes waffle bacon cut-of-meat salt
canned-food bento-box rice-ball spaghetti oden fried-shrimp dango dumpling fortune-cookie takeout-box chocolate-bar
candy honey-pot custard teapot sake chopsticks spoon amphora world-map compass brick rock wood parachute seat
motor-boat flying-saucer traffic-light stop-sign construction comet snowflake droplet water-wave tornado firecracker
ribbon ticket military-medal flying-disc badminton goal-net knot thread yarn safety-pin shopping-bags prayer-beads
gem-stone megaphone saxophone accordion banjo long-drum pager battery floppy-disk film-frames candle-holder
red-paper-lantern ledger notebook bookmark coin package mailbox ballot-box paintbrush axe pick dagger bow-and-arrow
shield screwdriver saw wrench hook ladder alembic crutch razor headstone moai placard fire-extinguisher
"""


def unknown_icons(split: Split) -> tuple[str, ...]:
    """Names of icons of unknown classes; no name is in both splits."""
    names = tuple(dict.fromkeys(_ICONS.split()))
    return tuple(name for index, name in enumerate(names) if (index % _TEST_EVERY == 0) == (split == "test"))


def photo(rng: np.random.Generator, size_px: int, split: Split) -> Image.Image:
    """A photograph, or something like one."""
    if split == "test":
        return _part(rng, _test_photos(), size_px, 0.4)
    if rng.random() < _IMITATED:
        return _imitated_photo(rng, size_px)
    image = _recoloured(rng, _part(rng, _training_photos(), size_px, 0.25))
    return _in_front(rng, image) if rng.random() < _IN_FRONT else image


def _in_front(rng: np.random.Generator, background: Image.Image) -> Image.Image:
    """An oval of another photograph before this one, which is out of focus: a subject to take for a thing."""
    size_px = background.width
    subject = _recoloured(rng, _part(rng, _training_photos(), size_px, 0.25))
    width, height = rng.uniform(0.3, 0.9, 2) * size_px
    x, y = rng.uniform(0, size_px - width), rng.uniform(0, size_px - height)
    mask = Image.new("L", background.size)
    ImageDraw.Draw(mask).ellipse((x, y, x + width, y + height), fill=255)
    ragged = 0.25 * (_clouds(rng, size_px, (8, 16, 32), (1.0, 0.7, 0.5)) - 0.5)  # an outline that is no oval
    soft = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.04 * size_px))) / 255 + ragged
    mask = Image.fromarray(paint.as_bytes(255 * np.clip(20 * (soft - 0.5), 0, 1)))
    background = background.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.03) * size_px))
    return Image.composite(subject, background, mask)


def _imitated_photo(rng: np.random.Generator, size_px: int) -> Image.Image:
    light = _clouds(rng, size_px, (2, 4, 8), (1.0, 0.6, 0.3))[..., None]  # (H, W, 1)
    first, second = (np.array(paint.random_colour(rng), dtype=np.float64) for _ in range(2))
    canvas = Image.fromarray(paint.as_bytes(first * light + second * (1 - light)))
    for _ in range(int(rng.integers(3, 12))):
        _add_object(rng, canvas)
    canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.002, 0.015) * size_px))
    texture = _clouds(rng, size_px, (16, 32, 64), (0.6, 0.8, 1.0))[..., None] - 0.5
    grain = rng.normal(0.0, rng.uniform(2, 14), (size_px, size_px, 1))
    return Image.fromarray(paint.as_bytes(np.asarray(canvas) * (1 + rng.uniform(0.1, 0.6) * texture) + grain))


def _part(rng: np.random.Generator, photos: list[Image.Image], size_px: int, smallest: float) -> Image.Image:
    """A random square of a photograph, as wide as at least `smallest` of its shorter side."""
    image = photos[rng.integers(len(photos))]
    side = int(rng.uniform(smallest, 1.0) * min(image.size))
    x, y = (int(rng.integers(0, whole - side + 1)) for whole in image.size)
    return image.crop((x, y, x + side, y + side)).resize((size_px, size_px), Image.Resampling.BICUBIC)


def _recoloured(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """At times mirrored or turned, with the channels in another order, and lighter or darker in each of them."""
    pixels = np.asarray(image, dtype=np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if rng.random() < 0.3:
        pixels = np.rot90(pixels, int(rng.integers(1, 4)))
    if rng.random() < 0.5:
        pixels = pixels[..., rng.permutation(3)]
    gamma, gain = rng.uniform(0.6, 1.6, 3), rng.uniform(0.7, 1.2, 3)
    return Image.fromarray(paint.as_bytes(255 * gain * (pixels / 255) ** gamma))


@cache
def _test_photos() -> list[Image.Image]:
    """scikit-learn's photographs: a temple and a flower."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


@cache
def _training_photos() -> list[Image.Image]:
    from skimage import data

    return [Image.fromarray(getattr(data, name)()).convert("RGB") for name in _PHOTOS]


def noise(rng: np.random.Generator, size_px: int) -> Image.Image:
    """Random pixels, coarse or fine, coloured or grey."""
    side = int(rng.choice([size_px, size_px // 2, size_px // 7, size_px // 14]))
    channels = 3 if rng.random() < 0.6 else 1
    pixels = rng.integers(0, 256, (side, side, channels), dtype=np.uint8)
    if rng.random() < 0.3:
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    resample = Image.Resampling.NEAREST if rng.random() < 0.7 else Image.Resampling.BICUBIC
    return Image.fromarray(np.broadcast_to(pixels, (side, side, 3)).copy()).resize((size_px, size_px), resample)


def page(rng: np.random.Generator, size_px: int, fonts: list[str]) -> Image.Image:
    """Lines of small print in one or two columns, sometimes with a heading."""
    paper = paint.pale_colour(rng)
    image = Image.new("RGB", (size_px, size_px), paper)
    draw = ImageDraw.Draw(image)
    ink = paint.far_colour(rng, [paper], 250.0)
    path = fonts[rng.integers(len(fonts))]
    height = rng.uniform(0.025, 0.055) * size_px
    top, margin = rng.uniform(0.02, 0.12) * size_px, rng.uniform(0.03, 0.1) * size_px
    if rng.random() < 0.5:
        draw.text((margin, top), _line(rng, 3), font=_font(path, 1.7 * height), fill=ink)
        top += 3 * height
    num_columns = 1 if rng.random() < 0.7 else 2
    width = (size_px - margin * (num_columns + 1)) / num_columns
    font = _font(path, height)
    for column in range(num_columns):
        left = margin + column * (width + margin)
        for y in np.arange(top, size_px - margin, 1.5 * height):
            draw.text((left, y), _fitting_line(rng, font, width), font=font, fill=ink)
    return image.rotate(rng.uniform(-4, 4), Image.Resampling.BILINEAR, fillcolor=paper)


def _add_object(rng: np.random.Generator, canvas: Image.Image) -> None:
    """A blob or a bar with a light and a dark side."""
    size = canvas.width
    colour = paint.random_colour(rng)
    x, y = rng.uniform(-0.1, 1.0, 2) * size
    width, height = rng.uniform(0.08, 0.7, 2) * size
    draw = ImageDraw.Draw(canvas)
    for part in range(4):
        shade = tuple(int(channel * (0.6 + 0.13 * part)) for channel in colour)
        inset = part * 0.06 * min(width, height)
        box = (x + inset, y + inset, x + width - 1.4 * inset, y + height - 1.4 * inset)
        (draw.ellipse if rng.random() < 0.6 else draw.rectangle)(box, fill=shade)


def _clouds(
    rng: np.random.Generator, size_px: int, sides: tuple[int, ...], weights: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """(H, W) in 0..1: random values on grids of some sizes, smoothed and summed."""
    total = np.zeros((size_px, size_px))
    for side, weight in zip(sides, weights):
        grid = Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))
        total += weight * np.asarray(grid.resize((size_px, size_px), Image.Resampling.BICUBIC)) / 255
    return total / sum(weights)


def _line(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(VOCABULARY[i] for i in rng.integers(0, len(VOCABULARY), num_words))


def _fitting_line(rng: np.random.Generator, font: ImageFont.FreeTypeFont, width: float) -> str:
    line = _line(rng, 14)
    num_fitting = int(len(line) * width / font.getlength(line))  # about: measuring a line takes as long as drawing it
    return line if num_fitting >= len(line) else line[:num_fitting].rpartition(" ")[0]


def _font(path: str, height: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, max(6, round(height)), layout_engine=ImageFont.Layout.BASIC)
