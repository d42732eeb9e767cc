"""The engine: continuous batching. Requests are admitted at any time; a step prefills some of them, or decodes all that
are prefilled by one token.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import deque
from collections.abc import Generator, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chat import stop_strings
from ..generation import stop_token_ids
from ..messages import Message
from ..model import YiVLForConditionalGeneration
from ..processor import YiVLProcessor
from .core import EngineCore, fail
from .detokenizer import IncrementalDetokenizer
from .prefix_cache import PrefixCache
from .prompt import InputProcessor, Prompt
from .prompt_lookup import PromptLookup
from .request import OnOutput, Request, StepOutput
from .sampler import Sampler
from .sampling import Sampling

_KEPT = ("model", "processor", "max_batch_size", "max_draft_tokens", "max_prompt_tokens", "inputs", "stop_ids")


class Engine:
    """Decodes many requests together, each as if it were alone.

    `admit` and `cancel` never wait for the model. Any thread may call `step`, one at a time: those that wait for an
    answer advance all answers (`generate`), or a thread of its own does (the server's).

    Args:
        allow_remote_images: fetch images that are given as http or https URLs, from the public internet only.
        max_batch_size: requests that have a slot at once; None for no limit.
        max_draft_tokens: of a greedy request and step, by prompt lookup; 0 for none.
    """

    def __init__(
        self,
        model: YiVLForConditionalGeneration,
        processor: YiVLProcessor,
        allow_remote_images: bool = False,
        max_batch_size: int | None = None,
        max_draft_tokens: int = 8,
    ) -> None:
        self.model = model
        self.processor = processor
        self.max_batch_size = max_batch_size
        self.max_draft_tokens = max_draft_tokens
        self.max_prompt_tokens = model.config.text_config.max_position_embeddings - 1  # an answer takes one at least
        self.inputs = InputProcessor(processor, self.max_prompt_tokens, allow_remote_images)
        self.stop_ids = stop_token_ids(model.generation_config, processor.tokenizer)
        token_ids = torch.arange(model.config.text_config.vocab_size, device="cpu")
        is_unused = token_ids >= len(processor.tokenizer)  # rows that pad the table
        suppress_tokens = is_unused | (token_ids == model.config.image_token_id)  # (V,)
        self._sampler = Sampler(suppress_tokens)
        self._start()

    def _start(self) -> None:
        self.core = EngineCore(self.model, self.processor, self._sampler)
        self._step_lock = threading.Lock()  # of `core`; held while the model computes
        self._lock = threading.Lock()  # of what follows; held for moments
        self._has_arrivals = threading.Condition(self._lock)
        self._arrivals: deque[Request] = deque()  # since the last step
        self._requests: dict[int, Request] = {}  # that are not done
        self._ids = itertools.count()

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in (*_KEPT, "_sampler")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def prefixes(self) -> PrefixCache:
        """The KV caches of recent conversations."""
        return self.core.prefixes

    @property
    def num_running(self) -> int:
        """Requests that have a slot, those whose prompt is being prefilled included."""
        return self.batch_size + self.core.scheduler.num_prefilling

    @property
    def batch_size(self) -> int:
        """Requests that are decoded together at the moment."""
        return len(self.core.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._arrivals) + sum(not request.is_cancelled for request in self.core.scheduler.waiting)

    def clear_cache(self) -> None:
        """Drop the cached prefixes and image features."""
        self.core.clear_cache()

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """A conversation that awaits an answer as a prompt; see `InputProcessor.prepare`."""
        return self.inputs.prepare(messages)

    def model_inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """A prompt as the model's own `forward` and `generate` take it: `input_ids`, and `pixel_values` if it has
        images."""
        inputs = {"input_ids": prompt.input_ids.to(self.core.device)}
        if prompt.images_uint8:
            pixels = self.processor.image_processor.to_pixel_values(torch.stack(prompt.images_uint8))
            inputs["pixel_values"] = pixels.to(self.core.device, self.model.dtype)
        return inputs

    # Requests

    def admit(
        self,
        prompt: Prompt,
        sampling: Sampling,
        on_output: OnOutput = lambda output: None,
        client: Hashable = None,
        ignore_eos: bool = False,
    ) -> int:
        """Add a request, which is prefilled by one of the next steps; returns its id.

        Args:
            on_output: receives what steps give the request, in the thread that steps; it must neither raise nor block.
            client: requests of one client share the slots fairly with those of others.
            ignore_eos: no end token ends the answer; for benchmarks.
        """
        with self._lock:
            request = self._new_request(prompt, sampling, on_output, client, ignore_eos)
            self._requests[request.id] = request
            self._arrivals.append(request)
            self._has_arrivals.notify_all()
        return request.id

    def cancel(self, request_id: int) -> None:
        """Give up a request; its slot is free at the next step. Nothing happens if it is done."""
        with self._lock:
            request = self._requests.pop(request_id, None)
            if request is None:
                return
            request.is_cancelled = True
            if request in self._arrivals:
                self._arrivals.remove(request)
        self._release_cancelled()

    def wait_for_work(self, timeout: float) -> bool:
        """Whether there is something to do, after at most so many seconds."""
        with self._has_arrivals:
            return self._has_arrivals.wait_for(lambda: bool(self._requests), timeout)

    def generate(
        self, prompts: Iterable[Prompt], sampling: Sampling, ignore_eos: bool = False
    ) -> Generator[list[StepOutput], None, None]:
        """Decode prompts, together with whatever else is under way; yields the outputs of each step for them.

        A step is computed when its outputs are asked for; closing the generator cancels the requests. An output's
        `request_id` is the index of its prompt.

        Raises:
            Exception: of a step.
        """
        received: deque[StepOutput] = deque()
        index_of: dict[int, int] = {}
        is_exiting = sys.is_finalizing  # a local name: at Python's exit those of modules may be gone
        try:
            for index, prompt in enumerate(prompts):
                index_of[self.admit(prompt, sampling, received.append, ignore_eos=ignore_eos)] = index
            while index_of:
                self.step_until(received)
                outputs = []
                while received:
                    output = received.popleft()
                    outputs.append(replace(output, request_id=index_of[output.request_id]))
                    if output.is_last:
                        del index_of[output.request_id]
                for output in outputs:
                    if output.error is not None:
                        raise output.error
                yield outputs
        finally:
            for request_id in () if is_exiting() else index_of:
                self.cancel(request_id)

    def step_until(self, received: Sequence[StepOutput]) -> None:
        """Step until there is an output in `received`, to which another thread's steps may append as well."""
        while not received:
            with self._step_lock:
                if not received:
                    self._step()
            self._release_cancelled()

    def _new_request(
        self, prompt: Prompt, sampling: Sampling, on_output: OnOutput, client: Hashable, ignore_eos: bool
    ) -> Request:
        max_tokens = min(sampling.max_new_tokens, self.max_prompt_tokens + 1 - len(prompt))
        stop_ids = set() if ignore_eos else self.stop_ids
        stops = (*stop_strings(self.processor.chat_format), *sampling.stop)
        detokenizer = IncrementalDetokenizer(self.processor.tokenizer, max_tokens, stop_ids, stops)
        lookup = None
        if sampling.is_greedy and self.max_draft_tokens:
            lookup = PromptLookup(prompt.key.token_ids.tolist(), self.model.config.image_token_id)
        generator = sampling.new_generator()
        return Request(next(self._ids), prompt, sampling, detokenizer, generator, on_output, client, lookup)

    # Steps

    def step(self) -> list[StepOutput]:
        """Compute a step: a chunk of some prompts, some images, or a token of every prefilled request.

        Returns:
            What requests got, which their `on_output` has received already. An error is an output of the requests that
            it concerns.
        """
        with self._step_lock:
            outputs = self._step()
        self._release_cancelled()
        return outputs

    def _step(self) -> list[StepOutput]:
        with self._lock:
            self.core.scheduler.waiting += self._arrivals
            self._arrivals.clear()
            is_single = len(self._requests) == 1
        try:
            outputs = self.core.step(is_single, self.max_batch_size, self.max_draft_tokens)
        except BaseException as error:  # the KV cache may not be valid: Ctrl-C, no memory
            outputs = self._fail_begun(error)
            if not isinstance(error, Exception):
                raise
        with self._lock:
            for output in outputs:
                if output.is_last:
                    self._requests.pop(output.request_id, None)
        return outputs

    def _fail_begun(self, error: BaseException) -> list[StepOutput]:
        """End all requests but those that wait."""
        if not isinstance(error, Exception):
            error = RuntimeError(f"a step of the model was interrupted: {type(error).__name__}")
        self.core.reset()
        with self._lock:
            not_begun = {request.id for request in (*self.core.scheduler.waiting, *self._arrivals)}
            begun = [request for request in self._requests.values() if request.id not in not_begun]
            for request in begun:
                del self._requests[request.id]
        return fail(begun, error)

    def _release_cancelled(self) -> None:
        """Free the slots of cancelled requests. A thread that holds the lock checks again after it: hence the loop."""
        while self.core.has_cancelled and self._step_lock.acquire(blocking=False):
            try:
                self.core.release()
            finally:
                self._step_lock.release()
