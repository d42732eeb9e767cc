"""The Python API: `load()` gives a `YiVL`, which answers questions about pictures.

B conversations answered at once, S prompt tokens, V vocabulary, N images of P patches, D language width.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from .arguments import as_bool, as_int, as_path, one_line, shown
from .chat import STOP_STRING, Encoded
from .chat import TooLongError as TooLongError
from .checkpoint import TowerFrom
from .checkpoint.load import check_fit, load_model
from .engine.batch import Batch, Errors, as_list, attempt
from .engine.batch import BatchError as BatchError
from .engine.batch import Generation as Generation
from .engine.engine import Answer, Chooser, Newcomers, Prompts, Rows, Sampling, decode, read_beginning
from .engine.fingerprint import fingerprint
from .engine.gemv import use_vectors_
from .engine.kv_cache import gather
from .engine.prefix_cache import Keys, LeastRecentlyUsed, PrefixCache, num_common
from .generation import as_list as as_id_list
from .generation import end_token_ids, set_end_tokens_
from .image.transform import ImageSource, check_source
from .messages import Message, as_images, as_messages, conversation, images_of, system_message, user_message
from .model import YiVLForConditionalGeneration
from .processor import YiVLProcessor
from .quantize import Scheme

Images = ImageSource | Sequence[ImageSource] | Iterator[ImageSource] | None

_MAX_PREFIX_BYTES = 1 << 30  # of conversations read lately: 16,000 tokens of the 6B's, 4,000 of the 34B's, in bf16
_MAX_FEATURE_BYTES = 256 << 20  # of pictures seen lately: 31 of the 6B's, in bf16
_BATCH_SIZE = 8


def load(
    path: str | os.PathLike | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tower_from: TowerFrom | None = "vit",
    quantize: Scheme | None = None,
    allow_remote_images: bool = False,
) -> YiVL:
    """A model that is ready to answer; the other arguments and the errors are those of `loading.load_model`.

    Args:
        allow_remote_images: fetch images that are given as http or https URLs, from the public internet only.
    """
    return YiVL(*load_model(path, device, dtype, tower_from, quantize), allow_remote_images=allow_remote_images)


class YiVL:
    """A model with its processor. Every method takes the options of `decode.Sampling` by name: `max_new_tokens` (512),
    `temperature` (0: greedy), `top_p` (1), `seed` and `stop`; None stands for the default.

    Images are whatever `image.load_image` takes: None, one, a list, or an iterator. Whatever is wrong with a request is
    raised as a `ValueError` before the model works on it.
    """

    def __init__(
        self, model: YiVLForConditionalGeneration, processor: YiVLProcessor, *, allow_remote_images: bool = False
    ) -> None:
        self.model = model
        self.processor = processor
        self.allow_remote_images = as_bool(allow_remote_images, "allow_remote_images")
        check_fit(model.config, processor)
        use_vectors_(model.model.language_model)
        use_vectors_(model.lm_head)
        tokens = torch.arange(model.config.text_config.vocab_size, device="cpu")
        self._forbidden = (tokens >= len(processor.tokenizer)) | (tokens == model.config.image_token_id)  # (V,)
        self._stop_ids = _stop_ids(model, processor.tokenizer)
        self._weights: int | None = None  # fingerprint of those that what is kept was computed with
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but what is kept for requests to come."""
        return {name: value for name, value in vars(self).items() if name not in ("_prefixes", "_features", "_weights")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._weights = None
        self.forget()

    def save(self, folder: str | os.PathLike) -> None:
        """Write model and processor to a new folder that `load` takes; a quantised model stays so.

        Raises:
            ValueError: the folder exists, or cannot be written.
        """
        target = as_path(folder, "the folder to save to").absolute()
        try:
            if target.exists():
                raise ValueError(f"{target} exists already; choose another name, or remove it.")
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.model.generation_config is not None:
                set_end_tokens_(self.model.generation_config, self.processor.tokenizer)
            with TemporaryDirectory(prefix=".saving-", dir=target.parent) as partial:
                whole = Path(partial) / "model"  # appears in its place when it is complete
                self.model.save_pretrained(whole)
                self.processor.save_pretrained(whole)
                os.replace(whole, target)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{target} cannot be written: {one_line(error)}.") from error

    def predict(
        self,
        images: Images,
        question: str,
        *,
        system: str | None = None,
        history: Iterable[Message] | None = None,
        **options: Any,
    ) -> str:
        """The answer to a question about some pictures.

        Args:
            system: text before the conversation; Yi-VL's own by default.
            history: the earlier messages of the conversation, in the form of `chat.render`, user first.
        """
        return self.answer(conversation(images, question, system, history), **options)

    def stream(
        self,
        images: Images,
        question: str,
        *,
        system: str | None = None,
        history: Iterable[Message] | None = None,
        **options: Any,
    ) -> Generator[str, None, None]:
        """`predict` piece by piece; closing the generator stops the work."""
        return self.stream_messages(conversation(images, question, system, history), **options)

    @overload
    def predict_batch(
        self,
        requests: Iterable[tuple[Images, str]],
        *,
        system: str | None = None,
        batch_size: int | None = 8,
        errors: Literal["raise"] = "raise",
        **options: Any,
    ) -> list[str]: ...

    @overload
    def predict_batch(
        self,
        requests: Iterable[tuple[Images, str]],
        *,
        system: str | None = None,
        batch_size: int | None = 8,
        errors: Literal["return"],
        **options: Any,
    ) -> list[str | ValueError]: ...

    def predict_batch(
        self,
        requests: Iterable[tuple[Images, str]],
        *,
        system: str | None = None,
        batch_size: int | None = 8,
        errors: Errors = "raise",
        **options: Any,
    ) -> list[str] | list[str | ValueError]:
        """The answers to many `(images, question)`, in their order, `batch_size` at once; see `answer_batch`."""
        conversations = [attempt(_request, request, system) for request in as_list(requests, "requests")]
        return _texts(self._generate_batch(conversations, "requests", batch_size, errors, options))

    @overload
    def answer_batch(
        self,
        conversations: Iterable[Iterable[Message]],
        *,
        batch_size: int | None = 8,
        errors: Literal["raise"] = "raise",
        **options: Any,
    ) -> list[str]: ...

    @overload
    def answer_batch(
        self,
        conversations: Iterable[Iterable[Message]],
        *,
        batch_size: int | None = 8,
        errors: Literal["return"],
        **options: Any,
    ) -> list[str | ValueError]: ...

    def answer_batch(
        self,
        conversations: Iterable[Iterable[Message]],
        *,
        batch_size: int | None = 8,
        errors: Errors = "raise",
        **options: Any,
    ) -> list[str] | list[str | ValueError]:
        """The answers to many whole conversations, in their order; see `answer`.

        `batch_size` of them are answered at once: where one has ended, the next begins. Before the first is, all are
        checked: their form, their length, and that every image is there, of a format that is read, and within bounds.
        Images are decoded (and URLs fetched) when their turn comes, so that memory does not grow with the number of
        conversations.

        Args:
            errors: "return" gives a `ValueError` in the place of an answer and answers all others.

        Raises:
            ValueError: with `errors="raise"`, one of them cannot be answered. Nothing was generated yet.
            BatchError: an image could not be fetched, or turned out to be damaged when it was decoded; it holds the
                answers that are ready.
        """
        return _texts(self.generate_batch(conversations, batch_size=batch_size, errors=errors, **options))

    def generate_batch(
        self,
        conversations: Iterable[Iterable[Message]],
        *,
        batch_size: int | None = 8,
        errors: Errors = "raise",
        **options: Any,
    ) -> list[Generation | ValueError]:
        """`answer_batch`, whose arguments and errors it has, with why each answer ended and how many tokens it took."""
        given = [attempt(as_messages, messages) for messages in as_list(conversations, "conversations")]
        return self._generate_batch(given, "conversations", batch_size, errors, options)

    def _generate_batch(
        self,
        conversations: list[list[Message] | ValueError],
        name: str,
        batch_size: int | None,
        errors: Errors,
        options: dict[str, Any],
    ) -> list[Generation | ValueError]:
        sampling = Sampling(**options)
        num_slots = _BATCH_SIZE if batch_size is None else as_int(batch_size, "batch_size", 1)
        batch = Batch(conversations, name, errors, self._check)

        def read_next(num_free: int) -> Newcomers | None:
            indices, group, images = batch.next_group(num_free, self._decode_images)
            if not group:
                return None
            prompts = self.prompts(self.encode(group), images)
            rows, answers = self._read(prompts), self.begin_answers(prompts, sampling)
            if len(group) == 1:
                self._prefixes.put(prompts.keys[0], rows.cache)
            batch.admit(indices, answers)
            return rows, answers

        for pieces in decode(read_next, num_slots, self._chooser(sampling)):
            batch.extend(pieces)
        return batch.results()

    def chat(self, system: str | None = None) -> Conversation:
        """A conversation that remembers what was said and shown."""
        return Conversation(self, system)

    def answer(self, messages: Sequence[Message], **options: Any) -> str:
        """The answer to a whole conversation; see `chat.render` for what messages are.

        An image part carries its picture: `{"type": "image", "image": path, bytes, PIL image or array}`.
        """
        return "".join(self.stream_messages(messages, **options))

    def stream_messages(self, messages: Sequence[Message], **options: Any) -> Generator[str, None, None]:
        """`answer` piece by piece; closing the generator stops the work."""
        sampling = Sampling(**options)
        prompts = self.prepare([messages])
        steps = self.generate(prompts, self.begin_answers(prompts, sampling), sampling)
        return (piece for (piece,) in steps if piece)

    def prepare(self, conversations: Sequence[Sequence[Message]]) -> Prompts:
        """Conversations that await an answer as the model reads them.

        Raises:
            ValueError: a conversation is malformed or too long, or a picture cannot be read.
        """
        conversations = [as_messages(messages) for messages in conversations]
        encoded = self.encode(conversations)  # before images are decoded
        images = [image for messages in conversations for image in images_of(messages)]
        with ThreadPoolExecutor() as threads:  # Pillow decodes and resizes without holding the interpreter's lock
            images_uint8 = list(threads.map(self._decode_image, images))
        return self.prompts(encoded, images_uint8)

    def prepare_image(self, image: ImageSource) -> Image.Image:
        """An image as the model sees it, to be shown later on, when its file may be gone.

        Raises:
            ValueError: it cannot be read.
        """
        return self.processor.image_processor.prepare(image, allow_remote_images=self.allow_remote_images)

    def _check(self, messages: list[Message]) -> None:
        """Find what is wrong with a conversation, but for what shows when images are fetched and decoded."""
        self.encode([messages])
        for image in images_of(messages):
            check_source(image, self.allow_remote_images)

    def _decode_images(self, messages: list[Message]) -> list[Tensor]:
        return [self._decode_image(image) for image in images_of(messages)]

    def _decode_image(self, image: ImageSource) -> Tensor:
        return self.processor.image_processor.square(image, self.allow_remote_images)

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Conversations that await an answer as tokens; their images are not looked at.

        Raises:
            ValueError: a conversation is malformed.
            TooLongError: one leaves no room for an answer.
        """
        max_tokens = self.model.config.text_config.max_position_embeddings - 1  # an answer takes one at least
        return [self.processor.encode_messages(messages, max_tokens=max_tokens) for messages in conversations]

    def prompts(self, encoded: Sequence[Encoded], squares: Sequence[Tensor]) -> Prompts:
        """Rows of tokens with their pictures, (H, W, 3) uint8 each, as the model reads them.

        Raises:
            TooLongError: a row leaves no room for an answer.
        """
        self._check_lengths(encoded)
        rows = [torch.tensor(prompt.input_ids, device="cpu") for prompt in encoded]
        pad_id = self.processor.tokenizer.pad_token_id or 0
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        device, keys = self._device, self._keys(encoded, squares)
        stacked = torch.stack(list(squares)) if squares else None
        return Prompts(input_ids.to(device), mask.to(device), stacked, keys)

    def begin_answers(self, prompts: Prompts, sampling: Sampling) -> list[Answer]:
        """An empty answer for every row; afterwards they know why they ended and how many tokens they took."""
        limit = self.model.config.text_config.max_position_embeddings
        rooms = [min(sampling.max_new_tokens, limit - num_tokens) for num_tokens in prompts.num_tokens]
        return [Answer(self.processor.tokenizer, room, self._stop_ids, sampling.stop_strings) for room in rooms]

    def generate(self, prompts: Prompts, answers: list[Answer], sampling: Sampling) -> Generator[list[str], None, None]:
        """Every row's new text (often none), step after step until the last answer has ended."""
        newcomers: list[Newcomers] = []
        kept: list[PrefixCache] = []  # of the weights that the prompts were read with

        def read_once(_: int) -> Newcomers | None:
            if newcomers:
                return None
            newcomers.append((self._read(prompts), answers))
            kept.append(self._prefixes)
            return newcomers[0]

        with closing(decode(read_once, len(answers), self._chooser(sampling))) as steps:
            try:
                for pieces in steps:
                    yield [pieces.get(number, "") for number in range(len(answers))]
            except GeneratorExit:  # stopped between two steps: what was read holds; after an error it may not
                _remember(kept[0], prompts, *newcomers[0])
                raise
            _remember(kept[0], prompts, *newcomers[0])

    def forget(self) -> None:
        """Let go of everything that is kept for requests to come: conversations and pictures read lately."""
        self._prefixes = PrefixCache(_MAX_PREFIX_BYTES)
        self._features: LeastRecentlyUsed[Tensor] = LeastRecentlyUsed(_MAX_FEATURE_BYTES)  # picture's key -> (P, D)

    def _forget_other_weights(self) -> None:
        """`forget` when the weights are not those of the last request: another adapter, another dtype, an edit."""
        weights = fingerprint(self.model)
        if weights != self._weights:
            self.forget()
            self._weights = weights

    @torch.inference_mode()
    def begin(self, prompts: Prompts) -> tuple[Cache, Tensor]:
        """What is known of the prompts' beginning, for every row, and all prompts' embeddings (B, S, D).

        What several rows begin with is read here, once, and remembered.
        """
        self._forget_other_weights()
        num_rows = len(prompts.keys)
        num_shared = num_common(prompts.keys)
        cache = self._prefixes.find(prompts.keys[0][:num_shared])
        embeddings = self._embed(prompts, cache.get_seq_length())
        if num_rows > 1 and num_shared:
            read_beginning(self.model, prompts, embeddings, cache, num_shared)
            self._prefixes.put(prompts.keys[0][:num_shared], cache)
            is_token = torch.ones(1, num_shared, dtype=torch.bool, device="cpu")
            cache, _ = gather([(cache, is_token, [0] * num_rows)])
        return cache, embeddings

    @property
    def _device(self) -> torch.device:
        """Where inputs go and logits come from. Weights that are offloaded are nowhere until they are needed, and
        accelerate then brings inputs to them."""
        device = self.model.device
        return torch.device("cpu") if device.type == "meta" else device

    def _read(self, prompts: Prompts) -> Rows:
        return Rows(self.model, prompts, *self.begin(prompts))

    def _chooser(self, sampling: Sampling) -> Chooser:
        return Chooser(sampling, self._forbidden.to(self._device))

    def _embed(self, prompts: Prompts, num_known: int) -> Tensor:
        """(B, S, D); pictures that lie before place `num_known` are not needed and left out."""
        embed = self.model.get_input_embeddings()
        embeddings = embed(prompts.input_ids).to(prompts.input_ids.device)  # (B, S, D)
        if prompts.squares is None:
            return embeddings
        is_image = prompts.input_ids == self.model.config.image_token_id  # (B, S)
        is_new = is_image & (prompts.places > num_known)
        starts = np.concatenate([keys[keys < 0] for keys in prompts.keys])[:: self.processor.patches_per_image]
        needed = is_new[is_image].view(len(starts), -1)[:, 0].tolist()
        features = self._encode([int(key) for key in starts], prompts.squares, needed)
        return embeddings.masked_scatter(is_new.unsqueeze(-1), features.to(embeddings))

    def _encode(self, keys: list[int], squares: Tensor, needed: list[bool]) -> Tensor:
        """(N, H, W, 3) -> features of the needed pictures (M, P, D); one seen lately is not encoded again."""
        wanted = [key for key, is_needed in zip(keys, needed, strict=True) if is_needed]
        features = {key: found for key in wanted if (found := self._features.get(key)) is not None}
        new = [key for key in dict.fromkeys(wanted) if key not in features]
        if new:
            pixels = self.processor.image_processor.normalise(squares[[keys.index(key) for key in new]])
            encoded_pictures = self.model.model.encode_images(pixels.to(self._device, self.model.dtype))
            for key, encoded in zip(new, encoded_pictures, strict=True):
                features[key] = encoded
                self._features.put(key, encoded.clone(), encoded.nbytes)
        return torch.stack([features[key] for key in wanted]) if wanted else torch.zeros(0, device="cpu")

    def _keys(self, encoded: Sequence[Encoded], squares: Sequence[Tensor]) -> list[Keys]:
        """Of every row's tokens: the ids, and in an image's place negative numbers that stand for its bytes."""
        pictures = iter(squares)
        rows = []
        for prompt in encoded:
            keys = np.array(prompt.input_ids, dtype=np.int64)
            for start in prompt.image_starts:
                digest = hashlib.sha256(next(pictures).numpy().tobytes()).digest()
                keys[start : start + self.processor.patches_per_image] = -1 - int.from_bytes(digest[:7], "big")
            rows.append(keys)
        return rows

    def _check_lengths(self, encoded: Sequence[Encoded]) -> None:
        max_tokens = self.model.config.text_config.max_position_embeddings - 1
        for prompt in encoded:
            if len(prompt.input_ids) > max_tokens:
                num_images, per_image = len(prompt.image_starts), self.processor.patches_per_image
                raise TooLongError(len(prompt.input_ids), num_images, per_image, max_tokens)


class Conversation:
    """A chat about pictures that remembers; `messages` is all that was said and shown, in the form of `chat.render`."""

    def __init__(self, yi_vl: YiVL, system: str | None = None) -> None:
        self.messages: list[Message] = [] if system is None else [system_message(system)]
        self._yi_vl = yi_vl

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        """The same conversation, to go on differently; with the same model, which is large and is not changed by it."""
        copied = Conversation(self._yi_vl)
        copied.messages = copy.deepcopy(self.messages, memo)
        return copied

    def ask(self, question: str, images: Images = None, **options: Any) -> str:
        """The answer to the next question, and to the pictures shown with it."""
        return "".join(self.stream(question, images, **options))

    def stream(self, question: str, images: Images = None, **options: Any) -> Generator[str, None, None]:
        """`ask` piece by piece. An answer that is stopped is remembered as far as it went, a failed turn not at all."""
        prepare = self._yi_vl.prepare_image  # once: the file may be gone by the next turn
        message = user_message([prepare(image) for image in as_images(images)], question)
        messages = [*as_messages(self.messages), message]
        return self._record(messages, self._yi_vl.stream_messages(messages, **options))

    def _record(self, messages: list[Message], pieces: Generator[str, None, None]) -> Generator[str, None, None]:
        before, said = self.messages, ""
        try:
            with closing(pieces):
                for piece in pieces:
                    said += piece
                    self.messages = [*messages, {"role": "assistant", "content": said}]
                    yield piece
            self.messages = [*messages, {"role": "assistant", "content": said}]
        except Exception:
            self.messages = before
            raise


def _remember(prefixes: PrefixCache, prompts: Prompts, rows: Rows, answers: list[Answer]) -> None:
    """Keep a single conversation, with its answer as far as that was read again."""
    if len(answers) == 1:
        keys = np.concatenate([prompts.keys[0], np.array(answers[0].tokens, dtype=np.int64)])
        prefixes.put(keys[: rows.cache.get_seq_length()], rows.cache)


def _stop_ids(model: YiVLForConditionalGeneration, tokenizer: Any) -> set[int]:
    """The generation config's end tokens, the tokenizer's, and Yi's two where the tokenizer has them.

    Not the separator's: `Answer` finds it in the text, whatever tokens it is made of.
    """
    configured = as_id_list(model.generation_config.eos_token_id) if model.generation_config else []
    ids = {*configured, *as_id_list(tokenizer.eos_token_id), *end_token_ids(tokenizer)}
    return ids - {tokenizer.get_vocab().get(STOP_STRING)}


def _texts(results: list[Generation | ValueError]) -> list[Any]:
    return [result if isinstance(result, ValueError) else result.text for result in results]


def _request(request: Any, system: Any) -> list[Message]:
    if not isinstance(request, (tuple, list)) or len(request) != 2:
        raise ValueError(f"it is {shown(request)}; expected (images, question).")
    return conversation(request[0], request[1], system)
