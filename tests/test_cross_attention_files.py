"""Gated cross-attention in files: saved, loaded, quantized, described, converted; other layouts refuse it by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunApp
from gated import NUM_LAYERS, RESAMPLED, ROWS, blocks, gated_config, gated_model, gated_processor, pixels, tokens
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE_TOKEN_ID
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
)

import yi_vl
from yi_vl.auto import YiGatedConfig, YiGatedForCausalLM
from yi_vl.checkpoint.assemble import from_parts
from yi_vl.checkpoint.gguf_vision import vision_unsupported
from yi_vl.cli import app
from yi_vl.config import YiVLConfig
from yi_vl.connector.config import CROSS_ATTENTION, ConnectorConfig
from yi_vl.decoder.config import YiHybridConfig
from yi_vl.decoder.cross_attention import CROSS_BLOCK
from yi_vl.decoder.gated_config import cross_pattern
from yi_vl.quantize import packed_layers
from yi_vl.vllm_plugin.unsupported import check_language_model

pytestmark = pytest.mark.core


def test_the_decoder_alone_is_one_of_transformers(tmp_path: Path) -> None:
    config = gated_config().text_config
    model = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(model, YiGatedForCausalLM) and all(not b.attention_gate.any() for b in blocks(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.config, YiGatedConfig) and loaded.config.cross_layers == [1, 3]
    ids = tokens(1, 8, {})
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    hidden = loaded(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == NUM_LAYERS + 1


def test_blocks_come_before_the_last_of_every_so_many_layers() -> None:
    assert cross_pattern(32, 4) == [3, 7, 11, 15, 19, 23, 27, 31] and cross_pattern(5, 2) == [1, 3]


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1], [3, 1], [True], "1"])
def test_wrong_layers_are_named(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"cross_layers is .*expected some of the layers 0 to 3, in ascending order"):
        YiGatedConfig(num_hidden_layers=4, cross_layers=layers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gates are open, saved."""
    path = tmp_path_factory.mktemp("gated")
    model = gated_model(**RESAMPLED)
    model.save_pretrained(path)
    gated_processor(model).save_pretrained(path)
    return path


@torch.inference_mode()
def test_saved_and_loaded_it_computes_the_same(folder: Path) -> None:
    model, ids, images = gated_model(**RESAMPLED), tokens(4, 12, ROWS), pixels(4)
    loaded = yi_vl.load(folder, dtype="float32")
    assert loaded.processor.tokens_per_image == loaded.model.config.num_image_tokens == 1
    assert loaded.model.config.num_image_features == 5 and loaded.model.config.text_config.cross_layers == [1, 3]
    auto = AutoModelForImageTextToText.from_pretrained(folder)
    expected = model(input_ids=ids, pixel_values=images).logits
    for each in (loaded.model, auto):
        logits = each(input_ids=ids, pixel_values=images).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "from yi_vl.auto import" in (folder / "yi_vl_classes.py").read_text()
    assert json.loads((folder / "config.json").read_text())["text_config"]["model_type"] == "yi_gated"


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.06), ("int4", 0.7)])
@torch.inference_mode()
def test_quantized_the_blocks_are_too(folder: Path, scheme: str, tolerance: float) -> None:
    quantized, exact = (yi_vl.load(folder, dtype="float32", quantize=q).model for q in (scheme, None))
    names = [name for name, _ in packed_layers(quantized)]
    assert sum(CROSS_BLOCK in name for name in names) == 2 * 7, "of two blocks all matrices"
    ids, images = tokens(1, 8, {0: [2]}), pixels(1)
    logits, expected = (model(input_ids=ids, pixel_values=images).logits for model in (quantized, exact))
    assert (logits - expected).std() < tolerance * expected.std()


def test_the_prompt_has_one_token_for_an_image(folder: Path) -> None:
    processor = yi_vl.load(folder).processor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]}]
    encoded = processor.encode_messages(messages)
    assert encoded.input_ids.count(IMAGE_TOKEN_ID) == 2 and len(encoded.image_starts) == 2
    image = Image.new("RGB", (60, 40), "red")
    inputs = processor(text="<image_placeholder>a<image_placeholder>", images=[image, image], return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE_TOKEN_ID).sum()) == 2


def refused(run_app: RunApp, *arguments: object) -> str:
    code, out, err = run_app("yi-vl", app, *arguments)
    assert code == 2 and "Traceback" not in err, out + err
    return " ".join(err.split())


@pytest.mark.parametrize("layout", ["official", "llava-hf", "gguf"])
def test_other_layouts_are_refused_by_name(layout: str, folder: Path, tmp_path: Path, run_app: RunApp) -> None:
    message = refused(run_app, "convert", folder, tmp_path / "out", "--to", layout)
    assert f"type yi_gated, and the layout '{layout}' has no place for its blocks of gated cross-attention" in message
    assert "connector of type cross_attention" in str(vision_unsupported(gated_config()))
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_not_made_of_it(folder: Path, tmp_path: Path, run_app: RunApp) -> None:
    message = refused(run_app, "expand", folder, tmp_path / "out", "--after-every", "2")
    assert "type yi_gated, whose layers differ. Expand the dense model" in message and "its connector" in message
    message = refused(run_app, "upcycle", folder, tmp_path / "out", "--experts", "2")
    assert "type yi_gated, whose blocks of gated cross-attention a hybrid decoder cannot have" in message
    with pytest.raises(ValueError, match="yi_gated model; the language model must be a llama"):
        from_parts("ViT-B-32", None, str(folder), 224)
    with pytest.raises(ValueError, match="goes into a llama, and the language model is a yi_hybrid"):
        YiVLConfig(text_config=YiHybridConfig(), connector_config=ConnectorConfig(type=CROSS_ATTENTION))
    with pytest.raises(ValueError, match="has blocks of gated cross-attention, and the connector is of type mlp"):
        YiVLConfig(text_config=YiGatedConfig())


def test_vllm_refuses_it_by_name() -> None:
    with pytest.raises(ValueError, match=r"gated cross-attention \(yi_gated\).* use yi-vl serve"):
        check_language_model(YiGatedConfig())
    check_language_model(LlamaConfig())


def test_it_is_converted_to_its_own_layout(folder: Path, tmp_path: Path, run_app: RunApp) -> None:
    assert run_app("yi-vl", app, "convert", folder, tmp_path / "copy", "--to", "yi-vl", "--verify")[0] == 0
    weights = load_file(tmp_path / "copy/model.safetensors")
    assert any(CROSS_BLOCK in name for name in weights)


def test_info_says_what_it_is(folder: Path, run_app: RunApp) -> None:
    code, out, _ = run_app("yi-vl", app, "info", folder)
    text = " ".join(out.replace("│", " ").split())
    count = sum(parameter.numel() for block in blocks(gated_model()) for parameter in block.parameters())
    assert code == 0 and f"gated blocks before layers 1, 3 (from 0), of {count:,} parameters" in text
    assert "a resampler of 1 layers" in text and "5 per image, of 16 patches; one token in the prompt" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"cross_layers": [9]}}, "cross_layers is .9.; expected some of the layers 0 to 3"),
        ({"connector_config": {"num_tokens": 10**9}}, "connector_config.num_tokens is 1000000000"),
        ({"connector_config": {"type": "mlp", "num_tokens": None, "num_layers": None}}, "has no|of type mlp"),
    ],
)
def test_a_broken_config_is_named(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    for section, changed in changes.items():
        values[section] |= changed
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        yi_vl.load(tmp_path / "broken")


def test_tiles_are_refused(tmp_path: Path) -> None:
    model = gated_model()
    processor = gated_processor(model)
    yi_vl.YiVL(model, processor).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"up to 4 tiles.*cross_attention"):
        yi_vl.load(tmp_path / "model", image_tiles=4)
    processor.image_processor.max_tiles = 2
    with pytest.raises(ValueError, match=r"up to 2 tiles.*cross_attention"):
        yi_vl.YiVL(model, processor)
