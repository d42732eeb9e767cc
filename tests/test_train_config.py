"""Settings: what is refused and what the message names; the recipes in train/configs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from train.__main__ import main
from train.config import TrainConfig, num_steps
from train.config_file import load_config, to_yaml
from yi_vl import program

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "train/configs").glob("*/*-[0-9]*.yaml"))
NANO = ROOT / "train/configs/nano/align-224.yaml"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.workrs=3", "unknown key 'data.workrs'"),
        ("speed=3", "unknown key 'speed'"),
        ("data.sources.0.wight=3", "unknown key .*wight"),
        ("data.sources=[{name: a, shards: b, wight: 1}]", "unknown key 'wight'.*weight"),
        ("init_from={checkpoint: a, tag: b}", "unknown key 'init_from.tag'"),
        ("steps=many", r"\(steps=many\): steps: .*many"),
        ("lr.vision=fast", "lr.vision: .*fast"),
        ("trainable.vision=maybe", "trainable.vision: .*maybe"),
        ("data=3", "data: "),
        ("data.sources=x", "data.sources: "),
        ("data.sources=[{name: a}]", "data.sources.0..shards is missing"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("precision=bf32", "precision is 'bf32'; expected one of"),
        ("data.format=poem", "format of source .* is 'poem'"),
        ("epochs=2", "exactly one of steps and epochs"),
        ("init_from.language_model=x", "init_from needs either"),
        ("trainable.language=some", "trainable.language is .some.; expected true, false or lora"),
        ("generations={shards: x.tar, count: 0}", "generations.count is 0"),
        ("trainable={vision: false, projector: false}", "trainable: nothing is"),
        ("micro_batch=0", "micro_batch is 0"),
        ("lr.vision=-1e-4", "lr.vision is -0.0001; it must not be negative"),
        ("lr.language=.inf", "lr.language is inf; expected a finite number"),
        ("lr.projector=.nan", "lr.projector is nan; expected a finite number"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas is .*0 to below 1"),
        ("optimizer.betas=[.nan, 0.9]", "optimizer.betas is nan"),
        ("optimizer.eps=0", "optimizer.eps is 0.0"),
        ("clip_norm=.inf", "clip_norm is inf"),
        ("data.sources.0.weight=.inf", "data.sources.captions.weight is inf"),
        ("data.max_broken_fraction=1.5", "data.max_broken_fraction is 1.5; expected 0 to 1"),
        ("seed=-1", "seed is -1"),
        ("generations={shards: x.tar, format: text}", "format text have no prompt"),
        ("optimiser.betas=[0.9, 0.99]", r"\(optimiser.betas.*\): the key 'optimiser' is now called 'optimizer'"),
        ("bad_steps={stop_after: 3}", "the key 'bad_steps' is now called 'spike_guard'"),
        ("answers={shards: x.tar}", "the key 'answers' is now called 'generations'"),
        ("answers.count=3", "the key 'answers' is now called 'generations'"),
        ("data.form=chat", "the key 'form' is now called 'format'"),
        ("data={form: chat}", "the key 'form' is now called 'format'"),
        ("data.sources=[{name: a, shards: x.tar, form: chat}]", "the key 'form' is now called 'format'"),
        ("data.sources.0.form=chat", "the key 'form' is now called 'format'"),
        ("generations={shards: x.tar, form: text}", "the key 'form' is now called 'format'"),
        ("nothing", "not of the form key.sub=value"),
        ("x=[", "cannot be read as YAML"),
    ],
)
def test_a_wrong_setting_is_refused_and_named(override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        load_config(NANO, [override])
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    for text, named in (
        ("runs_dir: x", "unknown key 'runs_dir'"),
        ("optimiser: {eps: 1}", "'optimizer'"),
        ("- 1", "expected keys"),
        ("a: [", "YAML"),
    ):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"run.yaml: .*{named}"):
            load_config(path)
    with pytest.raises(ValueError, match=r"none.yaml: there is no such config file"):
        load_config(tmp_path / "none.yaml")


def test_the_command_exits_with_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train", str(NANO), "data.workrs=3"])
    with pytest.raises(SystemExit) as ended:
        program.run(main, "error")
    output = capsys.readouterr().err
    assert ended.value.code == 2
    assert output.startswith("error: ") and output.count("\n") == 1 and "workrs" in output


def test_adapters_need_a_checkpoint_and_a_rank() -> None:
    assert load_config(NANO, ["trainable.language=lora"]).trainable.language == "lora"
    with pytest.raises(ValueError, match=r"lora\.rank is 0"):
        load_config(NANO, ["trainable.language=lora", "lora.rank=0"])
    with pytest.raises(ValueError, match="lora adapts a checkpoint"):
        load_config(ROOT / "train/configs/6b/align-224.yaml", ["trainable.language=lora"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_resolved_config_is_taken_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(config))
    assert load_config(resolved) == config


@pytest.mark.parametrize("size", ["6b", "34b", "6b-1.5", "9b-1.5", "34b-1.5"])
def test_the_published_recipe(size: str) -> None:
    """Of Yi-VL; what is there for Yi-1.5 has its numbers, and the language model's chat format."""
    align, upscale, chat = (
        load_config(ROOT / f"train/configs/{size}/{name}.yaml") for name in ("align-224", "upscale-448", "chat-448")
    )
    assert [num_steps(config) for config in (align, upscale, chat)] == [24_414, 6_103, 7_812]
    assert [config.image_size for config in (align, upscale, chat)] == [224, 448, 448]
    assert [config.global_batch for config in (align, upscale, chat)] == [4096, 4096, 256]
    assert [config.clip_norm for config in (align, upscale, chat)] == [0.5, 0.5, 1.0]
    assert [config.lr.vision for config in (align, upscale, chat)] == [1e-4, 1e-4, 2e-5]
    assert [config.trainable.language for config in (align, upscale, chat)] == [False, False, True]
    assert all(source.max_samples == 50_000 for source in chat.data.sources)
    assert align.init_from.tower is not None and align.init_from.tower.name == "ViT-H-14"
    assert upscale.init_from.checkpoint == f"{align.run_dir}/final"
    assert chat.init_from.checkpoint == f"{upscale.run_dir}/final"
    is_newer = size.endswith("-1.5")
    series = "Yi-1.5" if is_newer else "Yi"
    assert align.init_from.language_model == f"01-ai/{series}-{size.removesuffix('-1.5').upper()}-Chat"
    assert [config.chat_format for config in (align, upscale, chat)] == ["chatml" if is_newer else None, None, None]


def test_a_run_in_the_home_folder_is_there(
    configure: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configure("run_dir=~/run").run_dir == str(tmp_path / "run")
    with pytest.raises(ValueError, match="no such user"):
        configure("run_dir=~no-such-user/run")
