"""`yi-vl chat`: its images and texts, errors, Ctrl-C, and the paths that are typed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import TALL, WIDE, Run, folder, run, yi_vl  # noqa: F401  # fixtures
from tiny import grow_cache

from yi_vl import cli
from yi_vl.predict import YiVL
from yi_vl.terminal import split_paths


def test_chat_keeps_its_images_and_texts(run: Run, folder: str, yi_vl: YiVL) -> None:  # noqa: F811
    typed = iter(
        ["What is this?", f"/image {TALL}", "", "And this?", "/clear", "What is this?", "/help", "/exit", "never"]
    )
    code, out, err = run("chat", WIDE, "-m", folder, "--max-new-tokens", "6", typed=typed)
    chat = yi_vl.chat()
    first, second = chat.ask("What is this?", WIDE, max_new_tokens=6), chat.ask("And this?", TALL, max_new_tokens=6)
    afresh = yi_vl.predict(None, "What is this?", max_new_tokens=6)
    assert (code, err) == (0, "")
    assert out == "\n".join([cli._CHAT_HELP, first, second, afresh, cli._CHAT_HELP, ""])
    assert next(typed) == "never"


def test_chat_goes_on_after_errors(run: Run, folder: str, yi_vl: YiVL) -> None:  # noqa: F811
    typed = iter(["/image missing.png", f"/image {WIDE}", "a dog " * 600, "What is this?"])
    code, out, err = run("chat", "-m", folder, "--max-new-tokens", "6", typed=typed)
    first_line, second_line = err.splitlines()
    assert code == 0
    assert "missing.png: there is no such file" in first_line and "Give fewer images" in second_line
    assert yi_vl.predict(WIDE, "What is this?", max_new_tokens=6) in out  # the image waited for a question that fits


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(run: Run, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (dog,) = yi_vl.processor.tokenizer(" dog", add_special_tokens=False)["input_ids"]
    steps = 0

    def forward(**inputs: Any) -> SimpleNamespace:
        grow_cache(**inputs)
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return SimpleNamespace(logits=torch.eye(960)[None, None, dog if steps < 5 else 2])

    monkeypatch.setattr(yi_vl.model, "forward", forward)
    monkeypatch.setattr(cli, "load_quickly", lambda *_: yi_vl)
    code, out, _ = run("chat", typed=iter([KeyboardInterrupt(), "Hi", "And?"]))  # type: ignore[list-item]
    assert code == 0
    assert out.splitlines() == [cli._CHAT_HELP, "", "Ctrl-D or /exit leaves.", "dog dog [stopped]", "dog", ""]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("my holiday.jpg", ["my holiday.jpg"]),
        ('"my holiday.jpg"', ["my holiday.jpg"]),
        ("'my holiday.jpg' b.png", ["my holiday.jpg", "b.png"]),
        (r"my\ holiday.jpg b.png", ["my holiday.jpg", "b.png"]),
        ("it's.png", ["it's.png"]),
        ("~/c.png", ["~/c.png"]),
        ("", [""]),
    ],
)
def test_paths_after_image_are_read_as_a_shell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my holiday.jpg").touch()
    assert split_paths(argument) == expected


def test_chat_shows_several_images_at_once_or_none(
    run: Run, folder: str, yi_vl: YiVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my wide.png").write_bytes(Path(WIDE).read_bytes())
    typed = iter([f'/image "~/my wide.png" {TALL}', f"/image {TALL} missing.png", "Compare."])
    code, out, err = run("chat", "-m", folder, "--max-new-tokens", "6", typed=typed)
    assert code == 0 and "missing.png: there is no such file" in err
    assert yi_vl.predict([WIDE, TALL], "Compare.", max_new_tokens=6) in out
