"""Who answers: a Yi-VL in any layout, another transformers image-text-to-text model, or an OpenAI-compatible endpoint.

Each gives the runner the same one thing, `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .chat_client import DEFAULT_TIMEOUT_SECONDS, ChatClient, Reply, without_secrets
from .reasoning import has_reasoning

if TYPE_CHECKING:
    from yi_vl.engine.request_queue import Generation
    from yi_vl.quantize import Scheme

# First bytes -> what an endpoint is told of the format.
_SENT_AS_IT_IS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
Content = list[dict[str, Any]]  # the parts of one user message; an image part holds a `question.BenchmarkImage`


@dataclass(frozen=True)
class Settings:
    """How answers are generated: greedy by default. Recorded with every prediction."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class ModelChoice:
    """Which model is under test: "nano", a folder or hub id, or an endpoint's URL and its model; a Yi-VL quantized
    or as it is."""

    source: str
    endpoint_model: str | None = None
    device: str | None = None
    quantize: Scheme | None = None
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS  # an endpoint's

    @property
    def title(self) -> str:
        """What results call it; what stands behind "?" or before "@" in a URL is left out, it may be a secret."""
        source = without_secrets(self.source)
        named = f"{self.endpoint_model} at {source}" if self.endpoint_model else source
        return f"{named}, {self.quantize}" if self.quantize else named


class Answerer(Protocol):
    """A model under test."""

    def answer(self, requests: Sequence[Content], settings: Settings) -> list[Reply]:
        """A reply to each request, in order; a request that cannot be answered gets an error, not an exception."""


def open_model(choice: ModelChoice) -> Answerer:
    """An endpoint for a URL; a Yi-VL where the files are one, else whatever transformers makes of them.

    Raises:
        ValueError: it cannot be loaded, or not so.
    """
    if choice.source.startswith(("http://", "https://")):
        _refuse_quantize(choice, "an endpoint, which answers as it is")
        return Endpoint(choice.source, choice.endpoint_model, choice.timeout_seconds)
    if choice.endpoint_model is not None:
        raise ValueError(f"--endpoint-model {choice.endpoint_model} is for a URL, but the model is {choice.source}.")
    if choice.source != "nano" and (model_type := _model_type(choice.source)) not in ("yi_vl", None):
        _refuse_quantize(choice, f"{choice.source}, a {model_type}")
        return TransformersModel(choice.source, choice.device)
    return YiVLModel(choice.source, choice.device, choice.quantize)


def _refuse_quantize(choice: ModelChoice, model_name: str) -> None:
    if choice.quantize is not None:
        raise ValueError(
            f"--quantize {choice.quantize} is for a Yi-VL that is loaded here, but the model is "
            f"{model_name}. Leave it out."
        )


class YiVLModel:
    """A Yi-VL through its own engine; "nano" is the bundled one."""

    def __init__(self, name: str, device: str | None = None, quantize: Scheme | None = None) -> None:
        import yi_vl

        self.yi_vl = yi_vl.load(None if name == "nano" else name, device=device, quantize=quantize)

    def answer(self, requests: Sequence[Content], settings: Settings) -> list[Reply]:
        from yi_vl.engine.request_queue import attempt

        contents = [attempt(read_images, content) for content in requests]
        conversations = [[{"role": "user", "content": c}] for c in contents if not isinstance(c, ValueError)]
        results = iter(
            self.yi_vl.generate_batch(conversations, batch_size=len(requests), errors="return", **vars(settings))
        )
        return [_own_reply(content if isinstance(content, ValueError) else next(results)) for content in contents]


class TransformersModel:
    """Any image-text-to-text model that transformers loads, by its own processor and chat template."""

    def __init__(self, name: str, device: str | None = None) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._processor = AutoProcessor.from_pretrained(name)
            self._model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map=device).eval()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{name}: transformers cannot load it as an image-text-to-text model: {error}") from error
        if getattr(self._processor, "chat_template", None) is None:
            raise ValueError(f"{name} has no chat template, so it is not known how to ask it.")
        self._processor.tokenizer.padding_side = "left"

    def answer(self, requests: Sequence[Content], settings: Settings) -> list[Reply]:
        try:
            return self._generate(requests, settings)
        except ValueError:  # one of them cannot be answered: find out which
            return [self._answer_one(content, settings) for content in requests]

    def _answer_one(self, content: Content, settings: Settings) -> Reply:
        try:
            return self._generate([content], settings)[0]
        except ValueError as error:
            return Reply(error=str(error))

    def _generate(self, contents: Sequence[Content], settings: Settings) -> list[Reply]:
        import torch
        from transformers import set_seed

        inputs = self._processor.apply_chat_template(
            [[{"role": "user", "content": _as_images(read_images(content))}] for content in contents],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._model.device, self._model.dtype)
        if settings.seed is not None:
            set_seed(settings.seed)
        sampled = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                max_new_tokens=settings.max_new_tokens,
                **(sampled if settings.temperature > 0 else {"do_sample": False}),
            )
        return [self._reply(row, settings) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]

    def _reply(self, tokens: Sequence[int], settings: Settings) -> Reply:
        """Special tokens are left out, unless they are what marks reasoning."""
        tokenizer = self._processor.tokenizer
        special = set(tokenizer.all_special_ids)
        num_end = next((n for n, token in enumerate(reversed(tokens)) if token not in special), len(tokens))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        whole = tokenizer.decode(tokens[: len(tokens) - num_end], skip_special_tokens=False)
        is_marked = has_reasoning(whole) and not has_reasoning(text)
        is_cut = not num_end and len(tokens) >= settings.max_new_tokens
        return Reply((whole if is_marked else text).strip(), finish="length" if is_cut else "stop")


class Endpoint:
    """An OpenAI-compatible server; the key is taken from OPENAI_API_KEY and never written anywhere."""

    def __init__(self, url: str, model: str | None = None, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        self._client = ChatClient(url, timeout_seconds)
        self._model = model or self._client.first_model()

    def answer(self, requests: Sequence[Content], settings: Settings) -> list[Reply]:
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda content: self._answer_one(content, settings), requests))

    def _answer_one(self, content: Content, settings: Settings) -> Reply:
        extra: dict[str, Any] = {} if settings.seed is None else {"seed": settings.seed}
        try:
            parts = [_as_url(part) for part in read_images(content)]
        except ValueError as error:  # an image that cannot be read
            return Reply(error=str(error))
        return self._client.complete(
            parts,
            model=self._model,
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            **extra,
        )


def _own_reply(result: Generation | ValueError) -> Reply:
    if isinstance(result, ValueError):
        return Reply(error=str(result))
    return Reply(result.text, finish=result.finish_reason)


def read_images(content: Content) -> Content:
    """Images as bytes.

    Raises:
        ValueError: one cannot be read.
    """
    try:
        return [
            {"type": "image", "image": part["image"].read()} if part["type"] == "image" else part for part in content
        ]
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _as_images(content: Content) -> Content:
    from yi_vl.image import load_image

    return [part | {"image": load_image(part["image"])} if part["type"] == "image" else part for part in content]


def _as_url(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    from yi_vl.image import load_image
    from yi_vl.image.data_url import data_url, png_bytes

    content, image = part["image"], load_image(part["image"])
    subtype = next((subtype for start, subtype in _SENT_AS_IT_IS.items() if content.startswith(start)), None)
    if subtype is None:  # a TIFF, say: endpoints take few formats
        content, subtype = png_bytes(image), "png"
    return {"type": "image_url", "image_url": {"url": data_url(content, f"image/{subtype}")}}


def _model_type(name: str) -> str | None:
    """ "yi_vl" for a Yi-VL in any layout, another name for another model, None where it is not known."""
    from yi_vl.checkpoint.load import read_config

    try:
        return str(read_config(name).model_type)
    except ValueError:
        pass
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(name).model_type)
    except (OSError, ValueError, KeyError):
        return None
