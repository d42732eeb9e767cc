"""Requests as messages in the format of `chat.render`; arguments of callers are checked before they are rendered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from .arguments import as_text, shown

Message = dict[str, Any]

_MAX_IMAGES = 10_000  # taken from an iterator, which may be endless; no context holds so many


def conversation(images: Any, question: Any, system: Any = None, history: Any = None) -> list[Message]:
    """The messages of a question about some images, after those of `history`.

    Raises:
        ValueError: one of them is of another type.
    """
    begin = [] if system is None else [system_message(system)]
    earlier = [] if history is None else as_messages(history, "history")
    return [*begin, *earlier, user_message(as_images(images), question)]


def system_message(system: Any) -> Message:
    return {"role": "system", "content": as_text(system, "system")}


def user_message(images: Sequence[Any], question: Any) -> Message:
    parts: list[Message] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": as_text(question, "question")}]}


def as_images(images: Any) -> list[Any]:
    """None, one image, a list or tuple of them, or an iterator over them, which is used up."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    if isinstance(images, Iterator) and not hasattr(images, "read"):  # a file is an iterator over its lines
        return list(islice(images, _MAX_IMAGES))
    if isinstance(images, (Mapping, set, frozenset)):
        raise ValueError(f"images is a {type(images).__name__}; give one image, or a list of them in their order.")
    return [images]


def as_messages(messages: Any, name: str = "messages") -> list[Message]:
    """A conversation as a list whose every text can be encoded; roles and their order are `chat.render`'s to check.

    Raises:
        ValueError: it is not a list of messages, or one of them is malformed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ValueError(f"{name} is {shown(messages)}; expected a list of messages.")
    result = list(messages)
    for index, message in enumerate(result):
        where = f"{name}[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f'{where} is {shown(message)}; expected {{"role": "user", "content": ...}}.')
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{where} has the role {shown(message.get('role'))}; expected 'user' or 'assistant'.")
        _check_content(message.get("content"), where)
    return result


def images_of(messages: Iterable[Message]) -> Iterator[Any]:
    """All images of a conversation, in reading order."""
    for message in messages:
        content = message["content"]
        for part in content if not isinstance(content, str) else ():
            if part["type"] == "image":
                if "image" not in part:
                    raise ValueError('An image part must carry its image: {"type": "image", "image": ...}.')
                yield part["image"]


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        as_text(content, where)
    if not isinstance(content, (list, tuple)):
        return  # which `chat.render` refuses
    for index, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise ValueError(f"A content part is of type text or image, found {shown(part)} in {where}.")
        if isinstance(part.get("text"), str):
            as_text(part["text"], f"{where}, part {index},")
