"""The prompt: one walk over a conversation gives token ids, loss mask and image positions. No torch here.

A conversation is a list of messages as OpenAI and transformers write them:
`{"role": "user", "content": "text" | [{"type": "image"}, {"type": "text", "text": "..."}]}`.
Training and inference render it with the same function, so they cannot drift apart.

Two chat formats. `yi-vl` (`### Human: ...`) is Yi-VL's: 01-ai/Yi-VL's model card and inference code. `chatml`
(`<|im_start|>user ... <|im_end|>`) is that of the language models Yi-Chat and Yi-1.5-Chat: their tokenizers' templates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

ChatFormat = Literal["yi-vl", "chatml"]
YI_VL: ChatFormat = "yi-vl"
CHATML: ChatFormat = "chatml"
CHAT_FORMATS: tuple[ChatFormat, ...] = get_args(ChatFormat)

IMAGE_PLACEHOLDER = "<image_placeholder>"
STOP_STRING = "###"
SYSTEM_PROMPT = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, "
    "and respond to the human's questions with informative, helpful, detailed and polite answers. "
    "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像，"
    "并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)
_ROLES = {"user": " Human:", "assistant": " Assistant:"}
ANSWER_HEADER = f"\n{STOP_STRING}{_ROLES['assistant']}"  # the end of a prompt in the format yi-vl
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # one token each: 6 and 7 of Yi's tokenizers


class TooLongError(ValueError):
    """A conversation of more than `max_tokens` tokens: `num_tokens`, or at least so many if it was not tokenized."""

    def __init__(
        self, num_tokens: int, num_images: int, tokens_per_image: int, max_tokens: int, is_tokenized: bool = True
    ) -> None:
        self.num_tokens, self.is_tokenized = num_tokens, is_tokenized
        self.num_images, self.max_tokens = num_images, max_tokens
        takes = "takes" if is_tokenized else "takes at least"
        super().__init__(
            f"The prompt {takes} {num_tokens} tokens, {num_images * tokens_per_image} of them for {num_images} images "
            f"of {tokens_per_image}; the model holds {max_tokens + 1}, the answer included. Give fewer images or a "
            "shorter text, or begin a new chat."
        )


@dataclass(frozen=True)
class Segment:
    """A span of the prompt: text, one image, or one special token by its name."""

    text: str
    is_image: bool = False
    is_supervised: bool = False
    is_typed: bool = False  # user input, whose `###` must not become a separator
    is_special: bool = False


@dataclass
class Encoded:
    """What the walk yields: `input_ids` and `loss_mask` of equal length; `image_starts` has one index per image."""

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)


def render(
    messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False, chat_format: ChatFormat = YI_VL
) -> list[Segment]:
    """A conversation in a chat format. Each answer is supervised with what ends it: so the model learns to stop.

    Leading images and the text after them are separated by a newline; images without text stand alone. Empty text parts
    are ignored. Either role may come first. Without a system message `yi-vl` has its own, `chatml` has none.

    Args:
        add_generation_prompt: end with the assistant's header, for an answer to follow; else with the separator.
        chat_format: of the model: see `YiVLProcessor.chat_format`.

    Raises:
        ValueError: a message has an unknown role or part, roles do not alternate, a question has neither text nor
            images, or there is nothing to answer.
    """
    system, turns = _split_system(messages)
    _check_order(turns, add_generation_prompt)
    segments = _render_system(system, chat_format)
    for message in turns:
        is_answer = message["role"] == "assistant"
        segments += _header(message["role"], chat_format)
        if chat_format == YI_VL:
            segments.append(Segment(" ", is_supervised=is_answer))
        segments += _render_content(message, is_supervised=is_answer, is_typed=chat_format == YI_VL)
        segments += end_of_message(chat_format, is_supervised=is_answer)
    if add_generation_prompt:
        segments += _header("assistant", chat_format)
    return segments


def end_of_message(chat_format: ChatFormat, is_supervised: bool = False) -> list[Segment]:
    """What follows a message. The line break after `<|im_end|>` is no part of an answer: decoding has stopped there."""
    if chat_format == CHATML:
        return [Segment(IM_END, is_supervised=is_supervised, is_special=True), Segment("\n")]
    return [Segment("\n" + STOP_STRING, is_supervised=is_supervised)]


def answer_header(chat_format: ChatFormat) -> str:
    """The text that a prompt ends with."""
    return ANSWER_HEADER if chat_format == YI_VL else to_text(_header("assistant", CHATML))


def stop_strings(chat_format: ChatFormat) -> tuple[str, ...]:
    """Texts that end an answer; that of chatml ends with a token, whose text in an answer is nothing but text."""
    return (STOP_STRING,) if chat_format == YI_VL else ()


def _header(role: str, chat_format: ChatFormat) -> list[Segment]:
    if chat_format == CHATML:
        return [Segment(IM_START, is_special=True), Segment(f"{role}\n")]
    return [Segment(_ROLES[role])]


def _render_system(system: str | None, chat_format: ChatFormat) -> list[Segment]:
    if chat_format == YI_VL:
        return [Segment(SYSTEM_PROMPT if system is None else system, is_typed=True), Segment("\n\n" + STOP_STRING)]
    if not system:
        return []
    return [*_header("system", CHATML), Segment(system), *end_of_message(CHATML)]


def render_caption(caption: str, num_images: int = 1, prompt: str = "") -> list[Segment]:
    """The caption format of stages 1 and 2: images, or a text prompt in their place, then the caption and a newline.

    Only the last two are supervised.
    """
    segments = [Segment(IMAGE_PLACEHOLDER, is_image=True)] * num_images
    if prompt:
        segments.append(Segment(prompt, is_typed=True))
    return [*segments, Segment(caption, is_supervised=True, is_typed=True), Segment("\n", is_supervised=True)]


def encode(
    segments: Sequence[Segment],
    tokenizer: Any,
    image_token_id: int,
    tokens_per_image: int,
    max_tokens: int | None = None,
    max_token_length: int = 1,
) -> Encoded:
    """Token ids of a rendered conversation, with the loss mask and the first index of every image's run of tokens.

    Text between images and special tokens is tokenized in one go, as the official code does, and each token belongs to
    the segment that its first character lies in; nothing is tokenized twice. Special tokens in the text stay text.

    Args:
        tokenizer: a transformers tokenizer that reports offsets (any fast one).
        max_tokens: what cannot fit is refused before it is tokenized, so that the time is bounded by them.
        max_token_length: characters of the longest token that text can become.

    Raises:
        TooLongError: there are more than `max_tokens` tokens.
    """
    if max_tokens is not None:
        _check_length(segments, tokens_per_image, max_tokens, max_token_length)
    encoded = Encoded()
    special_ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special_ids.discard(tokenizer.unk_token_id)  # also of characters that the vocabulary does not have
    id_of = {name: tokenizer.convert_tokens_to_ids(name) for name in {s.text for s in segments if s.is_special}}
    for chunk in _chunks(segments):
        if chunk[0].is_image:
            encoded.image_starts.append(len(encoded.input_ids))
            encoded.input_ids += [image_token_id] * tokens_per_image
            encoded.loss_mask += [False] * tokens_per_image
            continue
        if chunk[0].is_special:
            encoded.input_ids.append(id_of[chunk[0].text])
            encoded.loss_mask.append(chunk[0].is_supervised)
            continue
        supervised = [segment.is_supervised for segment in chunk for _ in segment.text]
        input_ids, starts = _tokenize("".join(segment.text for segment in chunk), tokenizer, special_ids)
        encoded.input_ids += input_ids
        encoded.loss_mask += [supervised[start] for start in starts]
    if max_tokens is not None and len(encoded.input_ids) > max_tokens:
        raise TooLongError(len(encoded.input_ids), len(encoded.image_starts), tokens_per_image, max_tokens)
    return encoded


def _tokenize(text: str, tokenizer: Any, special_ids: Set[int]) -> tuple[list[int], list[int]]:
    """Token ids of a text, none of them special, and the index of each token's first character.

    `split_special_tokens` is a tokenizer's promise, and some break it: their model itself holds a special token's text
    as one piece. A text is then tokenized in spans that end within every such piece.
    """
    input_ids, starts = _call_tokenizer(text, tokenizer)
    if special_ids.isdisjoint(input_ids):
        return input_ids, starts
    cuts = [0, *(start + 1 for id, start in zip(input_ids, starts) if id in special_ids), len(text)]
    input_ids, starts = [], []
    for begin, end in pairwise(cuts):
        span_ids, span_starts = _call_tokenizer(text[begin:end], tokenizer)
        input_ids += span_ids
        starts += [begin + start for start in span_starts]
    for id, start in zip(input_ids, starts):
        if id in special_ids:
            raise ValueError(
                f"{text[start : start + 20]!r} is a special token of this tokenizer and cannot be used in text; "
                "leave it out."
            )
    return input_ids, starts


def _call_tokenizer(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    tokens = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    return tokens["input_ids"], [start for start, _ in tokens["offset_mapping"]]


def to_text(segments: Sequence[Segment]) -> str:
    """The conversation as the text a person would read, `<image_placeholder>` for images."""
    return "".join(segment.text for segment in segments)


def from_llava(conversations: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """LLaVA's `[{"from": "human", "value": "<image>\\nQuestion"}, {"from": "gpt", ...}]` as messages.

    Raises:
        ValueError: an entry has no `from` and `value`, or an unknown speaker.
    """
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = []
    for entry in conversations:
        if not isinstance(entry, dict) or not isinstance(entry.get("value"), str) or entry.get("from") not in roles:
            raise ValueError(
                f"A conversation entry needs `from` (human or gpt) and a text `value`, found {str(entry)[:200]}."
            )
        content: list[dict[str, str]] = []
        only_images = True
        for index, text in enumerate(entry["value"].split("<image>")):
            if index:
                content.append({"type": "image"})
            if text and index and only_images:
                text = text.removeprefix("\n")  # `render` writes the line break after leading images itself
            if text.strip() or (text and content and content[-1]["type"] == "text"):
                content.append({"type": "text", "text": text})
                only_images = False
        messages.append({"role": roles[entry["from"]], "content": content})
    return messages


def _check_length(segments: Sequence[Segment], tokens_per_image: int, max_tokens: int, max_token_length: int) -> None:
    num_images = sum(segment.is_image for segment in segments)
    num_characters = sum(len(segment.text) for segment in segments if not segment.is_image)
    least = num_images * tokens_per_image + math.ceil(num_characters / max_token_length)
    if least <= max_tokens:  # else cutting it into chunks could take long as well
        least = sum(tokens_per_image if chunk[0].is_image else 1 for chunk in _chunks(segments))
    if least > max_tokens:
        raise TooLongError(least, num_images, tokens_per_image, max_tokens, is_tokenized=False)


def strip_separator(text: str, chat_format: ChatFormat = YI_VL) -> str:
    """A decoded text without the separator that ends it, and the white space before that; `####` is no separator.

    That of chatml is a token, which decoding has left out.
    """
    stripped = text.rstrip()
    if chat_format == YI_VL and stripped.endswith(STOP_STRING) and not stripped.endswith("#" + STOP_STRING):
        return stripped.removesuffix(STOP_STRING).rstrip()
    return text


def strip_answer(text: str, chat_format: ChatFormat = YI_VL) -> str:
    """A text as decoded without special tokens, without its end and the white space around the answer.

    If the answer's header is in it, what is before stays; in yi-vl with one blank after the header.
    """
    if chat_format == CHATML:
        prompt, header, answer = text.rpartition("\nassistant\n")
        return f"{prompt}{header}{answer.strip()}"
    prompt, header, answer = strip_separator(text).rpartition(ANSWER_HEADER)
    return f"{prompt}{header} {answer.strip()}" if header else answer.strip()


def _split_system(messages: Sequence[dict[str, Any]]) -> tuple[str | None, Sequence[dict[str, Any]]]:
    if not messages:
        raise ValueError("The conversation is empty; give at least one message from the user.")
    if messages[0].get("role") != "system":
        return None, messages
    content = messages[0].get("content")
    if isinstance(content, str):
        return content, messages[1:]
    if not isinstance(content, (list, tuple)) or any(
        not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str)
        for part in content
    ):
        raise ValueError("A system message holds text only.")
    return "".join(part["text"] for part in content), messages[1:]


def _check_order(turns: Sequence[dict[str, Any]], add_generation_prompt: bool) -> None:
    roles = [message.get("role") for message in turns]
    for index, role in enumerate(roles):
        expected = "assistant" if index and roles[index - 1] == "user" else "user"
        if role != expected and (index or role != "assistant"):
            raise ValueError(
                f"Message {index + 1} is by {role!r}, expected {expected!r}: user and assistant take turns, after at "
                "most one system message."
            )
    if add_generation_prompt and roles[-1:] != ["user"]:
        raise ValueError("There is nothing to answer: the last message must be the user's.")


def _render_content(message: dict[str, Any], is_supervised: bool, is_typed: bool) -> list[Segment]:
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"A message's content is text or a list of parts, found {type(content).__name__}.")
    segments: list[Segment] = []
    only_images = True
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
            raise ValueError(f"A content part is of type text or image, found {str(part)[:200]}.")
        if part["type"] == "image":
            segments.append(Segment(IMAGE_PLACEHOLDER, is_image=True))
            continue
        if not isinstance(part.get("text"), str):
            raise ValueError(f"A part of type text holds its words under `text`, found {str(part)[:200]}.")
        if not part["text"]:
            continue
        if segments and only_images:
            segments.append(Segment("\n", is_supervised=is_supervised))
        only_images = False
        segments.append(Segment(part["text"], is_supervised=is_supervised, is_typed=is_typed))
    if message["role"] == "user" and not any(segment.is_image or segment.text.strip() for segment in segments):
        raise ValueError("The question is empty; ask something in words, or show an image.")
    return segments


def _chunks(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Spans to be tokenized in one go: images and special tokens stand alone, and a typed `###` is cut so that it is no
    separator."""
    chunk: list[Segment] = []
    for segment in segments:
        if segment.is_image or segment.is_special:
            if chunk:
                yield chunk
            yield [segment]
            chunk = []
            continue
        pieces = re.split(r"(?<=##)(?=#)", segment.text) if segment.is_typed else [segment.text]
        is_continued = (
            segment.is_typed and segment.text.startswith("#") and bool(chunk) and chunk[-1].text.endswith("#")
        )
        for index, text in enumerate(pieces):
            if index or is_continued:
                yield chunk
                chunk = []
            if text:
                chunk.append(Segment(text, is_supervised=segment.is_supervised))
    if chunk:
        yield chunk
