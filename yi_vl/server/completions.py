"""Chat completions: a request is parsed, checked, encoded, generated, and answered whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from torch import Tensor

from ..encode import Encoded
from ..engine.sampling import Sampling
from ..predict import TooLongError, YiVL
from .body import read_body
from .conversation import merge_messages
from .engine_loop import AdmissionLimit, BufferedStream, EngineLoop
from .images import ImageDecoder, read_url
from .metrics import Metrics
from .protocol import FAILURE, SHUTDOWN, ApiError, ChatRequest, Limits, Reply, parse_request

T = TypeVar("T")
_logger = logging.getLogger(__name__)
_NUM_BODIES = 32  # bodies read concurrently
_NUM_DECODERS = 4  # images decoded concurrently, so that one that takes long delays no other
_NUM_IMAGES = 64  # of the latest requests, kept decoded; with tiles as many thumbnails and tiles, but
_LEAST_IMAGES = 8  # at least so many images: those of a conversation


@dataclass(frozen=True)
class Piece:
    """One step of an answer: a token, and the text that is final with it."""

    choice: int
    text: str
    finish_reason: str | None
    usage: dict[str, int]  # so far


class Completions:
    """`/v1/chat/completions` over a ready model, whose engine it steps from now on."""

    def __init__(self, yi_vl: YiVL, name: str, limits: Limits, allow_remote_images: bool) -> None:
        self.loop = EngineLoop(yi_vl.engine, limits.max_batch_size, limits.num_waiting)
        self.metrics = Metrics(self.loop)
        self._yi_vl = yi_vl
        self._name = name
        self._limits = limits
        self._allow_remote_images = allow_remote_images
        self._body_limit = AdmissionLimit(_NUM_BODIES)
        self._tokenizing = ThreadPoolExecutor(1, "yi-vl-tokenizer")
        image_processor = yi_vl.processor.image_processor
        num_images = max(_LEAST_IMAGES, _NUM_IMAGES // (1 + image_processor.max_tiles))
        self._images = ImageDecoder(image_processor, _NUM_DECODERS, num_images)

    async def complete(self, request: Request) -> Response:
        """The answer to a request, or an `ApiError`; when the client leaves, the work for it stops within one step.

        What the server cancels, once the time it has for its shutdown is over, gets an error as its answer.
        """
        try:
            return await self._complete(request)
        except asyncio.CancelledError as error:
            raise ApiError(503, SHUTDOWN, code="shutting_down") from error

    async def _complete(self, request: Request) -> Response:
        arrival = time.perf_counter()
        with self._body_limit:
            body = await read_body(request, self._limits)
        chat = parse_request(body)
        self.check_name(chat.model)
        chat.check(self._limits)
        pieces = BufferedStream(self._answer(chat, arrival, _client_of(request)))
        try:
            await _cancel_on_disconnect(request, anext(pieces))  # from here on nothing is wrong with the request
            if chat.stream:
                return _EventStream(self._events(chat, pieces, request), pieces)
            return JSONResponse(await _cancel_on_disconnect(request, self._whole(chat, pieces)))
        except BaseException:
            pieces.cancel()
            raise

    def check_name(self, model: str) -> None:
        if model != self._name:
            raise ApiError(
                404, f"There is no model {model[:200]!r} here, only {self._name!r}.", "model", "model_not_found"
            )

    def close(self) -> None:
        self.loop.close()
        self._tokenizing.shutdown(cancel_futures=True)
        self._images.close()

    async def _answer(self, chat: ChatRequest, arrival: float, client: Hashable) -> AsyncGenerator[Piece, None]:
        """An empty piece once the prompt is found to be good, then one for every token."""
        with self.loop.admission:
            encoded = await self._encode(chat)  # what is too long is refused before its images are decoded
            if self._yi_vl.processor.image_processor.max_tiles:
                images = await self._load_tiled_images(encoded, chat)
            else:
                images = [await self._load_image(url, param) for url, param in chat.images]
            prompt = await self._checked(self._yi_vl.engine.inputs.to_prompt, encoded, images)
            yield Piece(0, "", None, {})
            num_generated = [0] * chat.n
            self.metrics.prompt_tokens.inc(len(prompt))
            async with aclosing(self.loop.generate(prompt, self._samplings(chat), client)) as outputs:
                async for choice, output in outputs:
                    if output.error is not None:
                        _logger.error("An answer failed.", exc_info=output.error)
                        self.metrics.failures.inc()
                        raise ApiError(500, FAILURE) from output.error
                    if not any(num_generated):
                        self.metrics.first_token_seconds.observe(time.perf_counter() - arrival)
                    self.metrics.completion_tokens.inc(output.num_tokens - num_generated[choice])
                    num_generated[choice] = output.num_tokens
                    yield Piece(choice, output.text, output.finish_reason, _usage(len(prompt), sum(num_generated)))

    async def _load_image(self, url: str, param: str) -> list[Tensor]:
        """The inputs of the tower that an image is."""
        return await self._images.decode(await self._read_url(url, param), param)

    async def _load_tiled_images(self, encoded: Encoded, chat: ChatRequest) -> list[list[Tensor]]:
        """The same of all images. What their tiles make too long is refused by their sizes, before they are decoded."""
        contents = [(await self._read_url(url, param), param) for url, param in chat.images]
        num_inputs = [await self._images.count_inputs(data, param) for data, param in contents]
        await self._checked(self._yi_vl.engine.inputs.expand, encoded, num_inputs)
        return [await self._images.decode(data, param) for data, param in contents]

    async def _read_url(self, url: str, param: str) -> bytes:
        return await read_url(url, param, self._limits, self._allow_remote_images)

    async def _encode(self, chat: ChatRequest) -> Encoded:
        """The conversation's tokens, without those of tiles."""
        messages = merge_messages(chat.as_messages([None] * len(chat.images)))
        return await self._checked(self._yi_vl.engine.inputs.encode, messages)

    async def _checked(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function that takes a conversation returns, from the thread that tokenizes."""
        try:
            return await self._in_thread(function, *arguments)
        except TooLongError as error:
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from error
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from error

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """A function's result, from the thread that tokenizes."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

    def _samplings(self, chat: ChatRequest) -> list[Sampling]:
        """The options of each choice."""
        sampling = self._sampling(chat)
        if sampling.seed is None:
            return [sampling] * chat.n
        return [replace(sampling, seed=(sampling.seed + choice) % 2**63) for choice in range(chat.n)]

    def _sampling(self, chat: ChatRequest) -> Sampling:
        limit = self._limits.max_tokens
        options: dict[str, Any] = {
            "max_new_tokens": limit if chat.max_new_tokens == -1 else chat.max_new_tokens,
            "temperature": 0.0 if chat.top_p == 0 else chat.temperature,
            "top_p": chat.top_p or None,
            "seed": None if chat.seed is None else chat.seed % 2**63,
            "stop": chat.stop,
        }
        sampling = Sampling(**{name: value for name, value in options.items() if value is not None})
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, limit))

    async def _whole(self, chat: ChatRequest, pieces: BufferedStream[Piece]) -> dict[str, Any]:
        texts, finish_reasons, usage = [""] * chat.n, [""] * chat.n, {}
        async for piece in pieces:
            texts[piece.choice] += piece.text
            finish_reasons[piece.choice] = piece.finish_reason or ""
            usage = piece.usage
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": finish_reason,
            }
            for index, (text, finish_reason) in enumerate(zip(texts, finish_reasons, strict=True))
        ]
        return Reply(self._name).whole(choices, usage)

    async def _events(
        self, chat: ChatRequest, pieces: BufferedStream[Piece], request: Request
    ) -> AsyncGenerator[str, None]:
        reply, started, usage = Reply(self._name), set[int](), {}
        includes_usage = chat.stream_options is not None and chat.stream_options.include_usage

        def delta(piece: Piece, content: dict[str, str], finish_reason: str | None = None) -> str:
            choice = {"index": piece.choice, "delta": content, "logprobs": None, "finish_reason": finish_reason}
            return _event(reply.chunk([choice], **({"usage": None} if includes_usage else {})))

        try:
            async for piece in pieces:
                usage = piece.usage
                if piece.choice not in started and piece.usage:
                    started.add(piece.choice)
                    yield delta(piece, {"role": "assistant", "content": ""})
                if piece.text:
                    yield delta(piece, {"content": piece.text})
                if piece.finish_reason:
                    yield delta(piece, {}, piece.finish_reason)
        except ApiError as error:
            request.state.final_status = error.status
            yield _event(error.body)
            return
        if includes_usage:
            yield _event(reply.chunk([], usage=usage))
        yield "data: [DONE]\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events made from pieces, which are cancelled after the last event, or when the client has left.

    A stream that the server cancels at its shutdown ends with an error event, so that it does not look complete.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], pieces: BufferedStream[Piece]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            error = ApiError(503, SHUTDOWN, code="shutting_down")
            Request(scope).state.final_status = error.status
            event = _event(error.body)
            await send({"type": "http.response.body", "body": event.encode(), "more_body": False})
        finally:
            self._pieces.cancel()


def _usage(num_prompt_tokens: int, num_generated: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt_tokens + num_generated,
    }


def _client_of(request: Request) -> Hashable:
    """Whose request it is, for a fair share of the slots: the checked key's owner's, or an address's."""
    return getattr(request.state, "client", None) or (request.client and request.client.host)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of the work, which is cancelled with `ClientDisconnect` if the client disconnects."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, disconnecting = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        disconnecting.cancel()
