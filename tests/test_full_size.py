"""The full-size measurement, at a size that a test can afford: the same files, the same two processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import CONTEXT
from tiny import OFFICIAL, tiny_config

from eval.speed import full_size
from yi_vl.checkpoint import largest_difference, open_checkpoint
from yi_vl.config import YiVLConfig

pytestmark = pytest.mark.slow


def _small(_: str) -> YiVLConfig:
    config = tiny_config(max_position_embeddings=1024)
    config.image_token_id = config.text_config.vocab_size
    return config


def test_a_random_release_is_made_loaded_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "preset", _small)
    monkeypatch.setattr(full_size.multiprocessing, "get_context", lambda method: CONTEXT)  # starts soon
    folder = tmp_path / "release"
    full_size.make(folder, "6b", OFFICIAL / "checkpoint")
    made = open_checkpoint(folder)
    assert made.layout == "official" and made.dtype == torch.bfloat16
    assert {t.dtype for name, t in made.tensors.items() if ".vision_tower." in name} == {torch.float32}
    assert largest_difference(made)[0] == 0.0
    result = full_size.measure(folder, OFFICIAL / "wide.png", 2)
    assert {"weights", "loading", "peak memory, loading", "answer"} <= result.keys()
    assert all(any(name.startswith(what) for name in result) for what in ("prefill, ", "decoding, "))
    sent: list[dict[str, str]] = []
    for scheme in (None, "int8"):  # in this process
        full_size._measure(folder, OFFICIAL / "wide.png", 2, scheme, SimpleNamespace(send=sent.append))
    assert [measured["weights"] for measured in sent] == [result["weights"], "0.00 GB in int8"]
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer cannot be loaded"):
        full_size.measure(folder, OFFICIAL / "wide.png", 2)
