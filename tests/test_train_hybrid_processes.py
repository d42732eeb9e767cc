"""A decoder of experts on two ranks: the balance over ranks, DDP and FSDP beside one process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hybrid import Configure, configure_hybrid, text_config
from processes import finish, output_path, start
from test_train_processes import launched, logged, one_process, rows


@pytest.fixture
def hybrid(configure: Configure, tmp_path: Path) -> Configure:
    return configure_hybrid(configure, tmp_path / "start")


@pytest.fixture
def two_ranks(hybrid: Configure, tmp_path: Path) -> Configure:
    return lambda *overrides: hybrid(
        f"data.sources=[{{name: chats, shards: '{tmp_path}/chats/*.tar'}}]", "data.workers=1", "log_samples=true",
        "steps=4", "experts={top_p: 0.4, top_p_from_step: 2, balance_weights: [0, 1, 1]}", *overrides,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
def test_two_ranks_learn_as_one(two_ranks: Configure, tmp_path: Path, parallelism: str) -> None:
    """With auxiliary losses, but the balance over ranks, which one process does not have; and with metrics that a
    resumed run has as well."""
    expected = one_process(two_ranks(f"run_dir={tmp_path}/one"))
    config = two_ranks("checkpoint={every_steps: 3, keep_last: 1}")
    environment = launched(parallelism) if parallelism == "fsdp" else {}
    assert finish(start(config, 2, **environment)) == [0, 0], output_path(config, 1).read_text()
    assert logged(config) == pytest.approx(expected, rel=2e-4)
    final = Path(config.run_dir) / "final"
    assert text_config(final)["router_top_p"] == 0.4
    tokens = [row["experts"]["experts_per_token"] for row in rows(config)]
    assert tokens[0] == [2.0] * 4 and all(number < 2 for number in tokens[-1])
    before = [(row["loss"], row["experts"]) for row in rows(config)]
    os.rename(final, final.with_name("first"))
    assert finish(start(config, 2, **environment)) == [0, 0], output_path(config, 1).read_text()
    assert [(row["loss"], row["experts"]) for row in rows(config)] == before


@pytest.mark.slow
def test_spread_weights_learn_from_a_teacher(two_ranks: Configure, tmp_path: Path) -> None:
    """Which is whole on each rank."""
    settings = (f"distill.teacher={tmp_path}/start", "trainable.language=['*.self_attn.*', '*.gate.*']")
    expected = one_process(two_ranks(f"run_dir={tmp_path}/one", *settings))
    config = two_ranks(*settings)
    assert finish(start(config, 2, **launched("fsdp"))) == [0, 0], output_path(config, 1).read_text()
    assert logged(config) == pytest.approx(expected, rel=2e-4)
