"""`python -m train.nano connectors`: toy runs, made once, killed and resumed; the table and plot of known results."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from conftest import COLOURS, RunApp, chat_sample, png
from PIL import Image

from train import run_series
from train.config import TrainConfig
from train.config_file import load_config
from train.metrics import read_metrics, training_rows, validation_rows
from train.nano.__main__ import app
from train.nano.connectors.compare import compare, compare_speed
from train.nano.connectors.config import Comparison, load_comparison
from train.nano.connectors.report import write_report
from train.nano.connectors.runs import Result, select_questions
from train.nano.measure.evaluate import Question, constant_accuracy, read_questions
from train.spike_guard import DivergedError
from train.trainer import Trainer, train

ROOT = Path(__file__).parents[1]
HELDOUT = "heldout/questions.jsonl"
TOY = """
directory: {folder}/comparison
model: {folder}/start/final
seeds: 2
heldout: {folder}/heldout
questions: 4
speed_rounds: 2
connectors:
  - {{name: mlp, type: mlp}}
  - {{name: resampler-5, type: resampler, num_tokens: 5, num_layers: 1, num_heads: 1}}
stages:
  align:
    base: {folder}/toy.yaml
    overrides: {{trainable: {{vision: false, language: false}}, steps: 2, checkpoint.every_steps: 1}}
  chat:
    base: {folder}/toy.yaml
    overrides:
      steps: 3
      checkpoint.every_steps: 1
      validation: {{samples: 2, sources: [{{name: chats, shards: {folder}/heldout.tar}}]}}
"""
QFORMER = "{name: qformer-2, type: qformer, num_tokens: 2, hidden_size: 16, num_layers: 1, num_heads: 1}"
Load = Callable[..., Comparison]
Patch = pytest.MonkeyPatch


@pytest.fixture
def load(
    configure: Callable[..., TrainConfig], tmp_path: Path, write_shard: Callable[..., Path], monkeypatch: Patch
) -> Load:
    """A function (overrides) -> a comparison that starts from a toy model, with held-out questions about colours."""
    for name in ("train.trainer.draw_curves", "train.run_series.free_memory", "train.nano.connectors.runs.free_memory"):
        monkeypatch.setattr(name, lambda *_: None)  # which take longer than a toy run
    configure()
    write_shard(tmp_path / "heldout.tar", [chat_sample(500 + i) for i in range(3)])
    (tmp_path / "heldout").mkdir()
    rows = []
    for index, colour in enumerate([*COLOURS] * 4):
        (tmp_path / f"heldout/{index}.png").write_bytes(png(colour))
        lang, skill = ("en", "zh")[index // 4 % 2], ("colour", "same")[index // 8]
        rows.append(
            {"id": str(index), "skill": skill, "topic": skill, "lang": lang, "images": [f"{index}.png"]}
            | {"question": "What colour is it?", "accepted": [colour]}
        )
    (tmp_path / HELDOUT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "comparison.yaml").write_text(TOY.format(folder=tmp_path))
    return lambda *overrides: load_comparison(tmp_path / "comparison.yaml", overrides)


@pytest.fixture
def start(load: Load, configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    """The toy model that the runs start from."""
    train(configure("steps=1", f"run_dir={tmp_path}/start"))


def results_of(comparison: Comparison) -> dict[str, Any]:
    """Those that do not depend on the time that it took."""
    results = json.loads((comparison.directory / "results.json").read_text())
    for run in results["runs"]:
        del run["seconds"], run["samples_per_second"]
    for row in results["connectors"].values():
        del row["samples_per_second"], row["ttft_ms"]
    return results


def watch_training(monkeypatch: Patch, stops_in: str = "") -> list[str]:
    """The runs that are trained from now on, by the end of their folder's name; the one that is named is killed after
    a step, as by a signal that no program can catch."""
    trained: list[str] = []

    def watched(config: TrainConfig) -> None:
        trained.append("/".join(Path(config.run_dir).parts[-2:]))
        with Patch.context() as patch:
            if trained[-1] == stops_in:
                real_step = Trainer.step

                def step(run: Trainer, *arguments: Any) -> Any:
                    if run.done_steps == 1:
                        raise KeyboardInterrupt
                    return real_step(run, *arguments)

                patch.setattr(Trainer, "step", step)
            train(config)

    monkeypatch.setattr(run_series, "train", watched)
    return trained


@pytest.mark.usefixtures("start")
def test_a_comparison_killed_in_a_run_resumes_to_the_same_results(
    load: Load, tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = load()
    trained = watch_training(monkeypatch)
    markdown = compare(whole)
    order = [(name, seed) for seed in (0, 1) for name in whole.names]
    assert trained == [f"{name}-seed-{seed}/{stage}" for name, seed in order for stage in ("align", "chat")]
    for name, seed in order:
        check_run(whole, name, seed)
    assert (
        "| mlp | 4 |" in markdown
        and "| resampler-5 | 5 |" in markdown
        and "the seeds (2); questions of each skill: 4." in markdown
    )
    speed = json.loads((whole.directory / "speed.json").read_text())
    assert {name: len(values) for name, values in speed["milliseconds"].items()} == {"mlp": 2, "resampler-5": 2}
    with Image.open(whole.directory / "accuracy.png") as plot:
        assert plot.width > 500
    lines = capfd.readouterr().err
    assert "mlp, resampler-5; seeds: 2; runs: 4 of 5 steps, 20 in all; questions after each run: 8." in lines
    assert "run 1 of 4: mlp, seed 0" in lines and "run 3 of 4, about " in lines

    killed = load(f"directory={tmp_path}/killed")
    shutil.copytree(whole.run_directory("mlp", 0), killed.run_directory("mlp", 0))
    for stage in ("align", "chat"):  # whose settings have other folders
        path = killed.run_directory("mlp", 0) / stage / "config.yaml"
        path.write_text(path.read_text().replace(str(whole.directory), str(killed.directory)))
    trained = watch_training(monkeypatch, stops_in="resampler-5-seed-0/chat")
    with pytest.raises(KeyboardInterrupt):
        compare(killed)
    assert (
        trained[-1] == "resampler-5-seed-0/chat" and "| resampler-5" not in (killed.directory / "table.md").read_text()
    )
    trained = watch_training(monkeypatch)
    compare(killed)
    assert trained[:2] == ["resampler-5-seed-0/align", "resampler-5-seed-0/chat"] and len(trained) == 6
    log = (killed.directory / "runs/resampler-5-seed-0/chat/train.log").read_text()
    assert "Resuming from" in log and "step 1 of 3" in log
    assert results_of(killed) == results_of(whole)

    larger = load(f"connectors=[{{name: mlp, type: mlp}}, {QFORMER}]")
    trained = watch_training(monkeypatch)
    compare(larger)
    assert trained == [f"qformer-2-seed-{seed}/{stage}" for seed in (0, 1) for stage in ("align", "chat")]
    assert list(results_of(larger)["connectors"]) == ["mlp", "qformer-2"]
    before = (whole.directory / "speed.json").read_bytes()
    trained = watch_training(monkeypatch)
    assert compare_speed(larger) and not trained
    assert (whole.directory / "speed.json").read_bytes() != before


def check_run(comparison: Comparison, name: str, seed: int) -> None:
    """A finished run: the same start, data and steps for all; its result; and what is left on the disk."""
    folder = comparison.run_directory(name, seed)
    align, chat = (load_config(folder / stage / "config.yaml") for stage in ("align", "chat"))
    assert align.seed == chat.seed == seed and (align.steps, chat.steps) == (2, 3)
    assert align.init_from.checkpoint == comparison.config.model and align.init_from.connector is not None
    assert align.init_from.connector.type == name.partition("-")[0], "fresh, also where it is the model's own type"
    assert chat.init_from.checkpoint == str(folder / "align/final") and chat.init_from.connector is None
    result = json.loads((folder / "result.json").read_text())
    rows = read_metrics(folder / "chat/metrics.jsonl")
    assert len(training_rows(rows)) == 3 and result["loss"] == validation_rows(rows)[-1]["validation_loss"]
    assert set(result["scores"]) == {"colour", "same", "all"} and result["scores"]["all"]["count"] == 8
    answers = (folder / "answers.jsonl").read_text().splitlines()
    assert result["scores"]["all"]["both"] == sum(json.loads(line)["right"] for line in answers) / 8
    assert not (folder / "align/final").exists() and not list(folder.glob("*/step-*"))
    assert (folder / "chat/final").is_dir() == (seed == 0), "for its speed"


@pytest.mark.usefixtures("start")
def test_other_settings_than_those_of_the_runs_made_are_refused(load: Load, monkeypatch: Patch, tmp_path: Path) -> None:
    watch_training(monkeypatch, stops_in="resampler-5-seed-0/align")
    with pytest.raises(KeyboardInterrupt):
        compare(load("seeds=1"))
    watch_training(monkeypatch)
    for override, message in (
        ("stages.chat.overrides.steps=4", "mlp-seed-0 holds a run with chat: steps 3, this run has 4. Set it back"),
        ("questions=6", "mlp-seed-0 holds a run with questions 4, this comparison has 6"),
        (
            "connectors=[{name: resampler-5, type: resampler, num_tokens: 6, num_layers: 1, num_heads: 1}]",
            "resampler-5-seed-0 holds a run with align: init_from.connector.num_tokens 5, this run has 6",
        ),
    ):
        with pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
            compare(load("seeds=1", override))
        assert "\n" not in str(caught.value)
    for path, name in ((tmp_path / "start/final/model.safetensors", "model"), (tmp_path / HELDOUT, "heldout")):
        content = path.read_bytes()
        path.write_bytes(content[:-2] + (b"00" if name == "model" else b"}\n\n"))
        with pytest.raises(ValueError, match=rf"mlp-seed-0 holds a run with {name} \w{{16}}, this comparison has \w+"):
            compare(load("seeds=1"))
        path.write_bytes(content)
    (tmp_path / "comparison/runs/mlp-seed-0/result.json").write_text("[]")
    with pytest.raises(ValueError, match=r"result\.json is not a run's result; delete .*mlp-seed-0"):
        compare(load("seeds=1"))


def pretend_to_train(monkeypatch: Patch, error: Callable[[str], BaseException | None]) -> None:
    """Runs end at once, by the error for the end of their folder's name, or as they are."""

    def pretended(config: TrainConfig) -> None:
        if (raised := error("/".join(Path(config.run_dir).parts[-2:]))) is not None:
            raise raised
        train(config)

    monkeypatch.setattr(run_series, "train", pretended)


@pytest.mark.usefixtures("start")
def test_a_run_that_diverges_is_left_out(load: Load, monkeypatch: Patch) -> None:
    diverged = DivergedError("10 consecutive steps were skipped")
    pretend_to_train(monkeypatch, lambda run: diverged if run.startswith("resampler-5") else None)
    comparison = load("seeds=1")
    markdown = compare(comparison)
    assert "Runs of resampler-5 that diverged and are left out: 1." in markdown
    (row,) = [line for line in markdown.splitlines() if line.startswith("| resampler-5")]
    assert set(row.split("|")[2:-1]) == {" – "}
    pretend_to_train(monkeypatch, lambda run: AssertionError(f"{run} is made again"))
    assert compare(comparison) == markdown


@pytest.mark.usefixtures("start")
def test_a_run_that_is_stopped_or_fails_is_named(
    load: Load, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_to_train(monkeypatch, lambda _: SystemExit(143))  # the trainer's, after SIGTERM and a checkpoint
    with pytest.raises(SystemExit) as ended:
        compare(load())
    assert ended.value.code == 143
    assert "Stopped in run 1 of 4; the same command resumes the comparison." in capsys.readouterr().err
    pretend_to_train(monkeypatch, lambda _: ValueError("the disk is full"))
    with pytest.raises(ValueError, match=r"run mlp, seed 0, align: the disk is full \(log: .*align/train\.log\)"):
        compare(load())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="trains in one process, and was started on 2 ranks"):
        compare(load())


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("connectors=[{name: a, type: perceiver}]", "connector 'a': .*'perceiver'; expected one of mlp, qformer"),
        ("connectors=[{name: a, type: abstractor, num_tokens: 7}]", "connector 'a': .*num_tokens is 7"),
        ("connectors=[{name: a, type: mlp, colour: 7}]", "connector 'a': .*colour"),
        ("connectors=[{type: mlp}]", "expected a name"),
        ("connectors=[{name: a/b, type: mlp}]", "expected a name"),
        ("connectors=[{name: a}]", "and a type"),
        ("connectors=[{name: a, type: mlp}, {name: a, type: mlp}]", r"names repeat \(a, a\)"),
        ("connectors=[]", "connectors is empty"),
        ("connectors=mlp", "connectors"),
        ("stages.chat.base=none.yaml", "none.yaml: there is no such config file"),
        ("stages.chat.overrides.stepz=3", r"connector 'mlp': .*unknown key 'stepz'"),
        ("stages.chat.overrides.run_dir=x", "stages.chat.overrides has run_dir, which the comparison sets itself"),
        ("stages.chat.overrides.init_from.checkpoint=x", "stages.chat.overrides has init_from"),
        ("seeds=0", "seeds is 0"),
        ("seeds=few", "seeds"),
        ("questions=1", "questions is 1"),
        ("speed_rounds=0", "speed_rounds is 0"),
        ("colour=red", "colour"),
        ("seeds", "'seeds' on the command line is not of the form"),
    ],
)
def test_a_wrong_setting_is_refused_and_named(load: Load, override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        load(override)
    assert "\n" not in str(caught.value) and "comparison.yaml" in str(caught.value)


@pytest.mark.usefixtures("start")
def test_the_command_says_in_one_line_what_is_wrong(run_app: RunApp, tmp_path: Path) -> None:
    path = tmp_path / "comparison.yaml"
    for arguments, message in (
        ([path, "connectors=[{name: a, type: perceiver}]"], "'perceiver'; expected one of"),
        ([tmp_path / "none.yaml"], "there is no such config file; an example is train/configs/nano/connectors.yaml"),
        ([path, "--speed"], "has no finished model yet; run the comparison without --speed first"),
        ([path, "model=none"], "none"),
        ([path, f"heldout={tmp_path}"], "questions.jsonl is not here; `python -m train.nano data` makes it"),
        ([path, "stages.chat.overrides.data.sources=[{name: a, shards: none.tar}]"], "'a'"),
    ):
        code, _, error = run_app("train.nano", app, "connectors", *arguments)
        assert code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


def result(connector: str, seed: int, tokens: int, words: float) -> Result:
    score = {"en": words, "zh": words, "both": words, "count": 120}
    scores = {"words": score, "same": score | {"both": 0.5}, "all": score | {"both": (words + 0.5) / 2, "count": 240}}
    return Result(connector, seed, tokens, 1_234_567, scores, 1.5, 10.0 + seed, {}, 60.0)


def test_the_table_and_the_plot_of_known_results(tmp_path: Path) -> None:
    runs = [result("mlp", seed, 64, words) for seed, words in enumerate((0.5, 0.6, 0.7))]
    runs += [result("resampler-8", 0, 8, 0.1), Result("resampler-8", 1, None, None, {}, None, None, {}, 1.0)]
    speed = {"machine": "a processor", "milliseconds": {"mlp": [30.0, 20.0, 90.0]}}
    constant = {"words": 0.005, "same": 0.5, "all": 0.25}
    results = write_report(tmp_path, runs, speed, constant, ["mlp", "resampler-8", "abstractor"])
    mlp = results["connectors"]["mlp"]
    assert mlp["accuracy"]["words"]["mean"] == pytest.approx(0.6)
    assert mlp["accuracy"]["words"]["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0].startswith("| connector | tokens per image | parameters | same | words | all |")
    assert (
        table[2]
        == "| mlp | 64 | 1,234,567 | 50.0 ± 0.0 | 60.0 ± 5.8 | 55.0 ± 2.9 | 1.500 ± 0.000 | 11.0 ± 0.6 | 30.0 |"
    )
    assert table[3] == "| resampler-8 | 8 | 1,234,567 | 50.0 | 10.0 | 30.0 | 1.500 | 10.0 | – |", "one seed: no error"
    assert table[4] == "| constant answer |  |  | 50.0 | 0.5 | 25.0 |  |  |  |", "the third has no runs yet"
    assert "the seeds (1-3); questions of each skill: 120." in table[6] and table[6].endswith("TTFT: a processor.")
    assert table[7] == "Runs of resampler-8 that diverged and are left out: 1."
    chinese = (tmp_path / "table_zh.md").read_text()
    assert "| 异同 | 文字 | 全部 |" in chinese and "60.0 ± 5.8" in chinese and "（1-3 个）" in chinese
    assert (tmp_path / "accuracy.png").stat().st_size > 5000


def question(skill: str, topic: str, lang: str, *accepted: str) -> Question:
    return Question("0", skill, topic, lang, (), "?", accepted)


def test_a_constant_answer_and_the_questions_chosen(load: Load, tmp_path: Path) -> None:
    questions = [
        *(question("digits", "digit", "en", f"It is {digit}.") for digit in "1123"),
        *(question("same", "same", "en", answer) for answer in ("Yes, both are red.", "Yes, both are blue.", "No.")),
        *(question("scenes", "count", "zh", answer, f"{answer}个。") for answer in ("一", "二")),
        *(question("scenes", "shape", "zh", answer) for answer in ("圆", "方")),
    ]
    constant = {"digits": 1 / 2, "same": 2 / 3, "scenes": 1 / 2, "all": 6 / 11}
    assert constant_accuracy(questions) == pytest.approx(constant)

    load()
    read = read_questions(tmp_path / "heldout")
    chosen = select_questions(read, 4)
    groups = [(question.skill, question.lang) for question in chosen]
    assert sorted(groups) == sorted([(skill, lang) for skill in ("colour", "same") for lang in ("en", "zh")] * 2)
    assert select_questions(read, None) == select_questions(read, 1000) == read


def test_the_comparison_of_the_project_holds_out_what_it_measures() -> None:
    comparison = load_comparison(ROOT / "train/configs/nano/connectors.yaml")
    for name in comparison.names:
        configs = comparison.stage_configs(name, 1)
        assert [config.image_size for config in configs.values()] == [448, 448]
        align, chat = configs.values()
        assert (align.trainable.vision, align.trainable.projector, align.trainable.language) == (False, True, False)
        assert chat.trainable.vision and chat.trainable.language is True and chat.validation is not None
        patterns = [source.shards for source in chat.data.sources]
        for held_out in chat.validation.sources:
            assert not any(fnmatch(held_out.shards, pattern) for pattern in patterns), held_out.shards


def test_a_connector_may_have_a_learning_rate_of_its_own(load: Load) -> None:
    comparison = load("connectors=[{name: mlp, type: mlp}, {name: fast, type: mlp, lr: 0.5}]")
    plain, fast = (comparison.stage_configs(name, 0) for name in ("mlp", "fast"))
    assert {config.lr.projector for config in fast.values()} == {0.5}
    assert {config.lr.projector for config in plain.values()}.isdisjoint({0.5})
    assert {config.lr.vision for config in fast.values()} == {config.lr.vision for config in plain.values()}
    with pytest.raises(ValueError, match=r"connector 'mlp'.*lr"):
        load("connectors=[{name: mlp, type: mlp, lr: -1}]")
