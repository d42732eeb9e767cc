"""The parts of nano trained on a CUDA device that is not there, as on a CPU; see fake_cuda.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_cuda import fake_cuda

pytest.importorskip("sklearn")
from nano_parts import RECIPE, made_up_art, save_parts, small_config

from train.nano.pretrain import init, language, match, tower
from train.nano.pretrain.ablation import measure_runs
from train.nano.pretrain.language import LanguageRecipe
from train.nano.pretrain.mosaic_model import Shape
from train.nano.pretrain.trainer import LoopRecipe
from yi_vl.files import read_json_lines

LANGUAGE = LanguageRecipe(
    shape=Shape(num_layers=2, width=32, num_heads=4, num_key_heads=2, mlp_width=48, vocab_size=2200),
    loop=LoopRecipe(num_steps=4, warmup_steps=2, save_every=2, measure_every=2, num_workers=0),
    num_rows=2,
    row_tokens=260,
    num_questions=2,
)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trainings are small; the folder has what they start from."""
    art = made_up_art()
    for module in (tower, match):
        monkeypatch.setattr(module, "load_art", lambda folder: art)
    for module in (init, tower):
        monkeypatch.setattr(module, "preset", lambda name: small_config())
    monkeypatch.setattr(tower, "_NUM_WORDS", 4)
    monkeypatch.setattr(tower, "_heldout", lambda composer, category, size: HELDOUT(composer, category, size)[:4])
    monkeypatch.setattr(match, "CATEGORIES", ("thing", "word"))
    monkeypatch.setattr(language, "_NUM_TEXTS", 300)
    save_parts(tmp_path)
    return tmp_path


HELDOUT = tower._heldout
TRAININGS: dict[str, Callable[[Path, Path], object]] = {
    "language": lambda parts, out: language.pretrain_language(out, LANGUAGE),
    "tower": lambda parts, out: tower.pretrain_tower(out, RECIPE),
    "match": lambda parts, out: match.match(parts / "language", parts / "tower", out, parts, RECIPE),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_part_trains_as_on_a_cpu_and_continues(small: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    on_cpu, on_cuda = small / "cpu", small / "cuda"
    TRAININGS[name](small, on_cpu)
    with fake_cuda(monkeypatch) as device:
        TRAININGS[name](small, on_cuda)
        assert device.num_operations > 1000
        TRAININGS[name](small, on_cuda)  # there is nothing left to do; the state is read on the device
        if name == "language":
            assert "cuda, step 4 |" in measure_runs([on_cuda], 2, num_examples=1)
    rows, expected = (list(read_json_lines(folder / "log.jsonl")) for folder in (on_cuda, on_cpu))
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-3)
    states = [torch.load(folder / "state.pt", weights_only=True)["module"] for folder in (on_cuda, on_cpu)]
    for key, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][key], atol=5e-3, rtol=1e-2)
