"""Language model and tower, each trained alone, as one model with a fresh projector: what `match` starts from."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from train.nano.pretrain.language import SIGNS_FILE
from yi_vl import YiVLForConditionalGeneration, YiVLProcessor
from yi_vl.vision import OpenClipTower


def join(language_dir: Path, tower_dir: Path, out_dir: Path) -> None:
    """Write the model to `out_dir` in bfloat16, with the embeddings of signs and cells.

    Args:
        language_dir: the `final` of a language model's run.
        tower_dir: of a tower's run.
    """
    model = YiVLForConditionalGeneration.from_pretrained(language_dir, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(OpenClipTower.from_pretrained(tower_dir).state_dict())
    out_dir.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(language_dir / SIGNS_FILE, out_dir / SIGNS_FILE)
    YiVLProcessor.from_pretrained(language_dir).save_pretrained(out_dir)
    model.to(torch.bfloat16).save_pretrained(out_dir)
