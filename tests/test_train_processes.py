"""Runs in processes of their own: killed at any moment, on one rank and on two, and gone on with to the same end."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import chat_sample
from preference_runs import configure_preferences, pair_sample
from processes import finish, output_path, run_program, start, wait_for
from rich.console import Console
from safetensors.torch import load_file

from train import checkpoint
from train.config import TrainConfig
from train.config_file import load_config
from train.data.batch import StepBatch
from train.data.loader import StepLoader
from train.experts import set_experts_
from train.metrics import read_metrics, training_rows, validation_rows
from train.optim import set_learning_rates_
from train.setup import reference_model
from train.trainable import select
from train.trainer import Trainer

pytestmark = pytest.mark.slow

Configure = Callable[..., TrainConfig]


@pytest.fixture
def configure_saved(configure: Configure, tmp_path: Path) -> Configure:
    """As `configure`, from a saved model, as released ones in bf16: other processes do not know the toy tower."""
    torch.set_num_threads(1)
    run = Trainer(configure(), Console(quiet=True))
    run.model.to(torch.bfloat16).float()
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
    logged_rows, expected = (
        [[row[key] for key in keys] for row in training_rows(rows(run))] for run in (config, whole)
    )
    assert logged_rows == expected


def test_killed_at_any_moment_it_goes_on_exactly(configure_saved: Configure, tmp_path: Path) -> None:
    settings = (
        "steps=12", "data.workers=2", "log_every=3", "checkpoint={every_steps: 2, keep_last: 2}",
        "schedule={shape: wsd, warmup: 2, decay_fraction: 0.5}", "batch_ramp=[[3, 4], [7, 12], [10, 6]]",
        "data.sources.0.weight=[4, 0]",
    )  # fmt: skip
    whole = configure_saved(f"run_dir={tmp_path}/whole", *settings)
    assert finish(start(whole)) == [0]
    assert [row["step"] for row in rows(whole, "samples-0.jsonl")] == list(range(1, 13)) and len(rows(whole)) == 4
    sizes = [len(row["samples"]) for row in rows(whole, "samples-0.jsonl")]
    assert sizes == [8, 8, 8, 4, 4, 4, 4, 12, 12, 12, 6, 6]

    config = configure_saved(*settings)
    run_dir = Path(config.run_dir)
    for moment in ("metrics.jsonl", ".step-00000004.tmp", ".step-00000008.tmp/model*", "step-00000010"):
        (process,) = start(config)
        wait_for(run_dir, moment, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        assert finish([process]) == [-signal.SIGKILL]
        _, left = psutil.wait_procs(workers, timeout=20)
        assert workers and not left, "the data workers end with the trainer"
    assert finish(start(config)) == [0], output_path(config).read_text()
    assert_same(config, whole)
    assert not list(run_dir.glob(".*"))


@pytest.fixture
def two_ranks(configure_saved: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    """A function (source, overrides) -> settings. `uneven` has three shards, of several sizes, for four streams; of
    the two shards of `halves` one has no image at all."""
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


def one_process(config: TrainConfig) -> list[float]:
    """Losses and gradient norms of one process that is given what both ranks have."""
    run = Trainer(config, Console(quiet=True))
    settings, reference = (config.data, config.max_tokens, config.seed), reference_model(config)
    loaders = [
        iter(StepLoader(run.processor, *settings, rank, 2, 4, config.micro_batch, reference=reference))
        for rank in range(2)
    ]
    numbers = []
    for step in range(config.steps or 0):
        set_learning_rates_(run.optimizer, step, run.num_steps, config.schedule)
        set_experts_(run.model.config.text_config, config.experts, step)
        first, second = (next(loader) for loader in loaders)
        batch = StepBatch([*first.micro_batches, *second.micro_batches], [], 0, {}, [])
        per_source, norm = run.step(batch, batch.num_terms)
        loss, count, *_ = per_source.sum(0).tolist()
        numbers += [loss / count, norm]
    return numbers


def logged(config: TrainConfig) -> list[float]:
    """The same of a run."""
    return [row[key] for row in training_rows(rows(config)) for key in ("loss", "grad_norm")]


def test_two_ranks_learn_as_one_and_survive(two_ranks: Configure, tmp_path: Path) -> None:
    whole = two_ranks("uneven", f"run_dir={tmp_path}/whole")
    assert finish(start(whole, 2)) == [0, 0], output_path(whole, 1).read_text()
    expected = one_process(two_ranks("uneven", f"run_dir={tmp_path}/one"))
    assert logged(whole) == pytest.approx(expected, rel=1e-4)

    config = two_ranks("uneven")
    ranks = start(config, 2)
    wait_for(Path(config.run_dir), "step-00000003", ranks[0])
    os.kill(ranks[1].pid, signal.SIGKILL)  # type: ignore[arg-type]
    codes = finish(ranks)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0, "the other rank ends, too"
    assert finish(start(config, 2)) == [0, 0]
    assert_same(config, whole, num_ranks=2)


def test_a_rank_without_an_image_learns_with_the_other(two_ranks: Configure, tmp_path: Path) -> None:
    settings = ("data.workers=1", "steps=4")
    config = two_ranks("halves", *settings)
    assert finish(start(config, 2)) == [0, 0], output_path(config, 1).read_text()
    shards = [
        {name.split()[0] for row in rows(config, f"samples-{rank}.jsonl") for name in row["samples"]} for rank in (0, 1)
    ]
    assert sorted(map(len, shards)) == [1, 1] and shards[0] != shards[1]
    expected = one_process(two_ranks("halves", f"run_dir={tmp_path}/one", *settings))
    assert logged(config) == pytest.approx(expected, rel=1e-4)


def test_two_ranks_adapt_an_int4_base_as_one(two_ranks: Configure, tmp_path: Path) -> None:
    settings = ("trainable={vision: false, language: lora}", "lora={rank: 4, alpha: 8, dropout: 0, base: int4}")
    settings += ("data.workers=1", "steps=4", "lr.language=1e-2")
    config = two_ranks("halves", *settings)
    assert finish(start(config, 2)) == [0, 0], output_path(config, 1).read_text()
    expected = one_process(two_ranks("halves", f"run_dir={tmp_path}/one", *settings))
    assert logged(config) == pytest.approx(expected, rel=1e-4)


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(two_ranks: Configure) -> None:
    ramp = "batch_ramp=[[1, 4], [2, 12]]"
    config = two_ranks("uneven", "steps=60", "checkpoint={every_steps: 1000, keep_last: 2}", ramp)
    run_dir = Path(config.run_dir)
    ranks = start(config, 2)
    wait_for(run_dir, "metrics.jsonl", ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)  # type: ignore[arg-type]
    assert finish(ranks) == [128 + signal.SIGTERM] * 2
    (saved,) = checkpoint.checkpoints(run_dir)
    step = int(saved.name[5:])
    again = load_config(saved / "config.yaml", [f"steps={step + 2}"])
    assert finish(start(again)) == [0]
    assert "2 ranks x 2 workers, this run has 1 x 2" in output_path(again).read_text()
    assert [row["step"] for row in rows(again)] == list(range(1, step + 3))
    assert [row["step"] for row in rows(again, "samples-1.jsonl")] == list(range(1, step + 1))
    sizes: Counter[int] = Counter()
    for rank in range(2):
        sizes.update({row["step"]: len(row["samples"]) for row in rows(again, f"samples-{rank}.jsonl")})
    assert [sizes[number + 1] for number in range(step + 2)] == [8, 4, *[12] * step][: step + 2]


def test_the_held_out_loss_does_not_depend_on_ranks_and_disturbs_none(
    two_ranks: Configure, tmp_path: Path, write_shard: Any
) -> None:
    """On one rank, on two, and with weights spread over two; of seven samples, some without an image."""
    write_shard(tmp_path / "held.tar", [chat_sample(500 + i) for i in range(9)])
    settings = ("data.workers=1", "steps=4", "neftune=5")
    validation = f"validation={{sources: [{{name: held, shards: {tmp_path}/held.tar}}], every_steps: 2, samples: 7}}"
    measured = {}
    for name, num_ranks, environment in (("one", 1, {}), ("two", 2, {}), ("spread", 2, launched("fsdp"))):
        plain = two_ranks("halves", f"run_dir={tmp_path}/{name}-plain", *settings)
        config = two_ranks(
            "halves", f"run_dir={tmp_path}/{name}-held", *settings, validation,
            "checkpoint={every_steps: 3, keep_last: 1, keep_best: true}",
        )  # fmt: skip
        for run in (plain, config):
            assert finish(start(run, num_ranks, **environment)) == [0] * num_ranks, output_path(run).read_text()
        assert_same(config, plain, num_ranks)
        measured[name] = validation_rows(rows(config))
        assert [row["step"] for row in measured[name]] == [0, 2, 4]
        best = min(measured[name][1:], key=lambda row: row["validation_loss"])
        assert checkpoint.best_checkpoint(Path(config.run_dir)) == checkpoint.checkpoint_path(
            Path(config.run_dir), best["step"]
        )
    assert measured["one"][0] == measured["two"][0] == measured["spread"][0], "bit for bit, of the same weights"
    for row, spread in zip(measured["two"], measured["spread"]):
        assert row["validation_loss"] == pytest.approx(spread["validation_loss"], rel=1e-4)


def test_a_rank_without_samples_stops_all_with_one_line(two_ranks: Configure, tmp_path: Path, write_shard: Any) -> None:
    write_shard(tmp_path / "few/0.tar", [chat_sample(0)])
    config = two_ranks("few", "data.workers=1")
    assert finish(start(config, 2)) == [2, 2]
    lines = [output_path(config, rank).read_text().splitlines()[-1] for rank in range(2)]
    assert lines[0] == lines[1] and lines[0].startswith("error: ") and "hold no sample for this worker" in lines[0]


def launched(name: str) -> dict[str, str]:
    """What `accelerate launch` tells its ranks with a config of ours."""
    path = Path(__file__).parents[1] / f"train/configs/accelerate/{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "train", "x.yaml"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    return {key: value for key, value in environment.items() if key.startswith(("ACCELERATE", "FSDP"))}


def test_the_configs_for_many_gpus_are_accelerates() -> None:
    assert "ACCELERATE_USE_FSDP" not in launched("ddp")
    fsdp = launched("fsdp")
    assert fsdp["FSDP_VERSION"] == "2" and fsdp["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize(
    ("selection", "precision"),
    [("[1, lm_head.*]", "fp32"), ("['*.self_attn.*']", "bf16"), ("[model.embed_tokens.*, 0]", "fp32")],
)
def test_two_ranks_train_layers_as_one(two_ranks: Configure, tmp_path: Path, selection: str, precision: str) -> None:
    """DDP waits for the gradient of each parameter that is trained; FSDP shards them together with frozen ones."""
    settings = ("trainable={vision: false, projector: false}", f"trainable.language={selection}", "data.workers=1")
    settings += ("steps=4", f"precision={precision}")
    expected = one_process(two_ranks("halves", f"run_dir={tmp_path}/one", *settings, "precision=fp32"))
    before = load_file(tmp_path / "start/model.safetensors")
    for name, environment in (("ddp", {}), ("fsdp", launched("fsdp"))):
        config = two_ranks("halves", f"run_dir={tmp_path}/{name}", *settings)
        assert finish(start(config, 2, **environment)) == [0, 0], output_path(config, 1).read_text()
        assert logged(config) == pytest.approx(expected, rel=1e-4 if precision == "fp32" else 2e-2)
        after = load_file(Path(config.run_dir) / "final/model.safetensors")
        moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
        assert moved == select(config.trainable.language, before)


@pytest.mark.parametrize(("trainable", "precision", "rel"), [("all", "fp32", 1e-4), ("language", "bf16", 2e-2)])
def test_spread_weights_learn_the_same(
    two_ranks: Configure, tmp_path: Path, trainable: str, precision: str, rel: float
) -> None:
    """FSDP over two ranks, one of which has no image, and one process that resumes from what they saved."""
    settings = ["data.workers=1", "steps=4", "checkpoint={every_steps: 2, keep_last: 2}", "lr.projector=3e-3"]
    settings += [f"precision={precision}"]
    settings += ["trainable={vision: false, projector: false}"] if trainable == "language" else []
    config = two_ranks("halves", *settings)
    assert finish(start(config, 2, **launched("fsdp"))) == [0, 0], output_path(config, 1).read_text()
    (line,) = (line for line in output_path(config).read_text().splitlines() if line.startswith("2 ranks"))
    here, whole = (int(word.replace(",", "")) for word in re.findall(r"[\d,]{4,}", line))
    assert whole / 2 <= here < 0.6 * whole
    expected = one_process(two_ranks("halves", f"run_dir={tmp_path}/one", *settings, "precision=fp32"))
    assert logged(config) == pytest.approx(expected, rel=rel)
    if trainable == "all":
        (state,) = (checkpoint.load_state(path) for path in checkpoint.checkpoints(Path(config.run_dir)))
        run = Trainer(config, Console(quiet=True))  # of which the last checkpoint is step 2
        assert run.done_steps == 2 and state["optimizer"]["state"].keys() == run_names(run)
        for name, parameter in run.objective.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                if parameter.requires_grad:
                    assert torch.equal(run.optimizer.state[parameter][key], state["optimizer"]["state"][name][key])
        before = logged(config)
        shutil.rmtree(Path(config.run_dir) / "final")
        assert finish(start(config, 2, **launched("fsdp"))) == [0, 0], output_path(config, 1).read_text()
        assert logged(config) == before, "going on, each rank has its part of the optimizer's state"
        assert {group["name"]: group["peak_lr"] for group in run.optimizer.param_groups}["projector"] == 3e-3


def run_names(run: Trainer) -> set[str]:
    return {name for name, parameter in run.objective.named_parameters() if parameter.requires_grad}


@pytest.fixture
def pairs(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    torch.set_num_threads(1)
    made = configure_preferences(configure, tmp_path, write_shard)
    return lambda *overrides: made("log_samples=true", *overrides)


@pytest.mark.parametrize("settings", [(), ("trainable.language=lora", "lora={rank: 4, alpha: 8, dropout: 0.1}")])
def test_preferences_killed_at_any_moment_go_on_exactly(
    pairs: Configure, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    settings += ("steps=8", "data.workers=2", "log_every=2", "checkpoint={every_steps: 2, keep_last: 2}")
    whole = pairs(f"run_dir={tmp_path}/whole", *settings)
    assert finish(start(whole)) == [0], output_path(whole).read_text()
    config = pairs(*settings)
    for moment in ("metrics.jsonl", ".step-00000004.tmp", "step-00000006"):
        (process,) = start(config)
        wait_for(Path(config.run_dir), moment, process)
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        assert finish([process]) == [-signal.SIGKILL]
    assert finish(start(config)) == [0], output_path(config).read_text()
    assert_same(config, whole)
    preferences = [[row["preference"] for row in rows(each)] for each in (config, whole)]
    assert preferences[0] == preferences[1] and len(preferences[0]) == 4


@pytest.mark.parametrize("settings", [(), ("trainable={projector: true, language: lora}", "lora.dropout=0")])
def test_two_ranks_prefer_as_one(pairs: Configure, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings += ("steps=4", "data.workers=1")
    config = pairs(*settings)
    assert finish(start(config, 2)) == [0, 0], output_path(config, 1).read_text()
    expected = one_process(pairs(f"run_dir={tmp_path}/one", *settings))
    assert logged(config) == pytest.approx(expected, rel=1e-4)
    assert all(0 <= row["preference"]["accuracy"] <= 1 for row in rows(config))


def test_spread_weights_prefer_the_same(pairs: Configure, tmp_path: Path) -> None:
    """FSDP, with the reference log-probabilities in the shards; one rank of which has no image."""
    for number, index in enumerate((6, 0)):
        write = [pair_sample(7 * i + index) for i in range(40)]
        with tarfile.open(tmp_path / f"pairs/{number}.tar", "w") as tar:
            for key, members in write:
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (made,) = run_program(
        tmp_path, "train.shards", "reference", f"{tmp_path}/pairs", f"{tmp_path}/refs", "--model", f"{tmp_path}/start",
        "--precision", "fp32",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    settings = ("steps=4", "data.workers=1", "dpo.reference=shards", "trainable.vision=true", "lr.vision=1e-3")
    settings += (f"data.sources=[{{name: pairs, shards: '{tmp_path}/refs/*.tar'}}]",)
    config = pairs(*settings)
    assert finish(start(config, 2, **launched("fsdp"))) == [0, 0], output_path(config, 1).read_text()
    expected = one_process(pairs(f"run_dir={tmp_path}/one", *settings))
    assert logged(config) == pytest.approx(expected, rel=1e-4)
    refused = pairs(f"run_dir={tmp_path}/refused")
    assert finish(start(refused, 2, **launched("fsdp"))) == [2, 2]
    assert "does not go with FSDP" in output_path(refused).read_text().splitlines()[-1]
