"""LoRA adapters: what PEFT saves is loaded and converted merged, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_model, tiny_processor
from typer.testing import CliRunner

import yi_vl
from yi_vl.cli import app

pytestmark = pytest.mark.core

_LINEARS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\..*_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapted(base: Path) -> PeftModel:
    """A model whose adapters, and whose projector, are not what they were at first."""
    model = get_peft_model(
        yi_vl.load(base, dtype=torch.float32, device="cpu").model,
        LoraConfig(r=4, lora_alpha=6, target_modules=_LINEARS, modules_to_save=["multi_modal_projector"]),
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if "lora_B" in name else 0.01)
    return model.eval()


@pytest.fixture
def folder(adapted: PeftModel, tmp_path: Path) -> Path:
    adapted.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    config = model.config
    ids = torch.randint(3, 800, (1, 40))
    ids[:, 2 : 2 + config.vision_config.num_patches] = config.image_token_id
    size = config.vision_config.image_size
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.randn(1, 3, size, size)).logits


def test_adapters_are_loaded_merged(base: Path, adapted: PeftModel, folder: Path) -> None:
    merged = yi_vl.load(folder, dtype=torch.float32, device="cpu").model
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)
    plain = yi_vl.load(base, dtype=torch.float32, device="cpu").model
    assert (logits(merged) - logits(plain)).abs().max() > 1e-2
    tower = "model.vision_tower."
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]) or not name.startswith(tower)


@pytest.mark.parametrize("to", ["yi-vl", "llava-hf"])
def test_adapters_are_converted_merged(adapted: PeftModel, folder: Path, tmp_path: Path, to: str) -> None:
    assert CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "whole"), "--to", to]).exit_code == 0
    whole = yi_vl.load(tmp_path / "whole", dtype=torch.float32, device="cpu").model
    torch.testing.assert_close(logits(whole), logits(adapted), rtol=1e-4, atol=1e-5)


def test_info_names_what_they_adapt(base: Path, folder: Path) -> None:
    shown, whole = (
        CliRunner().invoke(app, ["info", str(path)], env={"COLUMNS": "300"}).stdout for path in (folder, base)
    )
    assert f"of {base}; merged into it" in shown and "adapters" not in whole.replace(str(base), "")
    assert shown.partition("parameters")[2] == whole.partition("parameters")[2] != ""


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": "nowhere/at/all"}, "nowhere/at/all"),
        ({"base_model_name_or_path": None}, "lacks base_model_name_or_path"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "no LoRA adapters"),
    ],
)
def test_what_cannot_be_merged_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    _change(folder, **changes)
    with pytest.raises(ValueError, match=said):
        yi_vl.load(folder)


def test_adapters_of_another_model_are_refused(folder: Path) -> None:
    _change(folder, base_model_name_or_path=str(Path(__file__).parent / "official_tiny/checkpoint"))
    with pytest.raises(ValueError, match="are not adapters of"):
        yi_vl.load(folder)
    _change(folder, base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="adapters themselves"):
        yi_vl.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapters"):
        yi_vl.load(folder)
