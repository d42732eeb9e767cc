"""Gated cross-attention on two ranks, one of which has no image: with DDP and FSDP the same as on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import chat_sample
from processes import finish, output_path, start
from rich.console import Console
from safetensors.torch import load_file
from test_cross_attention_training import FROZEN, SETTING
from test_train_processes import launched, logged, one_process

from train.config import TrainConfig
from train.trainer import Trainer
from yi_vl.decoder.cross_attention import CROSS_BLOCK
from yi_vl.decoder.gated import cross_blocks

pytestmark = pytest.mark.slow

Configure = Callable[..., TrainConfig]


@pytest.fixture
def halves(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    """Settings of runs on two shards, of which one has no image at all, from a saved model whose gates are open."""
    run = Trainer(configure(SETTING), Console(quiet=True))
    for block in cross_blocks(run.model.model.language_model):
        torch.nn.init.constant_(block.attention_gate, 0.5)  # type: ignore[arg-type]
        torch.nn.init.constant_(block.mlp_gate, 0.5)  # type: ignore[arg-type]
    run.save(tmp_path / "start", with_state=False)
    write_shard(tmp_path / "halves/0.tar", [chat_sample(7 * i + 6) for i in range(40)])
    write_shard(tmp_path / "halves/1.tar", [chat_sample(7 * i) for i in range(40)])
    return lambda *overrides: configure(
        f"init_from={{checkpoint: {tmp_path}/start, tower: null, language_model: null}}",
        f"data.sources=[{{name: halves, shards: '{tmp_path}/halves/*.tar'}}]",
        "data.workers=1",
        "steps=4",
        *overrides,
    )


@pytest.mark.parametrize("trained", [FROZEN, "trainable.vision=true"])
def test_two_ranks_learn_as_one(halves: Configure, tmp_path: Path, trained: str) -> None:
    expected = one_process(halves(f"run_dir={tmp_path}/one", trained))
    before = load_file(tmp_path / "start/model.safetensors")
    for name, environment in (("ddp", {}), ("fsdp", launched("fsdp"))):
        config = halves(f"run_dir={tmp_path}/{name}", trained)
        assert finish(start(config, 2, **environment)) == [0, 0], output_path(config, 1).read_text()
        assert logged(config) == pytest.approx(expected, rel=1e-4)
        after = load_file(Path(config.run_dir) / "final/model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert any(CROSS_BLOCK in name for name in moved)
        if trained == FROZEN:
            assert all(CROSS_BLOCK in name or "multi_modal_projector" in name for name in moved)
