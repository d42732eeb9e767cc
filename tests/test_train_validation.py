"""The held-out loss: what it is, that it changes nothing, and that the best checkpoint by it is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import caption_sample, chat_sample
from rich.console import Console
from toy_runs import losses, stop_after, trainer

import yi_vl
from train import checkpoint
from train.config import TrainConfig
from train.data.batch import num_supervised
from train.loss_curve import draw_loss_curve
from train.metrics import read_metrics, validation_rows
from train.trainer import Trainer, train
from train.validation import Validation
from yi_vl.model import YiVLForConditionalGeneration

Configure = Callable[..., TrainConfig]
Writer = Callable[..., Path]


@pytest.fixture
def held_out(configure: Configure, tmp_path: Path, write_shard: Writer) -> Configure:
    """`configure` with a validation of two sources, 5 + 3 samples at every second step."""
    write_shard(tmp_path / "held/chats.tar", [chat_sample(500 + i) for i in range(20)])
    write_shard(tmp_path / "held/captions.tar", [caption_sample(500 + i) for i in range(20)])
    sources = (
        f"[{{name: chats, shards: {tmp_path}/held/chats.tar}}, "
        f"{{name: held captions, shards: {tmp_path}/held/captions.tar, format: caption, max_samples: 3}}]"
    )
    return lambda *overrides: configure(f"validation={{sources: {sources}, every_steps: 2, samples: 5}}", *overrides)


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    return validation_rows(read_metrics(Path(config.run_dir) / "metrics.jsonl"))


def final_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return YiVLForConditionalGeneration.from_pretrained(Path(config.run_dir) / "final").state_dict()


@pytest.mark.parametrize("overrides", [(), ("neftune=5", "data.workers=1", "trainable.vision=false")])
def test_a_run_with_it_learns_the_same_to_the_last_bit(
    configure: Configure, held_out: Configure, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    plain, validated = configure(f"run_dir={tmp_path}/plain", *overrides), held_out(*overrides)
    train(plain)
    train(validated)
    assert losses(validated) == losses(plain)
    expected, weights = final_weights(plain), final_weights(validated)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [row["step"] for row in rows(validated)] == [0, 2, 4, 6] and not rows(plain)
    curve = [row["validation_loss"] for row in rows(validated)]
    assert curve[-1] < curve[0], "the toy learns"
    for row in rows(validated):
        per_source = row["validation_loss_per_source"]
        assert list(per_source) == ["chats", "held captions"]
        assert row["validation_loss"] == pytest.approx(sum(per_source.values()) / 2)


def measured(config: TrainConfig) -> dict[str, Any]:
    run = trainer(config)
    assert run.validation is not None
    return run.validation.measure(run.accelerator, run.objective, run._inputs)


def test_it_is_the_mean_loss_of_a_supervised_token(held_out: Configure) -> None:
    run = trainer(held_out())
    assert run.validation is not None
    row = run.validation.measure(run.accelerator, run.objective, run._inputs)
    reference = YiVLForConditionalGeneration(run.model.config).eval()
    reference.load_state_dict(run.model.state_dict())
    reference.model.language_model.set_attn_implementation("eager")
    sums = [[0.0, 0], [0.0, 0]]
    for index, batch in enumerate(run.validation._batches):
        inputs = run._inputs(batch)
        loss = reference(
            input_ids=batch.input_ids,
            pixel_values=inputs["pixel_values"],
            labels=batch.labels,
            num_items_in_batch=torch.tensor(1),
        ).loss
        sums[index >= 5][0] += loss.item()
        sums[index >= 5][1] += num_supervised(batch.labels)
    expected = [total / count for total, count in sums]
    assert list(row["validation_loss_per_source"].values()) == pytest.approx(expected, rel=1e-5)


def test_micro_batches_workers_and_the_data_trained_on_do_not_matter(held_out: Configure, tmp_path: Path) -> None:
    first = measured(held_out())
    other = measured(held_out("micro_batch=3", "data.workers=2", "data.shuffle_buffer=3", f"run_dir={tmp_path}/other"))
    assert first == other


def test_ranks_divide_the_samples_and_give_the_same_sum(held_out: Configure) -> None:
    run = trainer(held_out())
    whole = Validation(run.config, run.processor)
    loss_of = {name: float(index) for index, name in enumerate(whole.names)}
    for world_size in (2, 3, 5, 8, 20):
        parts = [Validation(run.config, run.processor, rank, world_size) for rank in range(world_size)]
        assert {len(part._batches) for part in parts} == {-(-8 // world_size)}, "as many forward passes on each"
        counted = [part._batches[: len(whole.names[rank::world_size])] for rank, part in enumerate(parts)]
        assert sum(map(len, counted)) == 8
        for rank, batches in enumerate(counted):
            for batch, index in zip(batches, range(rank, 8, world_size), strict=True):
                assert torch.equal(batch.input_ids, whole._batches[index].input_ids)
    scrambled = whole._means([loss_of[name] for name in whole.names])
    assert scrambled["validation_loss_per_source"]["chats"] == 10 / sum(whole._num_terms[:5])


def test_broken_and_long_samples_are_counted_and_named(
    configure: Configure, tmp_path: Path, write_shard: Writer
) -> None:
    long = chat_sample(0)[1] | {"json": chat_sample(0)[1]["json"].replace(b"What", b"What and what " * 200)}
    bad = {"png": b"x", "json": chat_sample(0)[1]["json"]}
    write_shard(tmp_path / "held.tar", [chat_sample(1), ("long", long), ("bad", bad), chat_sample(2), chat_sample(3)])
    settings = "validation={{sources: [{{name: {0}, shards: {1}}}], every_steps: 2, samples: {2}}}"
    run = trainer(configure(settings.format("words", tmp_path / "held.tar", 3)))
    assert run.validation is not None and [name.split()[-1] for name in run.validation.names] == [
        "q00001", "q00002", "q00003",
    ]  # fmt: skip
    text = "\n".join(run.validation.reports)
    assert "held.tar long: skipped, " in text and "max_tokens is 400" in text
    assert "held.tar bad: skipped, " in text and "3 of 3 samples, 1 broken, 1 too long" in text
    fewer = trainer(configure(settings.format("words", tmp_path / "held.tar", 9)))
    assert fewer.validation is not None and "words: 3 of 9 samples" in fewer.validation.reports[-1]
    trained_on = trainer(configure(settings.format("words", tmp_path / "chats/0.tar", 1)))
    assert trained_on.validation is not None and "are trained on too" in trained_on.validation.reports[-1]

    write_shard(tmp_path / "held.tar", [("long", long), ("bad", bad)])
    with pytest.raises(ValueError, match="'words' has no sample that can be used, 1 broken, 1 too long"):
        trainer(configure(settings.format("words", tmp_path / "held.tar", 1)))
    with pytest.raises(ValueError, match=r"validation\.sources: 'words' names .*none.tar, and there is no such shard"):
        train(configure(settings.format("words", tmp_path / "none.tar", 1)))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("validation={sources: []}", "validation.sources is empty"),
        ("validation={every_steps: 5}", "validation.sources is missing"),
        ("validation={sources: [{name: a, shards: b}], every_steps: 0}", "validation.every_steps is 0"),
        ("validation={sources: [{name: a, shards: b}], samples: -1}", "validation.samples is -1"),
        ("validation={sources: [{name: a, shards: b}, {name: a, shards: c}]}", r"names repeat \(a, a\)"),
        ("validation={sources: [{name: a, shards: b, max_samples: 0}]}", "validation.sources.a.max_samples is 0"),
        ("validation={sources: [{name: a, shards: b, format: poem}]}", "validation.sources.a.format is 'poem'"),
        ("validation={sources: [{name: a, shards: b, weight: 1}]}", "unknown key .*weight"),
        ("validation={sources: [{name: a}]}", "validation.sources.0..shards is missing"),
        ("checkpoint.keep_best=true", "keep_best is true, but there is no validation"),
        ("neftune=-1", "neftune is -1.0"),
        ("neftune=.inf", "neftune is inf"),
    ],
)
def test_a_wrong_setting_is_refused_and_named(configure: Configure, override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        configure(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stopped_in", ["a step", "the measurement"])
def test_a_stopped_run_logs_what_a_whole_one_does(
    held_out: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str
) -> None:
    """Between the checkpoint of step 4 and its validation, too."""
    settings = ("checkpoint={every_steps: 2, keep_last: 1}", "neftune=5")
    whole, stopped = held_out(f"run_dir={tmp_path}/whole", *settings), held_out(*settings)
    train(whole)
    run = trainer(stopped)
    if stopped_in == "a step":
        stop_after(run, 5)
    else:
        measure = Validation.measure

        def stop_at_4(*arguments: Any) -> Any:
            if run.done_steps == 4:
                raise KeyboardInterrupt
            return measure(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Validation, "measure", stop_at_4)
            with pytest.raises(KeyboardInterrupt):
                run.run()
        assert [row["step"] for row in rows(stopped)] == [0, 2]
    train(stopped)
    assert losses(stopped) == losses(whole) and rows(stopped) == rows(whole)
    expected, weights = final_weights(whole), final_weights(stopped)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_it_is_printed_drawn_and_tracked(
    held_out: Configure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import pyplot
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = held_out("steps=2", "trackers=[tensorboard]")
    train(config)
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation loss" in line]
    first, last = rows(config)
    assert [line.split("  ")[0] for line in lines] == ["step 0/2", "step 2/2"]
    assert f"validation loss {last['validation_loss']:.4f}  (chats " in lines[1]
    (events,) = Path(config.run_dir, "yi_vl").glob("events.out.tfevents.*")
    scalars = EventAccumulator(str(events)).Reload()
    assert [event.value for event in scalars.Scalars("validation_loss")] == pytest.approx(
        [first["validation_loss"], last["validation_loss"]]
    )
    assert "validation_loss_per_source/held captions" in scalars.Tags()["scalars"]

    labels: list[Any] = []
    monkeypatch.setattr(pyplot, "close", lambda figure: labels.extend(figure.axes[0].get_lines()))
    draw_loss_curve(Path(config.run_dir))
    drawn = {line.get_label(): list(line.get_ydata()) for line in labels}
    assert drawn["held out"] == [first["validation_loss"], last["validation_loss"]]
    assert {"all", "captions", "chats", "held out: chats", "held out: held captions"} <= set(drawn)


def test_a_loss_that_is_not_finite_is_null(held_out: Configure) -> None:
    run = trainer(held_out())
    assert run.validation is not None
    with torch.no_grad():
        run.model.lm_head.weight.fill_(torch.nan)
    row = run.validation.measure(run.accelerator, run.objective, run._inputs)
    assert row["validation_loss"] is None
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def set_losses(monkeypatch: pytest.MonkeyPatch, *by_step: float | None) -> None:
    """Measure these losses instead, at the start and at every second step."""
    left = list(by_step)

    def measure(*_: Any) -> dict[str, Any]:
        loss = left.pop(0)
        return {"validation_loss": loss, "validation_loss_per_source": {"chats": loss}}

    monkeypatch.setattr(Validation, "measure", measure)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if path.is_dir())


def test_the_best_checkpoint_survives_and_is_a_model(held_out: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = held_out("steps=8", "checkpoint={every_steps: 3, keep_last: 1, keep_best: true}", "log_samples=true")
    run_dir = Path(config.run_dir)
    set_losses(monkeypatch, 1.0, 3.0, 2.0, None, 2.5)
    train(config)
    assert names(run_dir) == ["best", "final", "step-00000004", "step-00000006"]
    best = checkpoint.best_checkpoint(run_dir)
    assert best == run_dir / "step-00000004", "of the steps, not of the start; not of 3, which is only a checkpoint"
    loaded = yi_vl.load(run_dir / "best", dtype=torch.float32, device="cpu").model.state_dict()
    state = YiVLForConditionalGeneration.from_pretrained(run_dir / "step-00000004").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    shutil.rmtree(run_dir / "final")
    assert Trainer(config, Console(quiet=True)).done_steps == 6, "a run resumes from the newest"


def test_the_last_step_may_be_the_best(held_out: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = held_out("steps=4", "checkpoint={every_steps: 100, keep_last: 1, keep_best: true}")
    set_losses(monkeypatch, 9.0, 3.0, 1.0)
    final = train(config)
    best, last = (
        YiVLForConditionalGeneration.from_pretrained(path).state_dict() for path in (final.parent / "best", final)
    )
    assert all(torch.equal(best[name], last[name]) for name in last)
    assert names(final.parent) == ["best", "final", "step-00000004"]


@pytest.mark.parametrize("moment", ["before it is saved", "before the link is set"])
def test_a_run_that_was_killed_keeps_the_best(
    held_out: Configure, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = held_out("checkpoint={every_steps: 2, keep_last: 1, keep_best: true}")
    run_dir = Path(config.run_dir)
    set_losses(monkeypatch, 9.0, 3.0, 1.0, 2.0)
    with monkeypatch.context() as patch:
        run = trainer(config)
        target = "is_best" if moment == "before it is saved" else "mark_best"
        real = getattr(checkpoint, target)

        def stop_at_4(*arguments: Any) -> Any:
            if run.done_steps == 4:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(checkpoint, target, stop_at_4)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    assert checkpoint.best_checkpoint(run_dir) == run_dir / "step-00000002", "the one before is still whole"
    yi_vl.load(run_dir / "best", device="cpu")
    train(config)
    assert checkpoint.best_checkpoint(run_dir) == run_dir / "step-00000004"
    assert names(run_dir) == ["best", "final", "step-00000004"]


def test_a_copied_run_goes_on(held_out: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs that copy folders follow links, and `best` is then a folder."""
    settings = "checkpoint={every_steps: 2, keep_last: 1, keep_best: true}"
    set_losses(monkeypatch, 9.0, 3.0, 1.0)
    stop_after(trainer(held_out(settings)), 5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (tmp_path / "copy/best").is_symlink()
    set_losses(monkeypatch, 0.5)
    train(held_out(settings, f"run_dir={tmp_path}/copy"))
    assert checkpoint.best_checkpoint(tmp_path / "copy") == tmp_path / "copy/step-00000006"


def test_other_samples_cannot_choose_the_best_of_one_run(held_out: Configure) -> None:
    settings = "checkpoint={every_steps: 2, keep_last: 1, keep_best: true}"
    stop_after(trainer(held_out(settings)), 3)
    with pytest.raises(ValueError, match=r"validation\.samples 5, this run has 4, but checkpoint\.keep_best compares"):
        train(held_out(settings, "validation.samples=4"))
    train(held_out(settings, "validation.every_steps=3"))
    assert [row["step"] for row in rows(held_out())] == [0, 2, 3, 6]
