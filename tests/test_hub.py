"""A model by its id on the Hugging Face hub: what is fetched and said, and how long a silent hub is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hubs import CHECKPOINT, MODEL, Hub, announced, content_of, serving_hub
from huggingface_hub import constants

import yi_vl
from yi_vl.checkpoint.load import fetch, load_processor

FETCHING = f"Fetching {MODEL} from the Hugging Face hub ..."


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving_hub() as server:
        point_to(monkeypatch, server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def refused(source: str) -> str:
    with pytest.raises(ValueError, match=f"{source} is not a local folder") as caught:
        fetch(source, with_weights=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_fetched_once_and_announced(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    assert load_processor(MODEL).tokens_per_image == 16
    assert "config.json" in hub.fetched and not any("pytorch_model-" in path for path in hub.fetched)
    assert announced(caplog) == [FETCHING]
    hub.fetched.clear()
    caplog.clear()
    load_processor(MODEL)
    assert not hub.fetched and not announced(caplog)

    model = yi_vl.load(MODEL, device="cpu", dtype=torch.float32)
    local = yi_vl.load(CHECKPOINT, device="cpu", dtype=torch.float32)
    assert torch.equal(model.model.lm_head.weight, local.model.lm_head.weight)
    assert "images/example.png" not in hub.fetched and len(set(hub.fetched)) == len(hub.fetched) == 5
    assert announced(caplog) == [FETCHING]
    assert content_of(fetch(MODEL, with_weights=True)) == content_of(CHECKPOINT)


def test_without_the_hub_the_cache_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch(MODEL, with_weights=True)
    caplog.clear()
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert fetch(MODEL, with_weights=True) == folder and not announced(caplog)


def test_a_hub_that_is_not_there_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert "refused" in refused(MODEL)


def test_a_silent_hub_is_not_waited_for_without_a_limit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.is_silent = True
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    start = time.monotonic()
    assert "timed out" in refused(MODEL)
    assert time.monotonic() - start < 30


def test_an_unknown_id_is_one_line(hub: Hub) -> None:
    assert "there is no model of this name" in refused("01-ai/Other")


def test_an_interrupted_download_is_one_line_and_is_resumed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its attempts
    hub.broken = {"pytorch_model-00002-of-00004.bin"}
    refused(MODEL)
    hub.broken = set()
    assert content_of(fetch(MODEL, with_weights=True)) == content_of(CHECKPOINT)


def test_the_command_line_announces_on_stderr(tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "yi_vl", "convert", MODEL, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    announcement, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout, announcement) == (2, "", FETCHING)
    assert error.startswith(f"yi-vl: {MODEL} is not a local folder, and could not be fetched from the hub")
