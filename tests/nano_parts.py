"""What the trainings of nano's tower need, small: artwork made up, a tower, recipes of a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from safetensors.torch import save_file
from tiny import tiny_config, tiny_processor
from transformers import AutoModelForCausalLM

from train.nano.data.art import Art, Drawing
from train.nano.data.labels import FLAGS, THINGS
from train.nano.pretrain.tower import TowerRecipe
from train.nano.text.mosaic import SIGN_IDS
from yi_vl.config import OpenClipVisionConfig, YiVLConfig, preset
from yi_vl.vision import OpenClipTower

RECIPE = TowerRecipe(
    num_steps=4, batch_size=4, num_points=4, warmup_steps=2, save_every=2, measure_every=2, num_workers=0
)


def made_up_art() -> Art:
    """Each thing and flag has a colour of its own."""
    rng = np.random.default_rng(0)
    labels = [f"thing {key}" for key in THINGS] + [f"flag {key}" for key in FLAGS] + ["unknown"]
    pixels = {label: np.full((24, 24, 4), (*rng.integers(0, 256, 3), 255), dtype=np.uint8) for label in labels}
    drawings = {label: [Drawing("made up", colour)] for label, colour in pixels.items()}
    fonts = sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVuSans.ttf"))
    return Art(drawings, drawings, {"train": fonts, "test": fonts})


def small_config() -> YiVLConfig:
    """Nano's, with a small tower of the same patches."""
    config = preset("nano")
    config.vision_config = OpenClipVisionConfig(
        patch_size=56, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224
    )
    return config


def save_parts(folder: Path) -> tuple[Path, Path]:
    """Folders of a language model with its signs, and of a tower, for `match`."""
    text_config = tiny_config().text_config
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text_config).save_pretrained(folder / "language")
    tiny_processor(patch_size=56).tokenizer.save_pretrained(folder / "language")
    width = text_config.hidden_size
    signs = {"signs": torch.randn(len(SIGN_IDS), width), "cells": torch.randn(80, width)}
    save_file(signs, folder / "language" / "signs.safetensors")
    OpenClipTower(small_config().vision_config).save_pretrained(folder / "tower")
    return folder / "language", folder / "tower"
