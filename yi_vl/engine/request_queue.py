"""The requests of an offline batch: all are checked before the first is decoded, and one's error is its own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..arguments import as_choice, shown
from ..messages import Message
from .detokenizer import FinishReason
from .engine import Engine
from .request import StepOutput
from .sampling import Sampling

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
    """Conversations that wait to be admitted, and the results of those that were.

    Args:
        conversations: a `ValueError` stands for one that is malformed.
        name: of the list that the caller gave, for errors.

    Raises:
        ValueError: with `errors="raise"`, at the first that cannot be answered.
    """

    def __init__(
        self, engine: Engine, conversations: Sequence[list[Message] | ValueError], name: str, errors: Errors
    ) -> None:
        self._engine = engine
        self._is_strict = as_choice(errors, "errors", ("raise", "return")) == "raise"
        self._name = name
        self._texts = [""] * len(conversations)
        self._results: dict[int, Generation | ValueError] = {}
        self._index_of: dict[int, int] = {}  # of admitted requests
        self._outputs: deque[StepOutput] = deque()
        self._waiting: deque[tuple[int, list[Message]]] = deque()
        for index, messages in enumerate(conversations):
            problem = messages if isinstance(messages, ValueError) else attempt(engine.inputs.check, messages)
            if isinstance(problem, ValueError):
                if self._is_strict:
                    raise ValueError(f"{name}[{index}]: {problem}") from problem
                self._results[index] = problem
            else:
                self._waiting.append((index, messages))  # type: ignore[arg-type]

    def run(self, sampling: Sampling, batch_size: int) -> list[Generation | ValueError]:
        """Decode all conversations, at most `batch_size` together; a result for each, in their order.

        Raises:
            BatchError: with `errors="raise"`, an image cannot be fetched or decoded.
        """
        try:
            while self._waiting or self._index_of:
                if num_free := batch_size - len(self._index_of):
                    self._admit(sampling, num_free)
                if self._index_of:
                    self._engine.step_until(self._outputs)
                    self._record()
        finally:
            for request_id in self._index_of:
                self._engine.cancel(request_id)
        return [self._results[index] for index in range(len(self._texts))]

    def _admit(self, sampling: Sampling, num_requests: int) -> None:
        group = [self._waiting.popleft() for _ in range(min(num_requests, len(self._waiting)))]
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without holding the interpreter's lock
            prompts = list(threads.map(lambda request: attempt(self._engine.prepare, request[1]), group))
        for (index, _), prompt in zip(group, prompts, strict=True):
            if not isinstance(prompt, ValueError):
                self._index_of[self._engine.admit(prompt, sampling, self._outputs.append)] = index
            elif self._is_strict:
                ready = [result.text if isinstance(result, Generation) else None for result in self._in_order()]
                raise BatchError(f"{self._name}[{index}]: {prompt}", ready) from prompt
            else:
                self._results[index] = prompt

    def _record(self) -> None:
        while self._outputs:
            output = self._outputs.popleft()
            if output.error is not None:
                raise output.error
            index = self._index_of[output.request_id]
            self._texts[index] += output.text
            if output.finish_reason:
                del self._index_of[output.request_id]
                self._results[index] = Generation(self._texts[index], output.finish_reason, output.num_tokens)

    def _in_order(self) -> list[Generation | ValueError | None]:
        return [self._results.get(index) for index in range(len(self._texts))]


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
