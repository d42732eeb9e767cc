"""Answers' text in vLLM without white space around it, as `yi_vl` gives them, also while they are streamed.

A model was trained on ` answer\\n###`: vLLM stops at the token of `###` (in the chat format chatml at `<|im_end|>`) by
generation_config.json, and returns the rest as it is. It has no hook for a model's own detokenizer, so the function
that makes one for each request is wrapped.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

from ..chat import ChatFormat, answer_header

_MARK = "yi_vl_answer_header"  # attribute of Yi-VL's tokenizer, by which vLLM's front end tells whose request it is
_HEADER_TOKENS = 16  # at least as many tokens as the header takes, whatever the tokenizer


class _AnswerDetokenizer(FastIncrementalDetokenizer):
    """Holds white space back until text follows it; the first is dropped, the last is never returned."""

    def __init__(self, tokenizer: Any, request: Any) -> None:
        super().__init__(tokenizer, request)
        self._held = ""

    def decode_next(self, next_token_id: int) -> str:
        """The text that a token makes final."""
        text = self._held + super().decode_next(next_token_id)
        if not self.output_text:
            text = text.lstrip()
        final = text.rstrip()
        self._held = text[len(final) :]
        return final


def mark_(tokenizer: Any, chat_format: ChatFormat) -> None:
    """Let answers that are decoded with this tokenizer be stripped."""
    setattr(tokenizer, _MARK, answer_header(chat_format))


def strip_answers() -> None:
    """Wrap vLLM's choice of a detokenizer; requests of other models, and raw completions, are left alone."""
    make = IncrementalDetokenizer.from_new_request
    if getattr(make, "is_wrapped", False):
        return

    def from_new_request(tokenizer: Any, request: Any) -> Any:
        header = getattr(tokenizer, _MARK, None)
        if header is not None and _is_chat(tokenizer, request, header):
            return _AnswerDetokenizer(tokenizer, request)
        return make(tokenizer, request)

    from_new_request.is_wrapped = True  # type: ignore[attr-defined]
    IncrementalDetokenizer.from_new_request = staticmethod(from_new_request)


def _is_chat(tokenizer: Any, request: Any, header: str) -> bool:
    """Whether an answer begins here: not in a completion of other text, nor in an answer that is continued."""
    end = (request.prompt_token_ids or [])[-_HEADER_TOKENS:]  # none where embeddings are given
    return bool(tokenizer.decode(end).endswith(header))
