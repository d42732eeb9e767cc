"""The engine: continuous batching. Requests are admitted at any time; a step prefills some of them, or decodes all that
are prefilled by one token.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..chat import STOP_STRING
from ..generation import as_list as as_id_list
from ..generation import end_token_ids
from ..messages import Message
from ..model import YiVLForConditionalGeneration
from ..processor import YiVLProcessor
from .detokenizer import IncrementalDetokenizer
from .fingerprint import fingerprint
from .image_features import ImageFeatures
from .pace import Pace
from .prefill import Prefill
from .prefix_cache import PrefixCache
from .prompt import InputProcessor, Prompt
from .prompt_lookup import PromptLookup
from .request import OnOutput, Request, StepOutput
from .running_batch import RunningBatch
from .sampler import Sampler
from .sampling import Sampling
from .scheduler import Scheduler

_MAX_PREFIX_BYTES = 1 << 30  # of recent conversations: 16,000 tokens of the 6B's, 4,000 of the 34B's, in bf16
_PREFILL_SECONDS = 0.1  # of one step while other requests are under way; four times as long for a single one
_IDLE_FACTOR = 4
_MAX_DECODE_TOKENS = 16  # of all requests in a step with drafts: so many cost little more than one


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
        self.stop_ids = _stop_ids(model, processor.tokenizer)
        token_ids = torch.arange(model.config.text_config.vocab_size, device="cpu")
        is_unused = token_ids >= len(processor.tokenizer)  # rows that pad the table
        suppress_tokens = is_unused | (token_ids == model.config.image_token_id)  # (V,)
        self._sampler = Sampler(suppress_tokens)
        self._start()

    def _start(self) -> None:
        self.scheduler = Scheduler(self._new_prefill, self._num_uncached)
        self._step_lock = threading.Lock()  # held while the model computes
        self._lock = threading.Lock()  # of what follows; held for moments
        self._has_arrivals = threading.Condition(self._lock)
        self._arrivals: deque[Request] = deque()  # since the last step
        self._requests: dict[int, Request] = {}  # that are not done
        self._ids = itertools.count()
        self._batch: RunningBatch | None = None
        self._is_prefill_turn = True
        self._prefill_pace = Pace(_PREFILL_SECONDS, least=64, most=4096, first=256)
        self._image_pace = Pace(_PREFILL_SECONDS, least=1, most=64, first=1)
        self.clear_cache()

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            "model",
            "processor",
            "max_batch_size",
            "max_draft_tokens",
            "max_prompt_tokens",
            "inputs",
            "stop_ids",
            "_sampler",
        )
        return {name: vars(self)[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    @property
    def device(self) -> torch.device:
        """Of inputs and logits: the CPU for offloaded weights, to which accelerate brings inputs as needed."""
        device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def num_running(self) -> int:
        """Requests that have a slot, those whose prompt is being prefilled included."""
        return self.batch_size + self.scheduler.num_prefilling

    @property
    def batch_size(self) -> int:
        """Requests that are decoded together at the moment."""
        return len(self._batch or ())

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._arrivals) + sum(not request.is_cancelled for request in self.scheduler.waiting)

    def clear_cache(self) -> None:
        """Drop the cached prefixes and image features."""
        self.prefixes = PrefixCache(_MAX_PREFIX_BYTES)
        self._features = ImageFeatures(self.model, self.processor)
        self._weights: int | None = None  # fingerprint of the weights that the cached values were computed with

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """A conversation that awaits an answer as a prompt; see `InputProcessor.prepare`."""
        return self.inputs.prepare(messages)

    def model_inputs(self, prompt: Prompt) -> dict[str, Tensor]:
        """A prompt as the model's own `forward` and `generate` take it: `input_ids`, and `pixel_values` if it has
        images."""
        inputs = {"input_ids": prompt.input_ids.to(self.device)}
        if prompt.images_uint8:
            pixels = self.processor.image_processor.to_pixel_values(torch.stack(prompt.images_uint8))
            inputs["pixel_values"] = pixels.to(self.device, self.model.dtype)
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
        detokenizer = IncrementalDetokenizer(self.processor.tokenizer, max_tokens, stop_ids, sampling.stop_strings)
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

    @torch.inference_mode()
    def _step(self) -> list[StepOutput]:
        with self._lock:
            self.scheduler.waiting += self._arrivals
            self._arrivals.clear()
        try:
            self._release()
            prefill = self._next_prefill()
            outputs = self._decode() if prefill is None else self._prefill(prefill)
            self._release()
            return outputs
        except BaseException as error:  # the KV cache may not be valid: Ctrl-C, no memory
            failed = RuntimeError(f"a step of the model was interrupted: {type(error).__name__}: {error}")
            outputs = self._fail_all(error if isinstance(error, Exception) else failed)
            if isinstance(error, Exception):
                return outputs
            raise

    def _next_prefill(self) -> Prefill | None:
        """What to prefill in this step; None when it is for decoding. Both take turns when there is work for both."""
        running = self._batch.requests if self._batch else []
        if running and self._is_prefill_turn:
            self._is_prefill_turn = False
            return None
        prefill = self.scheduler.next_prefill(running, self._max_prefill_tokens, self.max_batch_size)
        self._is_prefill_turn = prefill is not None
        return prefill

    @property
    def _max_prefill_tokens(self) -> int:
        return self._prefill_pace.num_units * (_IDLE_FACTOR if len(self._requests) == 1 else 1)

    def _prefill(self, prefill: Prefill) -> list[StepOutput]:
        try:
            batch = self._compute(prefill)
        except Exception as error:
            self.scheduler.prefills.remove(prefill)
            if len(prefill.requests) == 1:
                return self._fail(prefill.requests, error)
            for request in prefill.requests:  # one of them is at fault: let it fail alone
                self.scheduler.add([request])
            return []
        if batch is None:
            return []
        self.scheduler.prefills.remove(prefill)
        outputs = self._finish(batch.sample(self._sampler))
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.extend(batch)
        return outputs

    def _compute(self, prefill: Prefill) -> RunningBatch | None:
        """Encode some images of a prefill, or compute its next chunk; the batch when that was the last."""
        started = time.perf_counter()
        if missing := prefill.missing_images[: self._image_pace.num_units]:
            prefill.encode_images(missing)
            self._image_pace.record(len(missing), time.perf_counter() - started)
            return None
        num_computed = prefill.num_computed
        batch = prefill.step(self._max_prefill_tokens)
        self._prefill_pace.record(prefill.num_computed - num_computed, time.perf_counter() - started)
        return batch

    def _decode(self) -> list[StepOutput]:
        batch = self._batch
        if batch is None:
            return []
        max_drafted = min(self.max_draft_tokens, _MAX_DECODE_TOKENS // len(batch) - 1)
        drafts = [request.draft(max_drafted) if max_drafted > 0 else [] for request in batch.requests]
        if any(drafts):
            return self._finish(batch.verify(drafts, self._sampler))
        batch.decode()
        return self._finish(batch.sample(self._sampler))

    def _finish(self, outputs: list[StepOutput]) -> list[StepOutput]:
        self._remove(output.request_id for output in outputs if output.is_last)
        return outputs

    def _release_cancelled(self) -> None:
        """Free the slots of cancelled requests; while a step is under way, its thread does so afterwards."""
        started = (*(self._batch.requests if self._batch else ()), *self.scheduler.requests)
        if any(request.is_cancelled for request in started) and self._step_lock.acquire(blocking=False):
            try:
                self._release()
            finally:
                self._step_lock.release()

    def _release(self) -> None:
        """Free the slots of requests that are done, and cache their prefixes."""
        self.scheduler.drop_cancelled()
        if self._batch is None:
            return
        slots = [slot for slot, request in enumerate(self._batch.requests) if not request.is_done]
        if len(slots) == len(self._batch):
            return
        for slot, request in enumerate(self._batch.requests):
            if request.is_done:
                num_cached = int(self._batch.attention_mask[slot].sum())
                self.prefixes.put(request.key.head(num_cached), self._batch.cache, slot, self._batch.attention_mask)
        if slots:
            self._batch.select(slots)
        else:
            self._batch = None

    def _fail(self, requests: Iterable[Request], error: Exception) -> list[StepOutput]:
        failed = [request for request in requests if not request.is_done]
        self._remove(request.id for request in failed)
        return [request.fail(error) for request in failed]

    def _fail_all(self, error: Exception) -> list[StepOutput]:
        """End all requests that have begun."""
        with self._lock:
            not_begun = {request.id for request in (*self.scheduler.waiting, *self._arrivals)}
            begun = [request for request in self._requests.values() if request.id not in not_begun]
        self._batch, self.scheduler.prefills = None, []
        return self._fail(begun, error)

    def _remove(self, request_ids: Iterable[int]) -> None:
        with self._lock:
            for request_id in request_ids:
                self._requests.pop(request_id, None)

    def _num_uncached(self, request: Request) -> int:
        return max(1, len(request.prompt) - self.prefixes.num_cached(request.prompt.key))

    def _new_prefill(self, requests: Sequence[Request]) -> Prefill:
        weights = fingerprint(self.model)
        if weights != self._weights:  # another adapter, another dtype, an edit
            self.clear_cache()
            self._weights = weights
        return Prefill(self.model, self._features, self.prefixes, requests, self.device)


def _stop_ids(model: YiVLForConditionalGeneration, tokenizer: Any) -> set[int]:
    """The generation config's end tokens, the tokenizer's, and Yi's two where the tokenizer has them.

    Not the separator's: the detokenizer finds it in the text, whatever tokens it is made of.
    """
    configured = as_id_list(model.generation_config.eos_token_id) if model.generation_config else []
    ids = {*configured, *as_id_list(tokenizer.eos_token_id), *end_token_ids(tokenizer)}
    return ids - {tokenizer.get_vocab().get(STOP_STRING)}
