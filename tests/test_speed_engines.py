"""`python -m eval speed engines`: all variants get the same work; what cannot be measured is named, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_yi_vl

from eval.speed import engines
from eval.speed.engines import NotMeasuredError, Question, Variant, compare_engines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)  # neither vLLM nor llama.cpp
    tiny_yi_vl().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_what_is_not_installed_is_named(folder: Path) -> None:
    measured = compare_engines(folder, num_questions=2, new_tokens=3, num_rounds=1, with_images=True)
    names = ["transformers, generate", *(f"yi_vl, batch size {size}" for size in (1, 8, 32))]
    assert list(measured["variants"]) == names
    assert all(row["tokens_per_second"] > 0 < row["first_token_ms"] for row in measured["variants"].values())
    assert "vLLM: not installed" in measured["not_measured"] and "llama.cpp: not installed" in measured["not_measured"]
    assert "continuous batching: it takes no images" in measured["not_measured"]


def test_all_variants_get_the_same_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[tuple[list[Question], int]]] = {"a": [], "b": []}

    def make(name: str) -> Variant:
        def answer(questions: list[Question], new_tokens: int) -> list[str]:
            seen[name].append((list(questions), new_tokens))
            return [f"{name if index else 'same'}" for index, _ in enumerate(questions)]

        return Variant(answer, 2)  # type: ignore[arg-type]

    def refuse(*_: object) -> list[str]:
        raise NotMeasuredError("no reason")

    variants = {"a": make("a"), "b": make("b"), "c": Variant(refuse)}
    monkeypatch.setattr(engines, "_make_variants", lambda *_: (variants, {}))
    measured = compare_engines(folder, num_questions=3, new_tokens=5, num_rounds=2, with_images=False)
    warm_up = 2  # calls
    assert seen["a"][warm_up:] == seen["b"][warm_up:]
    work = [(len(questions), new_tokens) for questions, new_tokens in seen["a"]]
    assert work == [(2, 5), (1, 1), (3, 5), (1, 1), (3, 5), (1, 1)]
    texts = [question.text for name in seen for questions, _ in seen[name][:warm_up] for question in questions]
    texts += [question.text for questions, _ in seen["a"][warm_up:] for question in questions]
    assert len(set(texts)) == len(texts), "no question comes twice"
    assert measured["variants"]["b"]["answers_like_the_first"] == 1 and measured["not_measured"] == "c: no reason"


def test_images_differ() -> None:
    images = {engines._question(number, with_image=True).image for number in range(40)}
    assert len(images) == 40
