"""Other settings on a run that is resumed or finished: what would change the data or cannot apply is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import chat_sample
from rich.console import Console
from toy_runs import losses, stop_after, trainer

from train import checkpoint
from train.config import TrainConfig
from train.metrics import METRICS_FILE, read_metrics
from train.trainer import Trainer, train

Configure = Callable[..., TrainConfig]
Writer = Callable[..., Path]
EVERY = "checkpoint={every_steps: 2, keep_last: 2}"


@pytest.fixture
def stopped(configure: Configure) -> Configure:
    """`configure`, and a run that was stopped behind its checkpoint at step 4."""
    stop_after(trainer(configure(EVERY)), 5)
    return configure


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["seed=1"], "trained with seed 0, this run has 1, which changes the order of the data"),
        (["data.shuffle_buffer=7"], "data.shuffle_buffer 16, this run has 7, which changes the order of the data"),
        (["data.sources.1.weight=3"], "data.sources.chats.weight 2.0, this run has 3.0, which changes the order"),
        (["data.sources.0.max_samples=9"], "data.sources.captions.max_samples null, this run has 9, which changes"),
        (["data.sources.0.name=photos"], r"data.sources \['captions', 'chats'\], .* \['photos', 'chats'\]"),
        (["image_size=56"], "image_size 28, this run has 56, but"),
        (["trainable.vision=false"], "trainable.vision true, this run has false, but"),
        (["trainable.language=lora", "init_from={checkpoint: x, tower: null, language_model: null}"],
         "trainable.language true, this run has lora, but"),
        (["init_from={checkpoint: x, tower: null, language_model: null}"], "init_from.checkpoint null, .* has x"),
        (["steps=3"], "is at step 4, but this run has 3 steps"),
        (["steps=null", "epochs=1", "samples=80", "global_batch=16"], "global_batch 8, .* but the steps already done"),
        (["steps=null", "epochs=1", "samples=80", "batch_ramp=[[3, 4]]"], r"batch_ramp \[\], .* but the steps already"),
        (["data.sources.0.weight=[1, 2]"], r"captions.weight 1.0, this run has \[1.0, 2.0\], which changes the order"),
    ],
)  # fmt: skip
def test_what_would_lose_samples_or_cannot_apply_is_refused(
    stopped: Configure, overrides: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        train(stopped(EVERY, *overrides))
    assert "\n" not in str(caught.value) and "run_dir" in str(caught.value)


def test_added_and_missing_sources_are_refused(stopped: Configure, tmp_path: Path) -> None:
    for sources in (
        f"[{{name: chats, shards: '{tmp_path}/chats/*.tar', weight: 2.0}}]",
        f"[{{name: chats, shards: '{tmp_path}/chats/*.tar', weight: 2.0}}, "
        f"{{name: captions, shards: '{tmp_path}/captions/*.tar', format: caption}}]",
    ):
        with pytest.raises(ValueError, match=r"data.sources \['captions', 'chats'\], this run has \['chats'"):
            train(stopped(EVERY, f"data.sources={sources}"))


def test_what_applies_does_and_is_reported(stopped: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = stopped(EVERY, "lr.vision=7e-4", "optimizer.weight_decay=0.25", "optimizer.betas=[0.8, 0.9]", "steps=8")
    run = Trainer(config, Console(stderr=True, width=400))
    output = capsys.readouterr().err
    assert "From step 5 on:" in output and "lr.vision 0.0007 instead of 0.001" in output
    assert "steps 8 instead of 6" in output
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    assert groups["vision"]["peak_lr"] == 7e-4 and groups["language"]["peak_lr"] == 1e-3
    assert groups["vision"]["weight_decay"] == 0.25 and groups["vision, no decay"]["weight_decay"] == 0
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in groups.values())
    assert run.run() == 0 and len(losses(config)) == 8


def test_what_changes_later_may_be_added(stopped: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with `epochs`: the steps already done have the size that they had."""
    config = stopped(
        EVERY, "steps=null", "epochs=1", "samples=60", "batch_ramp=[[5, 4]]",
        "schedule={shape: wsd, warmup: 0, decay_fraction: 0.25}",
    )  # fmt: skip
    run = Trainer(config, Console(stderr=True, width=400))
    output = capsys.readouterr().err
    assert "From step 5 on:" in output and "schedule.shape wsd instead of cosine" in output
    assert "batch_ramp [[5, 4]] instead of []" in output and "steps 10 instead of 6" in output  # 5 x 8 + 5 x 4 samples
    assert run.run() == 0
    rows = read_metrics(Path(config.run_dir) / METRICS_FILE)
    assert [row["batch_size"] for row in rows] == [8] * 5 + [4] * 5
    assert [row["lr"]["vision"] for row in rows][4:] == pytest.approx([1e-3] * 5 + [0.5e-3])


def test_a_branch_of_a_constant_run_is_the_run_that_decays(configure: Configure, tmp_path: Path) -> None:
    """With the warm-up in steps, what is before the decay does not depend on the length of the run."""
    constant = configure(EVERY, f"run_dir={tmp_path}/constant", "schedule={shape: constant, warmup: 2}", "steps=100")
    stop_after(trainer(constant), 5)
    wsd = "schedule={shape: wsd, warmup: 2, decay_fraction: 0.34}"
    whole, branch = (configure(EVERY, f"run_dir={tmp_path}/{name}", wsd, "steps=6") for name in ("whole", "branch"))
    train(whole)
    shutil.copytree(tmp_path / "constant/step-00000004", tmp_path / "branch/step-00000004")
    train(branch)
    assert losses(branch) == losses(whole)[4:] and losses(constant)[:4] == losses(whole)[:4]


def test_the_same_settings_say_nothing(stopped: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = stopped(EVERY)
    Trainer(config, Console(stderr=True, width=400))
    assert "instead of" not in capsys.readouterr().err


def test_a_finished_run_with_other_settings_is_refused(configure: Configure, tmp_path: Path) -> None:
    final = train(configure("steps=1"))
    assert train(configure("steps=1", "log_every=3", "data.workers=1")) == final, "nothing that makes another model"
    for override, reason in (
        ("steps=2", "is finished already, with steps 1, this run has 2"),
        ("image_size=56", "image_size 28, this run has 56"),
        ("lr.vision=1", "lr.vision 0.001, this run has 1.0"),
        ("seed=3", "seed 0, this run has 3"),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*init_from.checkpoint={final}"):
            train(configure("steps=1", override) if "steps" not in override else configure(override))


def test_a_rank_that_changes_is_refused(configure: Configure, tmp_path: Path) -> None:
    base = train(configure(f"run_dir={tmp_path}/base", "steps=1"))
    settings = (
        f"init_from={{checkpoint: {base}, tower: null, language_model: null}}",
        "trainable.language=lora",
        EVERY,
    )
    stop_after(trainer(configure(*settings, "lora.rank=4")), 3)
    with pytest.raises(ValueError, match=r"lora\.rank 4, this run has 8, but the checkpoint's adapters"):
        train(configure(*settings, "lora.rank=8"))
    with pytest.raises(ValueError, match=r"trainable\.language lora, this run has true, but"):
        train(configure(settings[0], EVERY))
    moved = base.rename(tmp_path / "moved")
    assert train(configure(settings[0].replace(str(base), str(moved)), *settings[1:], "lora.rank=4")).is_dir()


def test_a_held_out_sample_that_is_too_long_or_broken_is_named_at_the_start(
    configure: Configure, tmp_path: Path, write_shard: Writer
) -> None:
    long = chat_sample(0)[1] | {"json": chat_sample(0)[1]["json"].replace(b"What", b"What and what " * 200)}
    for key, members, reason in (
        ("long", long, "held.tar long has a prompt of .* tokens or more, the model takes 511"),
        ("bad", {"png": b"x", "json": chat_sample(0)[1]["json"]}, "held.tar bad cannot be used"),
    ):
        write_shard(tmp_path / "held.tar", [chat_sample(1), (key, members)])
        with pytest.raises(ValueError, match=reason):
            trainer(configure(f"generations={{shards: {tmp_path}/held.tar, every_steps: 2, count: 2}}"))


def test_a_checkpoint_is_saved_before_answers_are_generated(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(EVERY, f"generations={{shards: {tmp_path}/chats/0.tar, every_steps: 2, count: 1}}")

    def fail(*_: Any) -> None:
        raise ValueError("no answer")

    monkeypatch.setattr(Trainer, "_generate", fail)
    with pytest.raises(ValueError, match="no answer"):
        train(config)
    assert [path.name for path in checkpoint.checkpoints(Path(config.run_dir))] == ["step-00000002"]


def test_a_checkpoint_due_at_a_skipped_step_is_saved_after_the_next(configure: Configure) -> None:
    run = trainer(configure(EVERY))
    accepts = run.guard.accepts
    run.guard.accepts = lambda norm: accepts(float("nan") if run.done_steps == 1 else norm)  # type: ignore[method-assign]
    saved: list[int] = []
    run.save = lambda *_, **__: saved.append(run.done_steps)  # type: ignore[method-assign]
    assert run.run() == 0
    assert saved == [3, 4]
