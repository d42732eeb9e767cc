"""Conversations in the formats of public data sets, as messages that `yi_vl.chat` renders.

Supported are LLaVA and ShareGPT (`conversations` of `from` and `value`) and OpenAI, transformers and LLaMA-Factory
(`messages` of `role` and `content`, a text with `<image>` or a list of parts), with `system` and `image` or `images`
beside them. A key that is neither read, nor known to be harmless, nor in `data.ignore`, is an error that names it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yi_vl.chat import from_llava

LISTS = ("conversations", "conversation", "messages")
IMAGE_KEYS = ("image", "images")
_ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "bing", "chatgpt", "chatbot", "bard", "model"),
    "system": ("system", "developer"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
_PART_TYPES = {
    "text": "text", "input_text": "text", "output_text": "text",
    "image": "image", "image_url": "image", "input_image": "image",
}  # fmt: skip
_PART_IMAGE_KEYS = ("image", "image_url", "path", "url")

# Keys of metadata: where a record is from or how it was made.
HARMLESS_KEYS = {
    "__key__", "__url__", "id", "uid", "uuid", "idx", "index", "key", "hash", "md5", "sha256", "_id", "item_id",
    "sample_id", "question_id", "conversation_id", "conv_id", "image_id", "url", "source", "data_source", "dataset",
    "dataset_name", "origin", "model", "model_name", "category", "categories", "type", "task", "task_type", "topic",
    "domain", "lang", "language", "split", "license", "width", "height", "size", "image_size", "resolution", "meta",
    "metadata", "date", "created", "created_at", "timestamp", "score", "quality", "similarity",
}  # fmt: skip
_HARMLESS_IN_MESSAGE = {"id", "index", "timestamp", "date", "markdown", "model", "name"}
_HARMLESS_IN_PART = {"detail"}
_SWITCHES = ("loss", "train", "weight")  # of a message; only values that exclude nothing are supported


@dataclass(frozen=True)
class Conversation:
    """messages: as `yi_vl.chat.render` takes them. images: paths or URLs that the record names; None: it names none."""

    messages: list[dict[str, Any]]
    images: list[Any] | None

    @property
    def num_slots(self) -> int:
        """Number of image placeholders in the text."""
        return sum(is_image(part) for message in self.messages for part in message["content"])

    @property
    def record(self) -> dict[str, Any]:
        """What `read_conversation` reads back."""
        return {"messages": self.messages}


def read_conversation(record: Any, ignore: Collection[str] = ()) -> Conversation:
    """A parsed JSON record, or the list of its messages alone.

    Args:
        ignore: keys, besides the harmless ones, that may be there without being read.

    Raises:
        ValueError: it is not a conversation, a key or part is not read, an answer is empty, or the number of images
            that it names is not that of the placeholders in its text.
    """
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}; expected an object with `conversations` or `messages`")
    entries = _entries(record)
    _refuse_unread(record, (*LISTS, *IMAGE_KEYS, "system"), HARMLESS_KEYS.union(ignore), "its")
    part_images: list[Any] = []
    messages = [_message(entry, f"message {number}", part_images, ignore) for number, entry in enumerate(entries, 1)]
    if [message["role"] for message in messages if message["role"] != "system"][:1] == ["assistant"]:
        raise ValueError("the conversation begins with an answer, expected a question: nothing led to it")
    conversation = Conversation(_with_system(messages, record.get("system")), named_images(record, part_images))
    if conversation.images is not None and len(conversation.images) != conversation.num_slots:
        raise ValueError(
            f"{conversation.num_slots} <image> in the text but {len(conversation.images)} images are named beside it"
        )
    return conversation


def has_text(text: str) -> bool:
    """Whether a text has visible characters: not only spaces, line breaks and control characters."""
    return any(unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for character in text)


def is_empty(value: Any) -> bool:
    """Whether a value of JSON or parquet holds nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, bytes, list, dict)) and not value)


def _entries(record: Mapping[str, Any]) -> list[Any]:
    keys = [key for key in LISTS if not is_empty(record.get(key))]
    if len(keys) > 1:
        raise ValueError(f"it has both `{keys[0]}` and `{keys[1]}`; expected one of them")
    entries = record[keys[0]] if keys else None
    if not isinstance(entries, list):
        others = ", ".join(list(map(str, record))[:20]) or "nothing"
        raise ValueError(f"it has no list of `conversations` or `messages`, only {others}"[:400])
    return entries


def _refuse_unread(entry: Mapping[str, Any], read: Collection[str], harmless: Collection[str], whose: str) -> None:
    for key, value in entry.items():
        if key not in read and key not in harmless and not is_empty(value):
            raise ValueError(f"{whose} `{str(key)[:80]}` is not read; leave it out, or ignore it by name (data.ignore)")


def _message(entry: Any, where: str, images: list[Any], ignore: Collection[str]) -> dict[str, Any]:
    """A message; the path or URL of each image in it, or None, is appended to `images`."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is a {type(entry).__name__}; it needs `from` and `value`, or `role` and `content`")
    speaker = entry.get("from", entry.get("role"))
    role = _ROLE_OF.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(
            f"{where} needs `from` or `role` of {', '.join(_ROLE_OF)}; found {str(speaker)[:80]!r}, which is not read"
        )
    for key in _SWITCHES:
        if key in entry and entry[key] not in (None, True, 1):
            raise ValueError(
                f"{where} has `{key}` {str(entry[key])[:80]}, which is not read: all answers are trained on"
            )
    read = ("from", "role", "value", "content", *_SWITCHES)
    _refuse_unread(entry, read, _HARMLESS_IN_MESSAGE.union(ignore), f"{where}:")
    message: dict[str, Any] = {"role": role, "content": _content(entry, where, role, images, ignore)}
    if role == "assistant" and not has_text("".join(part.get("text", "") for part in message["content"])):
        raise ValueError(f"the answer in {where} is empty")
    return message


def _content(
    entry: Mapping[str, Any], where: str, role: str, images: list[Any], ignore: Collection[str]
) -> list[dict[str, Any]]:
    keys = [key for key in ("value", "content") if not is_empty(entry.get(key))]
    if len(keys) > 1:
        raise ValueError(f"{where} has both `value` and `content`; expected one of them")
    content = entry[keys[0]] if keys else entry.get("value", entry.get("content"))
    if isinstance(content, str):
        (message,) = from_llava([{"from": _SPEAKERS[role], "value": content}])
        images += [None] * sum(map(is_image, message["content"]))
        return list(message["content"])
    if isinstance(content, list):
        return [_part(part, where, images, ignore) for part in content]
    raise ValueError(f"{where} has no text: its `value` or `content` is {type(content).__name__}")


def _part(part: Any, where: str, images: list[Any], ignore: Collection[str]) -> dict[str, Any]:
    """A part of a message; the path or URL of its image, or None, is appended to `images`."""
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise ValueError(f"{where} has a part of {type(part).__name__}; expected {{type, text}} or {{type, image}}")
    named = [key for key in _PART_IMAGE_KEYS if not is_empty(part.get(key))]
    declared = part.get("type", "image" if named else "text" if "text" in part else None)
    part_type = _PART_TYPES.get(declared) if isinstance(declared, str) else None
    if part_type is None:
        known = declared if declared is not None else ", ".join(map(str, part))
        raise ValueError(f"{where} has a part of type {str(known)[:80]}, which is not read; text and image are")
    read = ("type", "text") if part_type == "text" else ("type", "index", *_PART_IMAGE_KEYS)
    harmless = _HARMLESS_IN_PART.union(ignore, ["index"])
    _refuse_unread(part, read, harmless, f"{where}: a part's")
    if part_type == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a part of type text without a `text`")
        return {"type": "text", "text": part["text"]}
    if len(named) > 1:
        raise ValueError(f"{where} names an image twice, as `{named[0]}` and `{named[1]}`")
    index = part.get("index")
    if index is not None and index != len(images):
        raise ValueError(f"{where} has an image of index {index}; images are taken in the order of the text")
    image = part[named[0]] if named else None
    if isinstance(image, dict) and "url" in image:  # OpenAI's {"image_url": {"url": ...}}
        _refuse_unread(image, ("url",), _HARMLESS_IN_PART.union(ignore), f"{where}: a part's")
        image = image["url"]
    images.append(image)
    return {"type": "image"}


def _with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    if is_empty(system):
        return messages
    if not isinstance(system, str):
        raise ValueError(f"its `system` is {type(system).__name__}, not text")
    if messages and messages[0]["role"] == "system":
        raise ValueError("it has a system prompt twice: under `system` and as its first message")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, *messages]


def named_images(record: Mapping[str, Any], part_images: Sequence[Any]) -> list[Any] | None:
    """The images that the record names: in keys beside its messages, or in their parts; None: it names none."""
    keys = [key for key in IMAGE_KEYS if not is_empty(record.get(key))]
    in_parts = [image for image in part_images if image is not None]
    if len(keys) + bool(in_parts) > 1:
        names = [f"`{key}`" for key in keys] + ["the parts of its messages"] * bool(in_parts)
        raise ValueError(f"it names images twice, in {names[0]} and in {names[1]}")
    images = record[keys[0]] if keys else in_parts
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(image, (str, dict)) and image for image in images):
        raise ValueError(f"its `{keys[0] if keys else 'image'}` is neither a path nor a list of paths")
    if not images:
        return None
    if not keys and len(images) != len(part_images):
        raise ValueError(f"it names {len(images)} of its {len(part_images)} images, and not the others")
    return images


def is_image(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image"
