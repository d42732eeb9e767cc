"""From a response to an answer, as MMMU-Pro's official scorer decides. Pure functions.

Source: the behaviour of mmmu-pro/evaluate.py in MMMU-Benchmark/MMMU at bb0b95a, whose guesses have no seed. Letters are
those of the question's own options, however many it has, and any character of a response may be one. It stops with an
error where a response quotes no letter and an option is no text (a list, a number); here such an option is looked for as
Python writes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .mmmu_official import RandomGuess, padded, parse_letter

_MARK = "Answer:"


def parse_choice(response: str, options: Mapping[str, str], random_guess: RandomGuess) -> str:
    """The letter that a response names. `options`: letter -> text, in order."""
    if _MARK in response:
        rest = response.rsplit(_MARK, 1)[1]
        named = [letter for letter in options if letter in rest]
        if len(named) == 1:
            return named[0]
    # By the last two a letter is looked for where it stands alone.
    patterns = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))
    return parse_letter(padded(response), options, patterns, random_guess)
