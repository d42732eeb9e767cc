"""Segments of a prompt to the model's tokens: one walk gives ids, loss mask and image positions. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .chat import Segment


class TooLongError(ValueError):
    """A conversation of more than `max_tokens` tokens: `num_tokens`, or at least so many if it was not tokenized.

    Args:
        num_inputs: of the tower, of all images: more than these with tiles; None: as many.
    """

    def __init__(
        self,
        num_tokens: int,
        num_images: int,
        tokens_per_image: int,
        max_tokens: int,
        is_tokenized: bool = True,
        num_inputs: int | None = None,
    ) -> None:
        self.num_tokens, self.is_tokenized = num_tokens, is_tokenized
        self.num_images, self.max_tokens = num_images, max_tokens
        takes = "takes" if is_tokenized else "takes at least"
        if num_inputs is None or num_inputs == num_images:
            num_inputs, images = num_images, f"{num_images} images of {tokens_per_image}"
        else:
            num_tiles = num_inputs - num_images
            images = f"{num_images} images and {num_tiles} tiles of them, of {tokens_per_image} each"
        super().__init__(
            f"The prompt {takes} {num_tokens} tokens, {num_inputs * tokens_per_image} of them for {images}; the model "
            f"holds {max_tokens + 1}, the answer included. Give fewer images or a shorter text, or begin a new chat."
        )


@dataclass
class Encoded:
    """What the walk yields: `input_ids` and `loss_mask` of equal length; `image_starts` has one index per image.

    After `expand` that is one per input of the tower: an image with tiles has several, side by side.
    """

    input_ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    image_starts: list[int] = field(default_factory=list)


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


def expand(
    encoded: Encoded, num_inputs: Sequence[int], tokens_per_image: int, max_tokens: int | None = None
) -> Encoded:
    """What `encode` gave, with the tokens of as many inputs of the tower for each image as `num_inputs` says.

    Args:
        num_inputs: of each image, in reading order; 1 without tiles.

    Raises:
        TooLongError: there are more than `max_tokens` tokens.
    """
    num_images, total = len(encoded.image_starts), sum(num_inputs)
    if len(num_inputs) != num_images:
        raise ValueError(f"The conversation has {num_images} images, but {len(num_inputs)} are given.")
    num_tokens = len(encoded.input_ids) + (total - num_images) * tokens_per_image
    if max_tokens is not None and num_tokens > max_tokens:
        raise TooLongError(num_tokens, num_images, tokens_per_image, max_tokens, num_inputs=total)
    if total == num_images:
        return encoded
    expanded, copied = Encoded(), 0
    for start, count in zip(encoded.image_starts, num_inputs, strict=True):
        expanded.input_ids += encoded.input_ids[copied:start]
        expanded.loss_mask += encoded.loss_mask[copied:start]
        first, copied = len(expanded.input_ids), start + tokens_per_image
        expanded.image_starts += range(first, first + count * tokens_per_image, tokens_per_image)
        expanded.input_ids += encoded.input_ids[start:copied] * count
        expanded.loss_mask += encoded.loss_mask[start:copied] * count
    expanded.input_ids += encoded.input_ids[copied:]
    expanded.loss_mask += encoded.loss_mask[copied:]
    return expanded


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


def _check_length(segments: Sequence[Segment], tokens_per_image: int, max_tokens: int, max_token_length: int) -> None:
    num_images = sum(segment.is_image for segment in segments)
    num_characters = sum(len(segment.text) for segment in segments if not segment.is_image)
    least = num_images * tokens_per_image + math.ceil(num_characters / max_token_length)
    if least <= max_tokens:  # else cutting it into chunks could take long as well
        least = sum(tokens_per_image if chunk[0].is_image else 1 for chunk in _chunks(segments))
    if least > max_tokens:
        raise TooLongError(least, num_images, tokens_per_image, max_tokens, is_tokenized=False)


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
