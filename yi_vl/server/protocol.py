"""What OpenAI's clients send and get: requests, answers whole and in chunks, errors; and the limits on what they send.

Called by the other files of the server; calls nothing of the project.
"""

from __future__ import annotations

import reprlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


class ApiError(Exception):
    """A request that is not answered, and why, in OpenAI's form.

    400: it is malformed, or asks for what is not supported; 401: its key is wrong; 404: there is no such model or page;
    408, 413: it is too slow, too large; 422: a picture cannot be had or read; 429: too many wait already.
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
        kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        error = {"message": message, "type": kind.get(status, "invalid_request_error"), "param": param, "code": code}
        self.body = {"error": error}


FAILURE = "The server failed; its log says why."
_MAX_COMMAS = 100_000  # in a body: a cheap bound on its values, each of which takes microseconds to check


@dataclass(frozen=True)
class Limits:
    """What strangers may ask for; pictures hold at most `image.MAX_PIXELS` besides."""

    num_waiting: int = 16  # requests that wait while another is answered
    max_tokens: int = 2048  # of an answer
    num_choices: int = 4  # n
    num_images: int = 8  # in a conversation
    image_bytes: int = 16 * 2**20  # of an encoded picture
    body_bytes: int = 32 * 2**20
    body_seconds: float = 60  # for a body to arrive
    fetch_seconds: float = 10  # for a remote picture to arrive, redirects included


class _Strict(BaseModel):
    """Refuses what it does not know, but for values in `neutral`: OpenAI's defaults, which ask for nothing.

    null is the same as nothing wherever OpenAI knows the name.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, list[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if not cls._is_neutral(name, value)}

    @classmethod
    def _is_neutral(cls, name: str, value: Any) -> bool:
        if value is None:
            return name in cls.model_fields or name in cls.neutral
        return value in cls.neutral.get(name, [])


class ImageUrl(_Strict):
    """Where a picture is; there is one image transform, so `detail` can only be "auto"."""

    neutral = {"detail": ["auto"]}
    url: str


class Part(_Strict):
    """A stretch of a message: words or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _check_type(self) -> Part:
        if [name for name in ("text", "image_url") if getattr(self, name) is not None] != [self.type]:
            raise ValueError(f"a part of type {self.type} holds `{self.type}` and nothing else")
        return self


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """What one side said and showed. OpenAI's own answers come back in a history with the names in `neutral`."""

    neutral = {"refusal": [], "annotations": [[]], "audio": [], "function_call": [], "tool_calls": [[]]}
    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_as_parts)]


class StreamOptions(_Strict):
    """`include_usage` adds a last chunk that counts tokens."""

    neutral = {"include_obfuscation": [False]}
    include_usage: bool = False


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(_Strict):
    """A request to `/v1/chat/completions`.

    What it does not say is as in `decode.Sampling`: greedy, at most 512 tokens. With `n` and a `seed` the i-th choice
    is drawn with `seed + i`. Of OpenAI's other parameters those in `neutral` pass with their defaults, which change
    nothing, and so does any `user`, which names who asks.
    """

    neutral = {
        "frequency_penalty": [0],
        "logit_bias": [{}],
        "logprobs": [False],
        "metadata": [{}],
        "modalities": [["text"]],
        "parallel_tool_calls": [True],
        "presence_penalty": [0],
        "response_format": [{"type": "text"}],
        "service_tier": ["auto", "default"],
        "store": [False],
        "tool_choice": ["none", "auto"],
        "tools": [[]],
        "top_logprobs": [0],
    }
    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), Field(max_length=4)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens; give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for `stream`: true only")
        return self

    @property
    def images(self) -> list[tuple[str, str]]:
        """Every picture's URL with the name of its place in the request, in reading order."""
        return [
            (part.image_url.url, f"messages[{i}].content[{j}].image_url.url")
            for i, message in enumerate(self.messages)
            for j, part in enumerate(message.content)
            if part.image_url is not None
        ]

    def as_messages(self, pictures: Sequence[Any]) -> list[dict[str, Any]]:
        """The conversation in the form of `chat.render`, with its pictures put in."""
        remaining = iter(pictures)
        return [
            {
                "role": message.role,
                "content": [
                    {"type": "image", "image": next(remaining)}
                    if part.image_url
                    else {"type": "text", "text": part.text}
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
            message = f"The conversation holds {len(self.images)} pictures; at most {limits.num_images} are read."
            raise ApiError(413, message, "messages", "too_many_images")


def parse_request(body: bytes) -> ChatRequest:
    """The request in a JSON body; an `ApiError` names the first parameter that is wrong."""
    if body.count(b",") > _MAX_COMMAS:
        raise ApiError(413, f"The body holds more than {_MAX_COMMAS:,} values or commas.", code="request_too_large")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem["loc"]).lstrip(".")
    if problem["type"] == "json_invalid":
        raise ApiError(400, f"The body is not JSON: {problem['ctx']['error']}.", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        raise ApiError(400, f"{param} is not supported.", param, "unsupported_parameter")
    if problem["type"] == "missing":
        raise ApiError(400, f"{param} is missing.", param, "missing_required_parameter")
    if problem["type"] == "value_error":
        raise ApiError(400, f"{param or 'The request'}: {problem['ctx']['error']}.", param or None)
    found = reprlib.repr(problem["input"])
    raise ApiError(400, f"{param or 'The body'} is {found}: {problem['msg']}.", param or None)


class Reply:
    """What one request is answered with: `whole`, or `chunk` by chunk."""

    def __init__(self, model: str) -> None:
        self._header = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {**self._header, "object": "chat.completion", "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], **usage: dict[str, int] | None) -> dict[str, Any]:
        return {**self._header, "object": "chat.completion.chunk", "choices": choices, **usage}
