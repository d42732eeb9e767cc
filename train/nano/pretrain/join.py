"""A language model and a tower, each trained alone: kept in the repository, and joined to one model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from train.nano.pretrain.init import fresh_model
from train.nano.pretrain.language import SIGNS_FILE
from yi_vl import YiVLForConditionalGeneration, YiVLProcessor
from yi_vl.files import atomic_path
from yi_vl.vision import OpenClipTower

LANGUAGE, TOWER = "language", "tower"


def join(language_dir: Path, tower_dir: Path) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """A whole model in float32 with a fresh projector, and its processor.

    Raises:
        ValueError: a folder is not that of such a part.
    """
    text_model, tower = _read_language(language_dir), read_tower(tower_dir)
    model, processor = fresh_model(language_dir, text_model.config)
    model.model.language_model.load_state_dict(text_model.model.state_dict())
    model.lm_head.load_state_dict(text_model.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model, processor


def keep_language(language_dir: Path, parts_dir: Path) -> None:
    """Write a finished language model to `parts_dir/language`, its weights in bfloat16.

    Raises:
        ValueError: the folder is not that of such a model.
    """
    text_model = _read_language(language_dir).bfloat16()
    with atomic_path(parts_dir / LANGUAGE) as folder:
        shutil.copytree(language_dir, folder, ignore=shutil.ignore_patterns("model*"))
        text_model.save_pretrained(folder)


def keep_tower(tower_dir: Path, parts_dir: Path) -> None:
    """Write a finished tower to `parts_dir/tower`, its weights in bfloat16.

    Raises:
        ValueError: the folder has no tower.
    """
    tower = read_tower(tower_dir).bfloat16()
    with atomic_path(parts_dir / TOWER) as folder:
        tower.save_pretrained(folder)


def read_tower(folder: Path) -> OpenClipTower:
    """The tower of a model, or a tower alone, in float32.

    Raises:
        ValueError: the folder has neither.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a model, or of a tower.")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type == "open_clip_vision":
        return OpenClipTower.from_pretrained(folder, dtype=torch.float32)
    if model_type == "yi_vl":
        return YiVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model.vision_tower
    raise ValueError(f"{path} is of a {model_type!r}; expected a yi_vl model or a tower, open_clip_vision.")


def _read_language(folder: Path) -> PreTrainedModel:
    if not (folder / SIGNS_FILE).is_file():
        raise ValueError(f"{folder} has no {SIGNS_FILE}: give the folder `final` of a run of `train.nano language`.")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model
