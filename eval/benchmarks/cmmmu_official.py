"""From a response to an answer, and whether it is right, as CMMMU's official scorer decides: every quirk included.

Pure functions; `random_guess` is called where no rule decides.
Source: the behaviour of CMMMU-Benchmark/CMMMU at e1ba8832.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from .mmmu_official import RandomGuess, Value, key_pieces, padded

LETTERS = "ABCD"
TRUE, FALSE = "对", "错"
_TRUE_FALSE_PHRASES = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
_BLANK_PHRASES = ("是", "为", "所以", "等于", "方案", "选择", "正确答案", "因此", "最后", "答案", "结果")
_UNDECIDED = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
_POSITIVE = ("正确", "对", "准确", "肯定")
_NEGATIVE = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错")
_SENTENCE_END = re.compile(r"。|\n")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:，\d{3})+")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+)(?![eE][+-]?\d+)(?!，)")


def parse_choice(response: str, options: Mapping[str, str], random_guess: RandomGuess) -> str | None:
    """The letter or letters that a response names, in order; None for an empty response, which is wrong."""
    if not response:
        return None
    text = padded(response)
    for pattern in ("({})", "{}"):
        counts = {letter: text.count(pattern.format(letter)) for letter in LETTERS}
        if any(counts.values()):
            return _most(counts)
    counts = {letter: text.count(options[letter]) if options.get(letter) else 0 for letter in LETTERS}
    return _most(counts) if any(counts.values()) else random_guess(list(LETTERS))


def _most(counts: Mapping[str, int]) -> str:
    return "".join(letter for letter, count in counts.items() if count == max(counts.values()))


def parse_true_false(response: str, random_guess: RandomGuess) -> str:
    """对 or 错."""
    whole = _whole(response)
    pieces = key_pieces(_SENTENCE_END.split(whole), _TRUE_FALSE_PHRASES, in_last=()) or [whole]
    decided = [piece for piece in dict.fromkeys(pieces) if not any(word in piece for word in _UNDECIDED)]
    positive = [any(word in piece for word in _POSITIVE) for piece in decided]
    negative = [not yes and any(word in piece for word in _NEGATIVE) for yes, piece in zip(positive, decided)]
    if sum(positive) == sum(negative):
        return random_guess([TRUE, FALSE])
    return TRUE if sum(positive) > sum(negative) else FALSE


def parse_blank(response: str, gold: str) -> list[Value]:
    """Every value that a response to a blank may state, normalized by the gold's length and letters."""
    whole = _whole(response)
    pieces = key_pieces(_SENTENCE_END.split(whole), _BLANK_PHRASES) or [whole]
    candidates = [*pieces, *(number for piece in pieces for number in _numbers(piece))]
    return [value for text in candidates for value in normalize(text, gold)]


def normalize(text: str, gold: str) -> list[Value]:
    """A number rounded to two places, or the text; nothing where it is much longer than the gold or more Latin."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        if len(text) > len(gold) + 20 or _num_latin(text) > _num_latin(gold) + 2:
            return []
        return [text]


def is_blank_correct(parsed: Sequence[Value], gold: str) -> bool:
    """Whether any parsed value contains the gold text or equals the gold number."""
    golds = normalize(gold, gold)
    return any(
        (expected in value if isinstance(expected, str) else False) if isinstance(value, str) else value == expected
        for value in parsed
        for expected in golds
    )


def _whole(response: str) -> str:
    return response.strip("。").strip()


def _numbers(text: str) -> list[str]:
    return [number for pattern in (_THOUSANDS, _SCIENTIFIC, _PLAIN) for number in pattern.findall(text)]


def _num_latin(text: str) -> int:
    return len(re.findall(r"[a-zA-Z]", text))
