"""Preferences in the formats of public data sets: a conversation whose last answer has two versions.

The prompt is `prompt`, `question` or `instruction` (a text, or messages), or the messages of a conversation as in
conversations.py. `chosen` and `rejected` are a text, a message, or a list of messages, which may repeat the prompt.
Without `chosen` a conversation's last answer is the chosen one, and a list of messages in `rejected` the other.

Read are, among others, LLaMA-Factory's sets (`conversations`), TRL's with a prompt or without, RLAIF-V and RLHF-V
(`question`), MMPR, and ms-swift's (`rejected_response`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .conversations import IMAGE_KEYS, LISTS, Conversation, is_empty, is_image, named_images, read_conversation

_PROMPTS = ("prompt", "question", "instruction")
_CHOSEN = ("chosen", "chosen_response")
_REJECTED = ("rejected", "rejected_response", "rejected_conversations", "rejected_messages")
_HARMLESS = {
    "chosen_score", "rejected_score", "score_chosen", "score_rejected", "chosen_model", "rejected_model", "prompt_id",
    "ds_name", "origin_dataset", "origin_split",
}  # fmt: skip


@dataclass(frozen=True)
class Preference:
    """prompt: messages up to the question; chosen and rejected: an answer to it. images: as in `Conversation`."""

    prompt: list[dict[str, Any]]
    chosen: dict[str, Any]
    rejected: dict[str, Any]
    images: list[Any] | None

    @property
    def num_slots(self) -> int:
        """Number of image placeholders in the text."""
        return Conversation(self.prompt, None).num_slots

    @property
    def record(self) -> dict[str, Any]:
        """What `read_preference` reads back."""
        return {"messages": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


def read_preference(record: Any, ignore: Collection[str] = (), num_images: int = 0) -> Preference:
    """A parsed JSON record. A prompt without <image> has its images, if there are any, before its first question.

    Args:
        ignore: as of `read_conversation`.
        num_images: the number of images that lie beside a record that names none.

    Raises:
        ValueError: an answer is missing, empty or holds an image, both are the same, the prompts differ, or as
            `read_conversation`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}; expected an object with a prompt, `chosen` and `rejected`")
    prompt, chosen, rejected = _parts(record)
    rest = {key: value for key, value in record.items() if key not in (*LISTS, *_PROMPTS, *_CHOSEN, *_REJECTED)}
    read = _Reader(rest, frozenset(ignore) | _HARMLESS, num_images)
    prompts = [each for each in (prompt, chosen[:-1], rejected[:-1]) if each]
    if not prompts:
        raise ValueError(f"it has no prompt: a {', '.join(f'`{key}`' for key in _PROMPTS)} or messages before `chosen`")
    versions = [read([*each, answer]) for each in prompts for answer in (chosen[-1], rejected[-1])]
    first, second = versions[:2]
    if any(version.messages[:-1] != first.messages[:-1] for version in versions):
        raise ValueError("its prompt is there more than once, and not the same; only the last answer may differ")
    for version, name in ((first, "chosen"), (second, "rejected")):
        _check_answer(version.messages[-1], name)
    if _text(first.messages[-1]) == _text(second.messages[-1]):
        raise ValueError("its chosen and rejected answers are the same")
    return Preference(first.messages[:-1], first.messages[-1], second.messages[-1], first.images)


def _parts(record: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The prompt's messages, and those of the chosen and of the rejected version, not yet read."""
    prompt_key = _key(record, (*_PROMPTS, *LISTS))
    chosen_key, rejected_key = _key(record, _CHOSEN), _key(record, _REJECTED)
    if rejected_key is None:
        raise ValueError(
            f"it has no `rejected` answer, only {', '.join(list(map(str, record))[:20]) or 'nothing'}"[:400]
        )
    prompt = _entries(record, prompt_key, "user") if prompt_key is not None else []
    rejected = _entries(record, rejected_key, "assistant")
    if chosen_key is not None:
        return prompt, _entries(record, chosen_key, "assistant"), rejected
    if prompt_key not in LISTS or len(prompt) < 2:
        raise ValueError(f"it has no `chosen` answer, only {', '.join(list(map(str, record))[:20])}"[:400])
    return prompt[:-1], prompt[-1:], rejected  # the conversation ends with the chosen answer


def _key(record: Mapping[str, Any], spellings: Collection[str]) -> str | None:
    keys = [key for key in spellings if not is_empty(record.get(key))]
    if len(keys) > 1:
        raise ValueError(f"it has both `{keys[0]}` and `{keys[1]}`; expected one of them")
    return keys[0] if keys else None


def _entries(record: Mapping[str, Any], key: str, role: str) -> list[Any]:
    """A value as messages; a text is a message of `role`."""
    value = record[key]
    if isinstance(value, str) and key not in LISTS:
        return [{"role": role, "content": value}]
    if isinstance(value, dict) and key not in LISTS:
        return [value]
    if isinstance(value, list):
        return value
    raise ValueError(f"its `{key}` is {type(value).__name__}; expected a text or messages")


@dataclass(frozen=True)
class _Reader:
    """Reads messages of a record as a conversation with its images.

    rest: the record without its messages.
    """

    rest: Mapping[str, Any]
    ignore: Collection[str]
    num_images: int

    def __call__(self, entries: list[Any]) -> Conversation:
        images = named_images(self.rest, [])
        others = {key: value for key, value in self.rest.items() if key not in IMAGE_KEYS}
        conversation = read_conversation(others | {"messages": entries}, self.ignore)
        if images is None:
            images = conversation.images
        elif conversation.images is not None:
            raise ValueError("it names images twice, beside its messages and in their parts")
        num_images = self.num_images if images is None else len(images)
        if num_images and not conversation.num_slots:
            conversation = _with_images_first(conversation, num_images)
        if images is not None and len(images) != conversation.num_slots:
            raise ValueError(
                f"{conversation.num_slots} <image> in the text but {len(images)} images are named beside it"
            )
        return replace(conversation, images=images)


def _with_images_first(conversation: Conversation, num_images: int) -> Conversation:
    messages = list(conversation.messages)
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is not None:
        content = [{"type": "image"}] * num_images + messages[first]["content"]
        messages[first] = messages[first] | {"content": content}
    return replace(conversation, messages=messages)


def _check_answer(message: Mapping[str, Any], name: str) -> None:
    if message["role"] != "assistant":
        raise ValueError(f"its {name} version ends with a message of the {message['role']}, expected an answer")
    if any(map(is_image, message["content"])):
        raise ValueError(f"its {name} answer holds an <image>; both answers are about the images of the prompt")


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part.get("text", "") for part in message["content"]).strip()
