"""`eval speed server`, `ttft` and `lookup` over a tiny model: what they count, not how fast it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import OFFICIAL, tiny_yi_vl

from eval.speed import lookup, server
from yi_vl.predict import YiVL


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


@pytest.fixture(autouse=True)
def at_the_root(two_rounds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])


def test_concurrent_requests_are_compared_with_the_same_ones_one_by_one(yi_vl: YiVL) -> None:
    measured = server.compare_server(yi_vl, 4, 3)
    assert list(measured["variants"]) == ["one by one", "4 at once"] and measured["rounds"] == 2
    assert measured["ratio"] > 0 and all(row["tokens_per_second"] > 0 for row in measured["variants"].values())


def test_the_first_token_is_timed_idle_and_beside_long_requests(yi_vl: YiVL) -> None:
    measured = server.compare_first_token(yi_vl, 2, 100)
    assert list(measured["variants"]) == ["idle", "beside long answers", "beside long prompts"]
    assert measured["variants"]["idle"]["times_idle"] == 1
    assert yi_vl.engine.num_running == yi_vl.engine.num_waiting == 0  # the long requests were cancelled


def test_drafts_are_compared_with_plain_decoding(yi_vl: YiVL) -> None:
    before = yi_vl.engine.max_draft_tokens
    measured = lookup.compare_lookup(yi_vl, OFFICIAL / "wide.png", 12)
    plain, drafted = measured["variants"].values()
    assert measured["same_answers"] and plain["tokens_per_step"] == 1 <= drafted["tokens_per_step"]
    assert yi_vl.engine.max_draft_tokens == before
