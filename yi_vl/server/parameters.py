"""What clients of OpenAI, vLLM, SGLang, llama.cpp, Ollama and LiteLLM send besides what is supported.

`IGNORED_*`: fields that change no answer here, whatever they hold. `NEUTRAL_*`: fields that would change answers, and
the values of each that ask for nothing. null asks for nothing in every field.
"""

from __future__ import annotations

from typing import Any

IGNORED_PARAMETERS = frozenset(
    {
        # who asks, for what, and what is kept of it
        "cache_salt", "chat_id", "metadata", "priority", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "request_id", "rid", "safety_identifier", "service_tier", "session_id", "store",
        "tags", "user",
        # how fast, and from where
        "cache_prompt", "id_slot", "keep_alive", "prediction", "return_progress", "slot_id", "timings_per_token",
        # of tools and reasoning, of which there are none
        "include_reasoning", "parallel_tool_calls", "reasoning", "reasoning_effort", "reasoning_format",
        "separate_reasoning", "stream_reasoning",
        # details of tokens and penalties that nothing here turns on
        "dry_allowed_length", "dry_base", "dry_penalty_last_n", "dry_sequence_breakers", "dynatemp_exponent",
        "min_keep", "mirostat_eta", "mirostat_tau", "repeat_last_n", "spaces_between_special_tokens", "xtc_threshold",
    }
)  # fmt: skip

_OFF: list[Any] = [False, 0]
_ZERO: list[Any] = [0]
_ONE: list[Any] = [1]
_EMPTY: list[Any] = [[], {}, ""]

NEUTRAL_PARAMETERS: dict[str, list[Any]] = {
    # OpenAI
    "frequency_penalty": _ZERO,
    "function_call": ["none", "auto"],
    "functions": _EMPTY,
    "logit_bias": _EMPTY,
    "logprobs": _OFF,
    "modalities": [["text"]],
    "presence_penalty": _ZERO,
    "response_format": [{"type": "text"}],
    "tool_choice": ["none", "auto"],
    "tools": _EMPTY,
    "top_logprobs": _ZERO,
    "verbosity": ["medium"],
    # vLLM and SGLang
    "add_generation_prompt": [True],
    "add_special_tokens": _OFF,
    "allowed_token_ids": _EMPTY,
    "bad_words": _EMPTY,
    "best_of": _ONE,
    "chat_template": _EMPTY,
    "chat_template_kwargs": [{}, {"enable_thinking": False}, {"thinking": False}],
    "continue_final_message": _OFF,
    "documents": _EMPTY,
    "ebnf": _EMPTY,
    "echo": _OFF,
    "guided_choice": _EMPTY,
    "guided_grammar": _EMPTY,
    "guided_json": _EMPTY,
    "guided_regex": _EMPTY,
    "ignore_eos": _OFF,
    "include_stop_str_in_output": _OFF,
    "length_penalty": _ONE,
    "logits_processors": _EMPTY,
    "lora_path": _EMPTY,
    "min_p": _ZERO,
    "min_tokens": _ZERO,
    "mm_processor_kwargs": _EMPTY,
    "no_stop_trim": _OFF,
    "prompt_logprobs": _OFF,
    "regex": _EMPTY,
    "repetition_penalty": _ONE,
    "return_hidden_states": _OFF,
    "return_token_ids": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "skip_special_tokens": [True],
    "stop_regex": _EMPTY,
    "stop_token_ids": _EMPTY,
    "structured_outputs": _EMPTY,
    "top_k": [-1, 0],
    "truncate_prompt_tokens": [-1],
    "use_beam_search": _OFF,
    "vllm_xargs": _EMPTY,
    # llama.cpp, Ollama and routers
    "dry_multiplier": _ZERO,
    "dynatemp_range": _ZERO,
    "enable_thinking": _OFF,
    "format": _EMPTY,
    "grammar": _EMPTY,
    "json_schema": _EMPTY,
    "lora": _EMPTY,
    "mirostat": _ZERO,
    "n_probs": _ZERO,
    "options": _EMPTY,
    "plugins": _EMPTY,
    "repeat_penalty": _ONE,
    "samplers": _EMPTY,
    "tfs_z": _ONE,
    "think": _OFF,
    "thinking": [False, {"type": "disabled"}],
    "top_a": _ZERO,
    "top_n_sigma": [0, -1],
    "typical_p": _ONE,
    "xtc_probability": _ZERO,
}

# A participant's name, and what clients send back of an answer that they keep.
IGNORED_IN_MESSAGES = frozenset(
    {
        "annotations", "cache_control", "created_at", "id", "name", "provider_specific_fields", "reasoning",
        "reasoning_content", "reasoning_details", "status", "thinking_blocks", "timestamp", "weight",
    }
)  # fmt: skip
NEUTRAL_IN_MESSAGES: dict[str, list[Any]] = {
    "audio": _EMPTY,
    "function_call": _EMPTY,
    "images": _EMPTY,
    "prefix": _OFF,
    "refusal": _EMPTY,
    "tool_call_id": _EMPTY,
    "tool_calls": _EMPTY,
    "type": ["message"],
}

# There is one image transform, and the bytes say an image's format.
IGNORED_IN_PARTS = frozenset(
    {
        "annotations", "cache_control", "detail", "filename", "format", "id", "logprobs", "media_type", "mime_type",
        "source_type", "uuid",
    }
)  # fmt: skip
NEUTRAL_IN_PARTS: dict[str, list[Any]] = {"file_id": _EMPTY}


def is_neutral(value: Any, neutral: list[Any]) -> bool:
    """Whether a value is one of those that ask for nothing; 0.0 is 0, true is not 1, null members do not count."""
    if isinstance(value, dict):
        value = {name: member for name, member in value.items() if member is not None}
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral)
