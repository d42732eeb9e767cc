"""The Python API: `load()` gives a `YiVL`, which answers questions about images."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import torch
from PIL import Image
from safetensors import SafetensorError

from .arguments import as_bool, as_int, as_path, one_line, shown
from .checkpoint import TowerFrom
from .checkpoint.fit import check_fit
from .checkpoint.load import load_model
from .encode import TooLongError as TooLongError
from .engine.engine import Engine
from .engine.request_queue import BatchError as BatchError
from .engine.request_queue import Errors, RequestQueue, as_list, attempt
from .engine.request_queue import Generation as Generation
from .engine.sampling import Sampling
from .generation import set_end_tokens_
from .image import ImageSource, TiledImage
from .image.tiles import as_max_tiles
from .linear import repack_linears_
from .messages import Message, as_images, as_messages, conversation, system_message, user_message
from .model import YiVLForConditionalGeneration
from .processor import YiVLProcessor
from .quantize import Scheme

Images = ImageSource | Sequence[ImageSource] | Iterator[ImageSource] | None

_BATCH_SIZE = 8
_logger = logging.getLogger(__name__)


def load(
    path: str | os.PathLike | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tower_from: TowerFrom | None = "vit",
    quantize: Scheme | None = None,
    allow_remote_images: bool = False,
    image_tiles: int | None = None,
) -> YiVL:
    """A model with its processor; the other arguments and the errors are those of `checkpoint.load.load_model`.

    Args:
        allow_remote_images: fetch images that are given as http or https URLs, from the public internet only.
        image_tiles: most tiles of an image beside its thumbnail, 0 for none; by default what the model was trained
            with. One that was trained without has never seen several views of one image, and may answer worse.
    """
    tiles = None if image_tiles is None else as_max_tiles(image_tiles, "image_tiles")
    model, processor = load_model(path, device, dtype, tower_from, quantize)
    if tiles is not None:
        if tiles and not processor.image_processor.max_tiles:
            name = "the bundled nano" if path is None else shown(str(path))
            _logger.warning("%s was trained without tiles, and may answer worse with them.", name)
        processor.image_processor.max_tiles = tiles
    return YiVL(model, processor, allow_remote_images=allow_remote_images)


class YiVL:
    """A model with its processor. Every method takes the options of `Sampling` by name: `max_new_tokens` (512),
    `temperature` (0: greedy), `top_p` (1), `seed` and `stop`; None stands for the default.

    Images are whatever `load_image` takes: None, one, a list, or an iterator. What is wrong with a request is raised as
    a `ValueError` before the model runs.
    """

    def __init__(
        self, model: YiVLForConditionalGeneration, processor: YiVLProcessor, *, allow_remote_images: bool = False
    ) -> None:
        as_bool(allow_remote_images, "allow_remote_images")
        check_fit(model.config, processor)
        self.engine = Engine(model, processor, allow_remote_images)

    @property
    def model(self) -> YiVLForConditionalGeneration:
        return self.engine.model

    @property
    def processor(self) -> YiVLProcessor:
        return self.engine.processor

    def save(self, folder: str | os.PathLike) -> None:
        """Write model and processor to a new folder that `load` takes; a quantized model stays so.

        Raises:
            ValueError: the folder exists, or cannot be written.
        """
        target = as_path(folder, "the folder to save to").absolute()
        try:
            if target.exists():
                raise ValueError(f"{target} exists already; choose another name, or remove it.")
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.model.generation_config is not None:
                chat_format = self.processor.chat_format
                set_end_tokens_(self.model.generation_config, self.processor.tokenizer, chat_format)
            with TemporaryDirectory(prefix=".saving-", dir=target.parent) as partial:
                complete = Path(partial) / "model"
                self.model.save_pretrained(complete)
                self.processor.save_pretrained(complete)
                os.replace(complete, target)
            repack_linears_(self.model)
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
        """The answer to a question about some images.

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
        """`predict`, yielding text as it is generated; closing the generator stops the generation."""
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
        """The answers to many `(images, question)`, in their order; see `answer_batch`."""
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

        At most `batch_size` are decoded together; a finished one makes room for the next. All are checked first: their
        form, their length, and that every image exists, in a supported format and within bounds. Images are decoded
        (and URLs fetched) just before their prefill, so that memory does not grow with the number of conversations.

        Args:
            errors: "return" gives a `ValueError` in place of an answer, and answers all others.

        Raises:
            ValueError: with `errors="raise"`, one of them cannot be answered. Nothing was generated.
            BatchError: an image could not be fetched or decoded; it holds the answers that are ready.
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
        """`answer_batch`, with each answer's finish reason and number of tokens."""
        checked = [attempt(as_messages, messages) for messages in as_list(conversations, "conversations")]
        return self._generate_batch(checked, "conversations", batch_size, errors, options)

    def _generate_batch(
        self,
        conversations: list[list[Message] | ValueError],
        name: str,
        batch_size: int | None,
        errors: Errors,
        options: dict[str, Any],
    ) -> list[Generation | ValueError]:
        sampling = Sampling(**options)
        max_batch_size = _BATCH_SIZE if batch_size is None else as_int(batch_size, "batch_size", 1)
        return RequestQueue(self.engine, conversations, name, errors).run(sampling, max_batch_size)

    def chat(self, system: str | None = None) -> Conversation:
        """A conversation that keeps its history."""
        return Conversation(self, system)

    def answer(self, messages: Sequence[Message], **options: Any) -> str:
        """The answer to a whole conversation; see `chat.render` for what messages are.

        An image part carries its image: `{"type": "image", "image": path, bytes, PIL image or array}`.
        """
        return "".join(self.stream_messages(messages, **options))

    def stream_messages(self, messages: Sequence[Message], **options: Any) -> Generator[str, None, None]:
        """`answer`, yielding text as it is generated; closing the generator stops the generation."""
        sampling = Sampling(**options)
        steps = self.engine.generate([self.engine.prepare(messages)], sampling)
        return (output.text for outputs in steps for output in outputs if output.text)

    def prepare_image(self, image: ImageSource) -> Image.Image | TiledImage:
        """An image as the model sees it, for later turns, when its file may be gone; with tiles a `TiledImage`.

        Raises:
            ValueError: it cannot be read.
        """
        allow_remote_images = self.engine.inputs.allow_remote_images
        return self.processor.image_processor.snapshot(image, allow_remote_images=allow_remote_images)

    def clear_cache(self) -> None:
        """Drop the cached prefixes and image features of earlier requests."""
        self.engine.clear_cache()


class Conversation:
    """A chat about images that keeps its history: `messages`, in the form of `chat.render`."""

    def __init__(self, yi_vl: YiVL, system: str | None = None) -> None:
        self.messages: list[Message] = [] if system is None else [system_message(system)]
        self._yi_vl = yi_vl

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        """A branch of the conversation; the model is shared."""
        copied = Conversation(self._yi_vl)
        copied.messages = copy.deepcopy(self.messages, memo)
        return copied

    def ask(self, question: str, images: Images = None, **options: Any) -> str:
        """The answer to the next question, which may show more images."""
        return "".join(self.stream(question, images, **options))

    def stream(self, question: str, images: Images = None, **options: Any) -> Generator[str, None, None]:
        """`ask`, yielding text as it is generated. A stopped answer stays in the history as far as it was generated; a
        failed turn does not."""
        prepare = self._yi_vl.prepare_image  # now: the file may be gone by the next turn
        message = user_message([prepare(image) for image in as_images(images)], question)
        messages = [*as_messages(self.messages), message]
        return self._record(messages, self._yi_vl.stream_messages(messages, **options))

    def _record(self, messages: list[Message], texts: Generator[str, None, None]) -> Generator[str, None, None]:
        before, answer = self.messages, ""
        try:
            with closing(texts):
                for text in texts:
                    answer += text
                    self.messages = [*messages, {"role": "assistant", "content": answer}]
                    yield text
            self.messages = [*messages, {"role": "assistant", "content": answer}]
        except Exception:
            self.messages = before
            raise


def _texts(results: list[Generation | ValueError]) -> list[Any]:
    return [result if isinstance(result, ValueError) else result.text for result in results]


def _request(request: Any, system: Any) -> list[Message]:
    if not isinstance(request, (tuple, list)) or len(request) != 2:
        raise ValueError(f"it is {shown(request)}; expected (images, question).")
    return conversation(request[0], request[1], system)
