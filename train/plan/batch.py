"""The average rows of a run's batches: one with an image, one of a text alone, or both in a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import PACK, PREFERENCE, SPLIT, TrainConfig, batch_sizes, num_steps
from ..schedule import mean_fractions
from .flops import Row

TEXT = "text"


@dataclass(frozen=True)
class SampleTokens:
    """Tokens of text in an average sample, by format; those of an image come on top."""

    caption: int = 32
    chat: int = 256
    text: int = 512

    def of(self, sample_format: str) -> int:
        """Of one of `config.SAMPLE_FORMATS`; an answer of a pair is one of a chat."""
        by_format = {"caption": self.caption, "chat": self.chat, PREFERENCE: self.chat, TEXT: self.text}
        return by_format[sample_format]


AVERAGE = SampleTokens()


def average_rows(
    config: TrainConfig, tokens_per_input: int, tokens: SampleTokens, image_inputs: int = 1
) -> list[tuple[float, Row]]:
    """The average row of the samples with an image and that of the texts, each with its fraction of the samples.

    Samples of every format but text are taken to have one image.

    Args:
        tokens_per_input: that the tower gives of an image, or of a tile of it.
        image_inputs: how often the tower sees an average image.

    Raises:
        ValueError: such a row is longer than `max_tokens`.
    """
    sources = config.data.sources
    formats = [source.format if source.format is not None else config.data.format for source in sources]
    fractions = mean_fractions([source.weights for source in sources], batch_sizes(config), num_steps(config)).tolist()
    with_image = [(fraction, tokens.of(each)) for fraction, each in zip(fractions, formats) if each != TEXT]
    rows = []
    if with_image:
        fraction, num_text = _average(with_image)
        num_image_tokens = image_inputs * tokens_per_input
        if num_image_tokens + num_text > config.max_tokens:
            raise ValueError(
                f"an image of {num_image_tokens:,} tokens and {num_text} tokens of text exceed max_tokens "
                f"{config.max_tokens}."
            )
        rows.append((fraction, Row(num_image_tokens + num_text, num_text, image_inputs=image_inputs)))
    if texts := [fraction for fraction, each in zip(fractions, formats) if each == TEXT]:
        num_text = _text_row_tokens(config, tokens.text)
        rows.append((sum(texts), Row(num_text, num_text - 1, has_image=False)))
    return rows


def longest(row: Row, config: TrainConfig, tokens_per_input: int) -> Row:
    """A row of the same kind that has `max_tokens` tokens."""
    limit = config.max_tokens
    supervised = limit - row.num_inputs * tokens_per_input if row.has_image else limit - 1
    return Row(limit, supervised, row.has_image, row.image_inputs)


def _average(samples: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Fractions and tokens of some sources -> their fractions' sum, and the tokens of their average sample."""
    fraction = sum(fraction for fraction, _ in samples)
    return fraction, round(sum(each * num_tokens for each, num_tokens in samples) / fraction)


def _text_row_tokens(config: TrainConfig, num_tokens: int) -> int:
    """Of the rows that documents of `num_tokens` tokens become, by `data.long_text`."""
    limit = config.max_tokens
    if config.data.long_text == PACK:
        return limit
    if config.data.long_text == SPLIT:
        return -(-num_tokens // -(-num_tokens // limit))
    if num_tokens > limit:
        raise ValueError(
            f"texts of {num_tokens} tokens exceed max_tokens {limit} and would be skipped; set data.long_text to "
            f"{SPLIT} or {PACK}, or say --text-tokens."
        )
    return num_tokens
