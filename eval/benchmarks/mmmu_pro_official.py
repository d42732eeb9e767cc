"""From a response to an answer, as MMMU-Pro's official scorer decides. Pure functions.

Source: the behaviour of mmmu-pro/evaluate.py in MMMU-Benchmark/MMMU at bb0b95a, whose draws have no seed. Letters are
those of the question's own options, however many it has, and any character of a response may be one. It stops with an
error where a response quotes no letter and an option is no text (a list, a number); here such an option is looked for as
Python writes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .mmmu_official import Draw, padded, parse_letter

_MARK = "Answer:"


def parse_choice(response: str, options: Mapping[str, str], draw: Draw) -> str:
    """The letter that a response means. `options`: letter -> text, in order."""
    if _MARK in response:
        behind = response.rsplit(_MARK, 1)[1]
        named = [letter for letter in options if letter in behind]
        if len(named) == 1:
            return named[0]
    # The last two forms are looked for where a letter stands alone.
    forms = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
    return parse_letter(padded(response), options, forms, draw)
