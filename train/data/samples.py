"""From a raw sample of a shard, the members `KEY.suffix` of a tar, to the text and the encoded images to train on.

Every member is read or known to be irrelevant to training; any other is an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from yi_vl.chat import YI_VL, ChatFormat, Segment, render, render_caption

from ..config import PREFERENCE
from .conversations import Conversation, has_text, read_conversation
from .preferences import read_preference
from .shard_reader import RawSample

# Formats that cannot be decoded, such as HEIC, are listed too: such an image must not count as missing.
IMAGE_SUFFIXES = {
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "jp2", "j2k", "jpx",
    "ppm", "pgm", "pbm", "pnm", "ico", "tga", "qoi", "heic", "heif", "jxl", "svg",
}  # fmt: skip
REFERENCE_SUFFIX = "ref.json"  # see reference.py
_HARMLESS_SUFFIXES = {"url", "id", "key", "uid", "md5", "sha256"}


def read_sample(
    raw: RawSample, sample_format: str, ignore: Collection[str] = (), chat_format: ChatFormat = YI_VL
) -> tuple[list[Segment], list[bytes]]:
    """The text of a sample, and its encoded images, as many as there are <image> in the text.

    Of a preference it is the text with the chosen answer.

    Args:
        sample_format: as in `DataConfig`.
        ignore: suffixes of members and keys of .json that may be there without being read.

    Raises:
        ValueError: it cannot be trained on, with the reason.
    """
    versions, images = read_versions(raw, sample_format, ignore, chat_format)
    return versions[0], images


def read_versions(
    raw: RawSample, sample_format: str, ignore: Collection[str] = (), chat_format: ChatFormat = YI_VL
) -> tuple[list[list[Segment]], list[bytes]]:
    """As `read_sample`, but of a preference both versions of the text: with the chosen and with the rejected answer."""
    if "__error__" in raw:
        raise ValueError(raw["__error__"])
    images = _images(raw, ignore)
    _refuse_unread(raw, sample_format, ignore)
    if sample_format == PREFERENCE:
        versions = _preference(raw, images, ignore, chat_format)
    elif sample_format == "chat":
        versions = [render(_conversation(raw, images, ignore).messages, chat_format=chat_format)]
    elif sample_format == "caption":
        versions = [_caption(raw, images, ignore)]
    else:
        versions = [render_caption(_text(raw), 0)]
    for segments in versions:
        _check(segments, images)
    return versions, images


def _check(segments: Sequence[Segment], images: Sequence[bytes]) -> None:
    for segment in segments:
        segment.text.encode()  # half a surrogate pair, which JSON can spell, is no text
    num_slots = sum(segment.is_image for segment in segments)
    if num_slots != len(images):
        raise ValueError(f"{num_slots} <image> in the text but {len(images)} images beside it")
    if not any(segment.is_supervised for segment in segments):
        raise ValueError("no answer to train on")


def sample_name(raw: RawSample) -> str:
    """Shard and key."""
    return f"{raw['__url__']} {raw['__key__'] or '(tar)'}"


def parse_json(content: bytes | str, what: str) -> Any:
    """JSON in UTF-8, -16 or -32, with a byte order mark or without.

    Raises:
        ValueError: it is not JSON; the line begins with `what`.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from error


def _images(raw: RawSample, ignore: Collection[str]) -> list[bytes]:
    """Images in order: `jpg`, or `0.jpg`, `1.jpg`, ..."""
    numbered: dict[int, bytes] = {}
    for suffix, content in raw.items():
        number, _, extension = suffix.rpartition(".")
        if extension not in IMAGE_SUFFIXES or suffix in ignore:
            continue
        if number and not number.isdecimal():
            raise ValueError(f"the member name .{suffix} is neither .{extension} nor .<number>.{extension}")
        if int(number or 0) in numbered:
            raise ValueError(f"two images are number {number or 0}")
        numbered[int(number or 0)] = content
    if sorted(numbered) != list(range(len(numbered))):
        raise ValueError(f"images are numbered {sorted(numbered)}; expected 0, 1, ...")
    return [numbered[index] for index in sorted(numbered)]


def _refuse_unread(raw: RawSample, sample_format: str, ignore: Collection[str]) -> None:
    """The format decides which text is read: .txt and .json may lie beside each other, as img2dataset writes them."""
    for suffix in raw:
        is_image = suffix.rpartition(".")[2] in IMAGE_SUFFIXES
        if is_image and sample_format == "text" and suffix not in ignore:
            raise ValueError(f"its member .{suffix} is an image, and samples of the format text have none")
        if is_image or suffix in ("txt", "json") or suffix.startswith("__"):
            continue
        if suffix == REFERENCE_SUFFIX and sample_format == PREFERENCE:
            continue
        if suffix not in _HARMLESS_SUFFIXES and suffix not in ignore:
            members = ", ".join(f".{name}" for name in raw if not name.startswith("__"))
            raise ValueError(
                f"its member .{suffix} is not read (of {members}); leave it out, or ignore it by name (data.ignore)"
            )


def _member(raw: RawSample, suffix: str) -> bytes:
    if suffix not in raw:
        members = ", ".join("." + name for name in raw if not name.startswith("__"))
        raise ValueError(f"it has no .{suffix}, only {members or 'nothing'}")
    content: bytes = raw[suffix]
    if not content.strip():
        raise ValueError(f"its .{suffix} is empty")
    return content


def _text(raw: RawSample) -> str:
    text = _member(raw, "txt").decode("utf-8-sig").strip()
    if not has_text(text):
        raise ValueError("its .txt is empty")
    return text


def _conversation(raw: RawSample, images: list[bytes], ignore: Collection[str]) -> Conversation:
    conversation = read_conversation(parse_json(_member(raw, "json"), "its .json"), ignore)
    if conversation.images is not None and len(conversation.images) != len(images):
        raise ValueError(f"its .json names {len(conversation.images)} images but {len(images)} lie beside it")
    return conversation


def _preference(
    raw: RawSample, images: list[bytes], ignore: Collection[str], chat_format: ChatFormat
) -> list[list[Segment]]:
    """The conversation with the chosen and with the rejected answer, of which only that answer is supervised."""
    record = parse_json(_member(raw, "json"), "its .json")
    preference = read_preference(record, ignore, len(images))
    if preference.images is not None and len(preference.images) != len(images):
        raise ValueError(f"its .json names {len(preference.images)} images but {len(images)} lie beside it")
    return [
        _with_last_answer_supervised(render([*preference.prompt, answer], chat_format=chat_format))
        for answer in (preference.chosen, preference.rejected)
    ]


def _with_last_answer_supervised(segments: Sequence[Segment]) -> list[Segment]:
    last = max(index for index, segment in enumerate(segments) if segment.is_supervised)
    first = last
    while first and segments[first - 1].is_supervised:
        first -= 1
    return [replace(segment, is_supervised=False) for segment in segments[:first]] + list(segments[first:])


def _caption(raw: RawSample, images: list[bytes], ignore: Collection[str]) -> list[Segment]:
    """A caption for the plain prompt: KEY.txt (beside which KEY.json is metadata), else the one answer of KEY.json.

    The question of a conversation is left out, as in LLaVA, except without an image, where the caption is of its text.
    """
    if "txt" in raw or "json" not in raw:
        text = _text(raw)
        if not images:
            raise ValueError("its .txt is a caption without an image; a source of nothing but text has the format text")
        return render_caption(text, len(images))
    conversation = _conversation(raw, images, ignore)
    if [message["role"] for message in conversation.messages] != ["user", "assistant"]:
        raise ValueError("its .json is not one question and one answer, which the format caption needs")
    if conversation.num_slots and conversation.num_slots != len(images):
        raise ValueError(f"{conversation.num_slots} <image> in the text but {len(images)} images beside it")
    question, answer = (
        "".join(part.get("text", "") for part in message["content"]) for message in conversation.messages
    )
    return render_caption(answer, len(images), "" if images else question)
