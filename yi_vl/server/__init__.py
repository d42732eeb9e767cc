"""An OpenAI-style API over a ready `YiVL`: `create_app(yi_vl, "yi-vl")` is an ASGI application, `yi-vl serve` runs it.

`protocol <- images, worker <- metrics <- completions <- app`; all of it needs the extra `serve`.
Called by cli.py; calls predict.py.
"""

from .app import create_app
from .protocol import Limits

__all__ = ["Limits", "create_app"]
