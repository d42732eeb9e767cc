"""`ms://owner/name`: the real client, and a loopback server that answers as ModelScope does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hubs import CHECKPOINT, MODEL, Hub, announced, content_of, serving_hub
from typer.testing import CliRunner

import yi_vl
from yi_vl.checkpoint.load import fetch, find, load_processor, read_config
from yi_vl.cli import app

SOURCE = f"ms://{MODEL}"
FETCHING = f"Fetching {SOURCE} from ModelScope ..."
QUICK = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0", "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}  # seconds per retry


@pytest.mark.parametrize(
    "name", ["ms://", "ms://01ai", "ms://01ai/", "ms:///a", "ms://a/b/c", "ms://../a", "ms://a/..", "ms://a/b?c=d"]
)
def test_another_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="ms://owner/name"):
        find(name)


def test_without_modelscope_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yi_vl.checkpoint.modelscope.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install modelscope"):
        yi_vl.load("ms://01ai/Yi-VL-6B")
    result = CliRunner().invoke(app, ["info", "ms://01ai/Yi-VL-6B"])
    assert isinstance(result.exception, ValueError) and "pip install modelscope" in str(result.exception)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], int]]:
    """Puts a module with this code in the package's place."""
    monkeypatch.syspath_prepend(tmp_path)
    package = sys.modules.pop("modelscope", None)
    yield lambda code: (tmp_path / "modelscope.py").write_text(code)
    sys.modules.pop("modelscope", None)
    if package is not None:
        sys.modules["modelscope"] = package


def test_the_package_is_asked_for_the_files_of_a_yi_vl(stand_in: Callable[[str], int]) -> None:
    """Also where the package is not installed."""
    stand_in(
        f"""
requested = []

def snapshot_download(model_id, allow_patterns=(), local_files_only=False):
    requested.append((model_id, allow_patterns))
    return {str(CHECKPOINT)!r}
"""
    )
    assert read_config(SOURCE).model_type == "yi_vl"
    model = yi_vl.load(SOURCE, device="cpu", dtype=torch.float32)
    assert model.predict(None, "Hi", max_new_tokens=1) is not None
    configuration, everything = (set(patterns) for name, patterns in sys.modules["modelscope"].requested if patterns)
    assert everything - configuration == {"*.safetensors", "pytorch_model*.bin", "vit/*/pytorch_model*.bin"}
    assert {"*.json", "*.model", "vit/*/*.json"} <= configuration
    assert {name for name, _ in sys.modules["modelscope"].requested} == {MODEL}


def test_a_modelscope_that_cannot_be_imported_is_one_line(stand_in: Callable[[str], int]) -> None:
    stand_in("raise RuntimeError('no such name in transformers\\nmore')")
    with pytest.raises(ValueError, match=r"ms://a/b .*cannot be imported: no such name in transformers\. Update"):
        fetch("ms://a/b", with_weights=False)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The real package, which reads its settings when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
        patch.setenv("MODELSCOPE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("MODELSCOPE_API_TOKEN", "")
        for name, value in QUICK.items():
            patch.setenv(name, value)
        pytest.importorskip("modelscope_hub", reason="modelscope is not installed")
        pytest.importorskip("modelscope", reason="modelscope is not installed")
        yield


@pytest.fixture
def hub(client: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from modelscope_hub.config import set_default_config

    with serving_hub() as server:
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        point_to(monkeypatch, server.url)
        yield server
    set_default_config(None)


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    from modelscope_hub.config import set_default_config

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
    set_default_config(None)  # it is read once


def refused(source: str) -> str:
    with pytest.raises(ValueError, match=f"{source} could not be fetched from ModelScope") as caught:
        fetch(source, with_weights=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_is_fetched_once_and_announced(
    hub: Hub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    assert read_config(SOURCE).model_type == "yi_vl"
    assert load_processor(SOURCE).tokens_per_image == 16
    assert "config.json" in hub.fetched and not any("pytorch_model-" in path for path in hub.fetched)
    assert announced(caplog) == [FETCHING]
    hub.fetched.clear()
    caplog.clear()

    model = yi_vl.load(SOURCE, device="cpu", dtype=torch.float32)
    local = yi_vl.load(CHECKPOINT, device="cpu", dtype=torch.float32)
    assert torch.equal(model.model.lm_head.weight, local.model.lm_head.weight)
    assert "images/example.png" not in hub.fetched and len(set(hub.fetched)) == len(hub.fetched) == 5
    assert announced(caplog) == [FETCHING]
    hub.fetched.clear()
    caplog.clear()
    assert content_of(fetch(SOURCE, with_weights=True)) == content_of(CHECKPOINT)
    assert not hub.fetched and not announced(caplog)
    assert capfd.readouterr().out == ""


def test_without_modelscope_the_cache_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = fetch(SOURCE, with_weights=True)
    caplog.clear()
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert fetch(SOURCE, with_weights=True) == folder
    assert len(announced(caplog)) == 1 and "as it is in the cache" in announced(caplog)[0]


def test_a_server_that_is_down_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert refused(SOURCE).endswith("from ModelScope: Connection refused; check the connection.")


def test_an_unknown_id_is_one_line(hub: Hub) -> None:
    assert "there is no model of this name" in refused("ms://01ai/Other")


def test_an_interrupted_download_is_one_line_and_is_resumed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("modelscope_hub"), "handlers", [caplog.handler])
    hub.broken = {"pytorch_model-00002-of-00004.bin"}
    message = refused(SOURCE)
    assert "pytorch_model-00002-of-00004.bin failed" in message and message.isascii()
    assert announced(caplog) == [FETCHING]
    hub.broken = set()
    hub.fetched.clear()
    assert content_of(fetch(SOURCE, with_weights=True)) == content_of(CHECKPOINT)
    assert hub.fetched == ["pytorch_model-00002-of-00004.bin"]


def test_the_command_line_shows_a_model(hub: Hub) -> None:
    result = CliRunner().invoke(app, ["info", SOURCE])
    assert result.exit_code == 0 and result.stdout.lstrip().startswith(SOURCE)


def test_the_command_line_says_little_and_on_stderr(hub: Hub) -> None:
    """In a process of its own, for the package logs and prints when it is imported."""
    environment = os.environ | QUICK | {"MODELSCOPE_ENDPOINT": hub.url}
    command = [sys.executable, "-m", "yi_vl", "info", "ms://01ai/Other"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    announcement, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout, announcement) == (2, "", "Fetching ms://01ai/Other from ModelScope ...")
    assert error.startswith("yi-vl: ms://01ai/Other could not be fetched from ModelScope: there is no model")
