"""Documents of the format `text` that are longer than max_tokens, cut or packed into rows (`data.long_text`).

split: a document of more than max_tokens tokens is cut into the fewest pieces, of equal length but for one token.
pack: documents follow one another, each with the tokenizer's end-of-text token after it, and every max_tokens tokens
are a row. A token attends to all tokens before it in its row, those of other documents included, and positions are
counted within the row, as in GPT-3's pre-training (arXiv 2005.14165, section 2.3): the end-of-text token tells where a
document begins, and no row needs a mask.

Either way every token of every document is in exactly one row, in order, and is supervised, but the first of a row,
before which there is nothing to predict it from. No token is put before a piece: the models' own tokenizers add none.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from yi_vl.encode import Encoded
from yi_vl.processor import YiVLProcessor

from ..config import PACK, SKIP, DataConfig

# A name and token ids, which wait to become rows; in a checkpoint the ids are the bytes of int32.
_Chunk = tuple[str, np.ndarray]


class Documents:
    """The documents of a stream that are not yet used up, by source.

    Raises:
        ValueError: the tokenizer has no end-of-text token, which packing needs.
    """

    def __init__(self, data: DataConfig, max_tokens: int, processor: YiVLProcessor) -> None:
        formats = [source.format if source.format is not None else data.format for source in data.sources]
        sources = [index for index, each in enumerate(formats) if each == "text" and data.long_text != SKIP]
        end_id = processor.tokenizer.eos_token_id
        if sources and data.long_text == PACK and end_id is None:
            raise ValueError("data.long_text: pack needs a tokenizer with an end-of-text token (eos_token).")
        self._queues = {index: _Queue(max_tokens, end_id if data.long_text == PACK else None) for index in sources}

    def takes(self, source: int) -> bool:
        """Whether the samples of a source are documents to cut or pack."""
        return source in self._queues

    def add(self, source: int, name: str, input_ids: list[int]) -> None:
        """One more document."""
        self._queues[source].add(name, np.array(input_ids, dtype=np.int32))

    def is_ready(self, source: int) -> bool:
        """Whether the documents of a source fill a row."""
        return source in self._queues and self._queues[source].is_ready()

    def next_row(self, source: int) -> tuple[str, Encoded]:
        """The next row and its name: of its document and piece, or of the documents in it."""
        name, input_ids = self._queues[source].next_row()
        return name, Encoded(input_ids, [True] * len(input_ids))

    def state_dict(self) -> dict[int, Any]:
        return {source: queue.state_dict() for source, queue in self._queues.items()}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        for source, chunks in state.items():
            self._queues[source].load_state_dict(chunks)


class _Queue:
    """The documents of one source.

    Args:
        end_id: the token after each document, which packs them; None splits them.
    """

    def __init__(self, max_tokens: int, end_id: int | None) -> None:
        self._max_tokens, self._end_id = max_tokens, end_id
        self._chunks: deque[_Chunk] = deque()
        self._num_tokens = 0

    def add(self, name: str, input_ids: np.ndarray) -> None:
        if self._end_id is not None:
            self._append(name, np.append(input_ids, np.int32(self._end_id)))
            return
        pieces = np.array_split(input_ids, -(-len(input_ids) // self._max_tokens))
        for number, piece in enumerate(pieces, 1):
            self._append(f"{name} (piece {number} of {len(pieces)})" if len(pieces) > 1 else name, piece)

    def is_ready(self) -> bool:
        return self._num_tokens >= (1 if self._end_id is None else self._max_tokens)

    def next_row(self) -> tuple[str, list[int]]:
        if self._end_id is None:
            name, piece = self._take(self._max_tokens)
            return name, piece.tolist()
        row: list[int] = []
        names: list[str] = []
        while len(row) < self._max_tokens:
            name, part = self._take(self._max_tokens - len(row))
            names.append(name)
            row += part.tolist()
        others = f" to {names[-1]} ({len(names)} documents)" if len(names) > 1 else ""
        return names[0] + others, row

    def _append(self, name: str, input_ids: np.ndarray) -> None:
        self._chunks.append((name, input_ids))
        self._num_tokens += len(input_ids)

    def _take(self, most: int) -> _Chunk:
        """The first chunk, or as much of it as `most`."""
        name, input_ids = self._chunks.popleft()
        if len(input_ids) > most:
            self._chunks.appendleft((name, input_ids[most:]))
        self._num_tokens -= min(most, len(input_ids))
        return name, input_ids[:most]

    def state_dict(self) -> list[tuple[str, bytes]]:
        return [(name, input_ids.tobytes()) for name, input_ids in self._chunks]

    def load_state_dict(self, chunks: list[tuple[str, bytes]]) -> None:
        self._chunks.clear()
        self._num_tokens = 0
        for name, content in chunks:
            self._append(name, np.frombuffer(content, dtype=np.int32))
