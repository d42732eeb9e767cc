"""Phrases for items: nouns, articles, plurals, numbers, lists, in English and Chinese."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from train.nano.data.labels import COLOURS, FLAGS, SHAPES, THINGS, Lang
from train.nano.data.sample import Item

_NUMBERS_EN = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NUMBERS_ZH = ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九")
COMMAS: dict[Lang, str] = {"en": ", ", "zh": "，"}
LETTERS = "ABCD"  # of options
MAX_ITEMS = len(_NUMBERS_EN) - 1  # that are counted
_PLURALS = {
    "mouse": "mice",
    "fish": "fish",
    "octopus": "octopuses",
    "maple leaf": "maple leaves",
    "grapes": "grapes",
    "cherries": "cherries",
}


def count_phrase(number: int, lang: Lang) -> tuple[str, str]:
    """The answer to "how many", and its core: ("There are two.", "two")"""
    if lang == "zh":
        return f"有{_NUMBERS_ZH[number]}个。", f"{_NUMBERS_ZH[number]}个"
    return ("There is one." if number == 1 else f"There are {_NUMBERS_EN[number]}."), _NUMBERS_EN[number]


def several(item: Item, count: int, lang: Lang) -> str:
    if lang == "zh":
        return f"{_NUMBERS_ZH[count]}个{noun(item, 'zh')}" if count > 1 else noun(item, "zh")
    return f"{_NUMBERS_EN[count]} {plural(noun(item, 'en'))}" if count > 1 else with_article(item)


def listed(items: list[Item], lang: Lang) -> str:
    return joined([with_article(item) if lang == "en" else noun(item, "zh") for item in items], lang)


def entries(pairs: Iterable[tuple[str, str]], lang: Lang) -> str:
    """What belongs to each of several names: "dog C5, cat E1"."""
    space = " " if lang == "en" else ""
    return COMMAS[lang].join(f"{name}{space}{value}" for name, value in pairs)


def lettered(options: Iterable[str]) -> str:
    """Each option on a line of its own, after its letter in brackets."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))


def joined(parts: list[str], lang: Lang) -> str:
    and_, comma = (" and ", ", ") if lang == "en" else ("和", "、")
    return comma.join(parts[:-1]) + and_ + parts[-1] if len(parts) > 1 else parts[0]


def class_of(item: Item) -> str:
    return f"{item.category} {item.name}"


def unique_items(items: Sequence[Item]) -> list[Item]:
    """Those that no other item looks like."""
    counts = Counter(item.label for item in items)
    return [item for item in items if counts[item.label] == 1]


def uncoloured(item: Item) -> Item:
    return Item(item.category, item.name, item.box)


def is_countable(item: Item) -> bool:
    return item.category == "shape" or bool(THINGS[item.name].article)


def noun(item: Item, lang: Lang) -> str:
    """An item's bare name: red circle, dog; 红色的圆形, 狗"""
    if item.category == "shape":
        if lang == "en":
            return f"{item.colour} {item.name}" if item.colour else item.name
        return f"{COLOURS[item.colour][0]}的{SHAPES[item.name]}" if item.colour else SHAPES[item.name]
    named = (THINGS if item.category == "thing" else FLAGS)[item.name]
    return named.en if lang == "en" else named.zh


def shown(item: Item, lang: Lang) -> str:
    if item.category == "flag":
        return f"the flag of {FLAGS[item.name].en_with_article}" if lang == "en" else f"{FLAGS[item.name].zh}的国旗"
    return with_article(item) if lang == "en" else noun(item, "zh")


def with_article(item: Item) -> str:
    return a_or_an(noun(item, "en")) if item.category == "shape" else THINGS[item.name].en_with_article


def a_or_an(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "sh", "ch")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun in ("tomato",) else "s")


def sentence(text: str, lang: Lang = "en") -> str:
    return text[0].upper() + text[1:] + "." if lang == "en" else text + "。"
