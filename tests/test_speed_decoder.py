"""`python -m eval speed decoder | experts`: what is compared is equal but for the layers, and the shape is computed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from eval.speed import decoder, decoder_curves, experts
from eval.speed.commands import _lengths
from eval.speed.decoder import compare_decoder, make_models, new_cache, random_cache
from eval.speed.decoder_curves import ALL, Curve
from yi_vl.config import yi_config
from yi_vl.decoder.config import FULL, SLIDING
from yi_vl.versions import CACHE_ARGUMENT

WINDOW = 8


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> LlamaConfig:
    monkeypatch.setattr(decoder, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(decoder_curves, "CHUNK_TOKENS", 4)
    config = yi_config(32, 64, 8, 4, 2)
    config.vocab_size = 50
    return config


def test_the_table_has_every_model_at_every_context(dense: LlamaConfig, tmp_path: Path) -> None:
    image = tmp_path / "curves.png"
    measured = compare_decoder(dense, [16, 32], WINDOW, num_rounds=1, dtype=torch.float32, image=image)
    names = ("dense", "hybrid", "hybrid, experts")
    assert list(measured["variants"]) == [f"{length}, {name}" for length in (16, 32) for name in names]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert measured["variants"]["32, dense"]["kv_mb"] == pytest.approx(8 * 32 * 2 * 2 * 8 * 4 / 1e6)
    kept = 1 * 32 + 6 * (WINDOW - 1)  # one of two full layers, six windows
    assert measured["variants"]["32, hybrid"]["relative_kv_mb"] == pytest.approx(kept / (8 * 32))
    assert "hybrid: 2 of 8 layers see all tokens" in measured["shape"]


def test_an_image_without_a_folder_is_refused_before_anything_is_measured(dense: LlamaConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        compare_decoder(dense, [16], WINDOW, num_rounds=1, dtype=torch.float32, image=tmp_path / "none" / "curves.png")


def test_the_models_have_the_same_weights_but_for_the_experts(dense: LlamaConfig) -> None:
    models = make_models(dense, WINDOW, torch.float32)
    original = dict(models["dense"].named_parameters())
    for name, model in models.items():
        added = [key for key, value in model.named_parameters() if value is not original.get(key)]
        assert all(".mlp." in key for key in added) and bool(added) == (name == "hybrid, experts")
    active = [sum(p.numel() for p in model.model.layers[0].mlp.parameters()) for model in models.values()]
    assert active[2] == decoder.COPIES * active[0] + models["hybrid, experts"].model.layers[0].mlp.gate.weight.numel()


@pytest.mark.parametrize("name", ["dense", "hybrid", "hybrid, experts"])
def test_a_cached_prompt_gives_the_logits_of_an_uncached_one(dense: LlamaConfig, name: str) -> None:
    model = make_models(dense, WINDOW, torch.float32)[name]
    input_ids = torch.randint(50, (1, 21))
    cache = new_cache(model.config)
    with torch.inference_mode():
        expected = model(input_ids=input_ids).logits
        parts = [
            model(input_ids=part, **{CACHE_ARGUMENT: cache}).logits for part in input_ids.split([9, 4, 1, 1, 6], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_measurement_leaves_the_cache_as_it_was(dense: LlamaConfig) -> None:
    model = make_models(dense, WINDOW, torch.float32)["hybrid"]
    run = decoder._Run(model, random_cache(model, 20, torch.float32))
    before = [None if layer.keys is None else layer.keys.clone() for layer in run.cache.layers]
    seconds = run.decode()
    run.chunk()
    assert run.cache.get_seq_length() == 20
    for layer, keys in zip(run.cache.layers, before):
        assert keys is None or torch.equal(layer.keys, keys)
    assert 0 < seconds[FULL] + seconds[SLIDING] < seconds[ALL]


def test_times_between_the_contexts_are_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_curves, "CHUNK_TOKENS", 10)
    curve = Curve([100, 200], [SLIDING, FULL], chunks=[{ALL: 1.0}, {ALL: 2.0}, {ALL: 4.0}])
    assert curve.first_token_seconds(100) == pytest.approx(sum(1 + start / 100 for start in range(0, 100, 10)))
    assert curve.first_token_seconds(15) == pytest.approx(1 + 1.1 / 2)
    assert curve.slope(curve.chunks[1:]) == pytest.approx(2 / 100)


def test_lengths() -> None:
    assert _lengths("1024, 2048") == [1024, 2048]
    for text in ("", "1024,", "0", "-1", "1e3", "many"):
        with pytest.raises(ValueError, match="not a list of lengths"):
            _lengths(text)


def test_experts_are_measured_beside_a_dense_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_MAX_GATHERED_BYTES", 100_000)
    measured = experts.compare_experts(yi_config(32, 64, 2, 4, 2), 2, 2, [1, 64], torch.float32)
    assert list(measured["variants"]) == ["dense", "eager", "batched_mm", "grouped_mm"]
    assert math.isnan(measured["variants"]["batched_mm"]["64_rows_ms"])
    assert measured["not_measured"] == ["batched_mm of 64 rows: it copies 0.001 GB of weights"]
    for name, row in measured["variants"].items():
        assert row["1_rows_ms"] > 0 and (row["64_rows_ms"] > 0 or name == "batched_mm")
