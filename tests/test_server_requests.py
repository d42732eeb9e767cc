"""What clients send: what is accepted, merged, ignored and refused by name, and the prompts that come of it."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest
from openai import OpenAI
from serving import HI, WIDE, address, answer, ask, chat_message, client, direct, yi_vl

from yi_vl.chat import SYSTEM_PROMPT, render, to_text
from yi_vl.predict import YiVL
from yi_vl.server.conversation import merge_messages
from yi_vl.server.images import _decode_data_url
from yi_vl.server.protocol import ApiError, ChatRequest, parse_request

IMAGE = "<image_placeholder>"
DATA = "data:image/png;base64,iVBORw0KGgo="


def parse(**fields: Any) -> ChatRequest:
    return parse_request(json.dumps({"model": "tiny", "messages": HI, **fields}).encode())


def prompt(*messages: Any) -> str:
    """The prompt that messages become."""
    chat = parse(messages=messages)
    return to_text(render(merge_messages(chat.as_messages([None] * len(chat.images))), add_generation_prompt=True))


def shown(*words: str) -> list[dict[str, Any]]:
    """An image, and words after it."""
    return [{"type": "image_url", "image_url": {"url": DATA}}, *({"type": "text", "text": text} for text in words)]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # several system texts, wherever they are and whatever they are called
        ([chat_message("developer", "S"), chat_message("user", "Hi")], "S\n\n### Human: Hi\n###"),
        (
            [chat_message("system", "S"), chat_message("developer", "T"), chat_message("user", "Hi")],
            "S\nT\n\n### Human: Hi\n###",
        ),
        (
            [
                chat_message("user", "a"),
                chat_message("system", "S"),
                chat_message("assistant", "b"),
                chat_message("system", "T"),
                chat_message("user", "c"),
            ],
            "S\nT\n\n### Human: a\n### Assistant: b\n### Human: c\n###",
        ),
        ([chat_message("user", "a"), chat_message("system", "S")], "S\n\n### Human: a\n###"),
        (
            [chat_message("system", [{"type": "text", "text": "S"}]), chat_message("user", "Hi")],
            "S\n\n### Human: Hi\n###",
        ),
        (
            [chat_message("system", "S"), chat_message("system", ""), chat_message("user", "Hi")],
            "S\n\n### Human: Hi\n###",
        ),
        ([chat_message("system", ""), chat_message("user", "Hi")], "\n\n### Human: Hi\n###"),
        ([chat_message("system", None), chat_message("user", "Hi")], "\n\n### Human: Hi\n###"),
        # one side several times in a row
        (
            [chat_message("user", "a"), chat_message("user", "b"), chat_message("user", "c")],
            f"{SYSTEM_PROMPT}\n\n### Human: a\nb\nc\n###",
        ),
        (
            [chat_message("user", "a"), chat_message("system", "S"), chat_message("user", "b")],
            "S\n\n### Human: a\nb\n###",
        ),
        (
            [
                chat_message("user", "a"),
                chat_message("assistant", "b"),
                chat_message("assistant", "c"),
                chat_message("user", "d"),
            ],
            f"{SYSTEM_PROMPT}\n\n### Human: a\n### Assistant: b\nc\n### Human: d\n###",
        ),
        (
            [chat_message("user", shown()), chat_message("user", "What?")],
            f"{SYSTEM_PROMPT}\n\n### Human: {IMAGE}\nWhat?\n###",
        ),
        (
            [chat_message("user", "What?"), chat_message("user", shown())],
            f"{SYSTEM_PROMPT}\n\n### Human: What?\n{IMAGE}\n###",
        ),
        (
            [chat_message("user", shown()), chat_message("user", shown("?"))],
            f"{SYSTEM_PROMPT}\n\n### Human: {IMAGE}{IMAGE}\n?\n###",
        ),
        (
            [chat_message("user", "a"), chat_message("user", ""), chat_message("user", None)],
            f"{SYSTEM_PROMPT}\n\n### Human: a\n###",
        ),
        # the assistant first, or with nothing to say
        (
            [chat_message("system", "S"), chat_message("assistant", "Hello."), chat_message("user", "Hi")],
            "S\n\n### Assistant: Hello.\n### Human: Hi\n###",
        ),
        (
            [chat_message("user", "a"), chat_message("assistant", None, tool_calls=[]), chat_message("user", "b")],
            f"{SYSTEM_PROMPT}\n\n### Human: a\n### Assistant: \n### Human: b\n###",
        ),
        ([chat_message("user", "a"), chat_message("assistant", "")], f"{SYSTEM_PROMPT}\n\n### Human: a\n###"),
        # an image without words, and texts without any
        ([chat_message("user", shown())], f"{SYSTEM_PROMPT}\n\n### Human: {IMAGE}\n###"),
        ([chat_message("user", shown(""))], f"{SYSTEM_PROMPT}\n\n### Human: {IMAGE}\n###"),
        (
            [chat_message("user", [{"type": "text", "text": ""}, *shown("What?")])],
            f"{SYSTEM_PROMPT}\n\n### Human: {IMAGE}\nWhat?\n###",
        ),
        ([chat_message("user", ["a", "b"])], f"{SYSTEM_PROMPT}\n\n### Human: ab\n###"),
    ],
)
def test_messages_become_a_prompt(messages: list[Any], expected: str) -> None:
    assert prompt(*messages) == f"{expected} Assistant:"


def test_merging_leaves_what_it_is_given() -> None:
    messages = [
        chat_message("user", [{"type": "text", "text": "a"}]),
        chat_message("user", [{"type": "text", "text": "b"}]),
    ]
    before = json.dumps(messages)
    merge_messages(messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "Li"},
        {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        {"tool_calls": [], "function_call": {}, "tool_call_id": None, "annotations": [{"type": "url_citation"}]},
        {"reasoning_content": "Hm.", "reasoning": None, "provider_specific_fields": {"refusal": None}},
        {"id": "msg_1", "type": "message", "status": "completed", "cache_control": {"type": "ephemeral"}},
        {"prefix": False, "images": [], "anything": None},
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_fields_of_messages_that_say_nothing(role: str, fields: dict[str, Any]) -> None:
    messages = [chat_message("user", "a"), chat_message("assistant", "b"), chat_message("user", "c")]
    expected = prompt(*messages)
    messages[role == "assistant"].update(fields)
    assert prompt(*messages) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", [{"id": "1", "type": "function"}]), ("function_call", {"name": "f"}), ("audio", {"id": "1"}),
        ("refusal", "No."), ("images", ["iVBO"]), ("prefix", True), ("tool_call_id", "1"), ("nmae", "Li"),
    ],
)  # fmt: skip
def test_fields_of_messages_that_would_be_lost(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match="not supported") as caught:
        prompt(chat_message("user", "a"), chat_message("assistant", "b", **{field: value}), chat_message("user", "c"))
    assert caught.value.body["error"]["param"] == f"messages[1].{field}"


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": DATA}}, "image_url.url"),
        *(
            ({"type": "image_url", "image_url": {"url": DATA, "detail": detail}}, "image_url.url")
            for detail in ("auto", "low", "high", "original", "", None)
        ),
        ({"type": "image_url", "image_url": {"url": DATA, "format": "image/png"}}, "image_url.url"),
        ({"type": "image_url", "image_url": DATA}, "image_url"),
        ({"type": "image_url", "image_url": DATA, "text": None, "cache_control": {}}, "image_url"),
        ({"type": "input_image", "image_url": DATA, "detail": "high", "file_id": None}, "image_url"),
        ({"type": "image", "image": DATA}, "image"),
        ({"type": "image", "url": DATA}, "url"),
        ({"type": "image", "image_url": {"url": DATA}}, "image_url.url"),
        ({"type": "image", "base64": DATA.partition(",")[2], "mime_type": "image/png"}, "base64"),
        ({"type": "image", "source_type": "base64", "data": DATA.partition(",")[2], "mime_type": "image/png"}, "data"),
        (
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": DATA.partition(",")[2]},
            },
            "source.data",
        ),
        ({"type": "image", "source": {"type": "url", "url": DATA}}, "source.url"),
    ],
)
def test_layouts_of_image_parts(part: dict[str, Any], param: str) -> None:
    ((url, parsed_url),) = parse(messages=[chat_message("user", ["Look:", part])]).images
    assert parsed_url == f"messages[0].content[1].{param}"
    assert _decode_data_url(url, "", 100) == b"\x89PNG\r\n\x1a\n"
    assert IMAGE in prompt(chat_message("user", [part, {"type": "input_text", "text": "What?"}]))


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url"}, ""),
        ({"type": "image_url", "image_url": DATA, "image": DATA}, ""),
        ({"type": "image_url", "text": "a"}, ""),
        ({"type": "text", "text": "a", "image_url": DATA}, ""),
        ({"type": "text", "image_url": DATA}, ""),
        ({"type": "image", "source": {"type": "file", "file_id": "1"}}, ".source.type"),
        ({"type": "image", "source": {"type": "url", "data": "iVBO"}}, ".source"),
        ({"type": "input_image", "file_id": "file-1"}, ".file_id"),
        ({"type": "input_audio", "input_audio": {}}, ".type"),
        ({"type": "video_url", "video_url": {}}, ".type"),
        ({"type": "file", "file": {}}, ".type"),
        ({"text": "a"}, ".type"),
        (3, ""),
    ],
)
def test_parts_that_are_refused(part: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        prompt(chat_message("user", ["a", part]))
    assert caught.value.body["error"]["param"] == f"messages[0].content[1]{param}"


def test_images_of_a_system_text_are_refused() -> None:
    with pytest.raises(ValueError, match="text only"):
        prompt(chat_message("system", shown()), chat_message("user", "Hi"))


HARMLESS: list[dict[str, Any]] = [
    {"metadata": {"a": "b"}, "safety_identifier": "u", "prompt_cache_key": "k", "user": "u", "store": True},
    {"prompt_cache_retention": "24h", "service_tier": "flex", "prediction": {"type": "content", "content": "a"}},
    {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "functions": [], "function_call": "none"},
    {"tools": None, "tool_choice": None, "parallel_tool_calls": None, "functions": None, "function_call": None},
    {"tool_choice": "none", "parallel_tool_calls": True, "reasoning_effort": "low", "verbosity": "medium"},
    {"seed": None, "stop": None, "n": None, "stream": None, "temperature": None, "top_p": None, "max_tokens": None},
    {"stop": [], "temperature": 0}, {"stop": ""}, {"stop": [""]}, {"n": 1.0, "seed": 3.0, "max_tokens": None},
    {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0},
    {"frequency_penalty": None, "presence_penalty": None, "logit_bias": None, "logprobs": None, "top_logprobs": None},
    {"response_format": {"type": "text"}}, {"response_format": None}, {"modalities": ["text"], "audio": None},
    {"response_format": {"type": "text", "json_schema": None}},
    {"stream_options": {}}, {"stream_options": None}, {"stream_options": {"include_usage": True}, "stream": False},
    {"stream_options": {"include_obfuscation": True, "continuous_usage_stats": False}},
    {"web_search_options": None, "anything": None},
    {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "length_penalty": 1, "best_of": 1, "min_tokens": 0},
    {"top_k": 0, "typical_p": 1.0, "repeat_penalty": 1.0, "mirostat": 0, "cache_prompt": True, "id_slot": -1},
    {"use_beam_search": False, "ignore_eos": False, "skip_special_tokens": True, "include_stop_str_in_output": False},
    {"spaces_between_special_tokens": True, "echo": False, "add_generation_prompt": True, "stop_token_ids": []},
    {"chat_template_kwargs": {}, "mm_processor_kwargs": None, "guided_json": None, "structured_outputs": None},
    {"chat_template_kwargs": {"enable_thinking": False}, "continue_final_message": False, "priority": 1},
    {"keep_alive": "5m", "options": {}, "format": "", "think": False, "request_id": "r", "cache_salt": "s"},
]  # fmt: skip


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_parameters_that_change_no_answer(fields: dict[str, Any]) -> None:
    chat, plain = parse(**fields), parse()
    assert chat.model_dump(exclude={"n", "seed", "temperature", "stream_options"}) == plain.model_dump(
        exclude={"n", "seed", "temperature", "stream_options"}
    )
    assert chat.n == 1 and chat.seed in (None, 3) and not chat.temperature


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]}, {"functions": [{"name": "f"}]}, {"tool_choice": "required"},
        {"tool_choice": {"type": "function"}}, {"function_call": {"name": "f"}},
        {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"logprobs": True}, {"top_logprobs": 2}, {"logit_bias": {"1": -100}}, {"web_search_options": {}},
        {"modalities": ["text", "audio"]}, {"audio": {"voice": "a"}}, {"verbosity": "low"},
        {"frequency_penalty": 0.1}, {"presence_penalty": -1}, {"top_k": 40}, {"min_p": 0.1}, {"typical_p": 0.5},
        {"repetition_penalty": 1.1}, {"repeat_penalty": 1.1}, {"length_penalty": 2}, {"min_tokens": 5},
        {"ignore_eos": True}, {"stop_token_ids": [2]}, {"use_beam_search": True}, {"best_of": 2}, {"echo": True},
        {"skip_special_tokens": False}, {"include_stop_str_in_output": True}, {"add_generation_prompt": False},
        {"continue_final_message": True}, {"chat_template": "{{ x }}"}, {"guided_json": {"type": "object"}},
        {"chat_template_kwargs": {"enable_thinking": True}}, {"grammar": "root ::= a"}, {"json_schema": {"a": 1}},
        {"structured_outputs": {"json": {}}}, {"mirostat": 2}, {"thinking": {"type": "enabled"}}, {"think": True},
        {"options": {"num_ctx": 9}}, {"format": "json"}, {"temprature": 1}, {"repetition_penalty": True},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_that_would_change_the_answer_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="not supported") as caught:
        parse(**fields)
    error = caught.value.body["error"]
    assert (error["param"], error["code"]) == (*fields, "unsupported_parameter")


def test_lengths() -> None:
    assert parse(max_tokens=5, max_completion_tokens=5).max_new_tokens == 5
    assert parse(max_tokens=None, max_completion_tokens=7.0).max_new_tokens == 7
    assert parse(max_tokens=3, max_completion_tokens=None).max_new_tokens == 3
    assert parse(max_tokens=-1).max_new_tokens == -1 and parse().max_new_tokens is None
    with pytest.raises(ApiError, match="they differ"):
        parse(max_tokens=5, max_completion_tokens=6)


@pytest.mark.parametrize(
    ("fields", "param", "problem"),
    [
        ({"messages": HI * 50_000}, "messages", "50,000 parts"),
        ({"messages": [chat_message("user", [])] * 50_000}, "messages", "50,000 parts"),
        ({"messages": [chat_message("user", ["a"] * 200_000)]}, "messages", "200,000 parts"),
        ({"messages": [chat_message("user", ["a"] * 60)] * 100}, "messages", "6,000 parts"),
        ({"stop": [1] * 200_000}, "stop", "200,000 strings"),
        ({f"k{i}": 1 for i in range(50_000)}, "k0", "not supported"),
        (
            {"messages": [chat_message("user", "a", **{f"k{i}": 1 for i in range(50_000)})]},
            "messages[0].k0",
            "not supported",
        ),
        ({"metadata": {f"k{i}": 1 for i in range(50_000)}}, None, ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_endless_lists_are_refused_at_once(fields: dict[str, Any], param: str | None, problem: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HI, **fields}).encode()
    start_seconds = time.process_time()
    if param is None:
        parse_request(body)
    else:
        with pytest.raises(ApiError, match=problem) as caught:
            parse_request(body)
        assert caught.value.body["error"]["param"] == param
    assert time.process_time() - start_seconds < 10  # against minutes


def test_many_messages_are_merged_in_linear_time() -> None:
    messages = [chat_message("user", [{"type": "text", "text": "a"}])] * 200_000
    start_seconds = time.process_time()
    (merged,) = merge_messages(messages)
    assert len(merged["content"]) == 399_999 and time.process_time() - start_seconds < 10


def test_a_body_may_begin_with_a_byte_order_mark() -> None:
    assert parse_request(b"\xef\xbb\xbf" + json.dumps({"model": "tiny", "messages": HI}).encode()).model == "tiny"


def test_what_is_accepted_is_answered_as_it_should_be(client: OpenAI, yi_vl: YiVL) -> None:
    expected = direct(yi_vl, [("system", [], "S\nT"), ("user", [WIDE], "What?\nQuick!")], max_new_tokens=4)[0]
    url = "data:;base64," + base64.encodebytes(WIDE.read_bytes()).decode()
    messages = [
        chat_message("developer", "S"),
        chat_message("user", [{"type": "image_url", "image_url": {"url": url, "detail": "high"}}], name="Li"),
        chat_message("system", "T"),
        chat_message("user", [{"type": "text", "text": "What?"}]),
        chat_message("user", "Quick!"),
    ]
    fields: dict[str, Any] = {"extra_body": {"top_k": -1, "chat_template_kwargs": {}}, "metadata": {"a": "b"}}
    assert answer(client, messages=messages, max_tokens=4, max_completion_tokens=4, tools=[], **fields) == expected


def test_lengths_and_greedy_sampling(yi_vl: YiVL, client: OpenAI) -> None:
    greedy = direct(yi_vl, [("user", [], "Hi")], max_new_tokens=8)[0]
    assert answer(client, max_tokens=8, temperature=2, top_p=0, seed=1) == greedy
    assert answer(client, max_tokens=8, temperature=2, seed=1) != greedy
    reply = client.chat.completions.create(**ask(max_tokens=-1, stop=[greedy[3:6]]))
    assert reply.choices[0].finish_reason == "stop"
