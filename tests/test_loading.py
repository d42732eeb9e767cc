"""From a folder to a model, or one line that says why not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import OFFICIAL, tiny_yi_vl

import yi_vl
from yi_vl.checkpoint import find as finding
from yi_vl.checkpoint import load as loading

pytestmark = pytest.mark.core

QUESTION = (OFFICIAL / "wide.png", "What is this?")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as the trainer leaves it, in bfloat16."""
    made = tiny_yi_vl()
    made.model.to(torch.bfloat16).save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(path: object, *parts: str) -> None:
    """`load` must refuse in one line that holds all the parts."""
    with pytest.raises(ValueError) as caught:
        yi_vl.load(path)  # type: ignore[arg-type]
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_a_small_model_answers_in_fp32_on_a_cpu(folder: Path) -> None:
    made = tiny_yi_vl()
    made.model.to(torch.bfloat16).to(torch.float32)
    loaded = yi_vl.load(folder, device="cpu")
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.predict(*QUESTION, max_new_tokens=12) == made.predict(*QUESTION, max_new_tokens=12)
    assert yi_vl.load(str(folder), device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_large_model_stays_bf16(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_SMALL_PARAMETERS", 1)
    assert yi_vl.load(folder, device="cpu").model.dtype == torch.bfloat16


def test_loading_is_silent_about_a_complete_model(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging

    logging.set_verbosity_warning()  # a test of the command line may have silenced it
    logging.enable_propagation()
    yi_vl.load(folder, device="cpu")
    logging.disable_propagation()
    assert not caplog.messages


def test_missing_unexpected_and_misshapen_tensors_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.surplus"] = torch.zeros(1)
    del weights["model.multi_modal_projector.norm_1.bias"]
    weights["lm_head.weight"] = torch.zeros(4, 4)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refuse(
        folder,
        "1 tensor missing: model.multi_modal_projector.norm_1.bias (32,)",
        "1 tensor unexpected: model.surplus (1,)",
        "1 tensor of another shape: lm_head.weight is (4, 4), expected (960, 32)",
    )


def test_damaged_folders_are_refused(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    refuse(folder, str(folder), "damaged or cut short", "1,000 bytes")
    (folder / "model.safetensors").unlink()
    refuse(folder, str(folder), "has no weights")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").unlink()
    refuse(folder, str(folder), "tokenizer")
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json cannot be read")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "of type 'llama'"),
        ({"model_type": None}, "of type None"),
    ],
)
def test_layouts_are_recognized_by_content(folder: Path, changes: dict[str, object], message: str) -> None:
    edit(folder / "config.json", **changes)
    refuse(folder, message, "Give a Yi-VL")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, f"{tmp_path}/config.json cannot be read", "No such file")
    refuse(tmp_path / "missing", "there is no such folder")
    refuse("./missing", "there is no such folder")
    refuse(OFFICIAL / "wide.png", "is a file")
    (tmp_path / "config.json").write_text("[]")
    refuse(tmp_path, "holds no configuration")


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(loading, "snapshot_download", unreachable)
    refuse("01-ai/Yi-VL-6B", "01-ai/Yi-VL-6B is not a local folder", "couldn't connect")


def test_a_missing_nano_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(finding, "_BUNDLED", tmp_path / "nano")
    refuse(None, "bundled nano model is not in this installation", str(tmp_path))


def test_the_bundled_model_is_the_default(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(finding, "_BUNDLED", folder)
    assert yi_vl.load(device="cpu").predict(None, "Hi", max_new_tokens=2)
    assert re.search(str(folder), finding.find(None))
