"""The engine: conversations become prompts, prompts are prefilled into slots, and slots are decoded token by token.

B requests, S prompt tokens, V vocabulary, N images of P patches, D language width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..chat import STOP_STRING, Encoded, TooLongError
from ..generation import as_list as as_id_list
from ..generation import end_token_ids
from ..image import ImageSource, check_source
from ..messages import Message, as_messages, images_of
from ..model import YiVLForConditionalGeneration
from ..processor import YiVLProcessor
from .detokenizer import IncrementalDetokenizer
from .fingerprint import fingerprint
from .kv_cache import gather
from .prefix_cache import ImageKey, LRUCache, PrefixCache, PrefixKey, shared_prefix_length
from .request_queue import Generation, RequestQueue
from .running_batch import Prompts, Request, RunningBatch, StepOutput, forward
from .sampling import Sampler, Sampling

_MAX_PREFIX_BYTES = 1 << 30  # of recent conversations: 16,000 tokens of the 6B's, 4,000 of the 34B's, in bf16
_MAX_FEATURE_BYTES = 256 << 20  # of recent images: 31 of the 6B's, in bf16
_CACHES = ("_prefixes", "_features", "_weights")  # attributes that are not copied or pickled


class Engine:
    """Prompts, prefill and decoding for one model. Recent prefixes and image features are cached between requests.

    Args:
        allow_remote_images: fetch images that are given as http or https URLs, from the public internet only.
    """

    def __init__(
        self, model: YiVLForConditionalGeneration, processor: YiVLProcessor, allow_remote_images: bool = False
    ) -> None:
        self.model = model
        self.processor = processor
        self.allow_remote_images = allow_remote_images
        self.max_prompt_tokens = model.config.text_config.max_position_embeddings - 1  # an answer takes one at least
        self.stop_ids = _stop_ids(model, processor.tokenizer)
        token_ids = torch.arange(model.config.text_config.vocab_size, device="cpu")
        is_unused = token_ids >= len(processor.tokenizer)  # rows that pad the table
        self._suppress_tokens = is_unused | (token_ids == model.config.image_token_id)  # (V,)
        self.clear_cache()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.clear_cache()

    @property
    def device(self) -> torch.device:
        """Of inputs and logits: the CPU for offloaded weights, to which accelerate brings inputs as needed."""
        device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    def clear_cache(self) -> None:
        """Drop the cached prefixes and image features."""
        self._prefixes = PrefixCache(_MAX_PREFIX_BYTES)
        self._features: LRUCache[Tensor] = LRUCache(_MAX_FEATURE_BYTES)  # an image's digest -> (P, D)
        self._weights: int | None = None  # fingerprint of the weights that the cached values were computed with

    # Prompts

    def prepare(self, conversations: Sequence[Sequence[Message]]) -> Prompts:
        """Conversations that await an answer as the model's inputs.

        Raises:
            ValueError: a conversation is malformed or too long, or an image cannot be read.
        """
        checked = [as_messages(messages) for messages in conversations]
        encoded = self.encode(checked)  # before images are decoded
        images = [image for messages in checked for image in images_of(messages)]
        with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes without holding the interpreter's lock
            images_uint8 = list(threads.map(self._decode_image, images))
        return self.stack_prompts(encoded, images_uint8)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Conversations that await an answer as tokens; their images are not looked at.

        Raises:
            ValueError: a conversation is malformed.
            TooLongError: one leaves no room for an answer.
        """
        return [
            self.processor.encode_messages(messages, max_tokens=self.max_prompt_tokens) for messages in conversations
        ]

    def check(self, messages: list[Message]) -> None:
        """
        Raises:
            ValueError: a conversation cannot be answered; what shows only when images are fetched and decoded is not
                found.
        """
        self.encode([messages])
        for image in images_of(messages):
            check_source(image, self.allow_remote_images)

    def stack_prompts(self, encoded: Sequence[Encoded], images_uint8: Sequence[Tensor]) -> Prompts:
        """Encoded prompts and their images, (H, W, 3) uint8 each in reading order, as the model's inputs.

        Raises:
            TooLongError: a prompt leaves no room for an answer.
        """
        for prompt in encoded:
            if len(prompt.input_ids) > self.max_prompt_tokens:
                num_images, patches = len(prompt.image_starts), self.processor.patches_per_image
                raise TooLongError(len(prompt.input_ids), num_images, patches, self.max_prompt_tokens)
        rows = [torch.tensor(prompt.input_ids, device="cpu") for prompt in encoded]
        pad_id = self.processor.tokenizer.pad_token_id or 0
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        stacked = torch.stack(list(images_uint8)) if images_uint8 else None
        keys = self._prefix_keys(encoded, images_uint8)
        return Prompts(input_ids.to(self.device), mask.to(self.device), stacked, keys)

    # Generation

    def generate(
        self, prompts: Prompts, sampling: Sampling, ignore_eos: bool = False
    ) -> Generator[list[StepOutput], None, None]:
        """Decode all prompts together; yields, after every step, the outputs of the requests that were not finished.

        A step is computed when its outputs are asked for: closing the generator stops the work.

        Args:
            ignore_eos: no end token ends an answer; for benchmarks.
        """
        requests = self.new_requests(prompts, sampling, ignore_eos=ignore_eos)
        batch, sampler = self.prefill(prompts, requests), self._sampler(sampling)
        prefixes = self._prefixes  # another object once weights have changed
        try:
            while batch:
                yield batch.sample(sampler)
                batch.decode()
        except GeneratorExit:  # closed between two steps; after an error the cache may not be valid
            _store_prefix(prefixes, prompts, requests, batch)
            raise
        _store_prefix(prefixes, prompts, requests, batch)

    def generate_queue(
        self, queue: RequestQueue, sampling: Sampling, max_batch_size: int
    ) -> list[Generation | ValueError]:
        """Decode all requests of a queue, `max_batch_size` together: a slot that is released takes the next request."""
        sampler = self._sampler(sampling)
        batch: RunningBatch | None = None
        while True:
            num_slots = max_batch_size - (len(batch) if batch else 0)
            if num_slots and (new := self._prefill_next(queue, num_slots, sampling)):
                if batch:
                    batch.extend(new)
                else:
                    batch = new
            if not batch:
                return queue.results()
            queue.record(batch.sample(sampler))
            batch.decode()

    def new_requests(
        self, prompts: Prompts, sampling: Sampling, indices: Iterable[int] | None = None, ignore_eos: bool = False
    ) -> list[Request]:
        """A request for each prompt, with no tokens generated yet."""
        requests = []
        limit, stop_ids = self.max_prompt_tokens + 1, set() if ignore_eos else self.stop_ids
        indices = range(len(prompts.prefix_keys)) if indices is None else indices
        for index, num_tokens in zip(indices, prompts.num_tokens, strict=True):
            max_tokens = min(sampling.max_new_tokens, limit - num_tokens)
            detokenizer = IncrementalDetokenizer(self.processor.tokenizer, max_tokens, stop_ids, sampling.stop_strings)
            requests.append(Request(index, detokenizer, sampling.new_generator()))
        return requests

    @torch.inference_mode()
    def prefill(self, prompts: Prompts, requests: Sequence[Request]) -> RunningBatch:
        """Compute the keys and values of the prompts, but for their cached prefix; each request gets a slot.

        A prefix that all prompts share is computed once, and cached.
        """
        weights = fingerprint(self.model)
        if weights != self._weights:  # another adapter, another dtype, an edit
            self.clear_cache()
            self._weights = weights
        num_rows = len(prompts.prefix_keys)
        num_shared = shared_prefix_length(prompts.prefix_keys)
        cache = self._prefixes.find(prompts.prefix_keys[0].head(num_shared))
        embeddings = self.embed(prompts, cache.get_seq_length())  # (B, S, D)
        if num_rows > 1 and num_shared:
            cache = self._prefill_shared_prefix(prompts, embeddings, cache, num_shared)
        num_cached = cache.get_seq_length()
        is_cached = prompts.is_at(0, num_cached)  # (B, S)
        mask = prompts.attention_mask[~is_cached].view(num_rows, -1).bool()  # padding, then tokens to compute
        mask = torch.cat([mask.new_ones(num_rows, num_cached), mask], dim=1)  # (B, S)
        position_ids = prompts.position_ids[~is_cached].view(num_rows, -1)
        inputs = embeddings[~is_cached].view(num_rows, -1, embeddings.shape[-1])
        logits = forward(self.model, cache, mask, position_ids, inputs_embeds=inputs)
        return RunningBatch(self.model, requests, cache, mask, logits)

    @torch.inference_mode()
    def embed(self, prompts: Prompts, num_cached: int = 0) -> Tensor:
        """(B, S, D): the prompts' embeddings, image features included; those of the first `num_cached` tokens of each
        prompt are not needed, and undefined."""
        # Any id but the image token's stands for what is cached, whose images are not encoded.
        input_ids = prompts.input_ids.masked_fill(prompts.is_at(0, num_cached), 0) if num_cached else prompts.input_ids
        embeddings = self.model.get_input_embeddings()(input_ids).to(input_ids.device)
        if prompts.images_uint8 is None:
            return embeddings
        images = [image for key in prompts.prefix_keys for image in key.images]
        features = self._image_features(prompts.images_uint8, images, num_cached)
        return self.model.model.insert_images(embeddings, input_ids, features)

    def _prefill_next(self, queue: RequestQueue, num_slots: int, sampling: Sampling) -> RunningBatch | None:
        indices, conversations, images_uint8 = queue.pop(num_slots, self._decode_images)
        if not indices:
            return None
        prompts = self.stack_prompts(self.encode(conversations), images_uint8)
        requests = self.new_requests(prompts, sampling, indices)
        batch = self.prefill(prompts, requests)
        if len(requests) == 1:
            self._prefixes.put(prompts.prefix_keys[0], batch.cache)
        queue.start(requests)
        return batch

    def _prefill_shared_prefix(self, prompts: Prompts, embeddings: Tensor, cache: Any, num_shared: int) -> Any:
        """Extend a cache of one row to the first `num_shared` tokens, store it, and repeat it for every prompt."""
        num_cached = cache.get_seq_length()
        mask = torch.ones(1, num_shared, dtype=torch.bool, device="cpu")
        if num_cached < num_shared:
            position_ids = torch.arange(num_cached, num_shared, device=embeddings.device).unsqueeze(0)
            inputs = embeddings[:1, prompts.is_at(num_cached, num_shared)[0]]
            forward(self.model, cache, mask, position_ids, inputs_embeds=inputs)
        self._prefixes.put(prompts.prefix_keys[0].head(num_shared), cache)
        return gather([(cache, mask, [0] * len(embeddings))])[0]

    def _image_features(self, images_uint8: Tensor, images: list[ImageKey], num_cached: int) -> Tensor:
        """(N, H, W, 3) -> (M, P, D), of the images that are not in the first `num_cached` tokens of their prompt; an
        image that was encoded recently is not encoded again."""
        digests = [image.digest for image in images if image.start >= num_cached]
        features = {digest: cached for digest in digests if (cached := self._features.get(digest)) is not None}
        missing = [digest for digest in dict.fromkeys(digests) if digest not in features]
        if missing:
            all_digests = [image.digest for image in images]
            rows = images_uint8[[all_digests.index(digest) for digest in missing]]
            pixel_values = self.processor.image_processor.to_pixel_values(rows).to(self.device, self.model.dtype)
            for digest, encoded in zip(missing, self.model.model.encode_images(pixel_values), strict=True):
                features[digest] = encoded
                self._features.put(digest, encoded.clone(), encoded.nbytes)
        if not digests:
            return torch.zeros(0, self.processor.patches_per_image, 0, device="cpu")
        return torch.stack([features[digest] for digest in digests])

    def _prefix_keys(self, encoded: Sequence[Encoded], images_uint8: Sequence[Tensor]) -> list[PrefixKey]:
        digests = (hashlib.sha256(image.numpy().tobytes()).digest() for image in images_uint8)
        patches = self.processor.patches_per_image
        return [
            PrefixKey(
                np.array(prompt.input_ids, dtype=np.int64),
                tuple(ImageKey(next(digests), start, start + patches) for start in prompt.image_starts),
            )
            for prompt in encoded
        ]

    def _decode_images(self, messages: list[Message]) -> list[Tensor]:
        return [self._decode_image(image) for image in images_of(messages)]

    def _decode_image(self, image: ImageSource) -> Tensor:
        return self.processor.image_processor.to_uint8(image, self.allow_remote_images)

    def _sampler(self, sampling: Sampling) -> Sampler:
        return Sampler(sampling, self._suppress_tokens.to(self.device))


def _store_prefix(prefixes: PrefixCache, prompts: Prompts, requests: Sequence[Request], batch: RunningBatch) -> None:
    """Cache a single conversation with its answer, as far as keys and values were computed."""
    if len(requests) == 1:
        key = prompts.prefix_keys[0].extended(requests[0].detokenizer.tokens)
        prefixes.put(key.head(batch.cache.get_seq_length()), batch.cache)


def _stop_ids(model: YiVLForConditionalGeneration, tokenizer: Any) -> set[int]:
    """The generation config's end tokens, the tokenizer's, and Yi's two where the tokenizer has them.

    Not the separator's: the detokenizer finds it in the text, whatever tokens it is made of.
    """
    configured = as_id_list(model.generation_config.eos_token_id) if model.generation_config else []
    ids = {*configured, *as_id_list(tokenizer.eos_token_id), *end_token_ids(tokenizer)}
    return ids - {tokenizer.get_vocab().get(STOP_STRING)}
