"""What changes over a run: learning rates and batch sizes as functions of the step, their settings, what is shown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from matplotlib import pyplot
from rich.console import Console
from toy_runs import trainer

from train import metrics
from train.config import ComponentScheduleConfig, ScheduleConfig, TrainConfig, num_steps
from train.config_file import load_config
from train.describe import describe_batches, schedule_lines
from train.loss_curve import draw_schedule
from train.metrics import Reporter, read_metrics
from train.optim import learning_rates, set_learning_rates_
from train.schedule import (
    BatchSizes,
    component_schedule,
    learning_rate_factor,
    mean_fractions,
    run_progress,
    source_weights,
)
from train.trainer import train

ROOT = Path(__file__).parents[1]
NANO = ROOT / "train/configs/nano/align-224.yaml"
Configure = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (ScheduleConfig("cosine", 0.1), 100, {0: 0.1, 8: 0.9, 9: 1, 10: 1, 40: 0.75, 55: 0.5, 70: 0.25, 100: 0}),
        (ScheduleConfig("cosine", 10, final=0.2), 100, {0: 0.1, 9: 1, 55: 0.6, 100: 0.2}),
        (ScheduleConfig("linear", 10), 110, {4: 0.5, 10: 1, 35: 0.75, 60: 0.5, 109: 0.01, 110: 0}),
        (ScheduleConfig("linear", 0, final=0.5), 100, {0: 1, 50: 0.75, 100: 0.5}),
        (ScheduleConfig("constant", 4), 100, {0: 0.25, 1: 0.5, 3: 1, 4: 1, 50: 1, 99: 1}),
        (ScheduleConfig("constant", 0), 100, {0: 1, 99: 1}),
        (ScheduleConfig("wsd", 5, 0.2, 0.1), 100, {0: 0.2, 4: 1, 5: 1, 79: 1, 80: 1, 90: 0.55, 99: 0.145, 100: 0.1}),
        (ScheduleConfig("wsd", 0.5, 0.5), 10, {0: 0.2, 4: 1, 5: 1, 6: 0.8, 9: 0.2}),
        (ScheduleConfig("wsd", 0, 1.0), 10, {0: 1, 5: 0.5}),
        (ScheduleConfig("cosine", 1), 4, {0: 1, 1: 1, 2: 0.75, 3: 0.25}),  # one step of warm-up, not all of them
        (ScheduleConfig("wsd", 0, 0.1), 1, {0: 1}),
    ],
)
def test_factors(schedule: ScheduleConfig, steps: int, expected: dict[int, float]) -> None:
    factors = {step: learning_rate_factor(step, steps, schedule) for step in expected}
    assert factors == pytest.approx(expected, abs=1e-15)
    assert all(factors[step] == 1 for step, factor in expected.items() if factor == 1), "exactly the peak"


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.03), (7, 0.03), (600, 0.03), (997, 0.1), (50, 0.0), (3, 0.9)])
def test_the_default_is_to_the_last_bit_what_it_was(steps: int, warmup: float) -> None:
    for step in range(steps):
        num_warmup = int(steps * warmup)
        progress = (step - num_warmup) / max(1, steps - num_warmup)
        before = (step + 1) / num_warmup if step < num_warmup else 0.5 * (1 + math.cos(math.pi * progress))
        assert learning_rate_factor(step, steps, ScheduleConfig(warmup=warmup)) == before


def test_a_component_differs_where_it_says() -> None:
    schedule = ScheduleConfig("wsd", 10, 0.2, 0.1, vision=ComponentScheduleConfig(shape="constant", warmup=0.0))
    vision, language = (component_schedule(schedule, name) for name in ("vision", "language"))
    assert (vision.shape, vision.warmup, vision.decay_fraction, vision.final) == ("constant", 0.0, 0.2, 0.1)
    assert (language.shape, language.warmup, language.decay_fraction, language.final) == ("wsd", 10, 0.2, 0.1)


def test_the_optimizer_has_the_rates_of_its_components(configure: Configure) -> None:
    config = configure(
        "schedule={shape: constant, warmup: 2, vision: {warmup: 4}, projector: {shape: linear, warmup: 0}}",
        "lr={vision: 4.0, projector: 6.0, language: 2.0}",
    )  # fmt: skip
    run = trainer(config)
    expected = {"vision": [1, 2, 3, 4, 4, 4], "projector": [6, 5, 4, 3, 2, 1], "language": [1, 2, 2, 2, 2, 2]}
    for step in range(6):
        set_learning_rates_(run.optimizer, step, run.num_steps, config.schedule)
        assert learning_rates(run.optimizer) == pytest.approx({name: rates[step] for name, rates in expected.items()})


RAMP = BatchSizes(4, ((3, 8), (5, 2), (9, 6)))


def test_batch_sizes_by_step() -> None:
    assert [RAMP.size(step) for step in range(11)] == [4, 4, 4, 8, 8, 2, 2, 2, 2, 6, 6]
    assert list(RAMP.stretches(11)) == [(3, 4), (2, 8), (4, 2), (2, 6)]
    assert list(RAMP.stretches(4)) == [(3, 4), (1, 8)] and list(RAMP.stretches(3)) == [(3, 4)]
    assert list(BatchSizes(4).stretches(7)) == [(7, 4)]
    for steps in range(14):
        samples = sum(RAMP.size(step) for step in range(steps))
        assert RAMP.num_samples(steps) == samples
        assert RAMP.num_steps(samples) == steps == RAMP.num_steps(samples + RAMP.size(steps) - 1)
    assert RAMP.split(2, "ranks") == BatchSizes(2, ((3, 4), (5, 1), (9, 3)))
    for sizes, named in ((BatchSizes(5), "global_batch 5"), (BatchSizes(4, ((1, 6), (2, 9))), "batch_ramp: 9")):
        with pytest.raises(ValueError, match=f"^{named} does not divide by 2 ranks.$"):
            sizes.split(2, "ranks")


def test_epochs_count_the_ramp() -> None:
    def steps(*overrides: str) -> int:
        return num_steps(load_config(NANO, ["steps=null", "global_batch=10", *overrides]))

    assert steps("epochs=2", "samples=100") == 20
    assert steps("epochs=2", "samples=100", "batch_ramp=[[5, 20]]") == 5 + 7  # 50 + 7 x 20 of 200
    assert steps("epochs=2", "samples=100", "batch_ramp=[[20, 5]]") == 20
    assert steps("epochs=2", "samples=100", "batch_ramp=[[19, 5]]") == 21
    assert steps("epochs=1", "samples=5") == 1


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("warmup_ratio=0.1", "the key 'warmup_ratio' is now called 'schedule.warmup'; rename it"),
        ("schedule.shape=sine", "schedule.shape is 'sine'; expected one of cosine, linear, constant, wsd"),
        ("schedule.projector.shape=WSD", "schedule.projector.shape is 'WSD'; expected one of cosine"),
        ("schedule.warmup=-0.1", "schedule.warmup is -0.1; expected a fraction of the steps below 1, or a number of"),
        ("schedule.warmup=1.5", "schedule.warmup is 1.5; expected a fraction of the steps below 1, or a number of"),
        ("schedule.vision.warmup=-2", "schedule.vision.warmup is -2; expected a fraction"),
        ("schedule.warmup=.inf", "schedule.warmup is inf; expected a finite number"),
        ("schedule.vision.warmup=.nan", "schedule.vision.warmup is nan; expected a finite number"),
        ("schedule.warmup=fast", "schedule.warmup: .*fast"),
        ("schedule.warmup=601", "schedule: the warm-up of vision takes 601 steps, the run has 600; lower"),
        ("schedule={shape: wsd, warmup: 100, language: {decay_fraction: 0.9}}",
         "schedule: language has 100 steps of warm-up and 540 of decay, the run has 600; lower"),
        ("schedule.decay_fraction=0", "schedule.decay_fraction is 0; expected more than 0, to 1"),
        ("schedule.decay_fraction=1.1", "schedule.decay_fraction is 1.1; expected more than 0, to 1"),
        ("schedule.final=2", "schedule.final is 2; expected 0 to 1"),
        ("schedule.language.final=-0.1", "schedule.language.final is -0.1; expected 0 to 1"),
        ("schedule.decay=0.1", "unknown key 'schedule.decay'"),
        ("schedule.tower.warmup=0.1", "unknown key 'schedule.tower"),
        ("schedule=wsd", "schedule: "),
        ("batch_ramp=64", "batch_ramp: "),
        ("batch_ramp=[64]", "batch_ramp"),
        ("batch_ramp=[[10, many]]", "batch_ramp.*many"),
        ("batch_ramp=[[10, 64, 3]]", r"batch_ramp is \[\[10, 64, 3\]\]; expected \[\[step, size\], ...\]"),
        ("batch_ramp=[[0, 64]]", r"batch_ramp is \[\[0, 64\]\]; expected .* with increasing steps above 0"),
        ("batch_ramp=[[10, 64], [10, 32]]", "batch_ramp is .*increasing steps"),
        ("batch_ramp=[[10, 64], [20, 0]]", "batch_ramp is .*positive sizes"),
        ("data.sources.0.weight=-1", "the weight of source 'captions' is -1.0; it must be positive"),
        ("data.sources.0.weight=0", "the weight of source 'captions' is 0.0; it must be positive"),
        ("data.sources.0.weight=[0, 0]", r"the weight of source 'captions' is \[0.0, 0.0\]; it must be positive"),
        ("data.sources.0.weight=[1, -1]", r"the weight of source 'captions' is \[1.0, -1.0\]; it must be positive, or"),
        ("data.sources.0.weight=[1, 2, 3]", r"the weight of .* is \[1, 2, 3\]; expected a number, or \[start, end\]"),
        ("data.sources.0.weight=[1, .inf]", "data.sources.captions.weight is inf"),
        ("data.sources.0.weight=much", "the weight of source 'captions' is 'much'; expected a number, or"),
        ("data.sources.0.weight=null", "the weight of source 'captions' is None; expected a number, or"),
        ("data.sources.0.weight=true", "the weight of source 'captions' is True; expected a number, or"),
        ("data.sources.0.weight={start: 1}", "the weight of source 'captions' is {'start': 1}; expected a number, or"),
        ("data.sources.0.weight=[[1], 2]", "the weight of source 'captions' is .*; expected a number, or"),
        ("data.sources.0.weight=[0, 1]", "data.sources: all weights are 0 at the start; give one source a positive"),
        ("data.sources.0.weight=[1, 0]", "data.sources: all weights are 0 at the end; give one source a positive"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_and_named(override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        load_config(NANO, [override])
    assert "\n" not in str(caught.value)


def test_an_old_key_in_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(NANO.read_text() + "warmup_ratio: 0.1\n")
    with pytest.raises(ValueError, match=r"run.yaml: the key 'warmup_ratio' is now called 'schedule.warmup'"):
        load_config(path)


def test_numbers_and_pairs_are_weights() -> None:
    for text, weight in (("3", 3.0), ("1e-1", 0.1), ("[2, 1]", [2.0, 1.0]), ("[1e-1, 0.5]", [0.1, 0.5])):
        (source,) = load_config(NANO, [f"data.sources.0.weight={text}"]).data.sources
        assert source.weight == weight
        assert source.weights == (tuple(weight) if isinstance(weight, list) else (weight, weight))


def test_weights_are_linear_over_the_run() -> None:
    weights = [(4.0, 0.0), (1.0, 1.0), (0.0, 2.0)]
    assert [run_progress(step, 5) for step in (0, 1, 2, 4, 5)] == [0, 0.25, 0.5, 1, 1]
    assert run_progress(0, 1) == 0
    assert [source_weights(weights, run_progress(step, 5)).tolist() for step in (0, 1, 4, 9)] == [
        [4, 1, 0], [3, 1, 0.5], [0, 1, 2], [0, 1, 2]
    ]  # fmt: skip
    sizes = BatchSizes(1, ((1, 3),))  # 1 sample of the fractions 4/5, 1/5, 0, then 3 of 0, 1/3, 2/3
    assert mean_fractions(weights, sizes, 2).tolist() == pytest.approx([0.8 / 4, 1.2 / 4, 2 / 4])
    assert mean_fractions([(3.0, 3.0), (1.0, 1.0)], sizes, 10_000_000).tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("overrides", "batches", "lines"),
    [
        ([], "600 steps of 32 samples", ["learning rate: 18 steps of warm-up, cosine to 0"]),
        (["schedule={shape: constant, warmup: 0}"], "600 steps of 32 samples", ["learning rate: constant"]),
        (["schedule={shape: wsd, warmup: 50, final: 0.1, vision: {shape: linear}}", "batch_ramp=[[200, 64], [500, 8]]"],
         "600 steps: 200 of 32 samples, 300 of 64, 100 of 8",
         ["learning rate of vision: 50 steps of warm-up, linear to 0.1",
          "learning rate of projector: 50 steps of warm-up, constant, linear to 0.1 in the last 60 steps"]),
        (["batch_ramp=[[600, 64]]", "data.sources=[{name: a, shards: x, weight: [3, 1]}, {name: b, shards: y}]"],
         "600 steps of 32 samples (batch_ramp: step 600 is after the end)",
         ["learning rate: 18 steps of warm-up, cosine to 0", "sources: a 75.0% to 50.0%, b 25.0% to 50.0%"]),
    ],
)  # fmt: skip
def test_what_changes_is_described(overrides: list[str], batches: str, lines: list[str]) -> None:
    config = load_config(NANO, overrides)  # of which the language model is frozen
    assert describe_batches(config) == batches and schedule_lines(config) == lines


def test_the_start_and_the_metrics_tell_what_changes(
    configure: Configure, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = configure(
        "schedule={shape: wsd, warmup: 2, decay_fraction: 0.5}", "batch_ramp=[[2, 12], [3, 4]]", "micro_batch=5",
        "data.sources.0.weight=[1, 0]", "log_every=2", "log_samples=true", "steps=4",
    )  # fmt: skip
    train(config)
    output = " ".join(re.sub(r"[│┃]", " ", capsys.readouterr().err).split())
    assert "4 steps: 2 of 8 samples, 1 of 12, 1 of 4" in output
    assert "2 steps of warm-up, constant, linear to 0 in the last 2 steps" in output
    assert "captions 33.3% to 0.0%, chats 66.7% to 100.0%" in output
    rows = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    assert [row["batch_size"] for row in rows] == [8, 4] and [row["samples_seen"] for row in rows] == [16, 32]
    assert [row["lr"]["vision"] for row in rows] == pytest.approx([1e-3, 0.5e-3])
    per_step = read_metrics(Path(config.run_dir) / "samples-0.jsonl")
    assert [len(row["samples"]) for row in per_step] == [8, 8, 12, 4]
    assert all(" q" in name for name in per_step[-1]["samples"]), "the weight of captions is 0 at the last step"


def test_throughput_is_of_the_samples_that_were_trained_on(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(configure("batch_ramp=[[1, 12]]"))
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    run.log._clear()
    for _, batch in zip(range(2), run.loader):
        run.log.add(batch, *run.step(batch, batch.num_supervised), flops=0)
    now[0] += 4.0
    assert run.log.metrics(2, {}, 12, run.loader.counts(), 0)["samples_per_second"] == (8 + 12) / 4


def test_the_time_left_is_by_samples(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("steps=20", "global_batch=2", "batch_ramp=[[10, 8]]")
    Path(config.run_dir).mkdir()
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with Reporter(config, 5, 0, Console(quiet=True)) as reporter:
        now[0] += 10.0
        assert reporter._time_left(10) == "0:01:20 left"  # 10 samples in 10 seconds, 80 remain
        now[0] += 86_400
        assert reporter._time_left(10) == "8 days, 0:01:20 left"


def test_the_plot_has_rates_and_sizes() -> None:
    rows = [
        {"step": 10, "lr": {"vision": 1.0, "projector": 2.0, "language": 2.0}, "batch_size": 8},
        {"step": 20, "lr": {"vision": 0.5, "projector": 1.0, "language": 1.0}, "batch_size": 16},
        {"step": 30, "lr": {"projector": 0.0, "language": 0.0}},  # of an earlier version
    ]
    figure, axes = pyplot.subplots()
    try:
        draw_schedule(axes, rows)
        drawn = {line.get_label(): line.get_ydata() for each in figure.axes for line in each.get_lines()}
    finally:
        pyplot.close(figure)
    assert list(drawn["learning rate: projector, language"]) == [2.0, 1.0, 0.0]
    assert list(drawn["learning rate: vision"][:2]) == [1.0, 0.5] and math.isnan(drawn["learning rate: vision"][2])
    assert list(drawn["batch size"][:2]) == [8, 16]


@pytest.mark.parametrize("page", ["schedules.md", "schedules_zh.md"])
def test_the_settings_of_the_page_are_taken(page: str) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        settings = {"steps": 10_000} | yaml.safe_load(block)
        load_config(NANO, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
