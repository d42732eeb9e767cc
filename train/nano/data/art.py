"""Artwork as rasters: the SVGs of the pinned packages rendered once, cached, and loaded in a second.

The cache is two files: `art.npy`, every RGBA raster flattened into one uint8 array, and `art.json`, where each lies.
Training artwork and held-out artwork are distinguished by the package they come from and never mixed.
"""

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image, ImageDraw

from train.nano.data.icon_sets import IconifySet, SvgFiles
from train.nano.data.labels import FLAGS, LABELS, THINGS, UNKNOWN
from train.nano.data.packages import FLAG_ART, FONTS, MORE_THING_ART, THING_ART, Package, Split, fetch, read_members
from train.nano.data.unknown import unknown_icons
from yi_vl.files import atomic_path, write_text

# circle-flags gives some country codes to languages: the country's disc has another name, or (Argentina) there is none
# and the held-out flag is twemoji's.
_CIRCLE_FLAG_NAMES = {"ie": "lang-ga", "io": "dg", "la": "lo"}
_WITHOUT_CIRCLE_FLAG = {"ar"}

LONGER_SIDE_PX = 192
_VERSION = 4  # without copies
_CENTRE_PX, _COPY_DISTANCE = 64, 10.0  # mean difference of two drawings, of 255
DATA_DIR = Path("data/nano")
ICONS_PATH = Path(__file__).with_name("icons.tsv")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """One raster of one class: `style` names its package, `pixels` is (H, W, 4) uint8, cropped to its ink.

    A glyph is drawn with one ink: black here, and white where it encloses something.
    """

    style: str
    pixels: npt.NDArray[np.uint8]
    is_glyph: bool = False


@dataclass(frozen=True)
class Art:
    """Drawings by label ("thing dog", "flag jp"), and font files by split: everything `compose` draws from."""

    train: dict[str, list[Drawing]]
    heldout: dict[str, list[Drawing]]
    fonts: dict[Split, list[Path]] = field(default_factory=lambda: {"train": [], "test": []})

    def of(self, split: Split) -> dict[str, list[Drawing]]:
        """The drawings a split may use."""
        return self.train if split == "train" else self.heldout


def load_art(data_dir: Path = DATA_DIR) -> Art:
    """The cached artwork and fonts; rendered (and first downloaded) when the cache is not there or an older one."""
    index = _read_index(data_dir)
    if index.get("version") != _VERSION:
        render_art(data_dir)
        index = _read_index(data_dir)
    flat = np.load(data_dir / "art.npy", mmap_mode="r")
    art = Art(train={}, heldout={}, fonts={"train": [], "test": []})
    for row in index["drawings"]:
        height, width = row["height"], row["width"]
        pixels = flat[row["offset"] : row["offset"] + height * width * 4].reshape(height, width, 4)
        drawing = Drawing(row["style"], pixels, row["is_glyph"])
        art.of(row["split"]).setdefault(row["label"], []).append(drawing)
    for name, package in FONTS.items():
        art.fonts[package.split].extend(sorted((data_dir / "fonts").glob(f"{name}-latin-*.woff2")))
    return art


def render_art(data_dir: Path) -> None:
    """Fetch every package, unpack the fonts, render all drawings and write the cache; the index comes last."""
    _unpack_fonts(data_dir)
    rendered: list[tuple[dict[str, Any], npt.NDArray[np.uint8]]] = []
    num_failed = 0
    for label, style, split, svg in _all_svgs(data_dir / "npm"):
        pixels = render(svg)
        if pixels is None:
            num_failed += 1
            _logger.warning("resvg could not draw %s of %s; skipped", label, style)
            continue
        is_glyph = not pixels[pixels[..., 3] > 0][:, :3].any()
        if is_glyph and label.startswith("flag"):
            continue  # a flag is its colours
        if is_glyph:
            pixels = fill_enclosed(pixels)
        rendered.append(({"label": label, "style": style, "split": split, "is_glyph": is_glyph}, pixels))
    kept = without_copies(rendered)
    offset = 0
    for row, pixels in kept:
        row |= {"offset": offset, "height": pixels.shape[0], "width": pixels.shape[1]}
        offset += pixels.size
    counts = {"num_failed": num_failed, "num_copies": len(rendered) - len(kept)}
    _logger.info("%d drawings rendered, %s", len(kept), counts)
    with atomic_path(data_dir / "art.npy") as partial, partial.open("wb") as file:  # the old one may be mapped
        np.save(file, np.concatenate([pixels.reshape(-1) for _, pixels in kept]))
    index = {"version": _VERSION, "drawings": [row for row, _ in kept], **counts}
    write_text(data_dir / "art.json", json.dumps(index))


def without_copies(
    rendered: list[tuple[dict[str, Any], npt.NDArray[np.uint8]]],
) -> list[tuple[dict[str, Any], npt.NDArray[np.uint8]]]:
    """The drawings, (row of the index, (H, W, 4) pixels), less those of training that are nearly a held-out one."""
    heldout: dict[str, list[npt.NDArray[np.float32]]] = {}
    for row, pixels in rendered:
        if row["split"] == "test":
            heldout.setdefault(row["label"], []).append(_centre(pixels))

    def is_copy(row: dict[str, Any], pixels: npt.NDArray[np.uint8]) -> bool:
        if row["split"] == "test" or row["label"] not in heldout:
            return False
        centre = _centre(pixels)
        return any(np.abs(centre - other).mean() <= _COPY_DISTANCE for other in heldout[row["label"]])

    return [(row, pixels) for row, pixels in rendered if not is_copy(row, pixels)]


def _centre(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(H, W, 4) -> (M, 3): the colours in the central disc, which a flag cut round has as well, laid on grey."""
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    ground = Image.new("RGBA", (_CENTRE_PX, _CENTRE_PX), (128, 128, 128, 255))
    ground.alpha_composite(image.crop((left, top, left + side, top + side)).resize(ground.size))
    away = np.hypot(*(np.mgrid[:_CENTRE_PX, :_CENTRE_PX] - (_CENTRE_PX - 1) / 2))
    return np.asarray(ground, dtype=np.float32)[away < 0.45 * _CENTRE_PX, :3]


def _read_index(data_dir: Path) -> dict[str, Any]:
    path = data_dir / "art.json"
    return cast(dict[str, Any], json.loads(path.read_text())) if path.exists() else {}


def render(svg: str) -> npt.NDArray[np.uint8] | None:
    """(H, W, 4) raster of an SVG cropped to its ink, or None where resvg fails or draws nothing."""
    try:
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=LONGER_SIDE_PX, skip_system_fonts=True))
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    return None if box is None else np.asarray(image.crop(box))


def fill_enclosed(glyph: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(H, W, 4) black ink on nothing -> the same on the white of what it encloses."""
    ink = glyph[..., 3]
    bordered = Image.fromarray(np.pad(np.where(ink > 127, 255, 0).astype(np.uint8), 1)).copy()  # not read-only
    ImageDraw.floodfill(bordered, (0, 0), 128)
    is_enclosed = np.asarray(bordered)[1:-1, 1:-1] != 128
    grey = np.where(is_enclosed, 255 - ink, 0)
    return np.dstack([grey, grey, grey, np.where(is_enclosed, 255, ink)]).astype(np.uint8)


def _unpack_fonts(data_dir: Path) -> None:
    """Write the regular and the bold Latin file of every font package to `data_dir/fonts`."""
    folder = data_dir / "fonts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, package in FONTS.items():
        files = [f"files/{name}-latin-{weight}-normal.woff2" for weight in (400, 700)]
        for member, content in read_members(fetch(package, data_dir / "npm"), files).items():
            (folder / Path(member).name).write_bytes(content)


def _all_svgs(npm_dir: Path) -> list[tuple[str, str, Split, str]]:
    """(label, style, split, svg) of every drawing of every class."""
    drawings: list[tuple[str, str, Split, str]] = []
    for style, package in THING_ART.items():
        icons = IconifySet(package, npm_dir)
        for named in THINGS.values():
            names = named.icons if package.split == "train" else named.icons[:1]
            drawings += [(f"thing {named.key}", style, package.split, svg) for svg in icons.svgs(names)]
        for named in FLAGS.values():  # emojione draws all flags, noto-v1 a few
            if package.split == "train" or named.key in _WITHOUT_CIRCLE_FLAG:
                svgs = icons.svgs(named.icons)[:1]
                drawings += [(f"flag {named.key}", style, package.split, svg) for svg in svgs]
        drawings += [(UNKNOWN, style, package.split, svg) for svg in icons.svgs(unknown_icons(package.split))]
    for style, names_of in read_icons().items():
        package = MORE_THING_ART[style]
        icons = IconifySet(package, npm_dir)
        for key, names in names_of.items():
            drawings += [(f"thing {key}", style, package.split, svg) for svg in icons.svgs(names)]
        drawings += [(UNKNOWN, style, package.split, svg) for svg in icons.svgs(unknown_icons(package.split))]
    for style, package in FLAG_ART.items():
        for key, file_style, svg in _flag_svgs(style, package, npm_dir):
            drawings.append((f"flag {key}", file_style, package.split, svg))
    known = set(LABELS)
    assert all(label in known for label, *_ in drawings)
    return drawings


def _flag_svgs(style: str, package: Package, npm_dir: Path) -> Iterator[tuple[str, str, str]]:
    """(key, style, svg) of every flag that a set of flags has, in each of its shapes."""
    names = _flag_names(style)
    has_files = style == "country-flag-icons"
    icons = SvgFiles(package, npm_dir, names.values()) if has_files else IconifySet(package, npm_dir)
    for (key, shape), name in names.items():
        for svg in icons.svgs([name]):
            yield key, f"{style}-{shape}" if shape else style, svg


def _flag_names(style: str) -> dict[tuple[str, str], str]:
    """{(key, shape): icon} of a set of flags."""
    if style == "flag":
        return {(key, shape): f"{key}-{shape}" for key in FLAGS for shape in ("4x3", "1x1")}
    if style == "country-flag-icons":  # "3x2/JP", "1x1/GB-ENG", "1x1/AC"
        return {(key, shape): f"{shape}/{key.removeprefix('sh-').upper()}" for key in FLAGS for shape in ("3x2", "1x1")}
    if style == "circle-flags":
        return {(key, ""): _CIRCLE_FLAG_NAMES.get(key, key) for key in FLAGS if key not in _WITHOUT_CIRCLE_FLAG}
    return {(key, ""): key for key in FLAGS}


def read_icons(path: Path = ICONS_PATH) -> dict[str, dict[str, tuple[str, ...]]]:
    """Of each set in `MORE_THING_ART`, the icons of things, by their keys."""
    icons: dict[str, dict[str, tuple[str, ...]]] = {style: {} for style in MORE_THING_ART}
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            icons[row["set"]][row["thing"]] = tuple(row["icons"].split())
    return icons
