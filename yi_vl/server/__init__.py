"""An OpenAI-style API over a ready `YiVL`: `create_app(yi_vl, "yi-vl")` is an ASGI application, `yi-vl serve` runs it.

It needs the extra `serve`. What requests may hold: docs/serve.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app
    from .protocol import Limits

__all__ = ["Limits", "create_app"]
_HOMES = {"Limits": "protocol", "create_app": "app"}


def __getattr__(name: str) -> Any:
    """Imported when it is used: an option of `yi-vl serve` is refused before torch is imported."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
