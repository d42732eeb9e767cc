"""The demo's page in a real browser: its fixtures, and what a user does and sees."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_pace import PATIENCE_MS, Pace

from demo import app, i18n
from demo.uploads import Uploads
from yi_vl.predict import YiVL


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
