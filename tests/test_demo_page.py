"""The demo's page, driven in a real browser over a tiny model."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from demo_browser import (
    Served,
    Visitor,
    browser,
    messages_of,
    served,
    shared_context,
    visit,
    wait_for_count,
    wait_until_in_browser,
)
from demo_pace import PATIENCE_MS, TALL, WIDE, Pace, pace, pixels_of, text, wait_until, yi_vl
from gradio.queueing import Queue
from tiny import IMAGE_SIZE_PX

from demo import app, i18n
from demo.card import find_card
from yi_vl.image import load_image, pad_and_resize
from yi_vl.predict import YiVL, load

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


def test_a_conversation(visit: Any, yi_vl: YiVL, pace: Pace) -> None:
    """Upload, ask, go on in Chinese with a second image, like, save: every answer is the model's own."""
    visitor = visit()
    assert visitor.ask("What is in this image?", WIDE)
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
    dog = load_image(ROOT / "docs" / "images" / "dog.png")
    assert seen == pad_and_resize(dog, IMAGE_SIZE_PX).tobytes()


def test_nano_answers_out_of_the_box(browser: Any, tmp_path: Path) -> None:
    """Also retakes the README's image, into the file that YI_VL_DEMO_IMAGE names."""
    images = ROOT / "docs" / "images"
    running = partial(app.running, load(), "nano", i18n.NANO, card=find_card(None), share=False)
    with running(server_name="127.0.0.1") as (url, _):
        context = browser.new_context(viewport={"width": 900, "height": 1230})
        context.set_default_timeout(PATIENCE_MS)
        visitor = Visitor(context.new_page(), url)
        for question, name in (("What word is written here?", "word.png"), ("图片里是什么？", "dog.png")):
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
