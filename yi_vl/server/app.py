"""The application: routes, keys, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..predict import YiVL
from .completions import Completions
from .metrics import CLIENT_CLOSED_REQUEST, CountRequests
from .middleware import add_middleware
from .protocol import FAILURE, ApiError, Limits


def create_app(
    yi_vl: YiVL,
    name: str,
    *,
    api_keys: Sequence[str] = (),
    allow_remote_images: bool = False,
    limits: Limits | None = None,
    cors_origins: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
) -> FastAPI:
    """An ASGI application that answers OpenAI's clients; `/healthz` and `/metrics` are open to all.

    Args:
        name: what clients call the model.
        api_keys: they must show one of these under `/v1`; by default nothing.
        allow_remote_images: fetch images from http and https URLs, of the public internet only.
        cors_origins: of web pages that may ask from browsers, like `https://example.org`; `*` for all.
        allowed_hosts: the Host headers that are answered, `*.example.org` for all names below one; by default all.

    Raises:
        ValueError: an origin is malformed.
    """
    completions = Completions(yi_vl, name, limits or Limits(), allow_remote_images)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "yi_vl"}

    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    async def get_model(requested: str) -> dict[str, Any]:
        completions.check_name(requested)
        return model

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def metrics() -> Response:
        return Response(completions.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @asynccontextmanager
    async def close_at_end(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(completions.close)  # the loop still tells clients why their answers end

    readable = ["GET", "HEAD"]
    api = APIRouter(prefix="/v1", dependencies=[Depends(_bearer_auth(api_keys))])
    api.add_api_route("/chat/completions", completions.complete, methods=["POST"], response_model=None)
    api.add_api_route("/models", list_models, methods=readable)
    api.add_api_route("/models/{requested:path}", get_model, methods=readable)
    app = FastAPI(lifespan=close_at_end, openapi_url=None, redirect_slashes=False)
    app.include_router(api)
    app.add_api_route("/healthz", health, methods=readable)
    app.add_api_route("/metrics", metrics, methods=readable, response_model=None)
    app.add_middleware(CountRequests, path="/v1/chat/completions", counter=completions.metrics.requests)
    add_middleware(app, cors_origins, allowed_hosts)
    for error_type, handler in _ERROR_HANDLERS.items():
        app.add_exception_handler(error_type, handler)
    return app


def _bearer_auth(api_keys: Sequence[str]) -> Callable[[Request], Awaitable[None]]:
    """A dependency that answers 401 to requests without one of the keys; without keys all requests pass."""
    keys = [key.strip().encode() for key in api_keys]

    async def authorize(request: Request) -> None:
        if not keys:
            return
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        key_bytes = credentials.strip().encode("latin-1")  # the header's bytes
        if not any([secrets.compare_digest(key_bytes, key) for key in keys]) or scheme.lower() != "bearer":
            message = "The API key is missing or wrong; send `Authorization: Bearer KEY`."
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        request.state.client = key_bytes

    return authorize


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, error.detail).body, error.status_code, error.headers)


async def _fail(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, FAILURE).body, 500)


async def _client_closed_request(_: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


_ERROR_HANDLERS = {
    ApiError: _refuse,
    HTTPException: _refuse_route,
    ClientDisconnect: _client_closed_request,
    Exception: _fail,
}
