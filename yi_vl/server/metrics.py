"""Prometheus metrics at `/metrics`: requests, tokens, time to first token, the queue."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine_loop import EngineLoop

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
CLIENT_CLOSED_REQUEST = 499  # nginx's status for a request whose client did not wait for the end


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self, loop: EngineLoop) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", f"Ended chat requests; {CLIENT_CLOSED_REQUEST}: the client left.", "status"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, images included.")
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated.")
        self.failures = self._counter("failures", "Answers that the server failed to finish, streamed ones included.")
        self.first_token_seconds = Histogram(
            "yi_vl_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        engine = loop.engine
        self._gauge("requests_running", "Answers that have a slot.", lambda: engine.num_running)
        self._gauge("requests_waiting", "Requests let in that have none yet.", lambda: loop.num_waiting)
        self._gauge("slots", "Answers that can be generated at once.", lambda: engine.max_batch_size or 0)
        self._gauge("batch_size", "Answers that the last step decoded together.", lambda: engine.batch_size)
        self._gauge("tokens_per_second", "Generated, in the last ten seconds.", lambda: loop.tokens_per_second)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"yi_vl_{name}_total", help, labels, registry=self.registry)

    def _gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        Gauge(f"yi_vl_{name}", help, registry=self.registry).set_function(value)


class CountRequests:
    """ASGI middleware: counts the requests to one path by the status they ended with.

    A stream that fails has begun with 200; whatever ends it says so in `request.state.final_status`.
    """

    def __init__(self, app: ASGIApp, path: str, counter: Counter) -> None:
        self._app, self._path, self._counter = app, path, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            await self._app(scope, receive, send)
            return
        started, ended = 500, CLIENT_CLOSED_REQUEST
        state = scope.setdefault("state", {})

        async def watch(message: Message) -> None:
            nonlocal started, ended
            if message["type"] == "http.response.start":
                started = message["status"]
            elif not message.get("more_body", False):
                ended = started
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            ended = 500
            raise
        finally:
            self._counter.labels(state.get("final_status", ended)).inc()
