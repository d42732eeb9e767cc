"""`yi-vl convert --verify`: what it says of a good conversion, and that it finds a bad one, whatever the target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import OFFICIAL, tiny_model, tiny_processor

import yi_vl
from yi_vl.checkpoint import Layout, convert, open_checkpoint
from yi_vl.checkpoint import write as write_module
from yi_vl.checkpoint.verify import verify_layout, verify_logits
from yi_vl.cli import main

CHECKPOINT = str(OFFICIAL / "checkpoint")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A function (arguments of yi-vl) -> (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["yi-vl", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        out, err = capsys.readouterr()
        return int(raised.value.code or 0), out, err

    return call


@pytest.mark.parametrize("to", ["yi-vl", "official", "llava-hf"])
def test_a_conversion_is_compared_with_its_source(to: Layout, run: Run, tmp_path: Path) -> None:
    code, out, _ = run("convert", CHECKPOINT, str(tmp_path / "out"), "--to", to, "--verify")
    towers, written, figures = out.splitlines()
    assert code == 0 and "copies of the vision tower differ by 0 at most" in towers and "is written" in written
    assert figures.startswith("Verified: 72 tensors are the same to the bit; logits") and "by 0 at most" in figures


def test_a_source_with_one_tower_is_compared_too(run: Run, tmp_path: Path) -> None:
    """Here with a stem and trained rows behind the image token's, which no other layout keeps."""
    tiny_model(stem_widths=[8, 16]).save_pretrained(tmp_path / "stem")
    tiny_processor(patch_size=28).save_pretrained(tmp_path / "stem")
    code, out, _ = run("convert", str(tmp_path / "stem"), str(tmp_path / "out"), "--verify")
    assert code == 0 and "Verified" in out and "copies" not in out
    code, out, err = run("convert", str(tmp_path / "stem"), "--verify")
    assert (code, out) == (2, "") and "one copy of the vision tower" in err


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_model_is_compared_with_its_source(scheme: Any, run: Run, tmp_path: Path) -> None:
    code, out, _ = run("convert", CHECKPOINT, str(tmp_path / "out"), "--quantize", scheme, "--verify")
    assert code == 0 and "Verified: logits on a fixed prompt and image differ by" in out
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "language_model.layers" in name and "scale" in name]:
        tensors[name] = tensors[name] * 3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"differs from its source: logits .* {scheme} explains"):
        verify_logits(CHECKPOINT, tmp_path / "out", "vit", {scheme})


def test_one_other_value_is_found(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        tensors["model.language_model.norm.weight"].view(torch.int32)[5] += 1  # the last bit
        save_file(tensors, path, metadata)

    monkeypatch.setattr(write_module, "save_file", save)
    code, out, err = run("convert", CHECKPOINT, str(tmp_path / "out"), "--verify")
    assert code == 2 and "is written" in out and err.splitlines()[-1].startswith("yi-vl:")
    assert "model.language_model.norm.weight has other values" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("file", "edit", "pattern"),
    [
        ("config.json", lambda values: values["text_config"].update(rms_norm_eps=0.5), "differs .* logits"),
        ("config.json", lambda values: values["text_config"]["rope_parameters"].update(rope_theta=3.0), "logits"),
        ("tokenizer.json", lambda values: values["model"].update(merges=[]), "other token ids"),
    ],
    ids=["norm", "rope", "tokenizer"],
)
def test_what_is_beside_the_weights_is_compared_too(
    file: str, edit: Callable[[Any], None], pattern: str, tmp_path: Path
) -> None:
    source = open_checkpoint(Path(CHECKPOINT))
    convert(source, tmp_path / "out", "yi-vl")
    path = tmp_path / "out" / file
    values = json.loads(path.read_text(encoding="utf-8"))
    edit(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=pattern):
        verify_layout(source, CHECKPOINT, tmp_path / "out", "vit")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = open_checkpoint(Path(CHECKPOINT))
    convert(source, tmp_path / "out", "yi-vl")
    tensors = dict(source.tensors)
    tensors["lm_head.bias"] = tensors["model.language_model.norm.weight"]
    changed = type(source)(**{**vars(source), "tensors": tensors})
    with pytest.raises(ValueError, match=r"only one of them has lm_head\.bias"):
        verify_layout(changed, CHECKPOINT, tmp_path / "out", "vit")


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    """The official layout has one dtype for the language model and the projector."""
    yi = yi_vl.load(CHECKPOINT, device="cpu", dtype=torch.float32)
    yi.model.model.language_model.to(torch.bfloat16)
    yi.model.lm_head.to(torch.bfloat16)
    yi.save(tmp_path / "mixed")
    shutil.copy(OFFICIAL / "checkpoint" / "tokenizer.model", tmp_path / "mixed")
    source = open_checkpoint(tmp_path / "mixed")
    convert(source, tmp_path / "out", "official")
    figures = verify_layout(source, str(tmp_path / "mixed"), tmp_path / "out", "vit")
    assert figures.startswith("64 tensors are the same to the bit, 8 rounded to bfloat16; logits"), figures
