"""A model from an open_clip tower, by its name, and a language model: what stage 1 starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny import OFFICIAL, tiny_config
from transformers import LlamaForCausalLM

from yi_vl.checkpoint.assemble import from_parts
from yi_vl.config import IMAGE_MEAN, OpenClipVisionConfig

TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
OPENCLIP = {"image_size": 56, "layers": 3, "width": 32, "head_width": 16, "patch_size": 14}
EVA = {
    "image_size": 224,
    "timm_model_name": "eva02_tiny_patch14_224",
    "timm_model_pretrained": False,
    "timm_pool": "token",
    "timm_proj": None,
}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama with the test checkpoint's tokenizer and no row for an image token."""
    folder = tmp_path_factory.mktemp("language")
    config = tiny_config().text_config
    config.vocab_size = 900
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((OFFICIAL / "checkpoint" / name).read_bytes())
    return str(folder)


def _add_tower(folder: Path, name: str, vision: dict[str, Any]) -> Path:
    """An open_clip model of this name, and a file of weights for it."""
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}
    if "timm_model_name" in vision:
        config["custom_text"] = True
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(1)
    weights = folder / f"{name}.pt"
    torch.save(open_clip.create_model(name).state_dict(), weights)
    return weights


@pytest.mark.parametrize(("vision", "image_size"), [(OPENCLIP, 56), (OPENCLIP, 112), (EVA, 224), (EVA, 112)])
def test_any_tower_of_open_clip_by_its_name(
    tmp_path: Path, language: str, vision: dict[str, Any], image_size: int
) -> None:
    name = f"test-{'eva' if 'timm_model_name' in vision else 'own'}-{image_size}"
    weights = _add_tower(tmp_path, name, vision)
    model, tokenizer = from_parts(name, str(weights), language, image_size)
    model.eval()
    original = open_clip.create_model(name, pretrained=str(weights)).visual.eval()
    pixels = torch.randn(2, 3, image_size, image_size)
    trunk = getattr(original, "trunk", original)
    if image_size != vision["image_size"]:
        assert model.config.vision_config.num_patches == (image_size // 14) ** 2
        assert model.model.encode_images(pixels).shape == (2, (image_size // 14) ** 2, 32)
    else:
        blocks: list[torch.Tensor] = []
        list(trunk.blocks if "timm_model_name" in vision else trunk.transformer.resblocks)[-2].register_forward_hook(
            lambda *call: blocks.append(call[-1])
        )
        original(pixels)
        features = model.model.vision_tower(pixels).last_hidden_state
        torch.testing.assert_close(features, blocks[0][:, 1:], rtol=1e-4, atol=1e-4)
    assert tokenizer.convert_tokens_to_ids("<image_placeholder>") == model.config.image_token_id == 900
    assert model.get_input_embeddings().weight.shape == (960, 32)
    model.model.vision_tower.gradient_checkpointing = True
    assert model.model.vision_tower.visual.grad_checkpointing
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again.model.encode_images(pixels), model.model.encode_images(pixels))


def test_eva02_by_its_name() -> None:
    config = OpenClipVisionConfig.from_open_clip("EVA02-L-14-336")
    assert (config.timm_model, config.hidden_size, config.num_hidden_layers) == (
        "eva02_large_patch14_clip_336",
        1024,
        24,
    )
    assert (config.image_size, config.patch_size, config.num_patches) == (336, 14, 576) and not config.is_plain


@pytest.mark.parametrize(
    ("tower", "pretrained", "message"),
    [
        ("ViT-Z-99", None, "no model named 'ViT-Z-99'"),
        ("RN50", None, "not a plain OpenCLIP vision transformer"),
        ("ViT-B-16-SigLIP", None, "pixels normalised as CLIP's"),
        ("ViT-H-14", "laion3b", "no weights 'laion3b'.*laion2b_s32b_b79k"),
    ],
)
def test_towers_that_do_not_fit_are_refused(language: str, tower: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_parts(tower, pretrained, language, 224)


def test_a_language_model_that_is_none_is_refused(tmp_path: Path) -> None:
    _add_tower(tmp_path, "test-small", OPENCLIP)
    with pytest.raises(ValueError, match="cannot be loaded"):
        from_parts("test-small", None, str(tmp_path), 56)


def test_the_image_transform_is_clips() -> None:
    assert open_clip.OPENAI_DATASET_MEAN == IMAGE_MEAN
