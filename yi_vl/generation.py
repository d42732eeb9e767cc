"""Where an answer ends: what a saved model tells transformers' `generate` and the engines that read its files."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from .chat import IM_END, STOP_STRING, YI_VL, ChatFormat, stop_strings

END_TOKENS = ("<|endoftext|>", IM_END)  # either ends an answer: the 6B and the 34B name one of them each


def end_token_ids(tokenizer: Any, chat_format: ChatFormat = YI_VL) -> list[int]:
    """Ids of Yi's two end tokens and of the prompt's separator, as far as the tokenizer has each as one token."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in (*END_TOKENS, *stop_strings(chat_format)) if token in vocabulary]


def as_list(eos_token_id: int | list[int] | None) -> list[int]:
    """A generation config's `eos_token_id`, which may be one id, several, or None."""
    if eos_token_id is None:
        return []
    return list(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else [int(eos_token_id)]


def stop_token_ids(generation_config: GenerationConfig | None, tokenizer: Any) -> set[int]:
    """The generation config's end tokens, the tokenizer's, and Yi's two where the tokenizer has them.

    Not the separator's: the engine's detokenizer finds it in the text, whatever tokens it is made of.
    """
    configured = as_list(generation_config.eos_token_id) if generation_config else []
    ids = {*configured, *as_list(tokenizer.eos_token_id), *end_token_ids(tokenizer)}
    return ids - {tokenizer.get_vocab().get(STOP_STRING)}


def set_end_tokens_(generation_config: GenerationConfig, tokenizer: Any, chat_format: ChatFormat = YI_VL) -> None:
    """Make engines that take their defaults from `generation_config` stop where an answer ends.

    `eos_token_id` is what they have in common: vLLM ignores `stop_strings`, and transformers wants a tokenizer with
    them. Ids that are there already are kept, but for that of `###` where it ends nothing: it is also a heading.
    """
    ends = [*as_list(generation_config.eos_token_id), *end_token_ids(tokenizer, chat_format)]
    if STOP_STRING not in stop_strings(chat_format):
        separator = tokenizer.get_vocab().get(STOP_STRING)
        ends = [end for end in ends if end != separator]
    generation_config.eos_token_id = list(dict.fromkeys(ends))
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = tokenizer.pad_token_id
