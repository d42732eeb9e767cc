"""Handlers of Gradio's events.

The conversation is kept in the user's browser and sent with every event, so that users cannot mix; prompts are
prefix-cached, so that only its new part is prefilled.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import gradio as gr

from yi_vl.image import WEB_FORMATS, TiledImage
from yi_vl.predict import TooLongError, YiVL

from . import chat
from .chat import BadImageError, Message
from .i18n import TEXTS, Language
from .uploads import Uploads

_NUM_CACHED_IMAGES = 64  # prepared ones, by path, which Gradio makes of the content; 0.6 MB each at 448 px

logger = logging.getLogger(__name__)
Update = dict[str, Any]


class Handlers:
    """Event handlers over one model, which answers all users' questions together.

    Args:
        name: of the model, for the visitors; `about` says what it is good for, in every language.
        keep: a folder for the conversations; None keeps nothing.
    """

    def __init__(
        self, yi_vl: YiVL, name: str, about: Mapping[Language, str], uploads: Uploads, keep: Path | None = None
    ) -> None:
        self.yi_vl = yi_vl
        self.name = name
        self.about = about
        self.uploads = uploads
        self.keep = keep
        prepare = partial(yi_vl.processor.image_processor.snapshot, formats=WEB_FORMATS)
        self._prepare = lru_cache(_NUM_CACHED_IMAGES)(prepare)

    def restore(self, saved: str, language: Language, request: gr.Request) -> tuple[Update, Update]:
        """The page was opened: the conversation and the unsent message that its tab had before, or why they are lost.

        Args:
            saved: JSON by page.js, from the browser, so of any content; empty in a new tab.
        """
        if not saved:
            return gr.skip(), gr.skip()
        try:
            history, typed, is_answering = chat.restored(saved)
            for path in [*chat.image_paths(history), *typed["files"]]:
                self._check(request, language, path)
        except ValueError as error:
            logger.info("A conversation is not restored: %s", error)
            return _shown([chat.error_message(TEXTS[language]["lost"])]), gr.skip()
        if history and (is_answering or history[-1]["role"] == "user"):
            history = [*history, chat.error_message(TEXTS[language]["interrupted"])]
        return _shown(history), gr.update(value=typed)

    def introduce(self, language: Language) -> str:
        """Which model answers, and what it is good for."""
        num_parameters = self.yi_vl.model.num_parameters()
        parameters = f"{num_parameters / 1e9:.1f} B" if num_parameters >= 1e9 else f"{num_parameters / 1e6:.1f} M"
        size_px = self.yi_vl.processor.image_processor.size_px
        text = TEXTS[language]["introduction"].format(
            name=chat.escaped(self.name), parameters=parameters, size_px=size_px, about=self.about[language]
        )
        return f"{text} {TEXTS[language]['kept']}" if self.keep else text

    def ask(self, typed: Message, history: list[Message], language: Language) -> Update:
        """A message was sent; images without text get a default question."""
        text, paths = typed["text"].rstrip(), typed["files"]
        if text or paths:
            history = [*history, *chat.user_messages(text or TEXTS[language]["default_question"], paths)]
        return _shown(history)

    def try_example(self, example: gr.SelectData) -> Update:
        """An example was clicked."""
        return _shown(chat.user_messages(example.value["text"], [file["path"] for file in example.value["files"]]))

    def ask_again(self, history: list[Message], where: gr.RetryData) -> Update:
        """Another answer was requested."""
        return _shown(history[: _place(where) + 1])

    def ask_differently(self, history: list[Message], edit: gr.EditData) -> Update:
        """A question was edited."""
        return _shown([*history[: _place(edit)], *chat.user_messages(edit.value)])

    def answer(
        self,
        history: list[Message],
        conversation_id: str,
        language: Language,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        request: gr.Request,
    ) -> Iterator[list[Message]]:
        """The history with an answer that grows, or with an error in its place.

        Gradio closes this generator when the visitor stops it or leaves, and that ends the model's work.
        """
        options = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        texts, answer_text = TEXTS[language], ""
        try:
            messages = chat.to_messages(history, lambda path: path)
            if not messages or messages[-1]["role"] != "user":
                return
            self.yi_vl.engine.inputs.encode(messages)  # what is too long is refused before its images are decoded
            messages = chat.to_messages(history, partial(self._open, request, language))
            with closing(self.yi_vl.stream_messages(messages, **options)) as pieces:
                for piece in pieces:
                    answer_text += piece
                    yield [*history, chat.assistant_message(answer_text)]
        except BadImageError as error:
            yield [*history, chat.error_message(_explained(texts["bad_image"], name=error.name, error=error))]
        except TooLongError as error:
            values = {"num_tokens": error.num_tokens, "num_images": error.num_images, "limit": error.max_tokens + 1}
            yield [*history, chat.error_message(_explained(texts["too_long"], **values))]
        except ValueError as error:
            yield [*history, chat.error_message(_explained(texts["refused"], error=error))]
        except Exception:
            logger.exception("An answer failed.")
            yield [*history, chat.error_message(texts["failed"])]
        else:
            if answer_text:
                self._keep([*history, chat.assistant_message(answer_text)], conversation_id, request)
            else:
                yield [*history, chat.error_message(texts["silent"])]

    def like(self, history: list[Message], conversation_id: str, mark: gr.LikeData, request: gr.Request) -> Update:
        """An answer was liked or disliked, which is recorded in the conversation."""
        history = chat.with_feedback(history, _place(mark), mark.liked)
        self._keep(history, conversation_id, request)
        return _shown(history)

    def clear(self) -> tuple[str, Update, Update, str]:
        """The conversation was cleared: a new one with another id, nothing typed and no images."""
        typed = gr.update(value=None, interactive=True, submit_btn=True, stop_btn=False)
        return secrets.token_hex(8), _shown([]), typed, ""

    def refuse(self, refused: str, history: list[Message], language: Language) -> Update:
        """Files were chosen that are not sent: `refused` is JSON, from the key of TEXTS that says why to names."""
        names, limit = json.loads(refused), self.uploads.max_image_bytes >> 20
        lines = [
            _explained(TEXTS[language][reason], names=", ".join(names[reason]), limit=limit)
            for reason in ("not_an_image", "too_large")
            if names[reason]
        ]
        return _shown([*history, chat.error_message("\n\n".join(lines))])

    def add_photo(self, photo: Message | None, typed: Message) -> tuple[Message, None]:
        """The camera's image is added to the message that is being written."""
        return typed | {"files": [*typed["files"], *([photo["path"]] if photo else [])]}, None

    def show_images(self, history: list[Message], language: Language, request: gr.Request) -> str:
        """The conversation's images as the model sees them, in HTML."""
        texts, images = TEXTS[language], []
        for path in chat.shown_image_paths(history)[:_NUM_CACHED_IMAGES]:
            try:
                image = self._open(request, language, path)
                images.append((Path(path).name, image.thumbnail if isinstance(image, TiledImage) else image))
            except ValueError as error:
                logger.info("%s is not shown: %s", path, error)
        return chat.to_figures(images, texts["seen_caption"]) if images else texts["seen_nothing"]

    def save_json(self, history: list[Message], language: Language, request: gr.Request) -> str:
        """The conversation as a JSON document; empty when an image of it is gone."""
        document = self._document(history, language, request)
        return json.dumps(document, ensure_ascii=False, indent=1) if document else ""

    def save_markdown(self, history: list[Message], language: Language, request: gr.Request) -> str:
        """The conversation as a page to read; empty when an image of it is gone."""
        document = self._document(history, language, request)
        return chat.to_markdown(document, TEXTS[language]["you"]) if document else ""

    def _document(self, history: list[Message], language: Language, request: gr.Request) -> dict[str, Any] | None:
        try:
            return chat.to_document(history, partial(self._read, request, language), self.name)
        except BadImageError as error:
            gr.Warning(TEXTS[language]["bad_image"].format(name=error.name, error=error))
            return None

    def _keep(self, history: list[Message], conversation_id: str, request: gr.Request) -> None:
        if self.keep and (document := self._document(history, "en", request)):
            text = json.dumps(document, ensure_ascii=False, indent=1)
            try:
                (self.keep / f"{conversation_id}.json").write_text(text, encoding="utf-8")
            except OSError:  # the user keeps the answer
                logger.exception("A conversation was not kept.")

    def _open(self, request: gr.Request, language: Language, path: str) -> Any:
        self._check(request, language, path)
        return self._prepare(path)

    def _read(self, request: gr.Request, language: Language, path: str) -> bytes:
        self._check(request, language, path)
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ValueError(TEXTS[language]["foreign"]) from error

    def _check(self, request: gr.Request, language: Language, path: str) -> None:
        """A browser may name any path; only the visitor's own uploads and the examples are opened."""
        if not self.uploads.may_read(request.cookies, path):
            raise ValueError(TEXTS[language]["foreign"])


def _place(event: gr.RetryData | gr.EditData | gr.LikeData) -> int:
    """Which message of the history; only of components in two dimensions it is a pair."""
    assert isinstance(event.index, int)
    return event.index


def _explained(text: str, **values: object) -> str:
    return text.format(**{name: chat.escaped(str(value)) for name, value in values.items()})


def _shown(history: list[Message]) -> Update:
    return gr.update(value=history, feedback_value=chat.feedback_values(history))
