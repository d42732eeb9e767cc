"""Answers, token by token: the ONE decode loop, how a token is chosen, and how tokens become text safe to show.

B rows (conversations answered at once), S prompt tokens, T tokens so far, V vocabulary, N images, D language width.
Called by predict.py; calls chat.py, cache.py, the model's forward, and transformers' samplers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from ..arguments import as_float, as_int, as_text, shown
from ..chat import STOP_STRING, hold_back
from .kv_cache import CACHE_ARGUMENT, gather
from .prefix_cache import Keys

_MAX_STOPS = 1000
_COLDEST, _HOTTEST = 1e-30, 1e30  # beyond float32 a temperature would be 0 or infinite
_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what tokenizers write for bytes that are not UTF-8, or not yet


@dataclass(frozen=True)
class Sampling:
    """How answers are generated. None stands for a default; numbers may be numpy scalars.

    Args:
        max_new_tokens: an answer's greatest length; cut to what the context has left.
        temperature: 0 always takes the likeliest token.
        top_p: draw only from the likeliest tokens that make up this probability.
        seed: makes draws repeatable; None draws afresh. Every row of a batch draws with it as if it were alone.
        stop: texts that end an answer and are not part of it, besides the prompt's own separator: one, or any iterable
            of them, which is read once.

    Raises:
        ValueError: a value is of another type, or out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        checks: dict[str, Callable[[Any], Any]] = {
            "max_new_tokens": lambda value: as_int(value, "max_new_tokens", 1),
            "temperature": lambda value: as_float(value, "temperature"),
            "top_p": lambda value: as_float(value, "top_p"),
            "seed": lambda value: as_int(value, "seed", 0, 2**63 - 1),
            "stop": _as_stops,
        }
        for field in fields(self):
            given = getattr(self, field.name)
            value = field.default if given is None else checks[field.name](given)
            object.__setattr__(self, field.name, value)  # the class is frozen
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be greater than 0 and at most 1.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """All texts that end an answer."""
        return (STOP_STRING, *self.stop)


def _as_stops(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = [stop]
    is_list = isinstance(stop, Iterable) and getattr(stop, "ndim", 1) == 1  # an array of none iterates over nothing
    if not is_list or isinstance(stop, (bytes, bytearray, Mapping)):
        raise ValueError(f"stop is {shown(stop)}; expected a text, or a list of texts.")
    texts = tuple(as_text(text, f"stop[{index}]") for index, text in enumerate(islice(stop, _MAX_STOPS + 1)))
    if len(texts) > _MAX_STOPS:
        raise ValueError(f"stop holds more than {_MAX_STOPS} texts; give fewer.")
    if not all(texts):
        raise ValueError(f"stop is {shown(list(texts))}; a text that ends an answer must not be empty.")
    return texts


@dataclass(frozen=True)
class Prompts:
    """What the model reads before it answers; see the table atop model.py."""

    input_ids: Tensor  # (B, S) int64, padded on the left
    attention_mask: Tensor  # (B, S) int64
    squares: Tensor | None  # (N, H, W, 3) uint8, the pictures as image.py prepares them, on the CPU
    keys: list[Keys]  # of every row's tokens

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of every row's prompt, images included."""
        return self.attention_mask.sum(1).tolist()

    @property
    def places(self) -> Tensor:
        """(B, S) int64: 1 for a row's first token, 2 for its second ...; padding is 0"""
        return self.attention_mask.cumsum(1)


@torch.inference_mode()
def read_beginning(model: PreTrainedModel, prompts: Prompts, embeddings: Tensor, cache: Cache, end: int) -> None:
    """Read what all rows begin with, up to place `end`, once; `cache` has one row and may know a part of it already.

    `embeddings`: (B, S, D), images in their places.
    """
    num_known = cache.get_seq_length()
    is_read = (prompts.places[0] > num_known) & (prompts.places[0] <= end)  # (S,)
    if is_read.any():
        positions = torch.arange(num_known, end, device=embeddings.device).unsqueeze(0)
        model(
            inputs_embeds=embeddings[:1, is_read],
            position_ids=positions,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: cache},
        )


class Rows:
    """Conversations that are being answered at once: what the model has read, and the logits of what comes next.

    Rows may end and new ones join; those shorter than the longest are padded, and padding shifts no row.

    Args:
        cache: B rows; knows equally many tokens of every row's beginning, perhaps none. It grows with every step.
        embeddings: (B, S, D), images in their places; what `cache` knows is not looked at.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, prompts: Prompts, cache: Cache, embeddings: Tensor) -> None:
        self.cache = cache
        self.logits: Tensor
        self._model = model
        num_rows, num_known = len(embeddings), cache.get_seq_length()
        places = prompts.places
        is_read = (places == 0) | (places > num_known)  # (B, S): padding stays in front of what is new
        places = places[is_read].view(num_rows, -1)
        known = places.new_ones(num_rows, num_known, dtype=torch.bool)
        self._is_token = torch.cat([known, places > 0], dim=1)  # (B, T)
        inputs = embeddings[is_read].view(num_rows, -1, embeddings.shape[-1])
        self._read((places - 1).clamp(min=0), inputs_embeds=inputs)

    def __len__(self) -> int:
        return len(self._is_token)

    @torch.inference_mode()
    def advance(self, tokens: Tensor) -> None:
        """One step: read every row's newest token, (B,)."""
        positions = self._is_token.sum(1, keepdim=True)  # (B, 1)
        self._is_token = F.pad(self._is_token, (0, 1), value=True)
        self._read(positions, input_ids=tokens.unsqueeze(1).to(positions.device))

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows only; the others cost nothing any more."""
        self.cache, self._is_token = gather([(self.cache, self._is_token, rows)])
        self.logits = self.logits[rows]

    @torch.inference_mode()
    def join(self, new: Rows) -> None:
        """Go on with the rows of both."""
        parts = [(rows.cache, rows._is_token, range(len(rows))) for rows in (self, new)]
        self.cache, self._is_token = gather(parts)
        self.logits = torch.cat([self.logits, new.logits])

    def _read(self, positions: Tensor, **inputs: Tensor) -> None:
        outputs = self._model(
            **inputs,
            attention_mask=None if self._is_token.all() else self._is_token,  # without one attention is faster
            position_ids=positions,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: self.cache},
        )
        self.logits = outputs.logits[:, -1]  # (B, V)


Newcomers = tuple[Rows, "list[Answer]"]  # what they were asked is read, their answers are empty


def decode(
    read_next: Callable[[int], Newcomers | None], num_places: int, choose: Chooser
) -> Generator[dict[int, str], None, None]:
    """Answer one conversation after another, several at once: whoever ends leaves, and the next takes the free place.

    Yields, after every step, the new text (often none) of every answer that grew, by its number in the order of
    coming. A step's work is done when its texts are asked for, so none is done after the last.

    Args:
        read_next: given how many places are free, reads that many conversations or fewer; None when there are no more.
        num_places: how many are answered at once.
    """
    rows: Rows | None = None
    seats: list[_Seat] = []
    num_come = 0
    while True:
        if len(seats) < num_places and (newcomers := read_next(num_places - len(seats))):
            new, answers = newcomers
            if rows is None or not seats:
                rows = new
            else:
                rows.join(new)
            seats += [_Seat(num_come + index, answer, choose.new_draws()) for index, answer in enumerate(answers)]
            num_come += len(answers)
        if rows is None or not seats:
            return
        tokens = choose(rows.logits, [seat.draws for seat in seats])  # (B, V) -> (B,)
        yield {seat.number: seat.answer.add(token) for seat, token in zip(seats, tokens.tolist(), strict=True)}
        going = [place for place, seat in enumerate(seats) if not seat.answer.finish_reason]
        if going and len(going) < len(seats):
            rows.keep(going)
        seats = [seats[place] for place in going]
        if seats:
            rows.advance(tokens[going])


@dataclass(frozen=True)
class _Seat:
    number: int
    answer: Answer
    draws: torch.Generator | None


class Chooser:
    """Takes each row's next token from its logits.

    Args:
        forbidden: (V,) true for tokens that no answer may hold: the image token, and rows that only pad the table.
    """

    def __init__(self, sampling: Sampling, forbidden: Tensor) -> None:
        self._forbidden = forbidden
        self._is_greedy = sampling.temperature == 0
        self._seed = sampling.seed
        if not self._is_greedy:
            temperature = min(max(sampling.temperature, _COLDEST), _HOTTEST)
            self._warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def new_draws(self) -> torch.Generator | None:
        """A row's own source of chance: neighbours change nothing, and the global one is left alone."""
        if self._is_greedy:
            return None
        generator = torch.Generator("cpu")  # on the CPU, for the same draws on every device
        if self._seed is None:
            generator.seed()
        else:
            generator.manual_seed(self._seed)
        return generator

    def __call__(self, logits: Tensor, draws: Iterable[torch.Generator | None]) -> Tensor:
        """(B, V) -> (B,), with every row's own draws."""
        logits = logits.float().masked_fill(self._forbidden, -math.inf)
        if self._is_greedy:
            return logits.argmax(-1)
        logits = logits - logits.amax(-1, keepdim=True)  # lest a tiny temperature overflow
        warped = self._warpers(None, logits)  # type: ignore[arg-type]  # none of them looks at the ids
        probabilities = warped.softmax(-1).cpu()
        drawn = [torch.multinomial(row, 1, generator=one) for row, one in zip(probabilities, draws, strict=True)]
        return torch.cat(drawn)


class Answer:
    """One row's answer while it grows: tokens in, text out that will not have to be taken back.

    Held back are a character's first bytes, what may turn out to be a stop string, and white space that may be the
    answer's last. All pieces together are the answer, without white space around it.

    Args:
        max_tokens: after so many the answer ends, `finish_reason` "length".
        stop_ids: tokens that end the answer, "stop"; as do the texts `stop_strings`, wherever token boundaries fall.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        stop_ids: Collection[int],
        stop_strings: Sequence[str] = (STOP_STRING,),
    ) -> None:
        self.finish_reason: Literal["stop", "length"] | None = None
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._stop_strings = stop_strings
        self._window: list[int] = []  # tokens of the last text read, for context, then those that are no text yet
        self._num_read = 0  # how many of the window are context
        self._pending = ""  # text that is not shown yet
        self._has_begun = False  # false while there has only been white space

    @property
    def num_tokens(self) -> int:
        """So far, the one that ended it included."""
        return len(self.tokens)

    def add(self, token: int) -> str:
        """Text that became certain with this token, often none. A finished answer takes no more."""
        if self.finish_reason:
            return ""
        self.tokens.append(token)
        if token in self._stop_ids:
            return self._finish("stop")
        self._pending += self._read(token)
        if not self._has_begun:
            self._pending = self._pending.lstrip()
        cuts = [cut for stop in self._stop_strings if (cut := self._pending.find(stop)) >= 0]
        if cuts:
            self._pending = self._pending[: min(cuts)]
            return self._finish("stop")
        if self.num_tokens >= self._max_tokens:
            return self._finish("length")
        certain = self._pending[: len(self._pending) - hold_back(self._pending, self._stop_strings)]
        return self._show(certain.rstrip())

    def _read(self, token: int) -> str:
        """The text that a token adds to those before it, once its bytes are characters.

        Only the last few tokens are decoded, so that a long answer costs no more per token than a short one.
        """
        self._window.append(token)
        before = self._decode(self._window[: self._num_read])
        after = self._decode(self._window)
        if len(after) <= len(before) or after.endswith(_BROKEN):
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show(self, text: str) -> str:
        self._pending = self._pending[len(text) :]
        self._has_begun = self._has_begun or bool(text)
        return text

    def _finish(self, reason: Literal["stop", "length"]) -> str:
        self.finish_reason = reason
        return self._show(self._pending.rstrip())
