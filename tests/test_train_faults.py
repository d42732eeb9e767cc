"""What must not spoil a run: damaged checkpoints, a full disk, signals, gradients that are no numbers, dead workers."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children, current_process
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from toy_runs import losses, step_once, stop_after, trainer

from train import checkpoint
from train.config import SpikeGuardConfig, TrainConfig
from train.metrics import read_metrics
from train.spike_guard import DivergedError, SpikeGuard
from train.trainer import Trainer, train
from yi_vl.model import YiVLForConditionalGeneration

Configure = Callable[..., TrainConfig]
EVERY_STEP = "checkpoint={every_steps: 1, keep_last: 3}"


def damage(path: Path) -> None:
    """One bit of a file, in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_left_for_the_one_before(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = configure(f"run_dir={tmp_path}/whole", EVERY_STEP, "log_every=4")
    train(whole)
    config = configure(EVERY_STEP, "log_every=4")
    stop_after(trainer(config), 5)
    run_dir = Path(config.run_dir)
    assert [path.name for path in checkpoint.checkpoints(run_dir)] == [f"step-{step:08d}" for step in (3, 4, 5)]
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=run_dir / "step-00000005").returncode == 0
    damage(run_dir / "step-00000005/model.safetensors")
    (run_dir / "step-00000004/training_state.pt").unlink()
    capsys.readouterr()
    train(config)
    output = capsys.readouterr().err
    for step, name in ((5, "model.safetensors is not as it was written"), (4, "training_state.pt")):
        assert f"step-0000000{step} is damaged" in output and name in output
    assert f"resuming from {run_dir}/step-00000003 instead" in output
    assert losses(config) == losses(whole)
    assert (run_dir / "damaged-step-00000005").is_dir()


def test_when_all_checkpoints_are_damaged_nothing_is_started_again(configure: Configure) -> None:
    config = configure(EVERY_STEP)
    stop_after(trainer(config), 2)
    for path in checkpoint.checkpoints(Path(config.run_dir)):
        (path / "SHA256SUMS").write_text("")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"No checkpoint in .* is whole .*SHA256SUMS is empty.*delete"):
            train(config)


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """A function that makes files larger than so many bytes fail to be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100_000, 500_000])  # of 0.4 MB of weights and 0.7 MB of state
def test_a_full_disk_leaves_the_old_checkpoint(
    configure: Configure, small_disk: Callable[[int], None], size: int
) -> None:
    config = configure(EVERY_STEP)
    run = trainer(config)
    stop_after(run, 2)
    run_dir = Path(config.run_dir)
    before = {path: path.read_bytes() for path in (run_dir / "step-00000002").iterdir()}
    small_disk(size)
    with pytest.raises(ValueError, match=r"step-00000003 cannot be written: .*earlier ones are untouched"):
        run.save(run_dir / "step-00000003", with_state=True)
    assert {path: path.read_bytes() for path in (run_dir / "step-00000002").iterdir()} == before
    assert not list(run_dir.glob(".*")) and not (run_dir / "step-00000003").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    settings = ("log_every=3", "log_samples=true")
    whole = configure(f"run_dir={tmp_path}/whole", *settings)
    train(whole)
    config = configure(*settings)
    usual = signal.getsignal(number)
    update = Trainer._update

    def signalled(run: Trainer, norm: float) -> None:
        update(run, norm)
        if run.done_steps == 3:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(Trainer, "_update", signalled)
        train(config)
    assert left.value.code == 128 + number and signal.getsignal(number) is usual
    assert [path.name for path in checkpoint.checkpoints(Path(config.run_dir))] == ["step-00000004"]
    output = capsys.readouterr().err
    assert f"{number.name} at step 4: The last good checkpoint is" in output and "step-00000004" in output
    train(config)
    assert losses(config) == losses(whole), "the first of two log lines reaches over the stop"
    for name in ("samples-0.jsonl", "metrics.jsonl"):
        rows, expected = (read_metrics(Path(run.run_dir) / name) for run in (config, whole))
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
    assert rows != [] and read_metrics(tmp_path / "run/samples-0.jsonl") == read_metrics(
        tmp_path / "whole/samples-0.jsonl"
    )


def test_a_signal_to_every_process_leaves_the_workers_to_the_trainer(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure("data.workers=2")
    update = Trainer._update

    def signalled(run: Trainer, norm: float) -> None:
        update(run, norm)
        if run.done_steps == 2:
            # From another process: torch takes a signal from the trainer itself as its own.
            subprocess.run(["kill", *(str(process.pid) for process in (*active_children(), current_process()))])
            time.sleep(0.3)

    monkeypatch.setattr(Trainer, "_update", signalled)
    with pytest.raises(SystemExit) as left:
        train(config)
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in checkpoint.checkpoints(Path(config.run_dir))] == ["step-00000003"]
    gc.collect()
    assert not active_children()


class Poisoned(torch.nn.Module):
    """An objective whose loss is multiplied by something in some steps."""

    def __init__(self, run: Trainer, steps: set[int], poison: float = torch.nan) -> None:
        super().__init__()
        self.run, self.steps, self.poison, self.inside = [run], steps, poison, run.objective

    def forward(self, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, per_source = self.inside(**inputs)
        factor = self.poison if self.run[0].done_steps in self.steps else 1.0
        return loss * factor, per_source * factor

    def take_expert_sums(self) -> None:
        return None


@pytest.mark.parametrize("poison", [torch.nan, 1e25], ids=["no number", "an infinite norm"])
def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(configure: Configure, poison: float) -> None:
    config = configure("spike_guard.stop_after=2")
    run = trainer(config)
    run.objective = Poisoned(run, {2, 4}, poison)
    real_step, changed = run.step, []

    def step(batch: Any, num_supervised: int) -> Any:
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        result = real_step(batch, num_supervised)
        changed.append(any(not torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items()))
        return result

    run.step = step  # type: ignore[method-assign]
    assert run.run() == 0
    assert changed == [True, True, False, True, False, True]
    rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    assert [(row["step"], row["steps_skipped"]) for row in rows] == [(1, 0), (2, 0), (4, 1), (6, 2)]


def test_too_many_skipped_steps_stop_the_run_and_name_the_checkpoint(configure: Configure) -> None:
    config = configure("spike_guard.stop_after=2", EVERY_STEP)
    run = trainer(config)
    run.objective = Poisoned(run, {3, 4, 5})
    with pytest.raises(
        DivergedError, match=r"2 consecutive steps were skipped.* is nan.*last good checkpoint is .*step-00000003;"
    ):
        run.run()
    model = YiVLForConditionalGeneration.from_pretrained(Path(config.run_dir) / "step-00000003")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_an_outlying_gradient_norm_is_skipped() -> None:
    guard = SpikeGuard(SpikeGuardConfig(max_norm_ratio=10, stop_after=3))
    assert guard.accepts(1e6), "nothing is unusual at the beginning"
    assert all(guard.accepts(1.0 + step % 2) for step in range(30))
    other = SpikeGuard(SpikeGuardConfig(max_norm_ratio=10, stop_after=3))
    other.load_state_dict(guard.state_dict())
    for judge in (guard, other):
        assert judge.accepts(9.0) and not judge.accepts(21.0) and not judge.accepts(float("inf"))
        assert not judge.should_stop and not judge.accepts(float("nan")) and judge.should_stop
        assert judge.accepts(1.0) and judge.num_skipped == 3 and not judge.should_stop
    lenient = SpikeGuard(SpikeGuardConfig(max_norm_ratio=None))
    assert all(lenient.accepts(10.0**step) for step in range(30))


def test_an_overflow_of_fp16_is_the_scalers_business(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(configure())
    monkeypatch.setattr(run.accelerator, "native_amp", True)
    monkeypatch.setattr(run.accelerator.state, "_mixed_precision", "fp16")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.accelerator.scaler = scaler
    run.optimizer = AcceleratedOptimizer(run.optimizer.optimizer, device_placement=False, scaler=scaler)
    run.accelerator._optimizers = [run.optimizer]
    run.objective = Poisoned(run, {0, 1, 2})
    batches = iter(run.loader)
    for scale, skipped in ((2.0, 0), (1.0, 0), (0.5, 1)):  # from 1 on the scale is not what overflows
        step_once(run, batches)
        assert (scaler.get_scale(), run.guard.num_skipped) == (scale, skipped)
        run.done_steps += 1
    run.guard._norms.extend([1e-9] * 50)
    step_once(run, batches)
    assert run.guard.num_skipped == 2
    run.guard._norms.extend([1.0] * 100)
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    run.optimizer.param_groups[0]["lr"] = 1e-3
    step_once(run, batches)
    assert run.guard.num_consecutive == 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in run.model.named_parameters())


def test_a_worker_that_dies_is_one_line(configure: Configure) -> None:
    config = configure("data.workers=1", EVERY_STEP, "steps=50")
    run = trainer(config)
    real_step = run.step

    def step(batch: Any, num_supervised: int) -> Any:
        if run.done_steps == 2:
            (worker,) = torch.multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
        return real_step(batch, num_supervised)

    run.step = step  # type: ignore[method-assign]
    with pytest.raises(
        ValueError,
        match=r"A data worker died: .*(Killed|exited unexpectedly).* lower data.workers .*step-0000000\d; started",
    ):
        run.run()


@pytest.mark.parametrize("error", [ConnectionResetError(), EOFError(), FileNotFoundError()])
def test_a_worker_that_dies_while_it_sends_a_batch_is_one_line(
    configure: Configure, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket that its tensors come through may be closed before SIGCHLD arrives."""
    run = trainer(configure("data.workers=1", "steps=3"))
    monkeypatch.setattr("time.sleep", lambda _: None)

    def receive(_: Any) -> Any:
        raise error

    monkeypatch.setattr(type(run.loader._loader), "__iter__", receive)
    with pytest.raises(ValueError, match=r"A data worker died: DataLoader worker: it was lost .* lower data.workers"):
        run.run()
