"""One chat completion from an OpenAI-compatible server, whatever the server does: a reply or a one-line error.

The openai client does the waiting: timeouts, lost connections, 408, 409, 429 and 5xx are tried again with a growing
delay, or the one that `Retry-After` asks for. The body is read here, because many servers send less than the
specification promises.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_TIMEOUT_SECONDS = 300.0
MAX_RETRIES = 4
_SERVER_STATUSES = (401, 403, 404)  # the key, the permission, the model or the URL: no other request would fare better
_REASONING_TYPES = ("thinking", "reasoning")  # of content parts

Finish = Literal["stop", "length", "refused"]


@dataclass(frozen=True)
class Reply:
    """A response, or why there is none.

    Attributes:
        text: the response as it came; an endpoint that sends its reasoning apart has it in `reasoning`.
        error: why the question has no response. With `is_server_down` every other question would fail as well.
        finish: "length" for a response cut at the greatest length, "refused" where the server withheld it; None where
            that is not known.
        refusal: the server's words for a refusal.
    """

    text: str = ""
    error: str | None = None
    finish: Finish | None = None
    reasoning: str = ""
    refusal: str = ""
    is_server_down: bool = False


class ChatClient:
    """A server's chat completions. The key is read from the environment, and never written anywhere.

    Args:
        key_names: environment variables, the first that is set holds the key.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        key_names: Sequence[str] = ("OPENAI_API_KEY",),
    ) -> None:
        from openai import OpenAI

        self._key = next((os.environ[name] for name in key_names if os.environ.get(name)), "")
        self.url = without_secrets(url)
        try:
            self._client = OpenAI(
                base_url=url, api_key=self._key or "none", max_retries=MAX_RETRIES, timeout=timeout_seconds
            )
        except Exception as error:  # the HTTP library's own InvalidURL
            raise ValueError(f"{self.url} cannot be used as a URL: {self._one_line(error)}.") from None

    def first_model(self) -> str:
        """The first model that the server lists."""
        from openai import OpenAIError

        try:
            body = _json(self._client.models.with_raw_response.list().http_response.content)
            return str(body["data"][0]["id"])
        except (OpenAIError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.url} does not list its models ({self._one_line(error)}); name one with --endpoint-model."
            ) from None

    def complete(self, content: Any, **parameters: Any) -> Reply:
        """The reply to one user message. `parameters`: those of the chat completions API."""
        from openai import APIConnectionError, APIStatusError, OpenAIError

        messages: Any = [{"role": "user", "content": content}]
        try:
            answer = self._client.chat.completions.with_raw_response.create(messages=messages, **parameters)
            return _reply(_json(answer.http_response.content))
        except APIStatusError as error:
            status = error.status_code
            return Reply(
                error=f"HTTP {status} from {self.url}: {self._one_line(error)}",
                is_server_down=status in _SERVER_STATUSES,
            )
        except APIConnectionError as error:  # a timeout is one, but it may be this question's own
            is_timeout = "Timeout" in type(error).__name__
            cause = error.__cause__ or error
            return Reply(
                error=f"{self.url}: {self._one_line(error)} ({self._one_line(cause)})", is_server_down=not is_timeout
            )
        except (OpenAIError, ValueError) as error:
            return Reply(error=f"{self.url}: {self._one_line(error)}")

    def _one_line(self, error: BaseException) -> str:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        return line.replace(self._key, "[key]") if self._key else line


def without_secrets(url: str) -> str:
    """A URL without what stands behind "?" or before "@"."""
    return re.sub(r"\?.*$|(?<=//)[^/@]*@", "", url)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"the reply is no JSON: {content[:80]!r}") from None


def _reply(body: Any) -> Reply:
    """What a body says, or a `ValueError` that quotes it."""
    if isinstance(body, Mapping) and body.get("error"):
        raise ValueError(f"an error instead of a reply: {_short(body['error'])}")
    choices = body.get("choices") if isinstance(body, Mapping) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(choice, Mapping) or not isinstance(message, Mapping):
        raise ValueError(f"a reply without choices: {_short(body)}")
    if choice.get("error"):
        raise ValueError(f"an error instead of a reply: {_short(choice['error'])}")
    parts = message.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts if isinstance(parts, list) else []
    refusal = _text(message.get("refusal")) or _text([part for part in parts if _type(part) == "refusal"])
    reason = choice.get("finish_reason")
    return Reply(
        text=_text([part for part in parts if _type(part) not in (*_REASONING_TYPES, "refusal")]).strip(),
        finish=_finish(reason, bool(refusal)),
        reasoning=_text(message.get("reasoning_content"))
        or _text(message.get("reasoning"))
        or _text([part for part in parts if _type(part) in _REASONING_TYPES]),
        refusal=refusal,
    )


def _finish(reason: Any, is_refused: bool) -> Finish | None:
    if is_refused or reason in ("content_filter", "refusal"):
        return "refused"
    if reason in ("length", "max_tokens"):
        return "length"
    return "stop" if reason else None


def _type(part: Any) -> str:
    return str(part.get("type", "text")) if isinstance(part, Mapping) else "text"


def _text(value: Any) -> str:
    """Text out of text, parts, or parts within parts."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # half of a surrogate pair cannot be written to a file
    if isinstance(value, list):
        return "".join(map(_text, value))
    if isinstance(value, Mapping):
        return _text(next((value[key] for key in ("text", "refusal", "thinking", "reasoning") if key in value), ""))
    return ""


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("message"), str):
        value = value["message"]
    return " ".join((_text(value) if isinstance(value, str) else json.dumps(value)).split())[:200]
