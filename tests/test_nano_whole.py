"""`python -m train.nano train`, all of it in a few steps: every part is built on the one before it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from nano_parts import RECIPE, made_up_art, small_config
from omegaconf import OmegaConf

import yi_vl
from train.nano import __main__ as nano
from train.nano.data import shards
from train.nano.pretrain import init, language, match, tower
from train.nano.pretrain.language import LanguageRecipe
from train.nano.pretrain.mosaic_model import Shape
from train.nano.pretrain.trainer import LoopRecipe

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_part_is_built_on_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the stages' processes
    for module in (init, tower):
        monkeypatch.setattr(module, "preset", lambda name: small_config())
    for module in (shards, tower, match):
        monkeypatch.setattr(module, "load_art", lambda data_dir: made_up_art())
    monkeypatch.setattr(tower, "score_heldout", lambda *_: 0.5)
    monkeypatch.setattr(match, "CATEGORIES", ("thing",))  # that are measured
    monkeypatch.setattr(shards, "SAMPLES_PER_SHARD", 4)
    for index, source in enumerate(shards.SOURCES):
        shards._write_shard(nano.DATA, index, 0)
        assert shards.shard_path(nano.DATA, source, 0).exists()

    loop = LoopRecipe(num_steps=2, save_every=2, measure_every=2, num_workers=0)
    monkeypatch.setattr(
        language, "LanguageRecipe", partial(LanguageRecipe, Shape(num_layers=2), loop=loop, num_rows=2, num_questions=2)
    )
    monkeypatch.setattr(tower, "TowerRecipe", lambda: RECIPE)
    monkeypatch.setattr(match, "match", partial(match.match, recipe=RECIPE))
    monkeypatch.setattr(nano, "CONFIGS", tmp_path)
    for stage in nano.STAGES:
        config = OmegaConf.load(ROOT / "train/configs/nano" / f"{stage}.yaml")
        OmegaConf.save(OmegaConf.merge(config, {"steps": 1, "global_batch": 2, "micro_batch": 2, "trackers": []}),
                       tmp_path / f"{stage}.yaml")  # fmt: skip

    nano.train(from_scratch=True)
    model = yi_vl.load("runs/nano/chat-448/final")
    assert model.model.config.text_config.num_hidden_layers == 2
    started = json.loads(Path("runs/nano/matched/config.json").read_text())
    assert started["text_config"]["num_hidden_layers"] == 2
    assert model.predict(ROOT / "docs/images/dog.png", "What is this?", max_new_tokens=2) is not None
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    nano.train(from_scratch=True)
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")} == before, "kept"
