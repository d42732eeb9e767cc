"""What OpenAI's clients send and get: requests and the limits on them, answers whole and in chunks, errors."""

from __future__ import annotations

import codecs
import reprlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .parameters import (
    IGNORED_IN_MESSAGES,
    IGNORED_IN_PARTS,
    IGNORED_PARAMETERS,
    NEUTRAL_IN_MESSAGES,
    NEUTRAL_IN_PARTS,
    NEUTRAL_PARAMETERS,
    is_neutral,
)


class ApiError(Exception):
    """A request that is not answered, and why, in OpenAI's form.

    400: it is malformed, or asks for what is not supported; 401: its key is wrong; 403: its Host header is; 404: there
    is no such model or page; 408, 413: it is too slow, too large; 415: its encoding is not supported; 422: an image
    cannot be fetched or read; 429: too many wait already; 500, 503: the server failed, or is shutting down.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        types = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        error = {"message": message, "type": types.get(status, "invalid_request_error"), "param": param, "code": code}
        self.body = {"error": error}


_MAX_STOP_STRINGS = 4
_MAX_PARTS = 4096  # of all messages together: as many as Yi-VL's context has tokens
_MAX_VALUES = 250_000  # in a body, counted cheaply; each takes up to 2 microseconds in which the event loop waits
FAILURE = "The server failed; its log says why."
SHUTDOWN = "The server is shutting down, and its time for answers under way is over; ask again."


@dataclass(frozen=True)
class Limits:
    """Limits of a request; images hold at most `image.MAX_PIXELS` besides."""

    max_batch_size: int = 16  # answers that are generated at once
    num_waiting: int = 16  # requests beyond those
    max_tokens: int = 2048  # of an answer
    num_choices: int = 4  # n
    num_images: int = 8  # in a conversation
    image_bytes: int = 16 * 2**20  # of an encoded image
    body_bytes: int = 32 * 2**20
    body_seconds: float = 60  # for a body to arrive
    fetch_seconds: float = 10  # for a remote image to arrive, redirects included


class _Strict(BaseModel):
    """Refuses unknown fields, and ignores what changes no answer.

    That is: null, wherever nothing is required; the fields in `ignored`; and the values in `neutral`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[dict[str, list[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = {name: value for name, value in fields.items() if not cls._asks_for_nothing(name, value)}
        for name in [name for name in kept if name not in cls.model_fields][1:]:  # the first one is refused by name
            del kept[name]
        return kept

    @classmethod
    def _asks_for_nothing(cls, name: str, value: Any) -> bool:
        if value is None:
            return name not in cls.model_fields or not cls.model_fields[name].is_required()
        return name in cls.ignored or is_neutral(value, cls.neutral.get(name, []))


class ImageUrl(_Strict):
    """Where an image is."""

    ignored = IGNORED_IN_PARTS
    url: str


class PlainUrl(ImageUrl):
    """The same, not wrapped in an object."""


class ImageSource(_Strict):
    """Where an image is, in Anthropic's form."""

    ignored = IGNORED_IN_PARTS
    type: Literal["base64", "url"]
    data: str | None = None
    url: str | None = None

    @model_validator(mode="after")
    def _check_type(self) -> ImageSource:
        if (self.type == "base64") != (self.data is not None) or (self.type == "url") != (self.url is not None):
            raise ValueError("a source of type base64 holds `data`, one of type url holds `url`")
        return self


def _as_image_url(value: Any) -> Any:
    return PlainUrl(url=value) if isinstance(value, str) else value


_AnyUrl = Annotated[ImageUrl | None, BeforeValidator(_as_image_url)]


class Part(_Strict):
    """A stretch of a message, text or an image, in the form of any of the APIs that clients are written for."""

    ignored = IGNORED_IN_PARTS
    neutral = NEUTRAL_IN_PARTS
    type: Literal["text", "image_url", "image", "input_text", "input_image", "output_text"]
    text: str | None = None
    image_url: _AnyUrl = None  # Chat Completions: {"url": ...}; Responses: a string
    image: _AnyUrl = None  # transformers, Qwen
    url: str | None = None  # LangChain
    base64: str | None = None  # LangChain
    data: str | None = None  # LangChain before version 1
    source: ImageSource | None = None  # Anthropic

    @model_validator(mode="after")
    def _check_type(self) -> Part:
        given = sorted(self.model_fields_set - {"type"})
        if self.is_text and given != ["text"]:
            raise ValueError(f"a part of type {self.type} holds `text` and nothing else")
        if not self.is_text and (len(given) != 1 or self.text is not None):
            raise ValueError(f"a part of type {self.type} holds `image_url` and nothing else")
        return self

    @property
    def is_text(self) -> bool:
        return self.type.endswith("text")

    @property
    def image_place(self) -> tuple[str, str]:
        """An image's URL, and where in the part it is."""
        for name in ("image_url", "image"):
            if (value := getattr(self, name)) is not None:
                return value.url, name if isinstance(value, PlainUrl) else f"{name}.url"
        if self.url is not None:
            return self.url, "url"
        if self.source is not None:
            if self.source.url is not None:
                return self.source.url, "source.url"
            return _as_data_url(self.source.data or ""), "source.data"
        if self.base64 is not None:
            return _as_data_url(self.base64), "base64"
        return _as_data_url(self.data or ""), "data"


def _as_data_url(encoded: str) -> str:
    return encoded if encoded[:5].lower() == "data:" else f"data:;base64,{encoded}"


def _as_parts(content: Any) -> Any:
    if content is None:
        return []
    parts = content if isinstance(content, list) else [content] if isinstance(content, str) else None
    if parts is None:
        return content
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


def _check_count(messages: Any) -> Any:
    if isinstance(messages, list):
        contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
        count = sum(max(len(content), 1) if isinstance(content, list) else 1 for content in contents)
        if count > _MAX_PARTS:
            raise ValueError(f"the conversation has {count:,} parts; at most {_MAX_PARTS:,} are read")
    return messages


class Message(_Strict):
    """One message; a missing content is an empty one."""

    ignored = IGNORED_IN_MESSAGES
    neutral = NEUTRAL_IN_MESSAGES
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]


class StreamOptions(_Strict):
    """`include_usage` adds a last chunk that counts tokens."""

    ignored = frozenset({"include_obfuscation"})
    neutral = {"continuous_usage_stats": [False]}
    include_usage: bool = False


def _as_strings(stop: Any) -> Any:
    if not isinstance(stop, (str, list)):
        return stop
    strings = [string for string in ([stop] if isinstance(stop, str) else stop) if string != ""]
    if len(strings) > _MAX_STOP_STRINGS:
        raise ValueError(f"there are {len(strings):,} strings; give at most {_MAX_STOP_STRINGS}")
    return strings


def _as_int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_length(num_tokens: int) -> int:
    if num_tokens < 1 and num_tokens != -1:
        raise ValueError(f"{num_tokens} is no length; give at least 1, or -1 for as many tokens as are allowed")
    return num_tokens


_Int = Annotated[int, BeforeValidator(_as_int)]  # some clients write every number with a decimal point
_Length = Annotated[_Int, AfterValidator(_check_length)]


class ChatRequest(_Strict):
    """A request to `/v1/chat/completions`.

    Defaults are those of `Sampling`: greedy, at most 512 tokens. With `n` and a `seed` the i-th choice
    is drawn with `seed + i`. A `top_p` of 0 is greedy; empty stop strings are ignored.
    """

    ignored = IGNORED_PARAMETERS
    neutral = NEUTRAL_PARAMETERS
    model: str
    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(_check_count)]
    max_tokens: _Length | None = None
    max_completion_tokens: _Length | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: Annotated[list[str], BeforeValidator(_as_strings)] = []
    seed: _Int | None = Field(None, ge=-(2**63), lt=2**63)
    n: _Int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens is the old name of max_completion_tokens, and they differ; give one of them")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """The greatest length asked for, under either name; -1: as many tokens as are allowed."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def images(self) -> list[tuple[str, str]]:
        """Every image's URL with the name of its place in the request, in reading order."""
        images = []
        for i, message in enumerate(self.messages):
            for j, part in enumerate(message.content):
                if not part.is_text:
                    url, place = part.image_place
                    images.append((url, f"messages[{i}].content[{j}].{place}"))
        return images

    def as_messages(self, images: Sequence[Any]) -> list[dict[str, Any]]:
        """The conversation with its images put in, in the form that `merge_messages` takes."""
        remaining = iter(images)
        return [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text} if part.is_text else {"type": "image", "image": next(remaining)}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]

    def check(self, limits: Limits) -> None:
        """Raise when it asks for more than may be asked for."""
        for name, value, limit in (
            ("max_tokens", self.max_tokens, limits.max_tokens),
            ("max_completion_tokens", self.max_completion_tokens, limits.max_tokens),
            ("n", self.n, limits.num_choices),
        ):
            if value is not None and value > limit:
                raise ApiError(400, f"{name} is {value}; here it is at most {limit}.", name)
        if len(self.images) > limits.num_images:
            message = f"The conversation holds {len(self.images)} images; at most {limits.num_images} are read."
            raise ApiError(413, message, "messages", "too_many_images")


def parse_request(body: bytes) -> ChatRequest:
    """The request in a JSON body; an `ApiError` names the first parameter that is wrong."""
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        message = f"The body holds more than {_MAX_VALUES:,} values (commas and opening brackets, in texts as well)."
        raise ApiError(413, message, code="request_too_large")
    try:
        return ChatRequest.model_validate_json(body.removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"]).lstrip(".")
    if problem["type"] == "json_invalid":
        raise ApiError(400, f"The body is not JSON: {problem['ctx']['error']}.", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        shown = reprlib.repr(problem["input"])
        raise ApiError(400, f"{param} is {shown}: not supported; leave it out.", param, "unsupported_parameter")
    if problem["type"] == "missing":
        raise ApiError(400, f"{param} is missing.", param, "missing_required_parameter")
    if problem["type"] == "value_error":
        raise ApiError(400, f"{param or 'The request'}: {problem['ctx']['error']}.", param or None)
    shown = reprlib.repr(problem["input"])
    raise ApiError(400, f"{param or 'The body'} is {shown}: {problem['msg']}.", param or None)


class Reply:
    """What one request is answered with: `whole`, or `chunk` by chunk."""

    def __init__(self, model: str) -> None:
        self._header = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {**self._header, "object": "chat.completion", "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **usage: dict[str, int] | None) -> dict[str, Any]:
        return {**self._header, "object": "chat.completion.chunk", "choices": choices, **usage}
