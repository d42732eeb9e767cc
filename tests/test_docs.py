"""README, docs/ and CONTRIBUTING.md: their commands, settings, paths and links exist; both languages have the same."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from train.config_file import load_config

ROOT = Path(__file__).parents[1]
ENGLISH = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_zh")),
]
PAGES = [*ENGLISH, *(path.with_name(f"{path.stem}_zh.md") for path in ENGLISH), ROOT / "CONTRIBUTING.md"]
APPS = {
    "yi-vl": "yi_vl.cli",
    "demo": "demo.__main__",
    "eval": "eval.__main__",
    "train.mixture": "train.mixture.__main__",
    "train.nano": "train.nano.__main__",
    "train.plan": "train.plan.__main__",
    "train.shards": "train.shards.__main__",
    "train.speed": "train.speed.__main__",
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r" <<(\w+)\n.*?\n\1$", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"`((?:yi_vl|train|eval|demo|tests|docs)/[\w/.-]*)`")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def chinese(page: Path) -> Path:
    return page.with_name(f"{page.stem}_zh.md")


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in _FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments, environment variables and what is piped into it."""
    for line in _HERE_DOCUMENT.sub("", text).replace("\\\n", " ").splitlines():
        line = line.split(" | ")[-1].split(" && ")[0]
        line = re.sub(r"^(\w+=\S+ +)+", "", line)
        if words := shlex.split(line.replace(".venv/bin/", ""), comments=True):
            yield words


def inline_commands(page: Path) -> Iterator[list[str]]:
    """Commands in a page's prose; `a | b | c` stands for one of several subcommands."""
    for code in re.findall(r"`((?:python -m|yi-vl|make) [^`]+)`", prose(page)):
        if "|" not in code:
            yield shlex.split(code)


def check_typer(app: str, words: list[str]) -> None:
    """Every subcommand and option of the words is one of the program's."""
    command: Any = typer.main.get_command(importlib.import_module(APPS[app]).app)
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-") or words[0] not in command.commands:
            assert not words or words[0] == "--help", f"{app} has no {words[0]!r}"
            return
        command, words = command.commands[words[0]], words[1:]
    if "--help" not in words:
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in options]
        assert not unknown, f"{app} has no {unknown}; its options are {sorted(options)}"


def check(words: list[str]) -> None:
    """
    Raises:
        AssertionError, ValueError: no such program, subcommand, option, make target or setting.
    """
    if words[0] == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in targets), targets
    elif words[0] == "yi-vl":
        check_typer("yi-vl", words[1:])
    elif "-m" in words:
        module, rest = (following := words[words.index("-m") + 1 :])[0], following[1:]
        if module in APPS:
            check_typer(module, rest)
        elif module == "train" and rest:
            load_config(ROOT / rest[0], rest[1:])
        elif module.split(".")[0] in ("train", "eval", "demo", "yi_vl"):
            assert importlib.util.find_spec(module), module
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), words


@each_page
def test_commands_exist(page: Path) -> None:
    listed = [words for block in blocks(page, "sh") for words in commands(block)]
    for words in [*listed, *inline_commands(page)]:
        try:
            check(words)
        except (AssertionError, ValueError, ImportError) as error:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {error}")


@each_page
def test_python_parses(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@each_page
def test_paths_exist(page: Path) -> None:
    for path in _PATH.findall(prose(page)):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page))


@each_page
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}; there are {anchors(target)}"


def outline(page: Path) -> dict[str, list]:
    """What the two languages of a page have in common."""
    words = [line for block in blocks(page, "sh") for line in commands(block)]
    other = page.name.replace("_zh", "")  # the other language
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose(page), re.MULTILINE)],
        "table rows": [line.count("|") for line in prose(page).splitlines() if line.startswith("|")],
        "commands": [  # questions and placeholders are translated
            [word for word in line if word.isascii() and " " not in word] for line in words
        ],
        "links": sorted({link.replace("_zh", "").split("#")[0] for link in links(page)} - {other}),
    }


@pytest.mark.parametrize("page", ENGLISH, ids=lambda path: path.name)
def test_both_languages_have_the_same(page: Path) -> None:
    english, translated = outline(page), outline(chinese(page))
    for part in english:
        assert english[part] == translated[part], part


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_readmes_are_short(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
    assert not [line for line in lines if len(line) > 120]


def test_a_wrong_command_is_found() -> None:
    for line in (
        "yi-vl asks x.png",
        "python -m eval mmmu --modell nano",
        "make tests",
        "python -m train train/configs/nano/chat-448.yaml optimizers.eps=1",
        "python -m train.shard x",
    ):
        with pytest.raises((AssertionError, ValueError, ImportError)):
            check(shlex.split(line))
