"""Prompt-lookup decoding: drafts of the next tokens, copied from where the last few stood before.

It pays where answers repeat the prompt or themselves. A draft is verified in one forward pass, which costs little more
than a single token's where reading the weights takes longest.
"""

from __future__ import annotations

from collections.abc import Sequence

_NGRAM_TOKENS = 3  # shorter ones match by chance
_FIRST_LENGTH = 2
_PAUSE_TOKENS = 16  # without drafts, after one of which nothing was accepted


class PromptLookup:
    """Drafts for one request.

    The length of drafts doubles while all of them are accepted, and halves when few are.

    Args:
        token_ids: of the prompt.
        never: ids that are not drafted: the image token.
    """

    def __init__(self, token_ids: Sequence[int], never: int) -> None:
        self._tokens: list[int] = []
        self._next_of: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after its last occurrence
        self._never = never
        self._length = _FIRST_LENGTH
        self._pause = 0
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens; the n-gram at the end is found from the next token on."""
        for token in token_ids:
            if len(self._tokens) >= _NGRAM_TOKENS:
                self._next_of[tuple(self._tokens[-_NGRAM_TOKENS:])] = len(self._tokens)
            self._tokens.append(token)
        self._pause = max(0, self._pause - len(token_ids))

    def draft(self, max_tokens: int) -> list[int]:
        """The tokens that may come next, often none."""
        start = self._next_of.get(tuple(self._tokens[-_NGRAM_TOKENS:]))
        if self._pause or start is None:
            return []
        tokens = self._tokens[start : start + min(self._length, max_tokens)]
        return tokens[: tokens.index(self._never)] if self._never in tokens else tokens

    def record(self, num_drafted: int, num_accepted: int) -> None:
        """So many tokens of a draft were right."""
        if num_accepted == num_drafted:
            self._length = 2 * self._length
        elif num_accepted * 2 < num_drafted:
            self._length = max(1, self._length // 2)
        if not num_accepted:
            self._pause = _PAUSE_TOKENS
