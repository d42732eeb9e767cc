"""Configurations: the presets have the released sizes, towers come by their open_clip name."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

import yi_vl
from yi_vl.checkpoint.summary import measure
from yi_vl.cli import _PRESETS
from yi_vl.config import PRESETS, OpenClipVisionConfig, YiVLConfig, preset

# Entries of a saved configuration that tell of its files, its weights or its tokenizer rather than of the model.
_ABOUT_FILES = ("architectures", "dtype", "transformers_version")


@pytest.mark.parametrize(
    ("name", "num_language", "num_projector", "num_tensors", "num_bf16_bytes"),
    [("6b", 6.061e9, 22.04e6, 818, 13.43e9), ("34b", 34.389e9, 60.60e6, 1070, 70.16e9)],
)
def test_presets_have_the_released_sizes(
    name: str, num_language: float, num_projector: float, num_tensors: int, num_bf16_bytes: float
) -> None:
    config = preset(name)
    sizes = measure(config)
    official = sizes.num_official_parameters
    assert official is not None
    assert official["language model"] == pytest.approx(num_language, abs=0.0005e9)
    assert official["projector"] == pytest.approx(num_projector, abs=0.005e6)
    assert official["vision tower"] == pytest.approx(631.75e6, abs=0.005e6)
    assert sizes.num_official_tensors == num_tensors
    assert 2 * sum(official.values()) == pytest.approx(num_bf16_bytes, abs=0.005e9)
    # ours has 64 more rows in the embedding and in the head: the image token's, and padding
    added = 2 * 64 * config.text_config.hidden_size
    assert sizes.num_parameters == official | {"language model": official["language model"] + added}


def test_memory_shrinks_with_the_language_models_linears() -> None:
    memory = measure(preset("6b")).memory_bytes
    num_weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 512 + 3 * 4096 * 11008) + 64064 * 4096
    num_rows = 32 * (2 * 4096 + 2 * 512 + 2 * 11008 + 4096) + 64064
    assert memory["fp32"] == 2 * memory["bf16"]
    rotary = 4 * 64  # bytes, which are no weights
    assert memory["bf16"] - memory["int8"] == num_weights - 2 * num_rows - rotary
    assert memory["bf16"] - memory["int4"] == (2 - 0.5 - 4 / 64) * num_weights - rotary


@pytest.mark.parametrize(
    ("name", "like", "num_layers", "num_language"),
    [("6b-1.5", "6b", 32, 6.061e9), ("9b-1.5", "6b", 48, 8.829e9), ("34b-1.5", "34b", 60, 34.389e9)],
)
def test_yi_1_5_differs_in_layers_and_norms_alone(name: str, like: str, num_layers: int, num_language: float) -> None:
    config, other = preset(name), preset(like)
    other.text_config.num_hidden_layers, other.text_config.rms_norm_eps = num_layers, 1e-6
    assert config.to_dict() == other.to_dict()
    assert config.text_config.rope_parameters["rope_theta"] == 5e6
    official = measure(config).num_official_parameters
    assert official is not None and official["language model"] == pytest.approx(num_language, abs=0.0005e9)


def test_the_command_line_knows_the_presets() -> None:
    assert _PRESETS == PRESETS


def test_nano_is_small_and_has_no_official_layout() -> None:
    sizes = measure(preset("nano"))
    assert sum(sizes.num_parameters.values()) <= 20e6
    assert sizes.num_official_parameters is None and sizes.num_official_tensors is None


def test_the_bundled_nano_has_the_shape_of_its_preset() -> None:
    bundled, expected = YiVLConfig.from_pretrained(Path(yi_vl.__file__).parent / "nano"), preset("nano")
    assert bundled.image_token_id == expected.image_token_id
    for part in ("text_config", "vision_config"):
        shapes = [getattr(config, part).to_diff_dict() for config in (bundled, expected)]
        assert {name: value for name, value in shapes[0].items() if name not in _ABOUT_FILES} == {
            name: value for name, value in shapes[1].items() if name not in _ABOUT_FILES
        }


def test_a_saved_configuration_does_not_tell_where_its_parts_came_from(tmp_path: Path) -> None:
    config = preset("nano")
    config.text_config.save_pretrained(tmp_path / "home" / "ada" / "llama")
    config.text_config = AutoConfig.from_pretrained(tmp_path / "home" / "ada" / "llama")
    config.save_pretrained(tmp_path / "whole")
    saved = (tmp_path / "whole" / "config.json").read_text()
    assert "ada" not in saved and "LABEL_0" not in saved  # LABEL_0: of classifiers, a default
    assert YiVLConfig.from_pretrained(tmp_path / "whole").text_config.num_hidden_layers == 7


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="no preset '7b'"):
        preset("7b")


def test_the_default_tower_is_open_clips_vit_h_14() -> None:
    by_name = OpenClipVisionConfig.from_open_clip("ViT-H-14", image_size=448)
    assert by_name.to_dict() == OpenClipVisionConfig().to_dict()
    assert by_name.num_patches == 1024 and by_name.grid_size == 32


def test_other_towers_by_name() -> None:
    small = OpenClipVisionConfig.from_open_clip("ViT-B-32-quickgelu")
    assert (small.image_size, small.patch_size, small.hidden_size, small.num_attention_heads) == (224, 32, 768, 12)
    assert small.quick_gelu and small.intermediate_size == 3072


@pytest.mark.parametrize(
    ("name", "problem"), [("ViT-Z", "no model named 'ViT-Z'"), ("RN50", "not a plain"), ("ViT-B-16-SigLIP", "timm")]
)
def test_towers_that_cannot_be_built_are_refused(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        OpenClipVisionConfig.from_open_clip(name)


def test_a_configuration_survives_its_json() -> None:
    config = preset("nano")
    again = YiVLConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.vision_config, OpenClipVisionConfig) and again.text_config.model_type == "llama"
