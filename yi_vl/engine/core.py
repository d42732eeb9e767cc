"""The engine's computation: which prompts are prefilled, what is decoded, and the caches; for one thread at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..hardware import synchronized_seconds
from ..model import YiVLForConditionalGeneration
from ..processor import YiVLProcessor
from .attention import use_grouped_attention_
from .fingerprint import fingerprint
from .image_features import ImageFeatures
from .pace import Pace
from .prefill import Prefill
from .prefix_cache import PrefixCache
from .request import Request, StepOutput
from .running_batch import RunningBatch
from .sampler import Sampler
from .scheduler import Scheduler

_MAX_PREFIX_BYTES = 1 << 30  # of recent conversations: 16,000 tokens of the 6B's, 4,000 of the 34B's, in bf16
_PREFILL_SECONDS = 0.1  # of one step while other requests are under way; four times as long for a single one
_IDLE_FACTOR = 4
_MAX_DECODE_TOKENS = 16  # of all requests in a step with drafts: so many cost little more than one


class EngineCore:
    """Prefills and decodes requests; recent prefixes and image features are cached between them."""

    def __init__(self, model: YiVLForConditionalGeneration, processor: YiVLProcessor, sampler: Sampler) -> None:
        self.scheduler = Scheduler(self.new_prefill, self._num_uncached)
        self.batch: RunningBatch | None = None
        self.prefill_pace = Pace(_PREFILL_SECONDS, least=64, most=4096, first=256)
        self._image_pace = Pace(_PREFILL_SECONDS, least=1, most=64, first=1)
        use_grouped_attention_(model)
        self._model = model
        self._processor = processor
        self._sampler = sampler
        self._is_prefill_turn = True
        self.clear_cache()

    @property
    def device(self) -> torch.device:
        """Of inputs and logits: the CPU for offloaded weights, to which accelerate brings inputs as needed."""
        device = self._model.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def running(self) -> list[Request]:
        """The requests that are decoded."""
        batch = self.batch  # which another thread may replace
        return batch.requests if batch else []

    @property
    def has_cancelled(self) -> bool:
        """Whether `release` has cancelled requests to release."""
        return self.scheduler.has_cancelled or any(request.is_cancelled for request in self.running)

    def clear_cache(self) -> None:
        """Drop the cached prefixes and image features."""
        self.prefixes = PrefixCache(_MAX_PREFIX_BYTES, self._model.config.text_config)
        self._features = ImageFeatures(self._model, self._processor)
        self._weights: int | None = None  # fingerprint of the weights that the cached values were computed with

    @torch.inference_mode()
    def step(self, is_single: bool, max_batch_size: int | None, max_draft_tokens: int) -> list[StepOutput]:
        """Compute a chunk of some prompts, some images, or a token of every prefilled request.

        Args:
            is_single: there is one request only, which may take longer.
        """
        self.release()
        max_tokens = self.prefill_pace.num_units * (_IDLE_FACTOR if is_single else 1)
        prefill = self._next_prefill(max_tokens, max_batch_size)
        outputs = self._decode(max_draft_tokens) if prefill is None else self._prefill(prefill, max_tokens)
        self.release()
        return outputs

    def release(self) -> None:
        """Free the slots of requests that are done, and cache their prefixes."""
        self.scheduler.drop_cancelled()
        batch = self.batch
        if batch is None:
            return
        slots = [slot for slot, request in enumerate(batch.requests) if not request.is_done]
        if len(slots) == len(batch):
            return
        for slot, request in enumerate(batch.requests):
            if request.is_done:
                num_cached = int(batch.attention_mask[slot].sum())
                self.prefixes.put(request.key.head(num_cached), batch.cache, slot, batch.attention_mask)
        if slots:
            batch.select(slots)
        else:
            self.batch = None

    def reset(self) -> None:
        """Drop what has begun, after a failure in which the KV cache may have become invalid."""
        self.batch, self.scheduler.prefills = None, []

    def new_prefill(self, requests: Sequence[Request]) -> Prefill:
        """Begin the prefill of some requests."""
        weights = fingerprint(self._model)
        if weights != self._weights:  # another adapter, another dtype, an edit
            self.clear_cache()
            self._weights = weights
        return Prefill(self._model, self._features, self.prefixes, requests, self.device)

    def _next_prefill(self, max_tokens: int, max_batch_size: int | None) -> Prefill | None:
        """What to prefill in this step; None when it is for decoding. Both take turns when there is work for both."""
        if self.running and self._is_prefill_turn:
            self._is_prefill_turn = False
            return None
        prefill = self.scheduler.next_prefill(self.running, max_tokens, max_batch_size)
        self._is_prefill_turn = prefill is not None
        return prefill

    def _prefill(self, prefill: Prefill, max_tokens: int) -> list[StepOutput]:
        try:
            batch = self._compute(prefill, max_tokens)
        except Exception as error:
            self.scheduler.prefills.remove(prefill)
            if len(prefill.requests) == 1:
                return fail(prefill.requests, error)
            for request in prefill.requests:  # one of them is at fault: let it fail alone
                self.scheduler.add([request])
            return []
        if batch is None:
            return []
        self.scheduler.prefills.remove(prefill)
        outputs = batch.sample(self._sampler)
        if self.batch is None:
            self.batch = batch
        else:
            self.batch.extend(batch)
        return outputs

    def _compute(self, prefill: Prefill, max_tokens: int) -> RunningBatch | None:
        """Encode some images of a prefill, or compute its next chunk; the batch when that was the last."""
        started = synchronized_seconds(self.device)
        if missing := prefill.missing_images[: self._image_pace.num_units]:
            prefill.encode_images(missing)
            self._image_pace.record(len(missing), synchronized_seconds(self.device) - started)
            return None
        num_computed = prefill.num_computed
        batch = prefill.step(max_tokens)
        self.prefill_pace.record(prefill.num_computed - num_computed, synchronized_seconds(self.device) - started)
        return batch

    def _decode(self, max_draft_tokens: int) -> list[StepOutput]:
        batch = self.batch
        if batch is None:
            return []
        max_drafted = min(max_draft_tokens, _MAX_DECODE_TOKENS // len(batch) - 1)
        drafts = [request.draft(max_drafted) if max_drafted > 0 else [] for request in batch.requests]
        if any(drafts):
            return batch.verify(drafts, self._sampler)
        batch.decode()
        return batch.sample(self._sampler)

    def _num_uncached(self, request: Request) -> int:
        return max(1, len(request.prompt) - self.prefixes.num_cached(request.prompt.key.reusable_head))


def fail(requests: Iterable[Request], error: Exception) -> list[StepOutput]:
    """End requests with an error, unless they are done."""
    return [request.fail(error) for request in requests if not request.is_done]
