"""From the messages that clients send to a conversation in Yi-VL's form: a system text, then sides that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Parts = list[dict[str, Any]]


def merge_messages(messages: Sequence[Message]) -> list[Message]:
    """The conversation as `chat.render` takes it.

    - `developer` is another name of `system`. System messages, wherever they are, are joined in their order by newlines
      and come first. If all of them are empty, there is no system text at all, not even Yi-VL's own.
    - Messages of one side in a row are one message, joined by newlines; after images alone no newline is added, for
      `chat.render` writes one between leading images and words.
    - Empty text parts are dropped, and so is an empty answer at the end, the place that some clients keep for the next.

    Args:
        messages: `{"role": "system" | "developer" | "user" | "assistant", "content": [part, ...]}`, with parts
            `{"type": "text", "text": str}` and `{"type": "image", ...}`. They are not modified.
    """
    system: list[Parts] = []
    turns: list[Message] = []
    for message in messages:
        content = [part for part in message["content"] if part["type"] != "text" or part["text"]]
        if message["role"] in ("system", "developer"):
            system.append(content)
        elif turns and turns[-1]["role"] == message["role"]:
            turns[-1]["content"] = _join(turns[-1]["content"], content)
        else:
            turns.append({"role": message["role"], "content": content})
    if turns and turns[-1] == {"role": "assistant", "content": []}:
        turns.pop()
    if not system:
        return turns
    text: Parts = []
    for content in system:
        text = _join(text, content)
    return [{"role": "system", "content": text}, *turns]


def _join(first: Parts, second: Parts) -> Parts:
    if not second or all(part["type"] == "image" for part in first):
        return [*first, *second]
    return [*first, {"type": "text", "text": "\n"}, *second]
