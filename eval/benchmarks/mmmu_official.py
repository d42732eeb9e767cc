"""From a response to an answer, and whether it is right, as MMMU's official scorer decides: every quirk included.

Pure functions. Where no rule finds an answer the official code guesses one from one seeded stream over all questions;
`random_guess` does that.
Source: the behaviour of MMMU-Benchmark/MMMU at bb0b95a.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

RandomGuess = Callable[[Sequence[str]], str]
Value = str | float

STRIPPED = ",.!?;:'"  # one after the other, once each
MANY_WORDS = 5  # with more than this a response may quote an option instead of naming its letter
_KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_LONE_MARKS = {":", ",", ".", "!", "?", ";", "'"}
_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")


def parse_choice(response: str, options: Mapping[str, str], random_guess: RandomGuess) -> str:
    """The letter that a response names. `options`: letter -> text, in order."""
    return parse_letter(padded(response), options, (("({})", "({})"), (" {} ", " {} ")), random_guess)


def parse_letter(
    text: str, options: Mapping[str, str], patterns: Sequence[tuple[str, str]], random_guess: RandomGuess
) -> str:
    """The letter named last, by the first pattern that names any, else that of the option quoted last.

    Args:
        patterns: of a letter's name, and of its last position; where the latter is not found, the first letter wins.
    """
    for name_pattern, position_pattern in patterns:
        letters = [letter for letter in options if name_pattern.format(letter) in text]
        if letters:
            return latest(letters, [text.rfind(position_pattern.format(letter)) for letter in letters])
    letters = quoted(text, options)
    if not letters:
        return random_guess(list(options))
    return latest(letters, [text.lower().rfind(options[letter].lower()) for letter in letters])


def padded(response: str) -> str:
    """Without marks at the ends, and with a space on both sides."""
    for mark in STRIPPED:
        response = response.strip(mark)
    return f" {response} "


def quoted(text: str, options: Mapping[str, str]) -> list[str]:
    """The letters of options whose text a long enough response holds."""
    if len(text.split()) <= MANY_WORDS:
        return []
    return [letter for letter, option in options.items() if option.lower() in text.lower()]


def latest(letters: Sequence[str], positions: Sequence[int]) -> str:
    """The letter that starts last; of those that start together, the first."""
    return letters[max(range(len(letters)), key=lambda index: (positions[index], -index))]


def parse_open(response: str) -> list[Value]:
    """Every value that an open response may state, normalized: strings and numbers."""
    whole = response.strip().strip(".").lower()
    pieces = key_pieces(whole.split("\n"), _KEY_PHRASES) or [whole]
    return [
        value for piece in [*pieces, *(n for piece in pieces for n in numbers(piece))] for value in normalize(piece)
    ]


def key_pieces(
    pieces: Sequence[str],
    phrases: Sequence[str],
    in_last: Sequence[str] = ("=",),
) -> list[str]:
    """Of each piece that has a phrase, the shortest tail behind one.

    Args:
        in_last: further phrases, that count in the last piece only.
    """
    tails = []
    for index, piece in enumerate(pieces):
        tail = ""
        for phrase in (*phrases, *(in_last if index == len(pieces) - 1 else ())):
            if phrase in piece:
                rest = piece.rsplit(phrase, 1)[1].strip()
                if not tail or len(rest) < len(tail):
                    tail = rest
        if tail and tail not in _LONE_MARKS:
            tails.append(tail)
    return tails


def numbers(text: str) -> list[str]:
    """Every number in a text, as written; parts of a number with commas count once more."""
    return [number for pattern in (_THOUSANDS, _SCIENTIFIC, _PLAIN) for number in pattern.findall(text)]


def normalize(text: str) -> list[Value]:
    """A number rounded to two places, or the text in lower case; a single character only counts with a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def is_open_correct(parsed: Sequence[Value], gold: str | Sequence[str]) -> bool:
    """Whether any parsed value contains a gold text or equals a gold number."""
    golds = [value for text in ([gold] if isinstance(gold, str) else gold) for value in normalize(text)]
    return any(_matches(value, gold) for value in parsed for gold in golds)


def _matches(value: Value, gold: Value) -> bool:
    if isinstance(value, str):
        return isinstance(gold, str) and gold in value
    return value == gold


def is_choice_correct(letter: str, gold: str | Sequence[str]) -> bool:
    """Equality with the gold, or membership where there are several."""
    return letter == gold if isinstance(gold, str) else letter in gold
