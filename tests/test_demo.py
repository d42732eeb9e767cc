"""The demo: its pure functions, its command, and the page itself, driven in a real browser over a tiny model."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from test_image_hostile import FILES
from tiny import IMAGE_SIZE_PX, OFFICIAL, tiny_yi_vl

from demo import chat, texts
from demo.__main__ import main
from demo.card import find_card
from yi_vl.image import load_image, pad_and_resize
from yi_vl.predict import YiVL, load

pytest.importorskip("gradio")

from demo import app
from demo.actions import Actions
from demo.visitors import Visitors

ROOT = Path(__file__).parents[1]
WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
PATIENCE_MS = 120_000  # a busy machine is no reason to fail

# Pure functions


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def file(path: object) -> dict[str, Any]:
    return {"type": "file", "file": {"path": str(path)}, "alt_text": "picture"}


def user(*parts: str | Path) -> dict[str, Any]:
    """A visitor's message as `gr.Chatbot` hands it over."""
    content = [file(part) if isinstance(part, Path) else text(part) for part in parts]
    return {"role": "user", "content": content, "metadata": None}


def bot(words: str, mark: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)], "metadata": mark and {"id": mark}}


def test_a_history_becomes_messages() -> None:
    history = [user(WIDE, TALL, "Compare."), bot("Alike.", "Like"), user("Sure?")]
    assert chat.to_messages(history, lambda path: Path(path).name) == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "wide.png"},
                {"type": "image", "image": "tall.png"},
                text("Compare."),
            ],
        },
        {"role": "assistant", "content": "Alike.", "feedback": "Like"},
        {"role": "user", "content": [text("Sure?")]},
    ]


def test_a_failed_turn_is_forgotten_and_an_unanswered_question_joins_the_next() -> None:
    complaint = {**chat.complained("⚠️ no"), "metadata": {"id": "complaint"}}
    history = [user(TALL), user("Broken"), complaint, user(WIDE, "One"), user("Two"), bot("Three")]
    messages = chat.to_messages(history, str)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part.get("text") for part in messages[0]["content"]] == [None, "One", "\n", "Two"]
    assert chat.picture_paths(history) == [str(WIDE)]


def test_a_bad_picture_is_named_without_its_folder() -> None:
    with pytest.raises(chat.BadPictureError, match=r"^no\.png: there is no such file") as caught:
        chat.to_messages([user(Path("/some/where/no.png"), "What?")], load_image)
    assert caught.value.name == "no.png" and "where" not in str(caught.value)


def test_pictures_and_words_are_messages_of_their_own() -> None:
    pictures, words = chat.asked("What?", [str(WIDE), str(TALL)])
    assert [part["path"] for part in pictures["content"]] == [str(WIDE), str(TALL)]
    assert words == {"role": "user", "content": [text("What?")]} and chat.asked("What?") == [words]
    (message,) = chat.to_messages([user(WIDE), user("What?")], str)
    assert message["content"] == [{"type": "image", "image": str(WIDE)}, text("What?")]


def test_marks() -> None:
    history = [user("One"), bot("Two"), user("Three"), chat.complained("⚠️")]
    liked = chat.marked(history, 1, True)
    assert chat.thumbs(liked) == ["Like", None] and chat.thumbs(history) == [None, None]
    assert chat.thumbs(chat.marked(liked, 1, False)) == ["Dislike", None]
    assert chat.thumbs(chat.marked(liked, 1, "")) == [None, None]


def test_documents_hold_the_pictures() -> None:
    history = [user(WIDE, "What?"), bot("A *thing*.", "Dislike")]
    document = chat.to_document(history, lambda path: Path(path).read_bytes(), "nano")
    url = "data:image/png;base64," + base64.b64encode(WIDE.read_bytes()).decode()
    assert document["messages"] == [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text("What?")]},
        {"role": "assistant", "content": "A *thing*.", "feedback": "Dislike"},
    ]
    assert chat.to_markdown(document, "You") == (
        f"# Yi-VL: nano\n\n**You**\n\n![1][1]\n\nWhat?\n\n**nano 👎**\n\nA *thing*.\n\n[1]: {url}\n"
    )


def test_what_a_browser_saved_is_restored_and_nothing_else() -> None:
    marked = {"metadata": {"id": "Like", "title": "<b>", "log": "x"}, "options": [{"value": "x"}]}
    history = [user(WIDE), user("# *a*"), bot("b") | marked]
    typed = {"text": "draft", "files": [{"path": str(TALL), "url": "http://elsewhere/tall.png"}]}
    saved = json.dumps({"history": history, "typed": typed, "isAnswering": True})
    restored, unsent, is_answering = chat.restored(saved)
    assert restored == [*chat.asked("# *a*", [str(WIDE)]), chat.answered("b") | {"metadata": {"id": "Like"}}]
    assert unsent == {"text": "draft", "files": [str(TALL)]} and is_answering
    assert chat.image_paths(restored) == [str(WIDE)]


@pytest.mark.parametrize(
    "history",
    [
        "null is none",
        [None],
        [{"role": "system", "content": []}],
        [{"role": "user", "content": [{"type": "component", "component": "html", "value": "<b>"}]}],
        [{"role": "user", "content": [{"type": "file", "file": "/etc/passwd"}]}],
    ],
)
def test_what_no_page_saves_is_refused(history: object) -> None:
    for saved in (json.dumps({"history": history, "typed": None, "isAnswering": False}), "{}", "[]", "no JSON"):
        with pytest.raises(ValueError):
            chat.restored(saved)


def test_where_a_model_is_described(tmp_path: Path) -> None:
    nano = find_card(None)
    assert nano.text.startswith("# nano") and nano.licence == "apache-2.0" and not nano.url
    assert find_card("01-ai/Yi-VL-6B").url == "https://huggingface.co/01-ai/Yi-VL-6B"
    assert find_card(str(tmp_path)) == find_card(str(WIDE))  # neither has a card
    (tmp_path / "README.md").write_text("# Mine", encoding="utf-8")
    assert find_card(str(tmp_path)).text == "# Mine" and not find_card(str(tmp_path)).licence


def test_figures_show_every_pixel_and_no_markup_of_a_name() -> None:
    picture = Image.open(WIDE).convert("RGB")
    page = chat.to_figures([("<b>.png", picture)], "{name} {size}")
    assert "<b>" not in page and "&lt;b&gt;.png" in page
    assert pixels_of(re.search(r'src="([^"]+)"', page)[1]) == picture.tobytes()


def pixels_of(data_url: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2]))).convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("header", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.9,zh;q=0.8", "en"), ("fr,zh;q=0.3,en;q=0.7", "en"), ("", "en")],
)
def test_the_preferred_language(header: str, language: str) -> None:
    assert texts.preferred(header) == language


def test_both_languages_say_the_same_things() -> None:
    english, chinese = texts.TEXTS["en"], texts.TEXTS["zh"]
    assert english.keys() == chinese.keys()
    for key, words in english.items():
        assert set(re.findall(r"{\w+}", words)) == set(re.findall(r"{\w+}", chinese[key])), key


def test_pure_modules_need_no_gradio() -> None:
    check = "import sys, demo.chat, demo.texts, demo.__main__; print('gradio' in sys.modules)"
    command = [sys.executable, "-c", check]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "False"


# The command


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--share"], "--auth USER:PASSWORD"),
        (["--host", "0.0.0.0"], "--auth USER:PASSWORD"),
        (["--auth", "nobody"], "a colon between"),
        (["--model", "no/such/model"], "no such folder"),
    ],
)
def test_what_a_user_can_cause_is_one_line(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.delenv("YI_VL_DEMO_AUTH", raising=False)
    with pytest.raises(SystemExit) as caught:
        main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("demo: ") and reason in said and said.count("\n") == 1


# Over a model, without a browser


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl(max_position_embeddings=2048)


class Pace:
    """Counts the model's steps and its ended answers, ends every answer after `num_tokens`, and stops the model before
    a step on demand."""

    def __init__(self, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tokens = 8
        self.num_steps = 0
        self.num_ended = 0
        self._in_answer = 0
        self._gate = threading.Semaphore(0)
        self._is_held = False
        self._eos = yi_vl.processor.tokenizer.eos_token_id
        self._forward = yi_vl.model.forward
        self._generate = yi_vl.generate
        monkeypatch.setattr(yi_vl.model, "forward", self._step)
        monkeypatch.setattr(yi_vl, "generate", self._answer)

    def hold(self, after: int) -> None:
        """Let the model take so many steps, and wait then."""
        self._is_held = True
        for _ in range(after):
            self._gate.release()

    def release(self) -> None:
        self._is_held = False
        self._gate.release()

    def wait_for(self, num_steps: int) -> None:
        wait_until(lambda: self.num_steps >= num_steps)

    def _answer(self, *arguments: Any) -> Iterator[list[str]]:
        try:
            yield from self._generate(*arguments)
        finally:
            self.num_ended += 1

    def _step(self, **inputs: Any) -> Any:
        if self._is_held:
            assert self._gate.acquire(timeout=PATIENCE_MS / 1000)
        self.num_steps += 1
        self._in_answer = 1 if "inputs_embeds" in inputs else self._in_answer + 1
        outputs = self._forward(**inputs)
        outputs.logits[..., self._eos] = torch.inf if self._in_answer > self.num_tokens else -torch.inf
        return outputs


@pytest.fixture
def pace(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pace]:
    pace = Pace(yi_vl, monkeypatch)
    yield pace
    pace.release()


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def actions_over(yi_vl: YiVL, keep: Path | None = None) -> Actions:
    visitors = Visitors()
    visitors.public = {str(WIDE)}
    return Actions(yi_vl, "tiny", texts.ANY_YI_VL, visitors, keep)


NOBODY = SimpleNamespace(cookies={}, headers={})
SETTINGS = ("0123", "en", 0.0, 1.0, 512)


def test_an_answer_streams_and_is_the_models_own(yi_vl: YiVL, pace: Pace) -> None:
    history = [user(WIDE, "What is this?")]
    *_, before, last = actions_over(yi_vl).answer(history, *SETTINGS, NOBODY)
    said = last[-1]["content"][0]["text"]
    assert last[:-1] == history and said.startswith(before[-1]["content"][0]["text"])
    assert said == yi_vl.predict(WIDE, "What is this?")


def test_closing_an_answer_stops_the_model(yi_vl: YiVL, pace: Pace) -> None:
    actions = actions_over(yi_vl)
    answer = actions.answer([user("Hi")], *SETTINGS, NOBODY)
    next(answer)
    before = pace.num_steps
    answer.close()
    assert pace.num_steps == before
    assert list(actions.answer([user("Hi")], *SETTINGS, NOBODY))  # the next in the queue is not kept waiting


def test_an_answer_that_is_left_alone_keeps_nobody_waiting(yi_vl: YiVL, pace: Pace) -> None:
    actions = actions_over(yi_vl)
    answer = actions.answer([user("Hi")], *SETTINGS, NOBODY)
    next(answer)
    another = threading.Thread(target=lambda: list(actions.answer([user("Hello")], *SETTINGS, NOBODY)), daemon=True)
    another.start()
    another.join(PATIENCE_MS / 1000)
    assert not another.is_alive() and pace.num_ended == 1
    answer.close()


@pytest.mark.parametrize(
    ("history", "language", "words"),
    [
        ([user(TALL, "What?")], "en", "tall.png.* cannot be shown.* never yours"),
        ([user(Path("/etc/passwd"), "What?")], "zh", "passwd.*无法给模型看.*不属于你"),
        ([user("word " * 4000)], "en", "too much to read at once: at least [0-9]+ tokens with 0 images"),
        ([user(*[WIDE] * 500, "What?")], "zh", "^[^a-zA-Z]*含 500 张图片[^a-zA-Z]*$"),
    ],
)
def test_what_goes_wrong_is_said_in_the_chat(yi_vl: YiVL, history: list[Any], language: str, words: str) -> None:
    settings = (SETTINGS[0], language, *SETTINGS[2:])
    (shown,) = actions_over(yi_vl).answer(history, *settings, NOBODY)
    assert re.search(words, shown[-1]["content"][0]["text"], re.DOTALL)
    assert chat.to_messages(shown, str) == []


@pytest.mark.parametrize("name", ["1 x 300,000", "icon", "GIF comments", "JPEG of 400 scans", "QOI"])
def test_a_hostile_picture_is_refused_in_the_chat(yi_vl: YiVL, pace: Pace, name: str, tmp_path: Path) -> None:
    make, reason = FILES[name]
    path = tmp_path / "hostile.png"
    path.write_bytes(make())
    actions = actions_over(yi_vl)
    actions.visitors.public.add(str(path))
    (shown,) = actions.answer([user(path, "What?")], *SETTINGS, NOBODY)
    assert re.search(f"hostile.png.*({reason}|not a picture of a format)", shown[-1]["content"][0]["text"], re.DOTALL)
    assert actions.show_pictures([user(path, "What?")], "en", NOBODY) == texts.TEXTS["en"]["seen_nothing"]


def test_too_many_pictures_are_refused_before_they_are_opened(yi_vl: YiVL, pace: Pace) -> None:
    actions = actions_over(yi_vl)
    actions._prepare = lambda path: pytest.fail("a picture was opened")
    (shown,) = actions.answer([user(*[WIDE] * 500, "What?")], *SETTINGS, NOBODY)
    assert "with 500 images" in shown[-1]["content"][0]["text"]


def test_only_what_a_visitor_may_read_is_restored(yi_vl: YiVL) -> None:
    def restore(path: Path) -> list[str]:
        saved = json.dumps({"history": [user(path), user("Hi"), bot("Yes")], "typed": None, "isAnswering": False})
        history, _ = actions_over(yi_vl).restore(saved, "zh", NOBODY)
        return [part.get("text") or part["path"] for message in history["value"] for part in message["content"]]

    assert restore(WIDE) == [str(WIDE), "Hi", "Yes"]
    assert restore(TALL) == [texts.TEXTS["zh"]["lost"]]


def test_an_error_of_ours_is_logged_and_not_shown(
    yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(yi_vl, "prepare", lambda _: {}["secret"])
    (shown,) = actions_over(yi_vl).answer([user("Hi")], *SETTINGS, NOBODY)
    assert shown[-1]["content"][0]["text"] == texts.TEXTS["en"]["failed"] and "secret" in caplog.text


def test_conversations_are_kept_on_request_only(yi_vl: YiVL, pace: Pace, tmp_path: Path) -> None:
    *_, history = actions_over(yi_vl, tmp_path).answer([user(WIDE, "What?")], *SETTINGS, NOBODY)
    actions = actions_over(yi_vl, tmp_path)
    history = [history[0], bot(history[1]["content"][0]["text"])]
    actions.like(history, "0123", SimpleNamespace(index=1, liked=True), NOBODY)
    kept = json.loads((tmp_path / "0123.json").read_text(encoding="utf-8"))
    assert [message.get("feedback") for message in kept["messages"]] == [None, "Like"]
    assert texts.TEXTS["en"]["kept"] in actions.introduce("en")
    assert texts.TEXTS["en"]["kept"] not in actions_over(yi_vl).introduce("en")


# The page


class Served:
    def __init__(self, url: str, visitors: Visitors) -> None:
        self.url = url
        self.visitors = visitors

    @property
    def folder(self) -> Path:
        return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture(scope="module")
def served(yi_vl: YiVL) -> Iterator[Served]:
    visitors = Visitors(max_picture_bytes=1 << 20, max_bytes=3 << 20, grace_seconds=0)  # large uploads take long
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(app, "Visitors", lambda: visitors)
        with app.running(yi_vl, "tiny", texts.ANY_YI_VL, server_name="127.0.0.1", share=False) as (url, _):
            yield Served(url, visitors)
        assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        try:
            chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        except playwright.Error as error:
            pytest.skip(f"there is no browser: {str(error).splitlines()[0]}; `playwright install chromium` gets one")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def shared_context(browser: Any) -> Any:
    """Its cache saves the page's scripts from being fetched and compiled for every test."""
    return browser.new_context(viewport={"width": 1100, "height": 800})


@pytest.fixture
def visit(browser: Any, shared_context: Any, served: Served, pace: Pace, tmp_path: Path) -> Iterator[Any]:
    """Opens the page as another visitor; what each saw last is left as a picture in pytest's folder."""
    contexts: list[Any] = []

    def open_page(**options: Any) -> Visitor:
        is_first = not options and not contexts
        viewport = {"width": 1100, "height": 800}
        context = shared_context if is_first else browser.new_context(**{"viewport": viewport} | options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        return Visitor(context.new_page(), served.url)

    yield open_page
    pace.release()
    for number, context in enumerate(contexts):
        for page in context.pages:
            page.screenshot(path=tmp_path / f"{number}.png")
            page.close()  # and with it sessionStorage
        context.clear_cookies()
        if context is not shared_context:
            context.close()


class Visitor:
    """A visitor's hands and eyes."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(url)
        self.page.locator("#typed textarea").wait_for()
        self.page.get_by_test_id("submit-button").wait_for()

    def attach(self, *paths: Path) -> None:
        before = self.page.locator("#typed .thumbnail-item").count()
        self.choose(*paths)
        self.has_thumbnails(before + len(paths))

    def choose(self, *paths: Path) -> None:
        self.page.locator("#typed input[type=file]").set_input_files([str(path) for path in paths])

    def has_thumbnails(self, count: int) -> None:
        wait_for_count(self.page.locator("#typed .thumbnail-item"), count)

    def send(self, question: str) -> None:
        self.page.locator("#typed textarea").fill(question)
        self.page.get_by_test_id("submit-button").click()

    def ask(self, question: str, *paths: Path) -> str:
        """The answer, when it is complete."""
        if paths:
            self.attach(*paths)
        count = self.answers.count()
        self.send(question)
        wait_for_count(self.answers, count + 1)
        self.wait_for_end()
        return self.answers.last.inner_text()

    def wait_for_end(self) -> None:
        self.page.get_by_test_id("submit-button").wait_for()

    def reload(self) -> None:
        self.page.reload()
        self.page.get_by_test_id("submit-button").wait_for()
        self.page.wait_for_function("window.isRestored")

    def is_in_box(self) -> bool:
        return self.page.evaluate("document.activeElement.matches('#typed textarea')")

    @property
    def answers(self) -> Any:
        return self.page.get_by_test_id("bot")

    @property
    def questions(self) -> Any:
        return self.page.get_by_test_id("user")

    @property
    def stop(self) -> Any:
        return self.page.get_by_role("button", name="Stop", exact=False)

    def press(self, label: str) -> None:
        self.page.locator("#chat").get_by_label(label, exact=True).last.click()

    def save(self, kind: str) -> str:
        """What the visitor's disk gets."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=kind).click()
        return Path(download.value.path()).read_text(encoding="utf-8")


def wait_for_count(locator: Any, count: int) -> None:
    wait_until_in_browser(locator.page, lambda: locator.count() == count)


def wait_until_in_browser(page: Any, is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not is_true():
        assert time.monotonic() < deadline, "waited in vain"
        page.wait_for_timeout(50)


def messages_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """A saved conversation as yi_vl takes it."""
    messages = []
    for message in document["messages"]:
        content = message["content"]
        if message["role"] == "user":
            content = [
                {"type": "image", "image": base64.b64decode(part["image_url"]["url"].partition(",")[2])}
                if part["type"] == "image_url"
                else part
                for part in content
            ]
        messages.append({"role": message["role"], "content": content})
    return messages


def test_a_conversation(visit: Any, yi_vl: YiVL, pace: Pace) -> None:
    """Upload, ask, go on in Chinese with a second picture, like, save: every answer is the model's to what was said."""
    visitor = visit()
    assert visitor.ask("What is in this picture?", WIDE)
    assert visitor.ask("和这张图比呢？", TALL, WIDE)
    visitor.press("Like")
    visitor.page.get_by_label("Liked", exact=True).wait_for()
    document = json.loads(visitor.save("JSON"))
    messages = messages_of(document)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in messages[2]["content"]] == ["image", "image", "text"]
    for index in (1, 3):
        assert messages[index]["content"] == yi_vl.answer(messages[:index])
    assert document["messages"][3]["feedback"] == "Like"
    page = visitor.save("Markdown")
    assert "和这张图比呢？" in page and page.count("data:image/png") == 3
    assert visitor.problems == []


def test_an_answer_appears_while_it_is_made_and_can_be_stopped(visit: Any, pace: Pace) -> None:
    visitor = visit()
    pace.num_tokens = 10**6
    pace.hold(after=6)
    visitor.send("Tell me a story")
    wait_for_count(visitor.answers, 1)
    pace.wait_for(6)
    assert visitor.page.get_by_test_id("submit-button").count() == 0
    with visitor.page.expect_request(re.compile("/cancel")):
        visitor.stop.click()
    visitor.page.request.get(visitor.page.url)  # answered after the server has read the one before
    pace.release()
    visitor.wait_for_end()
    wait_until(lambda: pace.num_ended == 1)
    assert pace.num_steps <= 7  # the step that was being taken has ended, and no other followed
    pace.num_tokens = 4
    assert visitor.ask("And then?")


def test_a_closed_tab_stops_its_answer(visit: Any, served: Served, pace: Pace) -> None:
    visitor = visit()
    pace.num_tokens = 10**6
    pace.hold(after=3)
    visitor.send("Tell me a story")
    pace.wait_for(3)
    visitor.page.close()
    wait_until(lambda: not any(served.visitors._num_tabs.values()))
    pace.release()
    wait_until(lambda: pace.num_ended == 1)
    assert pace.num_steps <= 4  # the step that was being taken has ended, and no other followed
    pace.num_tokens = 4
    assert visit().ask("Hi")


def test_another_answer_an_edited_question_and_a_new_conversation(visit: Any, yi_vl: YiVL, pace: Pace) -> None:
    visitor = visit()
    visitor.ask("What is this?", WIDE)
    first = json.loads(visitor.save("JSON"))
    visitor.press("Like")
    pace.hold(after=0)
    visitor.press("Retry")
    visitor.stop.wait_for()
    pace.release()
    visitor.wait_for_end()
    assert json.loads(visitor.save("JSON")) == first  # greedy: the same, and no longer liked
    visitor.press("Edit")
    visitor.page.locator("#chat textarea").fill("这是什么？")
    pace.hold(after=0)
    visitor.press("Submit")
    visitor.stop.wait_for()
    pace.release()
    visitor.wait_for_end()
    messages = messages_of(json.loads(visitor.save("JSON")))
    assert messages[0]["content"][1] == text("这是什么？") and len(messages) == 2
    assert messages[1]["content"] == yi_vl.answer(messages[:1])
    visitor.press("Clear")
    visitor.page.locator(".example").first.wait_for()
    assert visitor.answers.count() == 0 and visitor.problems == []


def test_a_keyboard_is_enough(visit: Any, pace: Pace) -> None:
    visitor = visit()
    keyboard, box = visitor.page.keyboard, visitor.page.locator("#typed textarea")
    wait_until_in_browser(visitor.page, visitor.is_in_box)
    keyboard.type("Hi")
    keyboard.press("Shift+Enter")
    keyboard.type("there")
    assert box.input_value() == "Hi\nthere"
    keyboard.press("Enter")
    wait_for_count(visitor.answers, 1)
    visitor.wait_for_end()
    wait_until_in_browser(visitor.page, visitor.is_in_box)
    keyboard.type("And")
    visitor.page.get_by_role("button", name="Settings").focus()
    assert visitor.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    pace.num_tokens = 10**6
    pace.hold(after=3)
    visitor.attach(WIDE)
    visitor.send("And on?")
    wait_for_count(visitor.answers, 2)
    visitor.page.get_by_role("button", name="New chat").press("Enter")
    visitor.page.locator(".example").first.wait_for()
    pace.release()
    wait_until_in_browser(visitor.page, visitor.is_in_box)
    visitor.wait_for_end()
    assert visitor.answers.count() == 0 and box.input_value() == "" and visitor.problems == []
    visitor.has_thumbnails(0)


AS_TYPED = """  # a
*a* **b** 1_000_000 <b>bold</b> <script>alert(1)</script> <img src="/none.png" onerror="alert(1)"> &lt;i&gt; &amp;
<!-- c --> [x](javascript:alert(1))
```py
x = 1
```
$x$ $$y$$
| a | b |
|---|---|
    indented   twice

مرحبا 👩🏽‍🚀 """ + "long" * 60  # fmt: skip


def test_what_is_typed_is_shown_as_typed_and_answers_are_harmless(
    visit: Any, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(messages: Any, **_: Any) -> Iterator[str]:
        yield 'A **bold**<script>window.hurt = 1</script><img src="/none.png" onerror="window.hurt = 1"> '
        yield "![](http://192.0.2.1/spy.png) [x](javascript:window.hurt=1)\n\n1. one\n2. two"

    monkeypatch.setattr(yi_vl, "stream_messages", answer)
    visitor = visit()
    spies: list[str] = []
    visitor.page.route(re.compile("192.0.2.1"), lambda route: (spies.append(route.request.url), route.abort()))
    visitor.ask(AS_TYPED)
    shown = visitor.page.locator("#chat [data-testid=user] .md")
    wait_until_in_browser(visitor.page, lambda: shown.text_content() == AS_TYPED)
    assert json.loads(visitor.save("JSON"))["messages"][0]["content"] == [text(AS_TYPED)]
    said = visitor.page.locator("#chat [data-testid=bot] .md")
    assert said.locator("strong").count() == 1 and said.locator("li").count() == 2
    assert said.locator("script, [onerror], a[href^=javascript]").count() == 0
    assert visitor.page.evaluate("window.hurt") is None and not spies
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    visitor.press("Edit")
    edited = visitor.page.locator("#chat textarea")
    assert edited.input_value() == AS_TYPED
    edited.fill("<u>b</u>")
    visitor.press("Submit")
    wait_until_in_browser(visitor.page, lambda: shown.text_content() == "<u>b</u>")
    visitor.wait_for_end()
    assert visitor.problems == []


def test_a_reload_keeps_the_conversation_or_says_that_it_is_lost(
    visit: Any, served: Served, pace: Pace, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.visitors, "_grace_seconds", 60)
    visitor = visit()
    said = visitor.ask("*What* is this?", WIDE)
    visitor.press("Like")
    visitor.page.get_by_label("Liked", exact=True).wait_for()
    visitor.attach(TALL)
    visitor.page.locator("#typed textarea").fill("draft")
    visitor.reload()
    visitor.has_thumbnails(1)
    assert visitor.answers.last.inner_text() == said and visitor.questions.last.inner_text() == "*What* is this?"
    assert visitor.page.locator("#typed textarea").input_value() == "draft"
    image = visitor.page.locator("#chat [data-testid=user] img")
    wait_until_in_browser(visitor.page, lambda: image.evaluate("(image) => image.naturalWidth > 0"))
    assert image.get_attribute("alt") == "Image 1: wide.png"
    visitor.page.get_by_test_id("submit-button").click()
    wait_for_count(visitor.answers, 2)
    visitor.wait_for_end()
    document = json.loads(visitor.save("JSON"))
    messages = messages_of(document)
    assert len(messages) == 4 and messages[3]["content"] == yi_vl.answer(messages[:3])
    assert document["messages"][1]["feedback"] == "Like"
    other = Visitor(visitor.page.context.new_page(), served.url)
    assert other.answers.count() == 0
    other.page.close()
    pace.num_tokens = 10**6
    pace.hold(after=4)
    visitor.send("Tell me a story")
    wait_for_count(visitor.answers, 3)
    pace.wait_for(4)
    visitor.reload()
    pace.release()
    visitor.page.get_by_text(texts.TEXTS["en"]["interrupted"]).wait_for()
    pace.num_tokens = 4
    assert visitor.ask("Then say this.")
    served.visitors._paths.clear()
    visitor.reload()
    visitor.page.get_by_text(texts.TEXTS["en"]["lost"]).wait_for()
    assert visitor.answers.count() == 1 and visitor.questions.count() == 0 and visitor.ask("Again")
    assert visitor.problems == []


def test_settings_leave_the_last_answer_in_view(visit: Any) -> None:
    visitor = visit()
    for question in ("One\n" * 8, "Two\n" * 8):
        visitor.ask(question)
    visitor.page.wait_for_timeout(500)  # Gradio scrolls 0.3 s after a message
    visitor.page.get_by_text("Settings").click()
    visitor.page.get_by_text("Greatest length").wait_for()
    answer, chat_box = visitor.answers.last, visitor.page.locator("#chat")

    def is_in_view() -> bool:
        box, around = answer.bounding_box(), chat_box.bounding_box()
        return around["y"] <= box["y"] and box["y"] + box["height"] <= min(around["y"] + around["height"], 800)

    wait_until_in_browser(visitor.page, is_in_view)
    assert visitor.page.evaluate("window.scrollY") == 0


def test_an_example_is_one_key_away_and_the_model_shows_what_it_sees(visit: Any) -> None:
    visitor = visit()
    visitor.page.locator(".example").first.press("Enter")
    visitor.answers.first.wait_for()
    visitor.wait_for_end()
    visitor.page.get_by_text("As the model sees it").click()
    picture = visitor.page.locator(".seen img")
    seen = pixels_of(picture.get_attribute("src"))
    penguin = load_image(ROOT / "docs" / "pictures" / "penguin.png")
    assert seen == pad_and_resize(penguin, IMAGE_SIZE_PX).tobytes()


def test_pictures_come_by_drop_paste_and_camera(visit: Any) -> None:
    visitor = visit(permissions=["camera"])
    make = """([name, base64]) => {
        const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], name, {type: "image/png"}));
        return data;
    }"""
    data = visitor.page.evaluate_handle(make, ["dropped.png", base64.b64encode(WIDE.read_bytes()).decode()])
    visitor.page.dispatch_event("#chat", "drop", {"dataTransfer": data})
    visitor.has_thumbnails(1)
    paste = "(data) => document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))"
    visitor.page.evaluate(paste, data)
    visitor.has_thumbnails(2)
    visitor.page.get_by_text("Camera").click()
    visitor.page.get_by_text("Click to Access Webcam").click()
    visitor.page.wait_for_function("document.querySelector('video')?.videoWidth > 0")  # else it photographs nothing
    visitor.page.get_by_label("capture photo").click()
    visitor.has_thumbnails(3)
    assert visitor.ask("")  # pictures without words get the obvious question
    assert visitor.questions.last.inner_text() == texts.TEXTS["en"]["default_question"]


ENGLISH = r"""() => [...document.querySelectorAll("[aria-label], [title], [placeholder], [alt], button, label, h1, h2")]
    .filter((element) => element.checkVisibility())
    .flatMap((element) => ["aria-label", "title", "placeholder", "alt"].map((name) => element.getAttribute(name))
        .concat(element.matches("button, label, h1, h2") ? element.innerText : []))
    .filter((words) => /[a-z]{3}/i.test((words ?? "")
        .replace(/\w+[.]png|Yi-VL|Top-p|JSON|Markdown|Language|^模型：.*/g, "")))"""


def test_everything_is_said_in_the_language_of_the_browser_or_of_the_switch(visit: Any, served: Served) -> None:
    visitor = visit(locale="zh-CN", permissions=["camera"])
    page = visitor.page
    page.get_by_text("给我看一张图片").wait_for()
    assert page.get_by_text("它会犯错").count() == 1 and page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "zh"
    assert page.locator("#typed textarea").get_attribute("placeholder") == texts.TEXTS["zh"]["type_here"]
    examples = page.locator(".example")
    assert examples.all_inner_texts() == list(texts.EXAMPLES["zh"].values())
    assert page.evaluate(ENGLISH) == []
    examples.first.click()
    wait_for_count(visitor.answers, 1)
    visitor.wait_for_end()
    visitor.choose(WIDE)
    visitor.has_thumbnails(1)
    page.get_by_text("设置").click()
    page.get_by_text("最大长度").wait_for()
    page.get_by_text("拍照").first.click()
    page.get_by_text("点击以使用摄像头").wait_for()
    assert page.evaluate(ENGLISH) == []
    page.get_by_role("link", name="English").click()
    page.get_by_text("Settings").wait_for()
    assert page.locator("html").get_attribute("lang") == "en" and page.evaluate("navigator.language") == "en"
    wait_for_count(visitor.answers, 1)  # the conversation is still there
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Select example 1: What is in this picture?").wait_for()
    assert page.get_by_role("link", name="English").get_attribute("aria-current") == "true"
    assert httpx.get(served.url, headers={"accept": "text/html", "accept-language": "fr"}).text.count('lang="en"') == 1


def test_the_page_fits_a_phone(visit: Any) -> None:
    visitor = visit(viewport={"width": 320, "height": 640}, is_mobile=True, has_touch=True, color_scheme="dark")
    assert not visitor.is_in_box()  # a keyboard would pop up
    visitor.ask("What is this?", WIDE)
    for name in ("As the model sees it", "Settings"):
        visitor.page.get_by_text(name).click()
    visitor.page.get_by_text("Greatest length").wait_for()
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = """() => [...document.querySelectorAll("button, a, input, textarea")].filter((element) => {
        const { left, right, width, height } = element.getBoundingClientRect();
        const isSmall = width < 44 || height < (element.matches("textarea") ? 32 : 44); // the frame belongs to the box
        return element.checkVisibility() && width && (isSmall || left < 0 || right > 320);
    }).map((element) => element.outerHTML)"""
    assert visitor.page.evaluate(small) == []


def huge_png() -> bytes:
    """A few bytes that claim 12,000 x 12,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_bad_picture_is_refused_in_plain_words(visit: Any, tmp_path: Path, yi_vl: YiVL) -> None:
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(WIDE.read_bytes()[:100])
    huge.write_bytes(huge_png())
    visitor = visit()
    said = visitor.ask("What is this?", broken)
    assert "⚠️ broken.png cannot be shown to the model" in said and "Try another" in said
    assert "/" not in said
    assert "12000 x 12000 pixels" in visitor.ask("And this?", huge)
    assert visitor.ask("Then this?", WIDE)
    messages = messages_of(json.loads(visitor.save("JSON")))
    assert len(messages) == 2 and messages[1]["content"] == yi_vl.answer(messages[:1])
    notes, large = tmp_path / "*my* <b>notes _1_.txt", tmp_path / "large.png"
    notes.write_text("no picture")
    large.write_bytes(bytes((1 << 20) + 1))
    count = visitor.answers.count()
    visitor.choose(notes, WIDE, large)
    visitor.has_thumbnails(1)  # what can be sent is
    wait_for_count(visitor.answers, count + 1)
    said = visitor.answers.last.inner_text()
    assert "*my* <b>notes _1_.txt: that is no picture" in said and "large.png: a picture may take 1 MB at most" in said
    assert visitor.page.locator(".toast-body").count() == 0


def test_two_visitors_wait_for_each_other_and_see_their_own_only(
    visit: Any, served: Served, pace: Pace, tmp_path: Path
) -> None:
    anna, bert = visit(), visit()
    pace.hold(after=2)
    anna.attach(WIDE)
    anna.send("What is this?")
    pace.wait_for(2)
    bert.attach(TALL)
    bert.send("这是什么？")
    bert.page.get_by_text(re.compile("queue: 1/1")).wait_for()
    anna.page.screenshot(path=tmp_path / "answering.png")
    bert.page.screenshot(path=tmp_path / "waiting.png")
    pace.release()
    for visitor in (anna, bert):
        wait_for_count(visitor.answers, 1)
        visitor.wait_for_end()
    for visitor, picture in ((anna, WIDE), (bert, TALL)):
        (question, _) = messages_of(json.loads(visitor.save("JSON")))
        assert question["content"][0]["image"] == picture.read_bytes()
    url = anna.page.locator("#chat [data-testid=user] img").get_attribute("src")
    assert anna.page.request.get(url).status == 200
    assert bert.page.request.get(url).status == httpx.get(url).status_code == 403
    assert list(served.folder.rglob("wide.png"))
    anna.page.close()
    wait_until(lambda: not list(served.folder.rglob("wide.png")))
    assert list(served.folder.rglob("tall.png")) and list(served.folder.rglob("penguin.png"))


def test_large_uploads_and_strangers_are_refused(visit: Any, served: Served) -> None:
    visitor = visit()

    def upload(name: str, num_bytes: int) -> int:
        file = {"name": name, "mimeType": "image/png", "buffer": bytes(num_bytes)}
        return visitor.page.request.post(f"{served.url}gradio_api/upload", multipart={"files": file}).status

    assert upload("large.png", (1 << 20) + 1) == 413
    assert [upload(f"{number}.png", 900_000) for number in range(3)] == [200, 200, 413]  # 3 MB in all, with large.png
    assert httpx.post(f"{served.url}gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert not list(served.folder.rglob("large.png")) and not list(served.folder.rglob("2.png"))


def test_a_password_closes_the_page(yi_vl: YiVL) -> None:
    running = partial(app.running, yi_vl, "tiny", texts.ANY_YI_VL, server_name="127.0.0.1", share=False)
    with running(auth=("anna", "secret")) as (url, _), httpx.Client(base_url=url) as client:
        assert client.get("config").status_code == 401
        client.get("/")
        assert client.post("login", data={"username": "anna", "password": "wrong"}).status_code == 400
        assert client.post("login", data={"username": "anna", "password": "secret"}).status_code == 200
        assert client.get("config").status_code == 200


def test_nano_answers_out_of_the_box(browser: Any, tmp_path: Path) -> None:
    """Also retakes the README's picture, into the file that YI_VL_DEMO_PICTURE names."""
    pictures = ROOT / "docs" / "pictures"
    running = partial(app.running, load(), "nano", texts.NANO, card=find_card(None), share=False)
    with running(server_name="127.0.0.1") as (url, _):
        context = browser.new_context(viewport={"width": 900, "height": 1230})
        context.set_default_timeout(PATIENCE_MS)
        visitor = Visitor(context.new_page(), url)
        for question, name in (("What is in this picture?", "penguin.png"), ("这是哪里的旗帜？", "brazil.png")):
            assert "⚠️" not in visitor.ask(question, pictures / name)  # what nano knows is test_nano.py's business
        visitor.press("Like")
        visitor.page.get_by_label("Liked", exact=True).wait_for()
        visitor.page.mouse.move(0, 0)
        visitor.page.locator("#chat .bubble-wrap").evaluate("(chat) => chat.scrollTo(0, chat.scrollHeight)")
        visitor.page.screenshot(path=os.environ.get("YI_VL_DEMO_PICTURE", tmp_path / "demo.png"), animations="disabled")
        with context.expect_page() as opened:
            visitor.page.get_by_role("link", name="Model card").click()
        opened.value.get_by_role("heading", name="nano: the smallest Yi-VL", level=1).wait_for()
        context.close()
