"""The demo's page for every user: languages, phones, image sources, several users, refused uploads, a password."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from demo_browser import Served, browser, messages_of, served, shared_context, visit, wait_for_count
from demo_pace import TALL, WIDE, Pace, pace, wait_until, yi_vl

from demo import app, i18n
from yi_vl.predict import YiVL

pytestmark = pytest.mark.slow


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
        .replace(/\w+[.](?:png|jpg)|Yi-VL|Top-p|JSON|Markdown|Language|^模型：.*/g, "")))"""


def test_everything_is_in_the_language_of_the_browser_or_of_the_switch(visit: Any, served: Served) -> None:
    visitor = visit(locale="zh-CN", permissions=["camera"])
    page = visitor.page
    page.get_by_text("给我看一张图片").wait_for()
    assert page.get_by_text("它会犯错").count() == 1 and page.locator("h1").count() == 1
    assert page.locator("html").get_attribute("lang") == "zh"
    assert page.locator("#typed textarea").get_attribute("placeholder") == i18n.TEXTS["zh"]["type_here"]
    examples = page.locator(".example")
    assert examples.all_inner_texts() == list(i18n.EXAMPLES["zh"])
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
    page.get_by_label("Select example 1: What is in this image?").wait_for()
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


def test_two_visitors_are_answered_together_and_see_their_own_only(
    yi_vl: YiVL, visit: Any, served: Served, pace: Pace, tmp_path: Path
) -> None:
    anna, bert = visit(), visit()
    pace.hold(after=2)
    anna.attach(WIDE)
    anna.send("What is this?")
    pace.wait_for(2)
    bert.attach(TALL)
    bert.send("这是什么？")
    wait_until(lambda: yi_vl.engine.num_running + yi_vl.engine.num_waiting == 2)
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
    assert list(served.folder.rglob("tall.png")) and list(served.folder.rglob("dog.png"))


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
