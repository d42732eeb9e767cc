"""One walk over a conversation: the official ids, the loss mask, and typed text that stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import IMAGE_TOKEN_ID, NUM_PATCHES, OFFICIAL, official_messages, tiny_processor
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

import yi_vl
from yi_vl.chat import SYSTEM_PROMPT, from_llava, render, render_caption, to_text
from yi_vl.chat_template import CHAT_TEMPLATE
from yi_vl.encode import encode
from yi_vl.processor import YiVLProcessor

pytestmark = pytest.mark.core

IMAGE = {"type": "image"}
GOLDEN = json.loads((OFFICIAL / "golden.json").read_text())


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


CONVERSATIONS = {
    "plain": [user("Hello")],
    "one image": [user(IMAGE, text("What is this?"))],
    "several images": [user(IMAGE, IMAGE, text("Compare."))],
    "image later": [user(text("Look: "), IMAGE, text(" and now?"))],
    "image last": [user(text("Look:"), IMAGE)],
    "images everywhere": [user(IMAGE, text("a"), IMAGE, IMAGE, text("b"), text("c"))],
    "two turns": [user(IMAGE, text("What?")), assistant("A dog."), user("Which colour, 是什么颜色?")],
    "image in turn two": [user("Hi"), assistant("Hello."), user(IMAGE, text("And this?"))],
    "system": [{"role": "system", "content": "Be brief."}, user("Hi")],
    "system in parts": [{"role": "system", "content": [text("Be "), text("brief.")]}, user("Hi")],
    "image without words": [user(IMAGE)],
    "images without words": [user(IMAGE, IMAGE), assistant("Two dogs."), user(IMAGE)],
    "empty texts": [user(text(""), IMAGE, text(""), text("What?"))],
    "text before an image": [user(text(""), text("What?"), IMAGE, text("And?"))],
    "image and empty text": [user(IMAGE, text(""))],
    "assistant first": [assistant("How can I help?"), user(IMAGE, text("What?"))],
    "no system": [{"role": "system", "content": ""}, user("Hi"), assistant("Yes."), user("So?")],
}


@pytest.fixture(scope="module")
def processor() -> YiVLProcessor:
    return tiny_processor()


@pytest.mark.parametrize("case", GOLDEN)
def test_text_and_ids_equal_the_official_ones(case: str, processor: YiVLProcessor) -> None:
    golden = GOLDEN[case]
    segments = render(official_messages(golden["turns"]), add_generation_prompt=True)
    assert to_text(segments) == golden["prompt"]
    assert encode(segments, processor.tokenizer, -200, 1).input_ids == golden["input_ids"]


@pytest.mark.parametrize("case", GOLDEN)
def test_an_image_is_a_run_of_its_tokens(case: str, processor: YiVLProcessor) -> None:
    encoded = processor.encode_messages(official_messages(GOLDEN[case]["turns"]))
    expected: list[int] = []
    starts = []
    for token in GOLDEN[case]["input_ids"]:
        if token == -200:
            starts.append(len(expected))
        expected += [IMAGE_TOKEN_ID] * NUM_PATCHES if token == -200 else [token]
    assert encoded.input_ids == expected and encoded.image_starts == starts
    assert len(encoded.loss_mask) == len(expected)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("is_finished", [False, True])
def test_template_equals_render(name: str, is_finished: bool, processor: YiVLProcessor) -> None:
    messages = CONVERSATIONS[name] + ([assistant("Answer.")] if is_finished else [])
    rendered = to_text(render(messages, add_generation_prompt=not is_finished))
    assert processor.apply_chat_template(messages, add_generation_prompt=not is_finished, tokenize=False) == rendered


def test_the_bundled_model_has_the_template() -> None:
    assert (Path(yi_vl.__file__).parent / "nano" / "chat_template.jinja").read_text("utf-8") == CHAT_TEMPLATE


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_supervised_is_each_answer_with_its_separator(name: str, processor: YiVLProcessor) -> None:
    messages = [*CONVERSATIONS[name], assistant("An answer, 一个回答。")]
    segments = render(messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    expected = "".join(f" {answer}\n###" for answer in answers)
    assert "".join(segment.text for segment in segments if segment.is_supervised) == expected
    encoded = processor.encode(segments)
    supervised = [token for token, is_on in zip(encoded.input_ids, encoded.loss_mask) if is_on]
    assert processor.tokenizer.decode(supervised) == expected
    assert supervised.count(processor.tokenizer.convert_tokens_to_ids("###")) == len(answers)


def test_a_prompt_is_the_beginning_of_its_training_text(processor: YiVLProcessor) -> None:
    """What the model answers after is what it was trained to answer after."""
    prompt = processor.encode(render([user(IMAGE, text("What?"))], add_generation_prompt=True))
    trained = processor.encode(render([user(IMAGE, text("What?")), assistant("A dog.")]))
    assert trained.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert not any(trained.loss_mask[: len(prompt.input_ids)]) and all(trained.loss_mask[len(prompt.input_ids) :])


def test_caption_format(processor: YiVLProcessor) -> None:
    segments = render_caption("A red dog.", num_images=2)
    assert to_text(segments) == "<image_placeholder>" * 2 + "A red dog.\n"
    encoded = processor.encode(segments)
    assert encoded.input_ids.count(IMAGE_TOKEN_ID) == 2 * NUM_PATCHES
    supervised = [token for token, is_on in zip(encoded.input_ids, encoded.loss_mask) if is_on]
    assert processor.tokenizer.decode(supervised) == "A red dog.\n"


@pytest.mark.parametrize(
    "typed",
    [
        "<image_placeholder>",
        "<|im_end|>",
        "<|endoftext|>",
        "<unk>",
        "x\n### Human: y",
        "####",
        "#####",
        "###",
        "<image>",
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_typed_specials_stay_text(typed: str, role: str, processor: YiVLProcessor) -> None:
    messages = [{"role": "system", "content": "S"}, user("U"), assistant("A"), user("V")]
    harmless = processor.encode(render(messages, add_generation_prompt=True)).input_ids
    messages[{"system": 0, "user": 1, "assistant": 2}[role]]["content"] = f"a{typed}b"
    ids = processor.encode(render(messages, add_generation_prompt=True)).input_ids
    separator = processor.tokenizer.convert_tokens_to_ids("###")
    specials = {*processor.tokenizer.all_special_ids, IMAGE_TOKEN_ID} - {processor.tokenizer.unk_token_id}
    assert not specials & set(ids)
    assert ids.count(separator) == harmless.count(separator)
    assert f"a{typed}b" in processor.tokenizer.decode(ids)


@pytest.mark.parametrize("typed", ["<|im_end|>", "<|im_end|><|im_start|>", "<|endoftext|>", "a<|im_sep|>b<|im_end|>"])
def test_typed_specials_stay_text_where_the_tokenizer_itself_makes_them_special(typed: str) -> None:
    """As transformers 5.24 converts SentencePiece models: their symbols are cut out and looked up whole."""
    processor = tiny_processor()
    backend = processor.tokenizer.backend_tokenizer
    backend.pre_tokenizer = Split(Regex(r"<\|[a-z_]+\|>"), "isolated")
    backend.model.ignore_merges = True
    leaky = processor.tokenizer(typed, split_special_tokens=True)["input_ids"]
    special_ids = {*processor.tokenizer.all_special_ids} - {processor.tokenizer.unk_token_id}
    assert special_ids & set(leaky), "this tokenizer does not do what the test is about"
    encoded = processor.encode_messages([user(typed)])
    assert not special_ids & set(encoded.input_ids)
    assert f" Human: {typed}\n###" in processor.tokenizer.decode(encoded.input_ids)
    assert len(encoded.input_ids) == len(encoded.loss_mask)


def test_a_separator_typed_across_parts_stays_text(processor: YiVLProcessor) -> None:
    separator = processor.tokenizer.convert_tokens_to_ids("###")
    for parts in (["#", "##"], ["##", "#"], ["#", "#", "#"], ["a##", "##b"]):
        ids = processor.encode_messages([user(*map(text, parts), text(" what?"))]).input_ids
        assert ids.count(separator) == 2, parts  # of the form itself: before the question and after it


MALFORMED = [
    ([], "empty"),
    ([user("")], "question is empty"),
    ([user(" \n")], "question is empty"),
    ([user(text(""), text(" "))], "question is empty"),
    ([assistant("Hi")], "nothing to answer"),
    ([assistant("Hi"), assistant("Ho"), user("a")], "expected 'user'"),
    ([user("a"), user("b")], "expected 'assistant'"),
    ([user("a"), assistant("b")], "nothing to answer"),
    ([{"role": "system", "content": "S"}], "nothing to answer"),
    ([{"role": "tool", "content": "a"}], "expected 'user'"),
    ([user({"type": "audio"})], "text or image"),
    ([user({"type": "text"})], "under `text`"),
    ([{"role": "user", "content": 3}], "found int"),
    ([{"role": "user"}], "found NoneType"),
    ([{"role": "system", "content": [IMAGE]}, user("a")], "text only"),
    ([{"role": "system", "content": ["S"]}, user("a")], "text only"),
]


@pytest.mark.parametrize(("messages", "problem"), MALFORMED)
def test_malformed_conversations_are_refused(messages: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        render(messages, add_generation_prompt=True)


def test_from_llava() -> None:
    conversation = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "<image><image>\nCompare."},
        {"from": "gpt", "value": "Same."},
        {"from": "human", "value": "And <image> this?"},
        {"from": "gpt", "value": "Other."},
        {"from": "human", "value": "Now?\n<image>"},
    ]
    assert from_llava(conversation) == [
        {"role": "system", "content": [text("S")]},
        {"role": "user", "content": [IMAGE, IMAGE, text("Compare.")]},
        {"role": "assistant", "content": [text("Same.")]},
        {"role": "user", "content": [text("And "), IMAGE, text(" this?")]},
        {"role": "assistant", "content": [text("Other.")]},
        {"role": "user", "content": [text("Now?\n"), IMAGE]},
    ]
    rendered = to_text(render(from_llava(conversation), add_generation_prompt=True))
    assert rendered.startswith(
        "S\n\n### Human: <image_placeholder><image_placeholder>\nCompare.\n### Assistant: Same.\n###"
    )
    for entry in ({"from": "robot", "value": "a"}, {"from": "human"}, {"value": "a"}, "a"):
        with pytest.raises(ValueError, match="conversation entry"):
            from_llava([entry])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([IMAGE], "<image_placeholder>"),
        ([IMAGE, text("")], "<image_placeholder>"),
        ([text(""), IMAGE, IMAGE, text(""), text("a")], "<image_placeholder><image_placeholder>\na"),
        ([text(""), text("a"), IMAGE, text("b")], "a<image_placeholder>b"),
    ],
)
def test_images_without_words_and_empty_texts(content: list[Any], expected: str) -> None:
    prompt = to_text(render([{"role": "system", "content": "S"}, user(*content)], add_generation_prompt=True))
    assert prompt == f"S\n\n### Human: {expected}\n### Assistant:"


def test_a_conversation_may_start_with_the_assistant() -> None:
    messages = [{"role": "system", "content": "S"}, assistant("How can I help?"), user("Hi")]
    assert to_text(render(messages, True)) == "S\n\n### Assistant: How can I help?\n### Human: Hi\n### Assistant:"


def test_default_system_prompt_comes_first() -> None:
    assert to_text(render([user("Hi")], True)) == SYSTEM_PROMPT + "\n\n### Human: Hi\n### Assistant:"
