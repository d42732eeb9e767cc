"""The demo: its pure functions, its command, and what it does with a tiny model."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from demo_pace import PATIENCE_MS, TALL, WIDE, Pace, pace, pixels_of, text, yi_vl
from PIL import Image
from test_image_hostile import FILES

from demo import chat, i18n
from demo.__main__ import main
from demo.card import find_card
from yi_vl.image import load_image
from yi_vl.predict import YiVL

pytest.importorskip("gradio")

from demo.handlers import Handlers
from demo.uploads import Uploads

ROOT = Path(__file__).parents[1]

# Pure functions


def file(path: object) -> dict[str, Any]:
    return {"type": "file", "file": {"path": str(path)}, "alt_text": "image"}


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


def test_a_failed_turn_is_dropped_and_an_unanswered_question_joins_the_next() -> None:
    error = {**chat.error_message("⚠️ no"), "metadata": {"id": "error"}}
    history = [user(TALL), user("Broken"), error, user(WIDE, "One"), user("Two"), bot("Three")]
    messages = chat.to_messages(history, str)
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert [part.get("text") for part in messages[0]["content"]] == [None, "One", "\n", "Two"]
    assert chat.shown_image_paths(history) == [str(WIDE)]


def test_a_bad_image_is_named_without_its_folder() -> None:
    with pytest.raises(chat.BadImageError, match=r"^no\.png: there is no such file") as caught:
        chat.to_messages([user(Path("/some/where/no.png"), "What?")], load_image)
    assert caught.value.name == "no.png" and "where" not in str(caught.value)


def test_images_and_words_are_messages_of_their_own() -> None:
    images, words = chat.user_messages("What?", [str(WIDE), str(TALL)])
    assert [part["path"] for part in images["content"]] == [str(WIDE), str(TALL)]
    assert words == {"role": "user", "content": [text("What?")]} and chat.user_messages("What?") == [words]
    (message,) = chat.to_messages([user(WIDE), user("What?")], str)
    assert message["content"] == [{"type": "image", "image": str(WIDE)}, text("What?")]


def test_marks() -> None:
    history = [user("One"), bot("Two"), user("Three"), chat.error_message("⚠️")]
    liked = chat.with_feedback(history, 1, True)
    assert chat.feedback_values(liked) == ["Like", None] and chat.feedback_values(history) == [None, None]
    assert chat.feedback_values(chat.with_feedback(liked, 1, False)) == ["Dislike", None]
    assert chat.feedback_values(chat.with_feedback(liked, 1, "")) == [None, None]


def test_documents_hold_the_images() -> None:
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
    assert restored == [
        *chat.user_messages("# *a*", [str(WIDE)]),
        chat.assistant_message("b") | {"metadata": {"id": "Like"}},
    ]
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
    image = Image.open(WIDE).convert("RGB")
    page = chat.to_figures([("<b>.png", image)], "{name} {size}")
    assert "<b>" not in page and "&lt;b&gt;.png" in page
    assert pixels_of(re.search(r'src="([^"]+)"', page)[1]) == image.tobytes()


@pytest.mark.parametrize(
    ("header", "language"),
    [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-US,en;q=0.9,zh;q=0.8", "en"), ("fr,zh;q=0.3,en;q=0.7", "en"), ("", "en")],
)
def test_the_preferred_language(header: str, language: str) -> None:
    assert i18n.preferred(header) == language


def test_both_languages_have_the_same_texts() -> None:
    english, chinese = i18n.TEXTS["en"], i18n.TEXTS["zh"]
    assert english.keys() == chinese.keys()
    for key, words in english.items():
        assert set(re.findall(r"{\w+}", words)) == set(re.findall(r"{\w+}", chinese[key])), key


def test_pure_modules_need_no_gradio() -> None:
    check = "import sys, demo.chat, demo.i18n, demo.__main__; print('gradio' in sys.modules)"
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
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("demo: ") and reason in message and message.count("\n") == 1


# Over a model, without a browser


def handlers_of(yi_vl: YiVL, keep: Path | None = None) -> Handlers:
    uploads = Uploads()
    uploads.public = {str(WIDE)}
    return Handlers(yi_vl, "tiny", i18n.ANY_YI_VL, uploads, keep)


REQUEST = SimpleNamespace(cookies={}, headers={})
SETTINGS = ("0123", "en", 0.0, 1.0, 512)


def test_an_answer_streams_and_is_the_models_own(yi_vl: YiVL, pace: Pace) -> None:
    history = [user(WIDE, "What is this?")]
    *_, before, last = handlers_of(yi_vl).answer(history, *SETTINGS, REQUEST)
    answer_text = last[-1]["content"][0]["text"]
    assert last[:-1] == history and answer_text.startswith(before[-1]["content"][0]["text"])
    assert answer_text == yi_vl.predict(WIDE, "What is this?")


def test_closing_an_answer_stops_the_model(yi_vl: YiVL, pace: Pace) -> None:
    handlers = handlers_of(yi_vl)
    answer = handlers.answer([user("Hi")], *SETTINGS, REQUEST)
    next(answer)
    before = pace.num_steps
    answer.close()
    assert pace.num_steps == before
    assert list(handlers.answer([user("Hi")], *SETTINGS, REQUEST))  # the next in the queue is not kept waiting


def test_an_abandoned_answer_keeps_no_other_request_waiting(yi_vl: YiVL, pace: Pace) -> None:
    handlers = handlers_of(yi_vl)
    answer = handlers.answer([user("Hi")], *SETTINGS, REQUEST)
    next(answer)
    another = threading.Thread(target=lambda: list(handlers.answer([user("Hello")], *SETTINGS, REQUEST)), daemon=True)
    another.start()
    another.join(PATIENCE_MS / 1000)
    assert not another.is_alive() and pace.num_ended == 1
    answer.close()


@pytest.mark.parametrize(
    ("history", "language", "words"),
    [
        ([user(TALL, "What?")], "en", "tall.png.* cannot be shown.* never yours"),
        ([user(Path("/etc/passwd"), "What?")], "zh", "passwd.*无法给模型看.*不属于你"),
        ([user("word " * 4000)], "en", "input is too long: at least [0-9]+ tokens with 0 images"),
        ([user(*[WIDE] * 500, "What?")], "zh", "^[^a-zA-Z]*含 500 张图片[^a-zA-Z]*$"),
    ],
)
def test_errors_are_shown_in_the_chat(yi_vl: YiVL, history: list[Any], language: str, words: str) -> None:
    settings = (SETTINGS[0], language, *SETTINGS[2:])
    (shown,) = handlers_of(yi_vl).answer(history, *settings, REQUEST)
    assert re.search(words, shown[-1]["content"][0]["text"], re.DOTALL)
    assert chat.to_messages(shown, str) == []


@pytest.mark.parametrize("name", ["1 x 300,000", "icon", "GIF comments", "JPEG of 400 scans", "QOI"])
def test_a_hostile_image_is_refused_in_the_chat(yi_vl: YiVL, pace: Pace, name: str, tmp_path: Path) -> None:
    make, reason = FILES[name]
    path = tmp_path / "hostile.png"
    path.write_bytes(make())
    handlers = handlers_of(yi_vl)
    handlers.uploads.public.add(str(path))
    (shown,) = handlers.answer([user(path, "What?")], *SETTINGS, REQUEST)
    assert re.search(f"hostile.png.*({reason}|not an image of a format)", shown[-1]["content"][0]["text"], re.DOTALL)
    assert handlers.show_images([user(path, "What?")], "en", REQUEST) == i18n.TEXTS["en"]["seen_nothing"]


def test_too_many_images_are_refused_before_they_are_opened(yi_vl: YiVL, pace: Pace) -> None:
    handlers = handlers_of(yi_vl)
    handlers._prepare = lambda path: pytest.fail("an image was opened")
    (shown,) = handlers.answer([user(*[WIDE] * 500, "What?")], *SETTINGS, REQUEST)
    assert "with 500 images" in shown[-1]["content"][0]["text"]


def test_only_what_a_visitor_may_read_is_restored(yi_vl: YiVL) -> None:
    def restore(path: Path) -> list[str]:
        saved = json.dumps({"history": [user(path), user("Hi"), bot("Yes")], "typed": None, "isAnswering": False})
        history, _ = handlers_of(yi_vl).restore(saved, "zh", REQUEST)
        return [part.get("text") or part["path"] for message in history["value"] for part in message["content"]]

    assert restore(WIDE) == [str(WIDE), "Hi", "Yes"]
    assert restore(TALL) == [i18n.TEXTS["zh"]["lost"]]


def test_an_internal_error_is_logged_and_not_shown(
    yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(yi_vl.engine, "prepare", lambda _: {}["secret"])
    (shown,) = handlers_of(yi_vl).answer([user("Hi")], *SETTINGS, REQUEST)
    assert shown[-1]["content"][0]["text"] == i18n.TEXTS["en"]["failed"] and "secret" in caplog.text


def test_conversations_are_kept_on_request_only(yi_vl: YiVL, pace: Pace, tmp_path: Path) -> None:
    *_, history = handlers_of(yi_vl, tmp_path).answer([user(WIDE, "What?")], *SETTINGS, REQUEST)
    handlers = handlers_of(yi_vl, tmp_path)
    history = [history[0], bot(history[1]["content"][0]["text"])]
    handlers.like(history, "0123", SimpleNamespace(index=1, liked=True), REQUEST)
    kept = json.loads((tmp_path / "0123.json").read_text(encoding="utf-8"))
    assert [message.get("feedback") for message in kept["messages"]] == [None, "Like"]
    assert i18n.TEXTS["en"]["kept"] in handlers.introduce("en")
    assert i18n.TEXTS["en"]["kept"] not in handlers_of(yi_vl).introduce("en")
