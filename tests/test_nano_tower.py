"""Nano's tower alone: a stopped run continues exactly, what it knows is probed, its training images vary in style."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")
from nano_parts import RECIPE, made_up_art, small_config

from train.nano.data import paint
from train.nano.data.art import Art
from train.nano.data.compose import Composer
from train.nano.data.labels import LABELS
from train.nano.data.sample import Sample, dense_labels
from train.nano.measure import probe
from train.nano.pretrain import tower
from train.nano.pretrain.tower import PointHead, SampleStream, pretrain_tower, score_heldout
from train.nano.pretrain.trainer import make_optimizers
from yi_vl.vision import OpenClipTower


@pytest.fixture
def art(monkeypatch: pytest.MonkeyPatch) -> Art:
    made = made_up_art()
    monkeypatch.setattr(tower, "load_art", lambda folder: made)
    monkeypatch.setattr(tower, "preset", lambda name: small_config())
    return made


@pytest.mark.parametrize("uses_muon", [False, True])
def test_a_stopped_run_continues_exactly(
    uses_muon: bool, art: Art, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, uses_muon=uses_muon)
    monkeypatch.setattr(tower, "score_heldout", lambda *_: 0.5)
    pretrain_tower(tmp_path / "whole", recipe)
    with pytest.MonkeyPatch.context() as patch:
        batches = list(SampleStream(art, recipe, lambda rng, samples: tower.point_batch(rng, samples, 4)))
        patch.setattr(SampleStream, "__iter__", lambda stream: iter(batches[:3]))
        pretrain_tower(tmp_path / "part", recipe)
    assert torch.load(tmp_path / "part" / "state.pt", weights_only=True)["step"] == 2
    pretrain_tower(tmp_path / "part", recipe)
    whole, again = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("whole", "part"))
    assert all(torch.equal(tensor, again["module"][name]) for name, tensor in whole["module"].items())
    assert OpenClipTower.from_pretrained(tmp_path / "part").config.image_size == 224
    with pytest.raises(ValueError, match="learning_rate"):
        pretrain_tower(tmp_path / "part", replace(recipe, learning_rate=1.0))


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_all_else() -> None:
    head = PointHead(OpenClipTower(small_config().vision_config))
    head.tower.visual.positional_embedding.requires_grad_(False)
    adamw, muon = (
        [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        for optimizer in make_optimizers(head, head.tower.visual.transformer, RECIPE)
    )
    trained = {id(parameter): name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert sorted(adamw + muon) == sorted(trained)
    assert all("resblocks" in trained[each] for each in muon) and len(muon) == 2 * 4  # blocks, matrices of each
    (alone,) = make_optimizers(head, head.tower.visual.transformer, replace(RECIPE, uses_muon=False))
    assert sum(len(group["params"]) for group in alone.param_groups) == len(trained)


def test_held_out_scores_are_of_images_and_of_letters(art: Art, monkeypatch: pytest.MonkeyPatch) -> None:
    head = PointHead(OpenClipTower(small_config().vision_config))
    monkeypatch.setattr(tower, "_NUM_WORDS", 4)
    samples = tower._heldout(Composer(art), "word", 224)
    letters = [item.name for sample in samples for item in sample.truth.items]
    with torch.no_grad():  # a head that always says "e"
        head.classify.weight.zero_()
        head.classify.bias.zero_()
        head.classify.bias[tower.LABELS.index("letter e")] = 9.0
    assert score_heldout(head, art, "word", 224) == round(letters.count("e") / len(letters), 4)


def test_a_probe_reads_what_features_hold_and_no_more() -> None:
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b", "c"] * 40)
    one_hot = np.stack([np.eye(3)[["a", "b", "c"].index(label)] for label in labels]).astype(np.float32)
    features = np.concatenate([one_hot + rng.normal(0, 0.1, one_hot.shape), rng.normal(0, 1, (120, 4))], axis=1)
    assert probe.linear_accuracy((features[:60], labels[:60]), (features[60:], labels[60:])) > 0.95
    assert probe.linear_accuracy((features[:60, 3:], labels[:60]), (features[60:, 3:], labels[60:])) < 0.6


def test_the_features_of_two_letters_in_one_patch_differ() -> None:
    patches = torch.randn(64, 16)
    left, right = (probe._describe(patches, probe.Item("letter", "a", (x, 0.5, x + 0.06, 0.6))) for x in (0.51, 0.56))
    assert left.shape == (32,) and torch.equal(left[:16], right[:16]) and not torch.equal(left, right)
    thing = probe._describe(patches, probe.Item("thing", "dog", (0.0, 0.0, 0.25, 0.25)))
    torch.testing.assert_close(thing, patches.view(8, 8, 16)[:2, :2].mean((0, 1)))


def test_a_probe_of_a_tower_is_a_table_and_features_are_computed_once(
    art: Art, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OpenClipTower(small_config().vision_config).save_pretrained(tmp_path / "tower")
    monkeypatch.setattr(probe, "load_art", lambda folder: art)
    monkeypatch.setattr(probe, "_NUM_TEST_WORDS", 6)
    monkeypatch.setattr(
        probe,
        "SKILLS",
        (probe.ProbedSkill("digits", "digit", 3, 0.98), probe.ProbedSkill("characters", "word", 12, 0.95)),
    )
    table = probe.probe_tower(tmp_path / "tower", tmp_path, tmp_path / "cache")
    assert "| digits | 360 | 30 |" in table and "| characters |" in table and table.count("%") == 4
    monkeypatch.setattr(probe, "item_features", lambda *_: pytest.fail("computed again"))
    assert probe.probe_tower(tmp_path / "tower", tmp_path, tmp_path / "cache") == table
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for folder, message in ((tmp_path, "llama"), (tmp_path / "nowhere", "no config.json")):
        with pytest.raises(ValueError, match=message):
            probe.load_tower(folder)


def test_things_are_drawn_in_other_styles_for_training() -> None:
    gradient = np.zeros((96, 96, 4), dtype=np.uint8)
    gradient[16:80, 16:80] = 255
    gradient[..., 0] = np.arange(96)[None] * 2
    sprite = Image.fromarray(gradient)
    colours, sizes = set(), set()
    for seed in range(60):
        drawn = paint.restyle_thing(np.random.default_rng(seed), sprite)
        assert drawn.mode == "RGBA" and drawn.getchannel("A").getextrema()[1] == 255
        inside = np.asarray(drawn)[np.asarray(drawn)[..., 3] == 255][:, :3]
        colours.add(len(np.unique(inside, axis=0)) < 12)
        sizes.add(drawn.size != sprite.size)
    assert colours == {True, False} and sizes == {True, False}


def test_letters_are_as_large_in_small_images_as_in_large_ones(art: Art) -> None:
    recipe = replace(RECIPE, num_steps=12, batch_size=16, large_every=2, late_from=1.0)
    shown: dict[int, set[str]] = {224: set(), 448: set()}
    widths_px: dict[int, list[float]] = {224: [], 448: []}

    def note(rng: np.random.Generator, samples: list[Sample]) -> None:
        side = samples[0].image.width
        shown[side].update(sample.truth.category for sample in samples)
        letters = [item for sample in samples for item in sample.truth.items if item.category == "letter"]
        widths_px[side] += [side * (item.box[2] - item.box[0]) for item in letters]

    list(SampleStream(art, recipe, note))
    assert {"thing", "flag", "digit", "scene", "word"} <= shown[224] & shown[448]
    assert 0.8 < np.mean(widths_px[224]) / np.mean(widths_px[448]) < 1.25


def test_lines_show_letters_as_large_as_words_of_large_images_do_and_label_them(art: Art) -> None:
    composer = Composer(art)
    heights, counts, is_labelled = [], [], []
    for seed in range(12):
        sample = composer.compose(np.random.default_rng(seed), "lines", 224)
        word = composer.compose(np.random.default_rng(seed), "word", 448)
        heights.append([np.mean([item.box[3] - item.box[1] for item in each.truth.items]) for each in (sample, word)])
        counts.append(len(sample.truth.items))
        labels = dense_labels(sample, 32, sub=1)
        for item in sample.truth.items:
            x, y = (int(side * 32) for side in item.centre)
            is_labelled.append(LABELS[labels[y, x]].startswith("letter"))
    small, large = np.mean(heights, axis=0)
    assert 1.6 < small / large < 2.4  # in halves of the side
    assert np.mean(counts) > 6 and all(is_labelled)
