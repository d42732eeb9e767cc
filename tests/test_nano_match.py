"""How nano's tower and projector are matched to the signs that its language model reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("sklearn")
from nano_parts import RECIPE, made_up_art, save_parts, small_config
from transformers import AutoModelForCausalLM

import yi_vl
from train.nano import __main__ as nano
from train.nano.data.labels import BACKGROUND
from train.nano.data.sample import Item, Sample, Truth
from train.nano.pretrain import init
from train.nano.pretrain import match as match_module
from train.nano.pretrain.join import join, keep_language, keep_tower
from train.nano.pretrain.match import _IGNORED, _targets, match, sign_loss
from train.nano.pretrain.tower import SampleStream
from train.nano.text.mosaic import SIGN_IDS
from yi_vl import YiVLForConditionalGeneration
from yi_vl.vision import OpenClipTower

SIGNS = torch.randn(len(SIGN_IDS), 256, generator=torch.Generator().manual_seed(0))
EMPTY = SIGN_IDS[BACKGROUND]


def test_the_loss_is_least_where_every_patch_says_its_sign() -> None:
    signs = torch.tensor([[EMPTY, 5, EMPTY, 9]])
    right = sign_loss(SIGNS[signs], signs, SIGNS)
    wrong = sign_loss(SIGNS[signs.roll(1, dims=1)], signs, SIGNS)
    assert right < 0.01 < 1 < wrong


def test_every_image_weighs_the_same_and_those_without_signs_nothing() -> None:
    few, many = torch.full((4,), EMPTY), torch.tensor([7, 7, 7, EMPTY])
    few[0] = 5
    signs = torch.stack([few, many, torch.full((4,), _IGNORED)])
    features = SIGNS[signs.clamp(min=0)].clone()
    features[2] = 100.0  # of an image that signs cannot tell
    one_wrong, three_wrong = features.clone(), features.clone()
    one_wrong[0, 0] = SIGNS[8]  # all that the first shows
    three_wrong[1, :3] = SIGNS[8]  # all that the second shows
    first, second = (sign_loss(each, signs, SIGNS) for each in (one_wrong, three_wrong))
    assert first > 1 and 0.5 < first / second < 2


def test_a_language_model_brings_its_signs_and_places(tmp_path: Path) -> None:
    cells = torch.randn(16 + 64, 256)
    save_file({"signs": SIGNS, "cells": cells}, tmp_path / "signs.safetensors")
    signs, codes = _targets(tmp_path)
    assert torch.equal(signs, SIGNS)
    assert torch.equal(codes[16], cells[:16]) and torch.equal(codes[64], cells[16:])


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of a language model with its signs, and of a tower."""
    monkeypatch.setattr(match_module, "load_art", lambda folder: made_up_art())
    monkeypatch.setattr(match_module, "CATEGORIES", ("thing",))
    monkeypatch.setattr(init, "preset", lambda name: small_config())
    return save_parts(tmp_path)


def test_parts_that_are_kept_are_joined_as_they_are(parts: tuple[Path, Path], tmp_path: Path) -> None:
    keep_language(parts[0], tmp_path / "kept")
    keep_tower(parts[1], tmp_path / "kept")
    joined, processor = join(tmp_path / "kept" / "language", tmp_path / "kept" / "tower")
    text_model = AutoModelForCausalLM.from_pretrained(parts[0]).state_dict()
    tower = OpenClipTower.from_pretrained(parts[1]).state_dict()
    for name, tensor in joined.state_dict().items():
        part, _, inner = name.removeprefix("model.").partition(".")
        source = {"vision_tower": tower, "language_model": text_model, "lm_head": text_model}.get(part)
        if source is not None:
            key = inner if source is tower else name.replace("language_model.", "")
            assert torch.equal(tensor, source[key].to(torch.bfloat16).float()), name
    assert joined.dtype == torch.float32
    assert processor.tokenizer.convert_tokens_to_ids("<image_placeholder>") == joined.config.image_token_id
    assert torch.equal(_targets(tmp_path / "kept" / "language")[0], _targets(parts[0])[0])
    joined.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    image = Image.new("RGB", (9, 9))
    assert isinstance(yi_vl.load(tmp_path / "joined").predict(image, "?", max_new_tokens=2), str)


def test_a_tower_is_taken_out_of_a_model_and_what_is_no_part_is_refused(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    model, _ = join(*parts)
    model.save_pretrained(tmp_path / "model")
    keep_tower(tmp_path / "model", tmp_path / "kept")
    kept = OpenClipTower.from_pretrained(tmp_path / "kept" / "tower").state_dict()
    assert all(torch.equal(tensor.to(torch.bfloat16), kept[name]) for name, tensor in
               model.model.vision_tower.state_dict().items())  # fmt: skip
    with pytest.raises(ValueError, match=r"model has no signs.safetensors: give the folder `final`"):
        keep_language(tmp_path / "model", tmp_path / "kept")
    with pytest.raises(ValueError, match=r"language/config.json is of a 'llama'; expected .* a tower"):
        keep_tower(parts[0], tmp_path / "kept")
    with pytest.raises(ValueError, match=r"nowhere has no config.json"):
        join(parts[0], tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"nothing to keep: give --language, --tower"):
        nano.keep()
    assert not (tmp_path / "kept" / "language").exists()


def test_a_stopped_match_continues_exactly_and_leaves_the_language_model_alone(
    parts: tuple[Path, Path], tmp_path: Path
) -> None:
    match(*parts, tmp_path / "whole", tmp_path, RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        all_batches = SampleStream.batches
        patch.setattr(
            SampleStream, "batches", lambda stream: (batch for batch, _ in zip(all_batches(stream), range(3)))
        )
        match(*parts, tmp_path / "part", tmp_path, RECIPE)
    assert torch.load(tmp_path / "part" / "state.pt", weights_only=True)["step"] == 2
    match(*parts, tmp_path / "part", tmp_path, RECIPE)
    whole, again = (
        YiVLForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "whole", tmp_path / "part")
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    before = join(*parts)[0].state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, whole[name])}
    assert changed and not any("language_model" in name or "lm_head" in name for name in changed)
    with pytest.raises(ValueError, match="batch_size"):
        match(*parts, tmp_path / "part", tmp_path, replace(RECIPE, batch_size=8))


def test_a_patch_that_no_sign_can_tell_is_ignored_and_the_others_are_not() -> None:
    letters = [Item("letter", letter, (x, 0.1, x + 0.02, 0.2)) for letter, x in zip("qzxa", (0.01, 0.03, 0.05, 0.8))]
    sample = Sample((Image.new("RGB", (224, 224)),), Truth("word", tuple(letters)), (None,) * 4)
    signs = match_module.sign_batch(np.random.default_rng(0), [sample], 56).signs[0]
    assert signs[0] == _IGNORED and signs[3] == SIGN_IDS["letter a"] and (signs[4:] == EMPTY).all()
