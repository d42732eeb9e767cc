"""`ms://owner/name`, with a package in modelscope's place that has one model and no network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import OFFICIAL
from typer.testing import CliRunner

import yi_vl
from yi_vl.checkpoint.load import find, load_processor, read_config
from yi_vl.cli import app

FAKE = """
import json, shutil
from pathlib import Path

here = Path(__file__).parent

def snapshot_download(model_id, allow_patterns):
    (here / "asked.json").write_text(json.dumps([model_id, allow_patterns]))
    if model_id != "01ai/Yi-VL-Tiny":
        raise RuntimeError(f"model {model_id} not found\\nRequest id: 1")
    return SOURCE
"""


@pytest.fixture
def request_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to which the stand-in writes each request."""
    folder = tmp_path / "packages" / "modelscope"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(FAKE.replace("SOURCE", repr(str(OFFICIAL / "checkpoint"))))
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    return folder / "asked.json"


def test_a_model_is_loaded_from_modelscope(request_file: Path) -> None:
    model = yi_vl.load("ms://01ai/Yi-VL-Tiny", device="cpu", dtype=torch.float32)
    model_id, patterns = json.loads(request_file.read_text())
    assert model_id == "01ai/Yi-VL-Tiny" and "*.safetensors" in patterns and "pytorch_model*.bin" in patterns
    local = yi_vl.load(OFFICIAL / "checkpoint", device="cpu", dtype=torch.float32)
    assert torch.equal(model.model.lm_head.weight, local.model.lm_head.weight)


def test_without_weights_none_are_fetched(request_file: Path) -> None:
    assert read_config("ms://01ai/Yi-VL-Tiny").model_type == "yi_vl"
    assert load_processor("ms://01ai/Yi-VL-Tiny").patches_per_image == 16
    assert "*.safetensors" not in json.loads(request_file.read_text())[1]


@pytest.mark.parametrize("name", ["ms://", "ms://01ai", "ms://01ai/", "ms:///a", "ms://a/b/c"])
def test_another_form_is_refused(request_file: Path, name: str) -> None:
    with pytest.raises(ValueError, match="ms://owner/name"):
        find(name)
    assert not request_file.exists()


def test_what_cannot_be_had_is_one_line(request_file: Path) -> None:
    with pytest.raises(ValueError, match=r"ms://01ai/Other cannot be had from ModelScope: .*not found") as caught:
        yi_vl.load("ms://01ai/Other")
    assert "\n" not in str(caught.value)


def test_without_modelscope_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yi_vl.checkpoint.modelscope.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install modelscope"):
        yi_vl.load("ms://01ai/Yi-VL-6B")
    result = CliRunner().invoke(app, ["info", "ms://01ai/Yi-VL-6B"])
    assert isinstance(result.exception, ValueError) and "pip install modelscope" in str(result.exception)
