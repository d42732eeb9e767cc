"""The classes of nano's images with English and Chinese names: things, flags, digits, letters, shapes, colours.

`LABELS` is the one label space of the tower's pretraining: background first, then things, flags, digits, letters and
every colour of every shape. Things are keyed by their English name, flags by country code.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

Lang = Literal["en", "zh"]
NamedCategory = Literal["thing", "flag"]
LANGS: tuple[Lang, Lang] = ("en", "zh")
CLASSES_PATH = Path(__file__).with_name("classes.tsv")


@dataclass(frozen=True)
class Named:
    """A class with its names. `article` is "a", "an", "the" or "" and stands before `en` inside a sentence."""

    category: NamedCategory
    key: str
    en: str
    article: str
    zh: str
    icons: tuple[str, ...]  # icon names in the artwork packages; for things the first is the one tested on
    shares: tuple[str, ...]  # codes of territories that fly the very same flag
    alike: tuple[str, ...]  # keys of other classes that look the same but for proportions or a shade

    @property
    def en_with_article(self) -> str:
        return f"{self.article} {self.en}".lstrip()


def read_classes(path: Path = CLASSES_PATH) -> list[Named]:
    """The classes of `classes.tsv`, in file order."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [
            Named(
                category=cast(NamedCategory, row["kind"]),
                key=row["key"],
                en=row["english"],
                article=row["article"],
                zh=row["chinese"],
                icons=tuple(row["icons"].split()),
                shares=tuple(row["shares"].split()),
                alike=tuple(row["alike"].split()),
            )
            for row in csv.DictReader(lines, delimiter="\t")
        ]


_CLASSES = read_classes()
THINGS: dict[str, Named] = {named.key: named for named in _CLASSES if named.category == "thing"}
FLAGS: dict[str, Named] = {named.key: named for named in _CLASSES if named.category == "flag"}
DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHAPES: dict[str, str] = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "heart": "心形",
    "diamond": "菱形",
    "cross": "十字形",
}
COLOURS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "red": ("红色", (220, 38, 38)),
    "orange": ("橙色", (249, 128, 22)),
    "yellow": ("黄色", (250, 210, 30)),
    "green": ("绿色", (34, 160, 70)),
    "blue": ("蓝色", (40, 90, 220)),
    "purple": ("紫色", (135, 50, 190)),
    "pink": ("粉色", (248, 130, 190)),
    "black": ("黑色", (18, 18, 20)),
    "white": ("白色", (250, 250, 250)),
}

BACKGROUND = "background"
UNKNOWN = "unknown"  # a thing without a name here
LABELS: list[str] = [
    BACKGROUND,
    *(f"thing {key}" for key in THINGS),
    *(f"flag {key}" for key in FLAGS),
    *(f"digit {digit}" for digit in DIGITS),
    *(f"letter {letter}" for letter in LETTERS),
    *(f"shape {colour} {shape}" for shape in SHAPES for colour in COLOURS),
    UNKNOWN,
]
LABEL_IDS: dict[str, int] = {label: index for index, label in enumerate(LABELS)}
