"""Runs in processes of their own: killed at any moment, on one rank and on two, and gone on with to the same end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import chat_sample
from processes import finish, said, start, wait_for
from rich.console import Console

from train import checkpoint
from train.config import TrainConfig, load_config
from train.data import StepBatch, StepLoader
from train.loop import Trainer
from train.optim import set_learning_rates_
from train.report import read_metrics

Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure_saved(configure: Configure, tmp_path: Path) -> Configure:
    """As `configure`, from a saved model: other processes do not know the toy tower."""
    torch.set_num_threads(1)
    run = Trainer(configure(), Console(quiet=True))
    run.save(tmp_path / "start", with_state=False)
    start_from = f"init_from={{checkpoint: {tmp_path}/start, tower: null, language_model: null}}"
    return lambda *overrides: configure(start_from, "log_samples=true", *overrides)


def rows(config: TrainConfig, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return read_metrics(Path(config.run_dir) / name)


def assert_same(config: TrainConfig, whole: TrainConfig, num_ranks: int = 1) -> None:
    """Samples, losses and norms, bit for bit."""
    for rank in range(num_ranks):
        assert rows(config, f"samples-{rank}.jsonl") == rows(whole, f"samples-{rank}.jsonl")
    keys = ("step", "loss", "loss_per_source", "grad_norm", "lr", "samples_seen")
    assert [[row[key] for key in keys] for row in rows(config)] == [[row[key] for key in keys] for row in rows(whole)]


def test_killed_at_any_moment_it_goes_on_exactly(configure_saved: Configure, tmp_path: Path) -> None:
    settings = ("steps=12", "data.workers=2", "log_every=3", "checkpoint={every_steps: 2, keep_last: 2}")
    whole = configure_saved(f"run_dir={tmp_path}/whole", *settings)
    assert finish(start(whole)) == [0]
    assert [row["step"] for row in rows(whole, "samples-0.jsonl")] == list(range(1, 13)) and len(rows(whole)) == 4

    config = configure_saved(*settings)
    run_dir = Path(config.run_dir)
    for moment in ("metrics.jsonl", ".step-00000004.tmp", ".step-00000008.tmp/model*", "step-00000010"):
        (process,) = start(config)
        wait_for(run_dir, moment, process)
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        assert finish([process]) == [-signal.SIGKILL]
    assert finish(start(config)) == [0], said(config).read_text()
    assert_same(config, whole)
    assert not list(run_dir.glob(".*"))


@pytest.fixture
def two_ranks(configure_saved: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    """A function (source, overrides) -> settings. `uneven` has three shards, of several sizes, for four streams; of
    the two shards of `halves` one has no picture at all."""
    for number, size in enumerate((5, 21, 13)):
        write_shard(tmp_path / f"uneven/{number}.tar", [chat_sample(30 * number + i) for i in range(size)])
    write_shard(tmp_path / "halves/0.tar", [chat_sample(7 * i + 6) for i in range(40)])
    write_shard(tmp_path / "halves/1.tar", [chat_sample(7 * i) for i in range(40)])
    few = "checkpoint={every_steps: 3, keep_last: 2}"
    return lambda name, *overrides: configure_saved(
        f"data.sources=[{{name: {name}, shards: '{tmp_path}/{name}/*.tar'}}]",
        "data.workers=2",
        "steps=8",
        few,
        *overrides,
    )


def one_process_losses(config: TrainConfig) -> list[float]:
    """The losses of one process that is given what both ranks have."""
    run = Trainer(config, Console(quiet=True))
    loaders = [
        iter(StepLoader(run.processor, config.data, config.max_tokens, config.seed, rank, 2, 4, config.micro_batch))
        for rank in range(2)
    ]
    losses = []
    for step in range(config.steps or 0):
        set_learning_rates_(run.optimiser, step, run.num_steps, config.warmup_ratio)
        one, other = (next(loader) for loader in loaders)
        per_source, _ = run.step(StepBatch([*one.micros, *other.micros], [], 0, {}, []))
        loss, count = per_source.sum(0).tolist()
        losses.append(loss / count)
    return losses


def test_two_ranks_learn_as_one_and_survive(two_ranks: Configure, tmp_path: Path) -> None:
    whole = two_ranks("uneven", f"run_dir={tmp_path}/whole")
    assert finish(start(whole, 2)) == [0, 0], said(whole, 1).read_text()
    expected = one_process_losses(two_ranks("uneven", f"run_dir={tmp_path}/one"))
    assert [row["loss"] for row in rows(whole)] == pytest.approx(expected, rel=1e-5)

    config = two_ranks("uneven")
    ranks = start(config, 2)
    wait_for(Path(config.run_dir), "step-00000003", ranks[0])
    os.kill(ranks[1].pid, signal.SIGKILL)  # type: ignore[arg-type]
    codes = finish(ranks)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0, "the other rank ends, too"
    assert finish(start(config, 2)) == [0, 0]
    assert_same(config, whole, num_ranks=2)


def test_a_rank_without_a_picture_learns_with_the_other(two_ranks: Configure, tmp_path: Path) -> None:
    settings = ("data.workers=1", "steps=4")
    config = two_ranks("halves", *settings)
    assert finish(start(config, 2)) == [0, 0], said(config, 1).read_text()
    shards = [
        {name.split()[0] for row in rows(config, f"samples-{rank}.jsonl") for name in row["samples"]} for rank in (0, 1)
    ]
    assert sorted(map(len, shards)) == [1, 1] and shards[0] != shards[1]
    expected = one_process_losses(two_ranks("halves", f"run_dir={tmp_path}/one", *settings))
    assert [row["loss"] for row in rows(config)] == pytest.approx(expected, rel=1e-5)


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(two_ranks: Configure) -> None:
    config = two_ranks("uneven", "steps=60", "checkpoint={every_steps: 1000, keep_last: 2}")
    run_dir = Path(config.run_dir)
    ranks = start(config, 2)
    wait_for(run_dir, "metrics.jsonl", ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)  # type: ignore[arg-type]
    assert finish(ranks) == [128 + signal.SIGTERM] * 2
    (saved,) = checkpoint.checkpoints(run_dir)
    step = int(saved.name[5:])
    again = load_config(saved / "config.yaml", [f"steps={step + 2}"])
    assert finish(start(again)) == [0]
    assert "2 ranks x 2 workers, this run has 1 x 2" in said(again).read_text()
    assert [row["step"] for row in rows(again)] == list(range(1, step + 3))
    assert [row["step"] for row in rows(again, "samples-1.jsonl")] == list(range(1, step + 1))


def test_a_rank_without_samples_stops_all_with_one_line(two_ranks: Configure, tmp_path: Path, write_shard: Any) -> None:
    write_shard(tmp_path / "few/0.tar", [chat_sample(0)])
    config = two_ranks("few", "data.workers=1")
    assert finish(start(config, 2)) == [2, 2]
    lines = [said(config, rank).read_text().splitlines()[-1] for rank in range(2)]
    assert lines[0] == lines[1] and lines[0].startswith("error: ") and "hold no sample for this worker" in lines[0]
