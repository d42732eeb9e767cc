"""An ASGI layer in front of Gradio that sets the page's language and its content security policy.

Gradio takes the language of its own labels from `navigator.language` before any script of the page runs, so a script
that sets it is inserted into the HTML.
"""

from __future__ import annotations

from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .i18n import LANGUAGES, Language, preferred

_GRADIO_LOCALES: dict[Language, str] = {"en": "en", "zh": "zh-CN"}
_POLICY = (  # an answer's Markdown may name images of other sites, which would learn of the visitor
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; base-uri 'self'; form-action 'self'; "
    "object-src 'none'"
)


def language_layer(app: ASGIApp) -> ASGIApp:
    """Starlette middleware: the page in the language of `?lang=`, else the first that its browser accepts."""

    async def localized(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            return await app(scope, receive, send)
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]  # plain HTML
        is_page = "text/html" in Headers(scope=scope).get("accept", "")
        if is_page:
            scope = {**scope, "headers": headers}
            send = _localizing(send, _requested(scope))
        await app(scope, receive, send)

    return localized


def _requested(scope: Scope) -> Language:
    requested = parse_qs(scope["query_string"].decode("latin-1")).get("lang", [""])[-1]
    for language in LANGUAGES:
        if requested == language:
            return language
    return preferred(Headers(scope=scope).get("accept-language", ""))


def _localizing(send: Send, language: Language) -> Send:
    """A `send` that holds an HTML response back until it is complete, and inserts the language into it."""
    start: Message = {}
    body = bytearray()

    async def localizing(message: Message) -> None:
        if message["type"] == "http.response.start":
            if not Headers(raw=message["headers"]).get("content-type", "").startswith("text/html"):
                return await send(message)
            start.update(message)
        elif not start:
            await send(message)
        else:
            body.extend(message.get("body", b""))
            if not message.get("more_body"):
                content = _localized(bytes(body), language)
                headers = MutableHeaders(scope=start)
                headers["content-length"] = str(len(content))
                headers["content-security-policy"] = _POLICY
                await send(start)
                await send({"type": "http.response.body", "body": content})

    return localizing


def _localized(page: bytes, language: Language) -> bytes:
    locale = _GRADIO_LOCALES[language]
    script = f'<script>Object.defineProperty(navigator, "language", {{value: "{locale}"}});</script>'
    page = page.replace(b'lang="en"', f'lang="{language}"'.encode(), 1)
    return page.replace(b"<head>", b"<head>" + script.encode(), 1)
