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
    system: Message | None = None
    turns: list[Message] = []
    for message in messages:
        content = [part for part in message["content"] if part["type"] != "text" or part["text"]]
        if message["role"] in ("system", "developer"):
            system = system or {"role": "system", "content": []}
            _extend(system["content"], content)
        elif turns and turns[-1]["role"] == message["role"]:
            _extend(turns[-1]["content"], content)
        else:
            turns.append({"role": message["role"], "content": content})
    if turns and turns[-1] == {"role": "assistant", "content": []}:
        turns.pop()
    return turns if system is None else [system, *turns]


def _extend(parts: Parts, more: Parts) -> None:
    if more and any(part["type"] != "image" for part in parts):
        parts.append({"type": "text", "text": "\n"})
    parts.extend(more)
