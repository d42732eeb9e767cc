"""The page: its layout in Gradio's chat components, what answers to which event, and the server that shows it.

Called by __main__.py; calls actions.py, texts.py and visitors.py.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from gradio.blocks import Block
from starlette.middleware import Middleware

from yi_vl.predict import YiVL

from .actions import Actions
from .texts import TEXTS, Language
from .visitors import Visitors

_MAX_WAITING = 32  # questions in the queue

_HERE = Path(__file__).parent
_PICTURES = _HERE.parent / "docs" / "pictures"
_EXAMPLES = {"penguin.png": "What is in this picture?", "scene.png": "有几个东西？", "brazil.png": "这是哪里的旗帜？"}
_THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(  # no font is fetched
    block_info_text_color="*neutral_600", input_placeholder_color="*neutral_500"
)
_SAVE = """(text) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text]));
    link.download = "yi-vl-chat.SUFFIX";
    link.click();
}"""
_SET_LANGUAGE = "(language) => { document.documentElement.lang = language; return language; }"

AnyBlock = TypeVar("AnyBlock", bound=Block)


@contextmanager
def running(
    yi_vl: YiVL, name: str, about: Mapping[Language, str], keep: Path | None = None, **launch: Any
) -> Iterator[tuple[str, str | None]]:
    """The page while it is served: its address, and its public one where it is shared.

    Uploads lie in a folder of their own, which ends with the server.

    Args:
        launch: of `gr.Blocks.launch`.
    """
    with tempfile.TemporaryDirectory(prefix="yi_vl_demo_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(folder)
        visitors = Visitors()
        page = Page(Actions(yi_vl, name, about, visitors, keep))
        visitors.public |= page.example_paths
        page.blocks.queue(max_size=_MAX_WAITING)
        _, url, shared_url = page.blocks.launch(
            prevent_thread_lock=True,
            quiet=True,
            theme=_THEME,
            css_paths=_HERE / "page.css",
            js=_script(visitors.max_picture_bytes),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size=visitors.max_picture_bytes,
            app_kwargs={"middleware": [Middleware(visitors.layer)], "max_body_size": visitors.max_bytes},
            **launch,
        )
        try:
            yield url, shared_url
        finally:
            page.blocks.close(verbose=False)


class Page:
    """`blocks` is Gradio's page over some `Actions`."""

    def __init__(self, actions: Actions) -> None:
        self.actions = actions
        self._words: dict[Block, dict[str, str]] = {}  # component -> property -> key of TEXTS
        with gr.Blocks(title="Yi-VL", fill_height=True, fill_width=True, analytics_enabled=False) as self.blocks:
            self._lay_out()
            self._connect()

    @property
    def example_paths(self) -> set[str]:
        """Where Gradio keeps the examples' pictures."""
        examples: list[Any] = self.chatbot.examples or []
        return {file["path"] for example in examples for file in example["files"]}

    def speak(self, language: Language) -> dict[Block, dict[str, Any]]:
        """Everything that is written on the page, in another language."""
        texts = TEXTS[language]
        updates = {}
        for block, keys in self._words.items():
            words: dict[str, Any] = {name: texts[key] for name, key in keys.items()}
            updates[block] = gr.update(**words)
        return updates | {self.introduction: gr.update(value=self.actions.introduce(language))}

    def _lay_out(self) -> None:
        max_tokens = self.actions.yi_vl.model.config.text_config.max_position_embeddings
        bare: dict[str, Any] = {"show_label": False, "container": False}
        self.conversation_id = gr.State(lambda: secrets.token_hex(8))
        self.document = gr.Textbox(visible=False)  # on its way to the visitor's disk
        self.refused = gr.Textbox(visible="hidden", elem_id="refused")  # files, by page.js
        with gr.Row(elem_id="head"):
            self.introduction = gr.Markdown(self.actions.introduce("en"))
            self.language = gr.Radio(
                [("中文", "zh"), ("English", "en")], value="en", label="语言 / Language", elem_id="language", **bare
            )
        self.save_json, self.save_markdown = gr.Button("⬇ JSON", render=False), gr.Button("⬇ Markdown", render=False)
        self.chatbot = self._in_words(
            gr.Chatbot(
                examples=[{"text": text, "files": [str(_PICTURES / name)]} for name, text in _EXAMPLES.items()],
                buttons=["copy", "copy_all", self.save_json, self.save_markdown],
                group_consecutive_messages=False,  # lest a message with a picture cannot be edited
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
        self.typed = self._in_words(
            gr.MultimodalTextbox(
                file_types=["image"],
                file_count="multiple",
                max_plain_text_length=100_000,
                autofocus=True,
                elem_id="typed",
                **bare,
            ),
            placeholder="type_here",
        )
        with gr.Row(elem_id="drawers"):
            with self._in_words(gr.Accordion(open=False), label="seen") as self.seen:
                self.pictures = gr.HTML()
            with self._in_words(gr.Accordion(open=False), label="camera"):
                self.photo = gr.Image(sources=["webcam"], type="filepath", show_label=False)
            with self._in_words(gr.Accordion(open=False), label="settings"):
                self.settings = [
                    self._in_words(gr.Slider(0, 2, 0, step=0.05), label="temperature", info="temperature_info"),
                    self._in_words(gr.Slider(0.05, 1, 1, step=0.05), label="top_p", info="top_p_info"),
                    self._in_words(
                        gr.Slider(1, max_tokens, min(512, max_tokens), step=1), label="length", info="length_info"
                    ),
                ]

    def _connect(self) -> None:
        actions, chatbot, typed, language = self.actions, self.chatbot, self.typed, self.language
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.blocks.load(actions.prefer, None, language, **quick)
        language.change(self.speak, language, [*self._words, self.introduction], js=_SET_LANGUAGE, **quick)
        answers = []
        for event, action, inputs, wait in (
            (typed.submit, actions.ask, [typed, chatbot, language], _wait_for_answer_to_typed),
            (chatbot.example_select, actions.try_example, None, _wait_for_answer),
            (chatbot.retry, actions.ask_again, chatbot, _wait_for_answer),
            (chatbot.edit, actions.ask_differently, chatbot, _wait_for_answer),
        ):
            asked = event(action, inputs, chatbot, **quick).then(wait, language, typed, **quick)
            answer = asked.then(
                actions.answer,
                [chatbot, self.conversation_id, language, *self.settings],
                chatbot,
                concurrency_id="model",
                concurrency_limit=1,
                show_progress="minimal",
                api_visibility="private",
            )
            answer.then(_wait_for_question, None, typed, **quick)
            answers.append(answer)
        gr.on([typed.stop, chatbot.clear], None, cancels=answers)
        chatbot.clear(actions.clear, None, [self.conversation_id, chatbot], **quick)
        chatbot.like(actions.like, [chatbot, self.conversation_id], chatbot, **quick)
        self.seen.expand(actions.show_pictures, [chatbot, language], self.pictures, **quick)
        self.refused.change(actions.refuse, [self.refused, chatbot, language], chatbot, **quick)
        self.photo.input(actions.add_photo, [self.photo, typed], [typed, self.photo], preprocess=False, **quick)
        for button, save, suffix in (
            (self.save_json, actions.save_json, "json"),
            (self.save_markdown, actions.save_markdown, "md"),
        ):
            saved = button.click(save, [chatbot, language], self.document, **quick)
            saved.success(None, self.document, None, js=_SAVE.replace("SUFFIX", suffix))

    def _in_words(self, block: AnyBlock, **keys: str) -> AnyBlock:
        """The same block, some properties of which are words that change with the language; English at first."""
        self._words[block] = keys
        for name, key in keys.items():
            setattr(block, name, TEXTS["en"][key])
        return block


def _script(max_picture_bytes: int) -> str:
    return (_HERE / "page.js").read_text(encoding="utf-8").replace("MAX_PICTURE_BYTES", str(max_picture_bytes))


def _wait_for_answer(language: Language) -> dict[str, Any]:
    return gr.update(interactive=False, submit_btn=False, stop_btn=TEXTS[language]["stop"])


def _wait_for_answer_to_typed(language: Language) -> dict[str, Any]:
    return _wait_for_answer(language) | {"value": None}


def _wait_for_question() -> dict[str, Any]:
    return gr.update(interactive=True, submit_btn=True, stop_btn=False)
