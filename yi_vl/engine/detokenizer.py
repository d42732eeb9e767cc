"""Tokens to text, incrementally: text is returned once no later token can change or remove it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from ..chat import STOP_STRING

FinishReason = Literal["stop", "length"]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode bytes to that are not, or not yet, UTF-8


class IncrementalDetokenizer:
    """One request's tokens in, its text out.

    Buffered are the first bytes of a character, what may be the beginning of a stop string, and white space that may be
    the answer's last. All returned texts together are the answer, without white space around it.

    Args:
        max_tokens: after so many the answer ends, `finish_reason` "length".
        stop_ids: tokens that end the answer, "stop"; as do `stop_strings`, wherever token boundaries fall.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        stop_ids: Collection[int],
        stop_strings: Sequence[str] = (STOP_STRING,),
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._stop_strings = stop_strings
        self._window: list[int] = []  # the last decoded tokens, as context, then those that are not decoded yet
        self._num_context = 0  # tokens of the window
        self._buffer = ""  # decoded, not returned yet
        self._has_text = False  # false while there has only been white space

    @property
    def num_tokens(self) -> int:
        """Generated so far, the one that ended the answer included."""
        return len(self.tokens)

    @property
    def num_left(self) -> int:
        """Tokens that the answer may still have."""
        return self._max_tokens - len(self.tokens)

    def add(self, token: int) -> str:
        """The text that this token makes final, often none. Tokens after the end are ignored."""
        if self.finish_reason:
            return ""
        self.tokens.append(token)
        if token in self._stop_ids:
            return self._finish("stop")
        self._buffer += self._decode_next(token)
        if not self._has_text:
            self._buffer = self._buffer.lstrip()
        stops = [start for stop in self._stop_strings if (start := self._buffer.find(stop)) >= 0]
        if stops:
            self._buffer = self._buffer[: min(stops)]
            return self._finish("stop")
        if self.num_tokens >= self._max_tokens:
            return self._finish("length")
        final = self._buffer[: len(self._buffer) - partial_stop_length(self._buffer, self._stop_strings)]
        return self._flush(final.rstrip())

    def _decode_next(self, token: int) -> str:
        """The text that a token adds to those before it, once its bytes are characters.

        Only the last few tokens are decoded, so that the time per token does not grow with the answer.
        """
        self._window.append(token)
        before = self._decode(self._window[: self._num_context])
        after = self._decode(self._window)
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _flush(self, text: str) -> str:
        self._buffer = self._buffer[len(text) :]
        self._has_text = self._has_text or bool(text)
        return text

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        return self._flush(self._buffer.rstrip())


def partial_stop_length(text: str, stop_strings: Sequence[str] = (STOP_STRING,)) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) - 1 for stop in stop_strings), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stop_strings):
            return length
    return 0
