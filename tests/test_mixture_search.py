"""A whole search: with toy runs, and with runs whose losses are known."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import caption_sample, chat_sample

from train import run_series
from train.config import TrainConfig
from train.config_file import load_config
from train.metrics import read_metrics, validation_rows
from train.mixture import search as mixture_search
from train.mixture.__main__ import app
from train.mixture.config import Search, load_search
from train.mixture.search import run_search
from train.spike_guard import DivergedError
from train.trainer import Trainer
from train.trainer import train as real_train
from yi_vl import program

Configure = Callable[..., TrainConfig]
Loss = Callable[[TrainConfig], float | None]
SEARCH = """
search_dir: {folder}/search
base: {folder}/toy.yaml
overrides: {{steps: 2, data.shuffle_buffer: 4}}
search: {{budget: 3, max_epochs: null}}
hyper: [{{key: lr.language, values: [1e-4, 1e-3]}}]
validation: {{samples: 2, sources: [{{name: chats, shards: {folder}/first.tar}}]}}
verdict:
  samples: 2
  sources:
    - {{name: chats, shards: {folder}/second.tar}}
    - {{name: captions, shards: {folder}/third.tar, format: caption}}
rank_check: {{steps: 4, runs: 3}}
repeats: 2
"""


@pytest.fixture
def load(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Callable[..., Search]:
    """A function (overrides) -> a search over the toy run of `configure`."""
    write_shard(tmp_path / "first.tar", [chat_sample(500 + i) for i in range(3)])
    write_shard(tmp_path / "second.tar", [chat_sample(600 + i) for i in range(3)])
    write_shard(tmp_path / "third.tar", [caption_sample(600 + i) for i in range(3)])
    (tmp_path / "search.yaml").write_text(SEARCH.format(folder=tmp_path))
    return lambda *overrides: load_search(tmp_path / "search.yaml", overrides)


def use_losses(monkeypatch: pytest.MonkeyPatch, loss_of: Loss, draws_page: bool = False) -> list[TrainConfig]:
    """Instead of training, log a known loss; returns the list of runs that are made. None: the run diverges."""
    monkeypatch.setattr(run_series, "free_memory", lambda: None)
    if not draws_page:
        monkeypatch.setattr(mixture_search, "write_report", lambda *_: None)
    made: list[TrainConfig] = []

    def train(config: TrainConfig) -> None:
        made.append(config)
        loss = loss_of(config)
        rows = [
            {"step": step, "validation_loss": value, "validation_loss_per_source": {"chats": value}}
            for step, value in ((0, 9.0), (config.steps, loss))
            if value is not None
        ]
        (Path(config.run_dir) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if loss is None:
            raise DivergedError("10 consecutive steps were skipped; the gradient norm of the last is nan.")

    monkeypatch.setattr(run_series, "train", train)
    return made


def shares(config: TrainConfig) -> dict[str, float]:
    return {source.name: source.weight for source in config.data.sources}


def known_loss(config: TrainConfig, noise: float = 0.0) -> float:
    """Lowest at 0.8 captions and lr.language 1e-4."""
    share = shares(config)["captions"]
    loss = 2 - 0.08 * math.log(share) - 0.02 * math.log(1 - share) - 0.03 * (config.lr.language == 1e-4)
    return loss + noise * random.Random(f"{config.seed} {share} {config.lr.language}").gauss(0, 1)


def train_killed_after_a_step(config: TrainConfig) -> None:
    real_step = Trainer.step

    def step(run: Trainer, *arguments: Any) -> Any:
        if run.done_steps == 1:
            raise KeyboardInterrupt
        return real_step(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        real_train(config)


def test_a_search_of_toy_runs_killed_in_one_of_them_resumes_to_the_same_results(
    load: Callable[..., Search], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("rank_check=null", "search.budget=2", "overrides.checkpoint.every_steps=1")
    search = load(*settings)
    results = run_search(search)
    names = [run["name"] for run in results["runs"]]
    assert names[:5] == ["equal-seed-0", "equal-seed-1", "present", "mixture-001", "mixture-002"]
    for run in results["runs"]:
        folder = search.directory / "runs" / run["name"]
        config = load_config(folder / "config.yaml")
        assert shares(config) == run["settings"]["shares"] and config.seed == run["settings"]["seed"]
        _, last = validation_rows(read_metrics(folder / "metrics.jsonl"))
        assert run["loss"] == last["validation_loss"] < run["start_loss"], "the toy learns"
        assert not (folder / "final").exists() and not list(folder.glob("step-*")), "weights are not kept"
        assert "step 2/2" in (folder / "train.log").read_text()
    assert len({run["loss"] for run in results["runs"]}) == len(names), "seeds and mixtures change a run"
    assert json.loads((search.directory / "results.json").read_text()) == results
    lines = capsys.readouterr().err
    assert "run 1 of 9: equal-seed-0, captions 0.500  chats 0.500  lr.language 0.001" in lines
    assert "run 2 of 9, about " in lines and "noise 0." in lines and "leave-one-out rank correlation" in lines

    other = load(*settings, f"search_dir={tmp_path}/killed", "keep_models=true")
    shutil.copytree(search.directory, other.directory)
    shutil.rmtree(other.directory / "runs/present")
    monkeypatch.setattr(run_series, "train", train_killed_after_a_step)
    with pytest.raises(KeyboardInterrupt):
        run_search(other)
    monkeypatch.setattr(run_series, "train", real_train)
    resumed = run_search(other)
    assert "Resuming from" in (other.directory / "runs/present/train.log").read_text()
    assert (other.directory / "runs/present/final").is_dir(), "weights are kept if asked"
    for run in [*results["runs"], *resumed["runs"]]:
        del run["seconds"]
    assert resumed == results


def test_a_killed_search_resumes_with_the_run_it_was_in(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_losses(monkeypatch, known_loss)
    whole = run_search(load())

    def killed_in_the_fifth(config: TrainConfig) -> float:
        if len(made) == 5:
            raise KeyboardInterrupt
        return known_loss(config)

    search = load(f"search_dir={load().directory}-killed")
    made = use_losses(monkeypatch, killed_in_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        run_search(search)
    again = use_losses(monkeypatch, known_loss)
    resumed = run_search(search)
    assert [Path(config.run_dir).name for config in again] == [run["name"] for run in resumed["runs"]][4:]
    assert [run["settings"] for run in resumed["runs"]] == [run["settings"] for run in whole["runs"]]
    assert resumed["verdict"] == whole["verdict"]


def test_a_search_that_is_stopped_says_so(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: TrainConfig) -> float:
        raise SystemExit(143)  # the trainer's, after SIGTERM and a checkpoint

    use_losses(monkeypatch, stopped)
    with pytest.raises(SystemExit) as ended:
        run_search(load())
    assert ended.value.code == 143
    assert "Stopped in run 1 of 13; the same command resumes the search." in capsys.readouterr().err

    def broken(config: TrainConfig) -> float:
        raise ValueError("the disk is full")

    use_losses(monkeypatch, broken)
    with pytest.raises(ValueError, match=r"run equal-seed-0: the disk is full \(log: .*equal-seed-0/train\.log\)"):
        run_search(load())


def test_a_known_optimum_is_recommended(load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch) -> None:
    made = use_losses(monkeypatch, lambda config: known_loss(config, 0.002))
    results = run_search(load("search.budget=24", "repeats=3"))
    assert results["verdict"]["is_recommended"] and results["regression"]["correlation"] > 0.8
    best = results["best"]
    assert best["shares"]["captions"] == pytest.approx(0.8, abs=0.1) and best["hyper"] == {"lr.language": 1e-4}
    assert "language: 0.0001" in results["yaml"] and f"weight: {best['shares']['captions']}" in results["yaml"]
    assert results["rank_check"]["correlation"] > 0.4

    seeds = [config.seed for config in made]
    judged = made[-6:]
    assert seeds[:3] == [0, 1, 2] and set(seeds[3:-6]) == {0}, "one seed for all that the regression compares"
    assert [config.seed for config in judged] == [1000, 1001, 1002] * 2
    assert {source.name for config in judged for source in config.validation.sources} == {"chats", "captions"}
    assert all(str(config.validation.sources[0].shards).endswith("first.tar") for config in made[:-6])
    assert all(str(config.validation.sources[0].shards).endswith("second.tar") for config in judged)
    assert {config.lr.language for config in judged[:3]} == {1e-3}, "equal shares keep the present settings"


def test_a_gain_below_the_noise_keeps_equal_shares(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mixture matters in the proxies of the search, and not on the second held-out set."""
    use_losses(monkeypatch, lambda config: known_loss(config) if config.seed < 1000 else 2 + 0.01 * (config.seed % 3))
    results = run_search(load("search.budget=12", "hyper=[]", "repeats=3", "rank_check=null"))
    assert results["best"] is not None and not results["verdict"]["is_recommended"]
    assert results["verdict"]["reason"].startswith("keep equal shares: ")
    assert results["yaml"].count("weight: 0.5") == 2 and "language" not in results["yaml"]


def test_noise_alone_gives_no_answer(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = use_losses(
        monkeypatch, lambda config: random.Random(f"{config.seed} {shares(config)} {config.steps}").random()
    )
    results = run_search(load("search.budget=16"))
    assert results["best"] is None and "below 0.5" in results["verdict"]["reason"]
    assert not any(config.seed >= 1000 for config in made), "nothing to judge"
    assert "do not rank mixtures" in capsys.readouterr().err


def test_longer_runs_that_rank_otherwise_are_reported(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_losses(monkeypatch, lambda config: known_loss(config) * (-1 if config.steps == 4 else 1), draws_page=True)
    results = run_search(load("search.budget=12"))
    assert results["rank_check"]["correlation"] == pytest.approx(-1)
    assert "warning: runs of 2 steps do not rank mixtures as runs of 4 do" in capsys.readouterr().err
    assert "may not hold for longer training" in Path(load().directory, "index.html").read_text()


def test_a_run_that_diverges_is_left_out(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that is too high is an answer, not the end of a search."""
    use_losses(monkeypatch, lambda config: None if config.lr.language == 0.5 else known_loss(config))
    settings = ("search.budget=12", "hyper=[{key: lr.language, values: [0.5]}]", "rank_check=null")
    results = run_search(load(*settings))
    diverged = [run for run in results["runs"] if run["loss"] is None]
    assert len(diverged) == 6 and len(results["regression"]["names"]) == len(results["runs"]) - 6 - 1 - 4
    assert "it diverged" in capsys.readouterr().err and results["best"]["hyper"] == {"lr.language": 1e-3}
    with pytest.raises(ValueError, match="2 of 2 runs with equal shares diverged"):
        use_losses(monkeypatch, lambda config: None)
        run_search(load(f"search_dir={load().directory}-other"))


def test_a_larger_budget_continues_from_the_runs_made(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_losses(monkeypatch, known_loss)
    few = run_search(load("search.budget=8", "rank_check=null"))
    made = use_losses(monkeypatch, known_loss)
    many = run_search(load("search.budget=10", "rank_check=null"))
    assert [run["name"] for run in many["runs"]][:11] == [run["name"] for run in few["runs"]][:11]
    names = [Path(config.run_dir).name for config in made]
    assert names[:2] == ["mixture-009", "mixture-010"] and len(names) == 4 and names[2].startswith("verdict-best-of-10")
    with pytest.raises(ValueError, match=r"holds a search with base with overrides.lr.vision 0.001, now 0.002"):
        run_search(load("search.budget=10", "rank_check=null", "overrides.lr.vision=2e-3"))
    with pytest.raises(ValueError, match=r"search\.seed 0, now 4\. Set it back"):
        run_search(load("rank_check=null", "search.seed=4"))
    run_search(load("search.budget=10", "rank_check=null", "overrides.data.workers=1", "keep_models=true"))


def test_a_search_begun_before_a_setting_existed_goes_on(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_losses(monkeypatch, known_loss)
    search = load("search.budget=8", "rank_check=null")
    run_search(search)
    path = search.directory / "design.json"
    design = json.loads(path.read_text())
    for key in [
        key for key in design["settings"] if ".distill." in key or key.endswith((".neftune", ".init_from.tower"))
    ]:
        del design["settings"][key]
    path.write_text(json.dumps(design))
    made = use_losses(monkeypatch, known_loss)
    run_search(search)
    assert not made
    with pytest.raises(ValueError, match=r"holds a search with base with overrides.neftune null, now 5"):
        path.write_text(json.dumps(design))
        run_search(load("search.budget=8", "rank_check=null", "overrides.neftune=5"))


def test_sources_that_are_not_searched_keep_their_share(
    load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = use_losses(monkeypatch, known_loss)
    results = run_search(load("search.sources=[captions]", "search.budget=12", "rank_check=null"))
    assert all(shares(config) == pytest.approx({"captions": 1 / 3, "chats": 2 / 3}) for config in made)
    assert {config.lr.language for config in made} == {1e-3, 1e-4} and list(results["fixed"]) == ["chats"]


def test_no_source_is_repeated_too_often(load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage takes 6 steps of 8 samples; captions has 60, at most 10 of which count."""
    made = use_losses(monkeypatch, known_loss)
    sources = (
        "overrides.data.sources=[{name: captions, shards: %s/captions/*.tar, format: caption, max_samples: 10}, "
        "{name: chats, shards: %s/chats/*.tar}]"
    )
    search = load("search.max_epochs=2", "search.budget=12", "rank_check=null")
    folder = search.directory.parent
    results = run_search(load(sources % (folder, folder), "search.max_epochs=2", "search.budget=12", "rank_check=null"))
    assert results["sources"] == {"captions": 10, "chats": 60}
    limit = 2 * 10 / 48
    assert {round(shares(config)["captions"], 9) for config in made[:2]} == {round(limit, 9)}
    assert all(shares(config)["captions"] <= limit + 1e-4 for config in made if "present" not in config.run_dir)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("search.method=random", "search.method is 'random'; expected one of dirichlet, grid"),
        ("search.budget=0", "search.budget is 0"),
        ("search.max_epochs=-1", "search.max_epochs is -1"),
        ("search.sources=[captions, poems]", "search.sources has poems; the sources of .* are captions, chats"),
        ("search.sizes={poems: 5}", "search.sizes has poems"),
        ("search.sizes={chats: 0}", "search.sizes is"),
        ("search.colour=red", "colour"),
        ("repeats=1", "repeats is 1; the noise needs at least 2"),
        ("rank_check.steps=2", "rank_check.steps is 2; expected more than a proxy's 2"),
        ("rank_check.runs=2", "rank_check.runs is 2"),
        ("rank_check.runs=9", "rank_check.runs is 9; expected at most search.budget, 3"),
        ("validation.sources=[]", "validation.sources is empty"),
        ("verdict.samples=0", "verdict.samples is 0"),
        ("hyper=[{key: lr.colour, values: [1]}]", "hyper has the key 'lr.colour'"),
        ("hyper=[{key: data.sources.chats.weight, values: [1]}]", "hyper has the key 'data.sources.chats.weight'"),
        ("hyper=[{key: lr.language, values: [-1]}]", "lr.language is -1"),
        ("hyper=[{key: lr.language, values: [fast]}]", "lr.language"),
        ("overrides.run_dir=x", "overrides has run_dir, which the search sets itself"),
        ("overrides.validation.samples=3", "overrides has validation"),
        ("overrides.stepz=3", r"search.yaml: overrides \(stepz=3\): unknown key 'stepz'"),
        ("base=none.yaml", "none.yaml: there is no such config file"),
        ("budget", "'budget' on the command line is not of the form"),
    ],
)
def test_a_wrong_setting_is_refused_and_named(load: Callable[..., Search], override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        load(override)
    assert "\n" not in str(caught.value)


def test_samples_are_for_training_choosing_or_judging(load: Callable[..., Search], tmp_path: Path) -> None:
    trained = f"verdict.sources=[{{name: a, shards: {tmp_path}/chats/1.tar}}]"
    with pytest.raises(ValueError, match=r"chats/1\.tar is in data\.sources and in verdict\.sources"):
        run_search(load(trained))
    twice = f"verdict.sources=[{{name: a, shards: {tmp_path}/chats/../first.tar}}]"
    with pytest.raises(ValueError, match=r"first\.tar is in validation\.sources and in verdict\.sources"):
        run_search(load(twice))
    with pytest.raises(ValueError, match=r"verdict\.sources: 'a' names .*none\.tar"):
        run_search(load(f"verdict.sources=[{{name: a, shards: {tmp_path}/none.tar}}]"))


def test_the_command(
    load: Callable[..., Search], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_losses(monkeypatch, known_loss)

    def command(*arguments: str) -> int | str | None:
        monkeypatch.setattr("sys.argv", ["mixture", *arguments])
        with pytest.raises(SystemExit) as ended:
            program.run(app, "error")
        return ended.value.code

    assert command(str(tmp_path / "search.yaml"), "search.budget=8") == 0
    lines = capsys.readouterr()
    assert "take the predicted best mixture" in lines.out and "sources:" in lines.out and "index.html" in lines.out
    assert command(str(tmp_path / "search.yaml"), "search.budget=8", "search.seed=1") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "search.seed 0, now 1" in error and error.count("\n") == 1
    assert command(str(tmp_path / "none.yaml")) == 2
    assert "there is no such config file" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("a: [")
    assert command(str(tmp_path / "broken.yaml")) == 2


def test_several_ranks_are_refused(load: Callable[..., Search], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trains in one process, and was started on 2 ranks"):
        run_search(load())
