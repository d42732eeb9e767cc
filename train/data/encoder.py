"""From a raw sample to token ids and images: `SampleEncoder`, and the outcomes of a mixture's turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from yi_vl.chat import Segment
from yi_vl.encode import Encoded, TooLongError
from yi_vl.processor import YiVLProcessor

from ..config import DataConfig
from .batch import Sample
from .documents import Documents
from .fast_image import to_inputs
from .reference import ReferenceModel, read_member
from .samples import read_versions, sample_name
from .shard_reader import RawSample
from .stream import Mixture

_MAX_DOCUMENT_CHARACTERS = 4_000_000  # to cut or pack; tokenized, each takes some hundred bytes


class TooLong(ValueError):
    """A sample with more than max_tokens tokens."""


Outcome = Sample | ValueError | None


class SampleEncoder:
    """Makes a `Sample` of the raw members of a tar.

    Args:
        reference: the model whose log-probabilities lie beside preferences; None: they are not read.
    """

    def __init__(
        self, processor: YiVLProcessor, data: DataConfig, max_tokens: int, reference: ReferenceModel | None = None
    ) -> None:
        self._processor = processor
        self._reference = reference
        self._sample_formats = [source.format if source.format is not None else data.format for source in data.sources]
        self._ignore = frozenset(data.ignore)
        self._max_tokens = max_tokens
        self._data = data
        self._is_fast = data.fast_pixels

    def encode(self, raw: RawSample, source: int) -> Sample:
        """
        Raises:
            TooLong: it has more than max_tokens tokens.
            WrongReferenceError: its reference log-probabilities are missing, or of another model.
            ValueError: it cannot be used, with the reason.
        """
        versions, encoded_images = self._read(raw, source)
        rows = [self._encode_text(segments) for segments in versions]
        image_processor = self._processor.image_processor
        if image_processor.max_tiles:  # what is too long is not decoded
            num_inputs = [image_processor.count_inputs(image) for image in encoded_images]
            rows = [self._expand(row, num_inputs) for row in rows]
        inputs = [self._to_inputs(image) for image in encoded_images]
        sample = Sample(sample_name(raw), source, versions[0], rows[0], [each for image in inputs for each in image])
        if len(rows) == 2:
            sample.rejected = rows[1]
            sample.reference = read_member(raw, self._reference) if self._reference is not None else None
        return sample

    def _to_inputs(self, image: bytes) -> list[Tensor]:
        """What the tower sees of an encoded image, (H, W, 3) uint8 each."""
        image_processor = self._processor.image_processor
        if self._is_fast:
            return to_inputs(image, image_processor.size_px, image_processor.max_tiles)
        return image_processor.to_inputs(image)

    def _encode_text(self, segments: Sequence[Segment]) -> Encoded:
        """The tokens of a text; its images are without tiles."""
        with self._too_long():
            encoded = self._processor.encode(segments, self._max_tokens)
        if not any(encoded.loss_mask[1:]):
            raise ValueError("it has no supervised tokens")
        return encoded

    def _expand(self, encoded: Encoded, num_inputs: Sequence[int]) -> Encoded:
        """The same with the tokens of tiles."""
        with self._too_long():
            return self._processor.expand(encoded, num_inputs, self._max_tokens)

    @contextmanager
    def _too_long(self) -> Iterator[None]:
        try:
            yield
        except TooLongError as error:
            least = "" if error.is_tokenized else "at least "
            raise TooLong(f"{least}{error.num_tokens} tokens, max_tokens is {self._max_tokens}") from error

    def new_documents(self) -> Documents:
        """Where `encode_or_queue` puts documents that are cut or packed."""
        return Documents(self._data, self._max_tokens, self._processor)

    def next_row(self, source: int, documents: Documents) -> Sample:
        """A row of documents."""
        name, encoded = documents.next_row(source)
        return Sample(name, source, [], encoded, [])

    def outcome(self, raw: RawSample, source: int, documents: Documents) -> Outcome:
        """The sample, the error that `encode` raises, or None for a document, which then waits in `documents`."""
        try:
            if not documents.takes(source):
                return self.encode(raw, source)
            documents.add(source, sample_name(raw), self._encode_document(raw, source))
            return None
        except ValueError as error:
            return error

    def _read(self, raw: RawSample, source: int) -> tuple[list[list[Segment]], list[bytes]]:
        return read_versions(raw, self._sample_formats[source], self._ignore, self._processor.chat_format)

    def _encode_document(self, raw: RawSample, source: int) -> list[int]:
        (segments,), _ = self._read(raw, source)
        num_characters = sum(len(segment.text) for segment in segments)
        if num_characters > _MAX_DOCUMENT_CHARACTERS:
            raise TooLong(f"{num_characters:,} characters; documents of {_MAX_DOCUMENT_CHARACTERS:,} are cut or packed")
        input_ids = self._processor.encode(segments).input_ids
        if len(input_ids) < 2:
            raise ValueError("it has no supervised tokens")
        return input_ids


def draw_turn(
    mixture: Mixture, encoder: SampleEncoder, documents: Documents, progress: float
) -> Iterator[tuple[int, RawSample | None, Outcome]]:
    """The outcomes of one turn of the source that is furthest below its target, one `Sample` at most.

    A turn takes one raw sample, or, of documents that are cut or packed, as many as fill a row, which comes last and
    without a raw sample. After the turn `mixture` and `documents` hold all that continues from it.

    Args:
        progress: as in `Mixture.draw`.

    Raises:
        ValueError: no source has a sample.
    """
    source, raw = mixture.draw(documents.is_ready, progress)
    while raw is not None:
        yield source, raw, encoder.outcome(raw, source, documents)
        needs_more = documents.takes(source) and not documents.is_ready(source)
        raw = mixture.sources[source].next_sample() if needs_more else None
    if documents.is_ready(source):
        yield source, None, encoder.next_row(source, documents)
