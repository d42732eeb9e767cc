"""The demo's page, driven in a real browser over a tiny model."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_pace import PATIENCE_MS, TALL, WIDE, Pace, pace, pixels_of, text, wait_until, yi_vl
from tiny import IMAGE_SIZE_PX

from demo import i18n
from demo.card import find_card
from yi_vl.image import load_image, pad_and_resize
from yi_vl.predict import YiVL, load

pytest.importorskip("gradio")

from gradio.queueing import Queue

from demo import app
from demo.uploads import Uploads

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


class Served:
    def __init__(self, url: str, uploads: Uploads) -> None:
        self.url = url
        self.uploads = uploads

    @property
    def folder(self) -> Path:
        return Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture(scope="module")
def served(yi_vl: YiVL) -> Iterator[Served]:
    uploads = Uploads(max_image_bytes=1 << 20, max_bytes=3 << 20, grace_seconds=0)  # large uploads take long
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(app, "Uploads", lambda: uploads)
        with app.running(yi_vl, "tiny", i18n.ANY_YI_VL, server_name="127.0.0.1", share=False) as (url, _):
            yield Served(url, uploads)
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
    """Opens the page as another visitor; what each saw last is left as a screenshot in pytest's folder."""
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

    def save(self, name: str) -> str:
        """What the visitor's disk gets."""
        with self.page.expect_download() as download:
            self.page.get_by_role("button", name=name).click()
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
    """Upload, ask, go on in Chinese with a second image, like, save: every answer is the model's own."""
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


def test_a_closed_tab_stops_its_answer(visit: Any, served: Served, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    is_cancelled, clean_events = threading.Event(), Queue.clean_events

    async def clean(queue: Queue, **of: Any) -> None:  # which Gradio does some time after a tab is closed
        await clean_events(queue, **of)
        is_cancelled.set()

    monkeypatch.setattr(Queue, "clean_events", clean)
    visitor = visit()
    pace.num_tokens = 10**6
    pace.hold(after=3)
    visitor.send("Tell me a story")
    pace.wait_for(3)
    visitor.page.close()
    wait_until(lambda: not any(served.uploads._num_tabs.values()))
    wait_until(is_cancelled.is_set)
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
    answer_text = visitor.page.locator("#chat [data-testid=bot] .md")
    assert answer_text.locator("strong").count() == 1 and answer_text.locator("li").count() == 2
    assert answer_text.locator("script, [onerror], a[href^=javascript]").count() == 0
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
    monkeypatch.setattr(served.uploads, "_grace_seconds", 60)
    visitor = visit()
    answer_text = visitor.ask("*What* is this?", WIDE)
    visitor.press("Like")
    visitor.page.get_by_label("Liked", exact=True).wait_for()
    visitor.attach(TALL)
    visitor.page.locator("#typed textarea").fill("draft")
    visitor.reload()
    visitor.has_thumbnails(1)
    assert visitor.answers.last.inner_text() == answer_text and visitor.questions.last.inner_text() == "*What* is this?"
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
    visitor.page.get_by_text(i18n.TEXTS["en"]["interrupted"]).wait_for()
    pace.num_tokens = 4
    assert visitor.ask("Then say this.")
    served.uploads._paths.clear()
    visitor.reload()
    visitor.page.get_by_text(i18n.TEXTS["en"]["lost"]).wait_for()
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
    image = visitor.page.locator(".seen img")
    seen = pixels_of(image.get_attribute("src"))
    penguin = load_image(ROOT / "docs" / "images" / "penguin.png")
    assert seen == pad_and_resize(penguin, IMAGE_SIZE_PX).tobytes()


def test_images_come_by_drop_paste_and_camera(visit: Any) -> None:
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
    assert visitor.ask("")  # images without words get the obvious question
    assert visitor.questions.last.inner_text() == i18n.TEXTS["en"]["default_question"]


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
    assert page.locator("#typed textarea").get_attribute("placeholder") == i18n.TEXTS["zh"]["type_here"]
    examples = page.locator(".example")
    assert examples.all_inner_texts() == list(i18n.EXAMPLES["zh"].values())
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

    def chunk(chunk_type: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + chunk_type + content + struct.pack(">I", zlib.crc32(chunk_type + content))
        )

    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_bad_image_is_refused_in_the_chat(visit: Any, tmp_path: Path, yi_vl: YiVL) -> None:
    broken, huge = tmp_path / "broken.png", tmp_path / "huge.png"
    broken.write_bytes(WIDE.read_bytes()[:100])
    huge.write_bytes(huge_png())
    visitor = visit()
    answer_text = visitor.ask("What is this?", broken)
    assert "⚠️ broken.png cannot be shown to the model" in answer_text and "Try another" in answer_text
    assert "/" not in answer_text
    assert "12000 x 12000 pixels" in visitor.ask("And this?", huge)
    assert visitor.ask("Then this?", WIDE)
    messages = messages_of(json.loads(visitor.save("JSON")))
    assert len(messages) == 2 and messages[1]["content"] == yi_vl.answer(messages[:1])
    notes, large = tmp_path / "*my* <b>notes _1_.txt", tmp_path / "large.png"
    notes.write_text("no image")
    large.write_bytes(bytes((1 << 20) + 1))
    count = visitor.answers.count()
    visitor.choose(notes, WIDE, large)
    visitor.has_thumbnails(1)  # what can be sent is
    wait_for_count(visitor.answers, count + 1)
    answer_text = visitor.answers.last.inner_text()
    assert (
        "*my* <b>notes _1_.txt: this is not an image" in answer_text
        and "large.png: an image may take 1 MB at most" in answer_text
    )
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
    for visitor, image in ((anna, WIDE), (bert, TALL)):
        (question, _) = messages_of(json.loads(visitor.save("JSON")))
        assert question["content"][0]["image"] == image.read_bytes()
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
    running = partial(app.running, yi_vl, "tiny", i18n.ANY_YI_VL, server_name="127.0.0.1", share=False)
    with running(auth=("anna", "secret")) as (url, _), httpx.Client(base_url=url) as client:
        assert client.get("config").status_code == 401
        client.get("/")
        assert client.post("login", data={"username": "anna", "password": "wrong"}).status_code == 400
        assert client.post("login", data={"username": "anna", "password": "secret"}).status_code == 200
        assert client.get("config").status_code == 200


def test_nano_answers_out_of_the_box(browser: Any, tmp_path: Path) -> None:
    """Also retakes the README's image, into the file that YI_VL_DEMO_IMAGE names."""
    images = ROOT / "docs" / "images"
    running = partial(app.running, load(), "nano", i18n.NANO, card=find_card(None), share=False)
    with running(server_name="127.0.0.1") as (url, _):
        context = browser.new_context(viewport={"width": 900, "height": 1230})
        context.set_default_timeout(PATIENCE_MS)
        visitor = Visitor(context.new_page(), url)
        for question, name in (("What is in this picture?", "penguin.png"), ("这是哪里的旗帜？", "brazil.png")):
            assert "⚠️" not in visitor.ask(question, images / name)  # what nano knows is test_nano.py's business
        visitor.press("Like")
        visitor.page.get_by_label("Liked", exact=True).wait_for()
        visitor.page.mouse.move(0, 0)
        visitor.page.locator("#chat .bubble-wrap").evaluate("(chat) => chat.scrollTo(0, chat.scrollHeight)")
        visitor.page.screenshot(path=os.environ.get("YI_VL_DEMO_IMAGE", tmp_path / "demo.png"), animations="disabled")
        with context.expect_page() as opened:
            visitor.page.get_by_role("link", name="Model card").click()
        opened.value.get_by_role("heading", name="nano: the smallest Yi-VL", level=1).wait_for()
        context.close()
