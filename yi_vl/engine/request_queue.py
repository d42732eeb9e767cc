"""The requests of an offline batch: all are checked before the first is decoded, and one's error is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from torch import Tensor

from ..arguments import as_choice, shown
from ..messages import Message
from .detokenizer import FinishReason
from .running_batch import Request, StepOutput

T = TypeVar("T")
Errors = Literal["raise", "return"]


class BatchError(ValueError):
    """A request failed after others were answered; `answers` holds theirs, None for those that are not ready."""

    def __init__(self, message: str, answers: list[str | None]) -> None:
        super().__init__(
            f"{message} ({sum(answer is not None for answer in answers)} answers are ready, as `answers`.)"
        )
        self.answers = answers


@dataclass(frozen=True)
class Generation:
    """An answer and why it ended.

    Args:
        finish_reason: "stop" at an end token or a stop string, "length" at `max_new_tokens` or the end of the context.
        num_tokens: generated, the one that ended it included.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int


class RequestQueue:
    """Conversations that wait for a slot, and the results of those that had one.

    Args:
        conversations: a `ValueError` stands for one that is malformed.
        name: of the list that the caller gave, for errors.
        check: raises a `ValueError` for a conversation that cannot be answered.

    Raises:
        ValueError: with `errors="raise"`, at the first that cannot be answered.
    """

    def __init__(
        self,
        conversations: Sequence[list[Message] | ValueError],
        name: str,
        errors: Errors,
        check: Callable[[list[Message]], None],
    ) -> None:
        self._is_strict = as_choice(errors, "errors", ("raise", "return")) == "raise"
        self._name = name
        self._errors: dict[int, ValueError] = {}
        self._requests: list[Request] = []  # that have or had a slot
        self._texts = [""] * len(conversations)
        waiting: list[tuple[int, list[Message]]] = []
        for index, messages in enumerate(conversations):
            problem = messages if isinstance(messages, ValueError) else attempt(check, messages)
            if isinstance(problem, ValueError):
                if self._is_strict:
                    raise ValueError(f"{name}[{index}]: {problem}") from problem
                self._errors[index] = problem
            else:
                waiting.append((index, messages))  # type: ignore[arg-type]
        self._waiting = iter(waiting)

    def pop(
        self, num_slots: int, decode_images: Callable[[list[Message]], list[Tensor]]
    ) -> tuple[list[int], list[list[Message]], list[Tensor]]:
        """The next requests whose images can be decoded, `num_slots` at most: their indices, messages and images.

        Raises:
            BatchError: with `errors="raise"`, one cannot.
        """
        indices: list[int] = []
        conversations: list[list[Message]] = []
        images: list[Tensor] = []
        while group := list(islice(self._waiting, num_slots - len(indices))):
            with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes without holding the interpreter's lock
                results = list(threads.map(lambda request: attempt(decode_images, request[1]), group))
            for (index, messages), decoded in zip(group, results, strict=True):
                if isinstance(decoded, ValueError):
                    if self._is_strict:
                        raise BatchError(f"{self._name}[{index}]: {decoded}", self._finished()) from decoded
                    self._errors[index] = decoded
                    continue
                indices.append(index)
                conversations.append(messages)
                images += decoded
        return indices, conversations, images

    def start(self, requests: Iterable[Request]) -> None:
        """Requests that have a slot from now on."""
        self._requests += requests

    def record(self, outputs: Iterable[StepOutput]) -> None:
        """Add a step's new text."""
        for output in outputs:
            self._texts[output.request_index] += output.text

    def results(self) -> list[Generation | ValueError]:
        """One per conversation, in their order; a `ValueError` only with `errors="return"`."""
        results: dict[int, Generation | ValueError] = dict(self._errors)
        for request in self._requests:
            reason = request.detokenizer.finish_reason
            assert reason is not None
            results[request.index] = Generation(self._texts[request.index], reason, request.detokenizer.num_tokens)
        return [results[index] for index in range(len(self._texts))]

    def _finished(self) -> list[str | None]:
        finished = {request.index for request in self._requests if request.detokenizer.finish_reason}
        return [text if index in finished else None for index, text in enumerate(self._texts)]


def attempt(function: Callable[..., T], *arguments: Any) -> T | ValueError:
    """What a function returns, or the `ValueError` that it raises."""
    try:
        return function(*arguments)
    except ValueError as error:
        return error


def as_list(values: Any, name: str) -> list[Any]:
    """
    Raises:
        ValueError: the values are not iterable, or a text or mapping.
    """
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {shown(values)}; expected a list.")
    return list(values)
