"""The prompt: a conversation as segments of text and images, which encode.py turns into token ids. No torch here.

A conversation is a list of messages as OpenAI and transformers write them:
`{"role": "user", "content": "text" | [{"type": "image"}, {"type": "text", "text": "..."}]}`.
Training and inference render it with the same function, so they cannot drift apart.

Two chat formats. `yi-vl` (`### Human: ...`) is Yi-VL's: 01-ai/Yi-VL's model card and inference code. `chatml`
(`<|im_start|>user ... <|im_end|>`) is that of the language models Yi-Chat and Yi-1.5-Chat: their tokenizers' templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Segment:
    """A span of the prompt: text, one image, or one special token by its name."""

    text: str
    is_image: bool = False
    is_supervised: bool = False
    is_typed: bool = False  # user input, whose `###` must not become a separator
    is_special: bool = False


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
