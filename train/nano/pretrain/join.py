"""A language model and a tower, each trained alone: kept in the repository, and joined to one model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from train.nano.pretrain.init import fresh_model
from yi_vl import YiVLForConditionalGeneration, YiVLProcessor
from yi_vl.vision import OpenClipTower

LANGUAGE, TOWER = "language", "tower"


def join(language_dir: Path, tower_dir: Path) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """A whole model in float32 with a fresh projector, and its processor."""
    text_model = AutoModelForCausalLM.from_pretrained(language_dir, dtype=torch.float32)
    tower = OpenClipTower.from_pretrained(tower_dir, dtype=torch.float32)
    model, processor = fresh_model(language_dir, text_model.config)
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.lm_head.load_state_dict(text_model.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model, processor


def keep_language(language_dir: Path, parts_dir: Path) -> None:
    """Write a finished language model to `parts_dir/language`, its weights in bfloat16."""
    folder = parts_dir / LANGUAGE
    shutil.copytree(language_dir, folder, ignore=shutil.ignore_patterns("model*"), dirs_exist_ok=True)
    AutoModelForCausalLM.from_pretrained(language_dir, dtype=torch.bfloat16).save_pretrained(folder)


def keep_tower(tower_dir: Path, parts_dir: Path) -> None:
    """Write a finished tower to `parts_dir/tower`, its weights in bfloat16."""
    OpenClipTower.from_pretrained(tower_dir, dtype=torch.bfloat16).save_pretrained(parts_dir / TOWER)
