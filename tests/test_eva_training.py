"""An EVA-02 tower in the trainer, in front of the language model of a Yi-VL: trained, resumed, loaded, asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_runs import losses, stop_after, trainer

import yi_vl
from train.config import TrainConfig
from train.config_file import load_config
from train.init import initial_model
from train.trainer import train
from yi_vl.checkpoint.assemble import from_parts
from yi_vl.config import OpenClipVisionConfig

ROOT = Path(__file__).parents[1]
EVA = "init_from.tower.name=timm/eva02_tiny_patch14_224"


def test_it_trains_resumes_and_answers(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings = [EVA, "steps=3", "image_size=28"]
    whole = configure(*settings, f"run_dir={tmp_path}/whole")
    final = train(whole)
    killed = configure(*settings, f"run_dir={tmp_path}/killed", "checkpoint.every_steps=1")
    stop_after(trainer(killed), 2)
    train(killed)
    assert losses(killed) == losses(whole)
    model = yi_vl.load(final, dtype="float32")
    vision = model.model.config.vision_config
    assert (vision.timm_model, vision.image_size, vision.num_patches) == ("eva02_tiny_patch14_224", 28, 4)
    assert isinstance(model.predict([Image.new("RGB", (40, 30), "red")], "What?", max_new_tokens=3), str)


def test_nanos_recipe_takes_the_language_model_of_a_yi_vl() -> None:
    config = load_config(ROOT / "train/configs/nano/eva-224.yaml", [f"init_from.language_model={ROOT}/yi_vl/nano"])
    model, processor = initial_model(config, torch.device("cpu"))
    nano = yi_vl.load(ROOT / "yi_vl/nano", dtype="float32")
    assert model.config.num_image_tokens == processor.tokens_per_image == 256
    assert model.config.image_token_id == nano.model.config.image_token_id
    weights = model.model.language_model.state_dict()
    assert all(torch.equal(weights[name], each) for name, each in nano.model.model.language_model.state_dict().items())
    assert torch.equal(model.lm_head.weight, nano.model.lm_head.weight)
    ids = processor.tokenizer("A cat. 一只猫。")["input_ids"]
    assert ids == nano.processor.tokenizer("A cat. 一只猫。")["input_ids"]


def test_weights_of_timm_are_read_from_a_file(tmp_path: Path) -> None:
    import timm

    trunk = timm.create_model("eva02_tiny_patch14_224", pretrained=False, num_classes=0)
    torch.save(trunk.state_dict(), tmp_path / "eva.pt")
    model, _ = from_parts("timm/eva02_tiny_patch14_224", str(tmp_path / "eva.pt"), str(ROOT / "yi_vl/nano"), 224)
    loaded = model.model.vision_tower.visual.trunk.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trunk.state_dict().items() if name in loaded)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/eva02_nothing", "timm has no model named 'eva02_nothing'"),
        ("timm/vit_tiny_patch16_224", "pixels normalised as CLIP's"),
        ("timm/resnet18", "not a vision transformer"),
        ("timm/", "timm has no model named ''"),
    ],
)
def test_other_towers_of_timm_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenClipVisionConfig.from_open_clip(name)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There are no weights 'nothing\.pt' for the tower 'timm/eva02"):
        from_parts("timm/eva02_tiny_patch14_224", "nothing.pt", str(ROOT / "yi_vl/nano"), 224)
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken\.pt' do not load into 'timm/eva02"):
        from_parts("timm/eva02_tiny_patch14_224", str(tmp_path / "broken.pt"), str(ROOT / "yi_vl/nano"), 224)
