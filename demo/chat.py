"""Pure functions between the history that Gradio shows and the messages that yi_vl answers.

A history is what `gr.Chatbot` holds, in the visitor's browser: a list of `{"role", "content", "metadata"}`, content a
list of `{"type": "text", "text"}` and `{"type": "file", "file": {"path"}}`. No gradio here.
"""

from __future__ import annotations

import html
import json
import mimetypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from yi_vl.image.data_url import data_url, png_bytes

Message = dict[str, Any]

_ERROR = "error"  # marks an answer that says what went wrong: its turn did not happen
_LIKED, _DISLIKED = "Like", "Dislike"  # as Gradio calls them


class BadImageError(ValueError):
    """An image that cannot be shown to the model."""

    def __init__(self, path: str, error: ValueError) -> None:
        self.name = Path(path).name
        super().__init__(str(error).replace(path, self.name))  # the server's folders are not shown


def user_messages(text: str, paths: Sequence[str] = ()) -> list[Message]:
    """A user's images and text, in separate messages: Gradio drops the rest of one that is edited."""
    images = [_image(path) for path in paths]
    contents = [images, [_text(text)]] if images else [[_text(text)]]
    return [{"role": "user", "content": content} for content in contents]


def assistant_message(text: str) -> Message:
    return {"role": "assistant", "content": [_text(text)]}


def error_message(text: str) -> Message:
    """An error in the place of an answer; `to_messages` drops it and its question."""
    return assistant_message(text) | {"metadata": {"id": _ERROR}}


def escaped(text: str) -> str:
    """Markdown that shows a text literally: file names and quoted input are untrusted."""
    return re.sub(r"([\\`*_\[\]<>&#$~|])", r"\\\1", text)


def with_feedback(history: Sequence[Message], index: int, liked: bool | str) -> list[Message]:
    """The history with an answer liked (True), disliked (False) or neither ("")."""
    feedback = {True: _LIKED, False: _DISLIKED}.get(liked)  # type: ignore[arg-type]
    return [*history[:index], history[index] | {"metadata": feedback and {"id": feedback}}, *history[index + 1 :]]


def feedback_values(history: Sequence[Message]) -> list[str | None]:
    """Like, Dislike or None for each answer, in order."""
    ids = [_metadata_id(message) for message in history if message["role"] == "assistant"]
    return [name if name in (_LIKED, _DISLIKED) else None for name in ids]


def to_messages(history: Sequence[Message], open_image: Callable[[str], Any]) -> list[Message]:
    """What yi_vl answers: without failed turns, and with a question that was never answered as part of the next.

    Liked and disliked answers have `feedback`.

    Args:
        open_image: from the path that a visitor's browser names to what an image part shall hold.

    Raises:
        BadImageError: `open_image` raised a ValueError.
    """
    messages: list[Message] = []
    for message in _without_failed_turns(history):
        parts = [_part(part, open_image) for part in message["content"]]
        if message["role"] == "assistant":
            feedback = {"feedback": name} if (name := _metadata_id(message)) else {}
            messages.append({"role": "assistant", "content": "".join(part["text"] for part in parts)} | feedback)
        elif messages and messages[-1]["role"] == "user":
            before = messages[-1]["content"]
            before += [_text("\n"), *parts] if before[-1]["type"] == "text" else parts
        else:
            messages.append({"role": "user", "content": parts})
    return messages


def restored(saved: str) -> tuple[list[Message], Message, bool]:
    """What a browser saved of a conversation: history, unsent message, and whether an answer was being generated.

    The browser can save anything; of messages only what this module writes is taken over.

    Args:
        saved: JSON `{"history": [...], "typed": {"text", "files": [{"path"}]}, "isAnswering"}`.

    Raises:
        ValueError: it is something else.
    """
    try:
        document = json.loads(saved)
        history = [_restored_message(message) for message in document["history"] or ()]
        typed = document["typed"] or {}
        files = [str(file["path"]) for file in typed.get("files") or ()]
        return history, {"text": str(typed.get("text") or ""), "files": files}, document["isAnswering"] is True
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no saved conversation: {error!r}") from error


def image_paths(history: Sequence[Message]) -> list[str]:
    """All images of a history as `user_messages` makes it, failed turns included."""
    return [part["path"] for message in history for part in message["content"] if "path" in part]


def _restored_message(message: Message) -> Message:
    if message["role"] not in ("user", "assistant"):
        raise ValueError(f"no message has the role {message['role']!r}")
    content = [
        _text(str(part["text"])) if part["type"] == "text" else _image(str(part["file"]["path"]))
        for part in message["content"]
    ]
    name = _metadata_id(message)
    return {"role": message["role"], "content": content} | (
        {"metadata": {"id": name}} if name in (_ERROR, _LIKED, _DISLIKED) else {}
    )


def _image(path: str) -> Message:
    return {"path": path, "alt_text": Path(path).name}


def shown_image_paths(history: Sequence[Message]) -> list[str]:
    """All images shown in a conversation, each once, failed turns left out."""
    parts = [part for message in _without_failed_turns(history) for part in message["content"]]
    return list(dict.fromkeys(part["file"]["path"] for part in parts if part["type"] == "file"))


def to_document(history: Sequence[Message], read: Callable[[str], bytes], model: str) -> dict[str, Any]:
    """The conversation as one document: OpenAI's messages, with the images inside as `data:` URLs.

    Args:
        read: from an image's path to its file's content.
    """
    messages = to_messages(history, lambda path: data_url(read(path), mimetypes.guess_type(path)[0] or "image/png"))
    for message in messages:
        if message["role"] == "user":
            message["content"] = [
                {"type": "image_url", "image_url": {"url": part["image"]}} if part["type"] == "image" else part
                for part in message["content"]
            ]
    return {"model": model, "messages": messages}


def to_markdown(document: dict[str, Any], you: str) -> str:
    """What `to_document` gave as a page to read: text on top, the images' data at the end."""
    lines, urls = [f"# Yi-VL: {document['model']}"], []
    for message in document["messages"]:
        emoji = {_LIKED: " 👍", _DISLIKED: " 👎"}.get(message.get("feedback"), "")
        lines.append(f"**{you if message['role'] == 'user' else document['model'] + emoji}**")
        content = message["content"]
        for part in content if isinstance(content, list) else [_text(content)]:
            if part["type"] == "image_url":
                urls.append(part["image_url"]["url"])
                lines.append(f"![{len(urls)}][{len(urls)}]")
            elif part["text"].strip():
                lines.append(part["text"])
    lines += [f"[{number}]: {url}" for number, url in enumerate(urls, start=1)]
    return "\n\n".join(lines) + "\n"


def to_figures(images: Sequence[tuple[str, Image.Image]], caption: str) -> str:
    """HTML that shows named images, pixel by pixel.

    Args:
        caption: with `{name}` and `{size}`.
    """
    figures = []
    for name, image in images:
        text = html.escape(caption.format(name=name, size=image.width))
        figures.append(
            f'<figure><img src="{data_url(png_bytes(image))}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        )
    return f'<div class="seen">{"".join(figures)}</div>'


def _without_failed_turns(history: Sequence[Message]) -> list[Message]:
    kept: list[Message] = []
    for message in history:
        if _metadata_id(message) != _ERROR:
            kept.append(message)
        else:
            while kept and kept[-1]["role"] == "user":
                kept.pop()
    return kept


def _metadata_id(message: Message) -> str | None:
    return (message.get("metadata") or {}).get("id")


def _part(part: Message, open_image: Callable[[str], Any]) -> Message:
    if part["type"] == "text":
        return _text(part["text"])
    path = part["file"]["path"]
    try:
        return {"type": "image", "image": open_image(path)}
    except ValueError as error:
        raise BadImageError(path, error) from error


def _text(text: str) -> Message:
    return {"type": "text", "text": text}
