"""From a response to an answer without luck or accident: the second protocol, the same for every benchmark.

Nothing is drawn; what means nothing is wrong, and counted. Full-width characters, marks around a letter and line ends
do not matter; what is denied ("not B", "B is wrong", "不是B") is not said; the article A and the pronoun I are no
letters; texts count as whole words. Pure functions; called by the benchmarks' files; calls nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

TRUE, FALSE = "对", "错"
_MARKUP = re.compile(r"\\(?:boxed|text|mathrm|textbf)\b|[*_`${}]")
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|rather than|instead of|except|unlike|excluding|rule out|without)|n't"
    r"|不是|并非|而非|不选|不应选|不能选|排除|不等于|不为|除了)"
    r"\s*(?:(?:the|a|an|be|to be|option|choice|answer)\b|选项)?\W*$",
    re.IGNORECASE,
)
_DENIED_BEHIND = re.compile(
    r"^\W*(?:选?项|option)?\W*(?:"
    r"(?:is|are|was|were|would be|must be|seems?)\s+(?:\w+ly\s+)?"
    r"(?:wrong|incorrect|false|not|excluded|ruled out|impossible)"
    r"|isn't|aren't|can't|cannot|doesn't|can be (?:excluded|ruled out)"
    r"|是?(?:错|不对|不正确|不符|不成立|被?排除))",
    re.IGNORECASE,
)
_STATED = (
    r"(?:\b(?:answer|choose|select|pick|conclusion)|答案|(?<!不)(?<!不应)(?<!不能)应?选择?|故选|因此)"
    r"(?:\s*(?:is|are|would be|should be|must be|has to be|therefore|:|=|应?该?是|应?为|应?选|项|选项"
    r"|option|choice|the|with)){0,4}\s*[\"'(\[]*([LETTERS](?:[)\]\s,、和与]*(?:and\s+)?[(\[]*[LETTERS])*)(?![A-Za-z'’])"
)
_SENTENCE_END = re.compile(r"[。\n!?;；]|\.(?:\s|$)")
_UNDECIDED = re.compile(
    r"是否正确|是否成立|是否|正确与否|正确性|正确的?(?:答案|选项)|对错|对不对|(?:是)?对(?:的)?还是(?:是)?错(?:的)?|否认|否则"
    r"|(?:相|绝|反|面|针|应|核|校)对|对(?:于|应|象|比|称|立|话|方|待|抗|数|手|其|该|此|这|那|他|她|它|我|人)"
    r"|\b(?:true|right|correct) or (?:false|wrong|incorrect)\b",
    re.IGNORECASE,
)
_NEGATIVE = (
    r"不正确|不准确|不对|不合适|不成立|不符合?|并不?是|并非|不是|错误|错|否"
    r"|\b(?:not (?:true|correct|right)|false|incorrect|wrong|no)\b|×|✗"
)
_POSITIVE = r"正确|准确|对|是的|成立|符合|肯定|\b(?:true|correct|right|yes)\b|√|✓"
_VERDICT = re.compile(f"{_NEGATIVE}|{_POSITIVE}", re.IGNORECASE)
_CONCLUSION = re.compile(r"所以|因此|综上|故|答案|结论|therefore|thus|answer|conclusion", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"无法(?:确定|判断|给出|得出|回答|证实)|(?:没有|缺乏|不|未)(?:提供)?足够|不能确定"
    r"|cannot (?:be )?determine|not enough information|insufficient information",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][+-]?\d+)?(?![A-Za-z_]*\d)"
)


def choice(response: str, options: Mapping[str, str], several: bool = False) -> str | None:
    """The letter that a response states, or, where a question may have several, the letters in order; else None."""
    text = _plain(response)
    letters = "".join(options)
    bare = re.fullmatch(rf"\W*[{letters}](?:[\W_]*(?:and|和|与)?[\W_]*[{letters}])*\W*", text)
    if bare:
        return _joined(re.findall(rf"[{letters}]", text), several)
    stated = [
        found
        for found in re.finditer(_STATED.replace("LETTERS", letters), text, re.IGNORECASE)
        if _holds(text, found, 1)
    ]
    stated = [found for found in stated if not set(found[1]) & set(letters.lower()) - set(letters)]
    if stated:
        said = _joined(re.findall(rf"[{letters}]", stated[-1][1]), several)
        if said:
            return said
    if several:
        lines = [re.match(rf"\W*[(\[]\s*([{letters}])\s*[)\]]", line) for line in text.splitlines() if line.strip()]
        if lines and all(lines):
            return _joined([found[1] for found in lines if found], several)
    named = {found[0].strip("()[] ") for found in _mentions(text, letters) if _holds(text, found)}
    if len(named) == 1:
        return named.pop()
    return None if named else _quoted(text, options)


def text_or_number(response: str, golds: Sequence[str]) -> tuple[list[str], bool]:
    """(what was said, whether a gold is part of it): whole words, or an equal number to two decimals.

    Of a response of many sentences those count that conclude; where none does, the last.
    """
    pieces = [piece for piece in _conclusions(_plain(response)) if not _UNKNOWN.search(piece)]
    return pieces, any(_says(piece, gold) for piece in pieces for gold in golds)


def judgement(response: str) -> str | None:
    """对, 错, or None where the response says neither or both.

    A verdict that it begins with decides; else all clauses must agree, or those that conclude.
    """
    text = _UNDECIDED.sub(" ", _plain(response))
    leading = _VERDICT.match(text.lstrip(" \"'“”(（:："))
    if leading:
        return _verdict(leading[0])
    if _UNKNOWN.search(text):
        return None
    clauses = [clause for clause in _SENTENCE_END.split(text) if clause.strip()]
    concluding = [clause for clause in clauses if _CONCLUSION.search(clause)]
    for chosen in (clauses, concluding, concluding[-1:]):
        verdicts = {_verdict(word) for clause in chosen for word in _VERDICT.findall(clause)}
        if len(verdicts) == 1:
            return verdicts.pop()
    return None


def _plain(response: str) -> str:
    return _MARKUP.sub(" ", unicodedata.normalize("NFKC", response)).strip()


def _joined(letters: Iterable[str], several: bool) -> str | None:
    found = sorted(set(letters))
    return "".join(found) if found and (several or len(found) == 1) else None


def _mentions(text: str, letters: str) -> list[re.Match[str]]:
    """Letters in brackets, or capitals that stand alone and are neither an article nor a pronoun."""
    found = list(re.finditer(rf"[(\[]\s*[{letters}]\s*[)\]]", text))
    if found:
        return found
    alone = re.finditer(rf"(?<![A-Za-z0-9'’\-])[{letters}](?![A-Za-z0-9'’\-])", text)
    return [match for match in alone if not _is_word(match[0], text[match.end() :])]


def _is_word(letter: str, behind: str) -> bool:
    return (
        letter in "AI"
        and re.match(r"\s+[a-z]", behind) is not None
        and not re.match(r"\s+(?:is|are|because|since|and|or|as|would|should|seems)\b", behind if letter == "A" else "")
    )


def _holds(text: str, found: re.Match[str], group: int = 0) -> bool:
    """Whether a mention is not denied by the words around it."""
    denied = _DENIED_BEFORE.search(text[: found.start(group)]) or _DENIED_BEHIND.match(text[found.end(group) :])
    before = _DENIED_BEFORE.search(text[: found.start()])
    return not denied and not before


def _quoted(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text is said; one that is part of another said option does not count."""
    said = {letter: _plain(option) for letter, option in options.items() if _says(text, option)}
    longest = [
        letter
        for letter, option in said.items()
        if not any(option.lower() in other.lower() and option != other for other in said.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _says(text: str, gold: str) -> bool:
    gold = _plain(gold)
    number = _as_number(gold)
    if number is not None:
        return any(_as_number(found[0]) == number and _holds(text, found) for found in _NUMBER.finditer(text))
    if not gold:
        return False
    left, right = (r"(?<![A-Za-z0-9])" if gold[0].isascii() else "", r"(?![A-Za-z0-9])" if gold[-1].isascii() else "")
    return any(_holds(text, found) for found in re.finditer(left + re.escape(gold) + right, text, re.IGNORECASE))


def _as_number(text: str) -> float | None:
    try:
        return round(float(text.replace(",", "").replace("−", "-").rstrip("%")), 2)
    except ValueError:
        return None


def _conclusions(text: str) -> list[str]:
    clauses = [clause.strip() for clause in _SENTENCE_END.split(text) if clause.strip()]
    return [clause for clause in clauses if _CONCLUSION.search(clause)] or clauses[-1:]


def _verdict(word: str) -> str:
    return FALSE if re.fullmatch(_NEGATIVE, word, re.IGNORECASE) else TRUE
