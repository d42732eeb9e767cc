"""The page: its layout in Gradio's chat components, its events and their handlers, and its server."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.blocks import Block
from gradio.components.chatbot import ExampleMessage
from starlette.middleware import Middleware

from yi_vl.predict import YiVL

from .card import Card
from .handlers import Handlers
from .i18n import EXAMPLES, GRADIO_IN_CHINESE, LANGUAGES, TEXTS, Language
from .language import language_layer
from .uploads import Uploads

_MAX_ANSWERS = 16  # that are generated together
_MAX_WAITING = 32  # questions in the queue

_HERE = Path(__file__).parent
_CARD_PATH = "card"
_IMAGES = _HERE.parent / "docs" / "images"
_THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(  # no font is fetched
    block_info_text_color="*neutral_600",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
_SAVE = """(text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = "yi-vl-chat.SUFFIX";
    link.click();
}"""
_SAVE_TAB = """(history, typed) => {  // by the tab, for a reload; not before what it remembers has been restored
    if (!window.isRestored) return;
    try {
        sessionStorage.setItem("chat", JSON.stringify({ history, typed }));
    } catch {
        sessionStorage.setItem("chat", "{}"); // too long: handlers.restore says so
    }
}"""
_LANGUAGE = "() => document.documentElement.lang"
_RESTORE_TAB = """() => {
    const saved = sessionStorage.getItem("chat");
    const isAnswering = sessionStorage.getItem("isAnswering") === "true";
    return [saved ? JSON.stringify({ ...JSON.parse(saved), isAnswering }) : "", document.documentElement.lang];
}"""
_FOCUS = "() => { setTimeout(() => document.querySelector('#typed textarea').focus()); }"
_LANGUAGES = """<nav aria-label="语言 / Language">
<a href="?lang=zh" lang="zh" hreflang="zh">中文</a> <a href="?lang=en" lang="en" hreflang="en">English</a></nav>"""

AnyBlock = TypeVar("AnyBlock", bound=Block)


@contextmanager
def running(
    yi_vl: YiVL,
    name: str,
    about: Mapping[Language, str],
    keep: Path | None = None,
    card: Card | None = None,
    **launch: Any,
) -> Iterator[tuple[str, str | None]]:
    """The page while it is served: its address, and its public one where it is shared.

    Uploads are kept in a temporary folder, which is removed with the server.

    Args:
        launch: of `gr.Blocks.launch`.
    """
    with tempfile.TemporaryDirectory(prefix="yi_vl_demo_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder)
        uploads = Uploads()
        page = Page(Handlers(yi_vl, name, about, uploads, keep), card or Card())
        uploads.public |= page.example_paths
        page.blocks.queue(max_size=_MAX_WAITING)
        _, url, shared_url = page.blocks.launch(
            prevent_thread_lock=True,
            quiet=True,
            theme=_THEME,
            css_paths=_HERE / "page.css",
            js=_script(uploads.max_image_bytes),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size=uploads.max_image_bytes,
            app_kwargs={
                "middleware": [Middleware(language_layer), Middleware(uploads.layer)],
                "max_body_size": uploads.max_bytes,
            },
            **launch,
        )
        try:
            yield url, shared_url
        finally:
            page.blocks.close(verbose=False)


class Page:
    """`blocks` is Gradio's page over some `Handlers`."""

    def __init__(self, handlers: Handlers, card: Card) -> None:
        self.handlers = handlers
        self.card = card
        self._text_keys: dict[Block, dict[str, str]] = {}  # component -> property -> key of TEXTS
        with gr.Blocks(title="Yi-VL", fill_height=True, fill_width=True, analytics_enabled=False) as self.blocks:
            self._lay_out()
            self._connect()
        if card.text:
            with self.blocks.route("Model card", _CARD_PATH, show_in_navbar=False):
                gr.Markdown(card.text)

    @property
    def example_paths(self) -> set[str]:
        """Where Gradio keeps the examples' images."""
        examples: list[Any] = self.chatbot.examples or []
        return {file["path"] for example in examples for file in example["files"]}

    def translate(self, language: Language) -> dict[Block, dict[str, Any]]:
        """Updates of all text on the page to another language."""
        texts = TEXTS[language]
        updates = {}
        for block, keys in self._text_keys.items():
            properties: dict[str, Any] = {name: texts[key] for name, key in keys.items()}
            updates[block] = gr.update(**properties)
        return updates | {
            self.language: gr.update(value=language),
            self.introduction: gr.update(value=self.handlers.introduce(language)),
            self.chatbot: updates[self.chatbot] | gr.update(examples=_examples(language)),
            self.footer: gr.update(value=self._about_rights(language)),
        }

    def _about_rights(self, language: Language) -> str:
        """Where the model is described, and under which licences it and the code are."""
        texts, card = TEXTS[language], self.card
        url = card.url or (_CARD_PATH if card.text else "")
        lines = [f"[{texts['model_card']}]({url})"] if url else []
        lines += [texts["model_licence"].format(licence=card.licence)] if card.licence else []
        return " · ".join([*lines, texts["code_licence"]])

    def _lay_out(self) -> None:
        bare: dict[str, Any] = {"show_label": False, "container": False}
        self.conversation_id = gr.State(lambda: secrets.token_hex(8))
        self.document = gr.Textbox(visible=False)  # on its way to the visitor's disk
        self.language = gr.Radio(["en", "zh"], value="en", visible=False)
        self.saved = gr.Textbox(visible=False)  # what the tab remembers of a conversation
        self.refused = gr.Textbox(visible="hidden", elem_id="refused")  # files, by page.js
        with gr.Row(elem_id="head"):
            self.introduction = gr.Markdown(self.handlers.introduce("en"))
            with gr.Row(elem_id="switches"):
                gr.HTML(_LANGUAGES)
                self.new_chat = self._localized(gr.Button(size="md"), value="new_chat")
        self.save_json, self.save_markdown = gr.Button("⬇ JSON", render=False), gr.Button("⬇ Markdown", render=False)
        self.chatbot = self._localized(
            gr.Chatbot(
                examples=_examples("en"),
                buttons=["copy", "copy_all", self.save_json, self.save_markdown],
                group_consecutive_messages=False,  # otherwise a message with an image cannot be edited
                editable="user",
                allow_file_downloads=False,
                show_label=False,
                height=360,
                scale=1,
                elem_id="chat",
            ),
            label="chat",
            placeholder="welcome",
        )
        self.typed = self._localized(
            gr.MultimodalTextbox(
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=100_000,
                elem_id="typed",
                **bare,
            ),
            placeholder="type_here",
            label="question",
        )
        self._lay_out_drawers()
        self.footer = gr.Markdown(self._about_rights("en"), elem_id="footer")

    def _lay_out_drawers(self) -> None:
        max_tokens = self.handlers.yi_vl.model.config.text_config.max_position_embeddings
        with gr.Row(elem_id="drawers"):
            with self._localized(gr.Accordion(open=False), label="seen") as self.seen:
                self.images = gr.HTML()
            with self._localized(gr.Accordion(open=False, elem_id="camera"), label="camera"):
                self.photo = gr.Image(sources=["webcam"], type="filepath", show_label=False)
            with self._localized(gr.Accordion(open=False), label="settings"), gr.Row(elem_id="settings"):
                self.settings = [
                    self._localized(gr.Slider(0, 2, 0, step=0.05), label="temperature", info="temperature_info"),
                    self._localized(gr.Slider(0.05, 1, 1, step=0.05), label="top_p", info="top_p_info"),
                    self._localized(
                        gr.Slider(1, max_tokens, min(512, max_tokens), step=1), label="length", info="length_info"
                    ),
                ]

    def _connect(self) -> None:
        handlers, chatbot, typed, language = self.handlers, self.chatbot, self.typed, self.language
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        opened = self.blocks.load(
            self.translate,
            language,
            [*self._text_keys, language, self.introduction, self.footer],
            js=_LANGUAGE,
            **quick,
        )
        restored = opened.then(handlers.restore, [self.saved, language], [chatbot, typed], js=_RESTORE_TAB, **quick)
        restored.then(None, None, None, js="() => { window.isRestored = true; }")
        gr.on([chatbot.change, typed.change], None, [chatbot, typed], None, js=_SAVE_TAB)
        answers = []
        for event, action, inputs, wait in (
            (typed.submit, handlers.ask, [typed, chatbot, language], _wait_for_answer_to_typed),
            (chatbot.example_select, handlers.try_example, None, _wait_for_answer),
            (chatbot.retry, handlers.ask_again, chatbot, _wait_for_answer),
            (chatbot.edit, handlers.ask_differently, chatbot, _wait_for_answer),
        ):
            submitted = event(action, inputs, chatbot, **quick).then(wait, language, typed, **quick)
            answer = submitted.then(
                handlers.answer,
                [chatbot, self.conversation_id, language, *self.settings],
                chatbot,
                concurrency_id="model",
                concurrency_limit=_MAX_ANSWERS,
                show_progress="minimal",
                api_visibility="private",
            )
            answer.then(_wait_for_question, None, typed, **quick)
            answers.append(answer)
        gr.on([typed.stop, chatbot.clear, self.new_chat.click], None, cancels=answers)
        cleared = gr.on(
            [chatbot.clear, self.new_chat.click],
            handlers.clear,
            None,
            [self.conversation_id, chatbot, typed, self.images],
            **quick,
        )
        cleared.then(None, None, None, js=_FOCUS)
        chatbot.like(handlers.like, [chatbot, self.conversation_id], chatbot, **quick)
        self.seen.expand(handlers.show_images, [chatbot, language], self.images, **quick)
        self.refused.change(handlers.refuse, [self.refused, chatbot, language], chatbot, **quick)
        self.photo.input(handlers.add_photo, [self.photo, typed], [typed, self.photo], preprocess=False, **quick)
        for button, save, suffix in (
            (self.save_json, handlers.save_json, "json"),
            (self.save_markdown, handlers.save_markdown, "md"),
        ):
            saved = button.click(save, [chatbot, language], self.document, **quick)
            saved.success(None, self.document, None, js=_SAVE.replace("SUFFIX", suffix))

    def _localized(self, block: AnyBlock, **keys: str) -> AnyBlock:
        """The same block, with properties whose text changes with the language; English at first."""
        self._text_keys[block] = keys
        for name, key in keys.items():
            setattr(block, name, TEXTS["en"][key])
        return block


def _script(max_image_bytes: int) -> str:
    settings = {
        "maxBytes": max_image_bytes,
        "imageAlt": {language: TEXTS[language]["image_alt"] for language in LANGUAGES},
        "labels": {"en": {}, "zh": GRADIO_IN_CHINESE},
    }
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return script.replace("SETTINGS", json.dumps(settings, ensure_ascii=False))


def _examples(language: Language) -> list[ExampleMessage]:
    return [
        {"text": question, "files": [str(_IMAGES / name) for name in names]}
        for question, names in EXAMPLES[language].items()
    ]


def _wait_for_answer(language: Language) -> dict[str, Any]:
    return gr.update(interactive=False, submit_btn=False, stop_btn=TEXTS[language]["stop"])


def _wait_for_answer_to_typed(language: Language) -> dict[str, Any]:
    return _wait_for_answer(language) | {"value": None}


def _wait_for_question() -> dict[str, Any]:
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)
