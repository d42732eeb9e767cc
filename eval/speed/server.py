"""The server under load: throughput of concurrent requests, and time to first token of a short one beside long ones.

Requests go over HTTP from another process to a server on a loopback address, in this one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from yi_vl.image.data_url import data_url
from yi_vl.server import Limits, create_app

from .client import client_process, first_token_seconds, tokens_per_second
from .rounds import measure_rounds, median_ratio, spread

if TYPE_CHECKING:
    from yi_vl import YiVL

_NAME = "model"
_IMAGES = ("dog.png", "scene.png")
_LONG_TEXT = "a word and another word "


def compare_server(yi_vl: YiVL, num_requests: int, new_tokens: int, has_images: bool = True) -> dict[str, Any]:
    """The same requests one by one and all at once, in turns."""
    urls = [data_url(Path("docs/images", name).read_bytes(), "image/png") for name in _IMAGES if has_images]
    bodies = []
    for index in range(num_requests):
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls[index % 2 : index % 2 + 1]]
        bodies.append(_body(images, f"Question {index}?", new_tokens))

    def rate(concurrency: int) -> float:
        yi_vl.clear_cache()
        return call(tokens_per_second, address, bodies, concurrency)

    with serving(yi_vl, num_requests) as address, client_process() as call:
        rate(2)  # warm-up
        rounds = measure_rounds({"one by one": lambda: rate(1), f"{num_requests} at once": lambda: rate(num_requests)})
    alone, together = rounds.values()
    return {
        "what": f"{num_requests} requests {'with an image' if has_images else 'of text'}, at most {new_tokens} new "
        "tokens each, over HTTP",
        "variants": {name: spread(values, "tokens_per_second") for name, values in rounds.items()},
        "ratio": median_ratio(together, alone),
        "rounds": len(alone),
    }


def compare_first_token(yi_vl: YiVL, num_long: int, long_tokens: int) -> dict[str, Any]:
    """The time to first token of a short request on an idle server, beside long answers, and beside long prompts."""
    short = _body([], "Hi", 4)
    context = yi_vl.model.config.text_config.max_position_embeddings
    text = _LONG_TEXT * (min(long_tokens, context - 300) // len(_LONG_TEXT.split()))
    long_answers = [_body([], f"Tell me about {index}", min(512, context - 300)) for index in range(num_long)]
    long_prompts = [_body([], f"{index} {text}", 16) for index in range(num_long)]

    def seconds(others: list[dict[str, Any]]) -> float:
        yi_vl.clear_cache()
        return call(first_token_seconds, address, short, others)

    with serving(yi_vl, num_long + 1) as address, client_process() as call:
        seconds([])  # warm-up
        rounds = measure_rounds(
            {
                "idle": lambda: seconds([]),
                "beside long answers": lambda: seconds(long_answers),
                "beside long prompts": lambda: seconds(long_prompts),
            }
        )
    return {
        "what": f"a short request beside {num_long} long ones: answers of up to 512 tokens, prompts of {long_tokens}",
        "variants": {
            name: spread(values, "seconds") | {"times_idle": median_ratio(values, rounds["idle"])}
            for name, values in rounds.items()
        },
        "rounds": len(rounds["idle"]),
    }


@contextmanager
def serving(yi_vl: YiVL, max_batch_size: int) -> Iterator[str]:
    """A server of its own on a free port."""
    app = create_app(yi_vl, _NAME, limits=Limits(max_batch_size=max_batch_size, num_waiting=max_batch_size))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1/chat/completions"
    finally:
        server.should_exit = True
        thread.join()


def _body(parts: list[dict[str, Any]], text: str, max_tokens: int) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": text}]
    return {"model": _NAME, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
