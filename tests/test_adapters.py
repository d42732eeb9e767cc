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


_ATTENTION = ["q_proj", "v_proj"]
MERGED: dict[str, dict[str, Any]] = {
    "rank_pattern": {
        "target_modules": [*_ATTENTION, "down_proj"],
        "rank_pattern": {"down_proj": 2, r"0\.self_attn": 8},
    },
    "patterns": {
        "target_modules": _LINEARS,
        "use_rslora": True,
        "rank_pattern": {
            r"language_model\.layers\.0\..*": 2,
            "v_proj": 6,
            "^model.language_model.layers.1.mlp.up_proj": 3,
        },
        "alpha_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 32},
    },
    "rslora": {"target_modules": _ATTENTION, "use_rslora": True, "lora_alpha": 5, "lora_dropout": 0.3},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 3}},
    "saved embeddings": {"target_modules": _ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "everything": {"target_modules": "all-linear", "exclude_modules": r".*vision_tower.*"},
    "tower and projector": {"target_modules": ["c_fc", "c_proj", "linear_1", "linear_2"], "lora_bias": True},
    "biases": {"target_modules": ["linear_1", "q_proj"], "bias": "all"},
    "biases of the adapted": {"target_modules": ["linear_1"], "bias": "lora_only"},
    "some layers": {"target_modules": _ATTENTION, "layers_to_transform": [1], "layers_pattern": "layers"},
    "gaussian": {"target_modules": _ATTENTION, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": _ATTENTION, "init_lora_weights": "orthogonal"},
    "fan_in_fan_out": {"target_modules": _ATTENTION, "fan_in_fan_out": True},
}


def _trained(base: Path, folder: Path, **options: Any) -> None:
    """Adapters whose every weight has moved, saved as PEFT saves them."""
    torch.manual_seed(0)
    model = get_peft_model(
        yi_vl.load(base, dtype=torch.float32, device="cpu").model, LoraConfig(**({"r": 4, "lora_alpha": 6} | options))
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)


def _merged_and_pefts(base: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    peft = PeftModel.from_pretrained(yi_vl.load(base, dtype=torch.float32, device="cpu").model, folder)
    return logits(yi_vl.load(folder, dtype=torch.float32, device="cpu").model), logits(peft.eval())


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out|.*save_embedding_layers|.*bias=|.*set to:UserWarning")
@pytest.mark.parametrize("name", MERGED)
@pytest.mark.filterwarnings("ignore:::peft")  # what it says of our odd options
def test_merged_they_are_what_peft_makes_of_them(base: Path, tmp_path: Path, name: str) -> None:
    _trained(base, tmp_path / "adapters", **MERGED[name])
    merged, expected = _merged_and_pefts(base, tmp_path / "adapters")
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    plain = logits(yi_vl.load(base, dtype=torch.float32, device="cpu").model)
    assert (merged - plain).abs().max() > 1e-2


REFUSED: dict[str, dict[str, Any]] = {
    "init_lora_weights is 'pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights is 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights is 'olora'": {"init_lora_weights": "olora"},
    "use_dora is True": {"use_dora": True},
    "target_parameters is": {"target_parameters": ["attn.in_proj_weight"]},
    "trainable_token_indices is": {"trainable_token_indices": [5, 6]},
    "alora_invocation_tokens is": {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    "conv1": {"target_modules": ["conv1"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("message", REFUSED)
def test_options_of_peft_that_are_not_merged_are_refused(base: Path, tmp_path: Path, message: str) -> None:
    _trained(base, tmp_path / "adapters", **({"target_modules": _ATTENTION} | REFUSED[message]))
    with pytest.raises(ValueError, match=message) as raised:
        yi_vl.load(tmp_path / "adapters", device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:::peft")
def test_pissa_is_merged_when_peft_made_it_plain(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        yi_vl.load(base, dtype=torch.float32, device="cpu").model,
        LoraConfig(r=4, target_modules=_ATTENTION, init_lora_weights="pissa"),
    )
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    learned = logits(model.eval())
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it before it saves them
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    merged = yi_vl.load(tmp_path / "plain", dtype=torch.float32, device="cpu").model
    torch.testing.assert_close(logits(merged), learned, rtol=1e-4, atol=1e-3)


def test_adapters_of_tied_embeddings_are_refused_and_others_of_the_same_model_merged(tmp_path: Path) -> None:
    tied = tiny_model()
    tied.config.tie_word_embeddings = tied.config.text_config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    tiny_processor().save_pretrained(tmp_path / "tied")
    for index, targets in enumerate((["lm_head"], ["embed_tokens"])):
        folder = tmp_path / str(index)
        with pytest.warns(UserWarning):
            _trained(tmp_path / "tied", folder, target_modules=targets)
        with pytest.raises(ValueError, match="which are one tensor there"):
            yi_vl.load(folder, device="cpu")
    _trained(tmp_path / "tied", tmp_path / "plain", target_modules=_ATTENTION)
    merged, expected = _merged_and_pefts(tmp_path / "tied", tmp_path / "plain")
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


def test_pickled_adapters_and_those_of_a_second_name_are_merged(base: Path, tmp_path: Path) -> None:
    _trained(base, tmp_path / "one", target_modules=_ATTENTION)
    model = yi_vl.load(base, dtype=torch.float32, device="cpu").model
    peft = PeftModel.from_pretrained(model, tmp_path / "one", adapter_name="second")
    peft.save_pretrained(tmp_path / "named", safe_serialization=False)
    merged, expected = _merged_and_pefts(base, tmp_path / "named" / "second")
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, logits(peft.eval()), rtol=1e-4, atol=1e-4)


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "nowhere/at/all"}, "nowhere/at/all"),
        ({"base_model_name_or_path": None}, "lacks base_model_name_or_path"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"rank_pattern": {"(": 8}}, "no regular expression"),
        ({"rank_pattern": [8]}, "rank_pattern is"),
        ({"r": 0}, "r is 0"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha is None"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"kasa_config": {"a": 1}}, "kasa_config"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"an_option_of_a_later_peft": 3}, "an_option_of_a_later_peft is 3"),
        ({"peft_type": "IA3"}, "no LoRA adapters"),
        ({"peft_type": "ADALORA"}, "'ADALORA'"),
    ],
)
def test_what_cannot_be_merged_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    _change(folder, **changes)
    with pytest.raises(ValueError, match=message):
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
