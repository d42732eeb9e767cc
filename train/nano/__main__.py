"""nano: its data, training from scratch, and what is tried on it.

`data | train | export | measure`: all of it, in this order. `language | measure-language | ablate` and `tower | probe`:
each part alone; `keep` makes it one that `train` starts from. `preferences | style`: preferences, and what they change.
`experts`: how many experts a token gets. `connectors`: other connectors, compared. `tiles`: what tiles bring on pages
of small words.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from yi_vl import program
from yi_vl.cli import QuantizeOption

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

CONFIGS = Path("train/configs/nano")
RUNS = Path("runs/nano")
STAGES = ("align-224", "upscale-448", "chat-448")
PARTS = Path("train/nano/parts")  # language model and tower, finished
DATA = Path("data/nano")
PACKAGED = Path("yi_vl/nano")
DOCUMENTS = (Path("README.md"), Path("README_zh.md"), PACKAGED / "README.md")


@app.command()
def data(processes: Annotated[int, typer.Option(help="number of processes that compose images")] = 2) -> None:
    """Fetch the artwork and write all shards and held-out questions to data/nano; what is complete is kept."""
    from train.nano.data.shards import build_shards
    from train.nano.measure.heldout import build_heldout

    build_shards(DATA, processes)
    build_heldout(DATA)


@app.command()
def train(
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="train the language model and the tower too: half a day on a CPU")
    ] = False,
) -> None:
    """Match the tower with the language model, then the three stages; finished runs are kept, interrupted ones resumed.

    Language model and tower come from train/nano/parts; what is not there is trained first.
    """
    from train.nano.pretrain.join import LANGUAGE, TOWER
    from train.nano.pretrain.match import match

    language_dir, tower_dir = PARTS / LANGUAGE, PARTS / TOWER
    if from_scratch or not language_dir.exists():
        language_dir = _train_language()
    if from_scratch or not tower_dir.exists():
        tower_dir = _train_tower()
    typer.echo(f"language model: {language_dir}, tower: {tower_dir}")
    if not (RUNS / "matched" / "config.json").exists():
        match(language_dir, tower_dir, RUNS / "matched", DATA)
    for stage in STAGES:
        run_stage(stage)


def _train_language() -> Path:
    from train.nano.pretrain.language import LanguageRecipe, pretrain_language

    folder = RUNS / "language" / "final"
    if not (folder / "config.json").exists():
        pretrain_language(RUNS / "language", LanguageRecipe())
    return folder


def _train_tower() -> Path:
    from train.nano.pretrain.tower import TowerRecipe, pretrain_tower

    folder = RUNS / "tower"
    if not (folder / "config.json").exists():
        pretrain_tower(folder, TowerRecipe(), DATA)
    return folder


def run_stage(name: str) -> None:
    """Train by a config file; a finished run returns at once, an interrupted one is resumed.

    Raises:
        SystemExit: it failed, and has said why.
    """
    trained = subprocess.run([sys.executable, "-m", "train", str(CONFIGS / f"{name}.yaml")], check=False)
    if trained.returncode:
        raise SystemExit(trained.returncode)


@app.command()
def measure(
    models: Annotated[
        list[str] | None, typer.Argument(help="models as name=folder; by default every finished stage")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for answers, scores and the table")] = RUNS / "measure",
    write: Annotated[bool, typer.Option(help="put the table into the READMEs and the model card as well")] = False,
    quantize: QuantizeOption = None,
) -> None:
    """Answer the held-out questions with every stage's model and print the table; out/answers-NAME/index.html shows the
    answers."""
    from train.nano.measure.evaluate import measure_all, write_table

    named = _named(models or ()) or {stage: RUNS / stage / "final" for stage in STAGES}
    markdown = measure_all(named, DATA / "heldout", out, quantize)
    typer.echo(markdown)
    for document in DOCUMENTS if write else ():
        write_table(document, markdown)


@app.command()
def language(
    run_dir: Annotated[Path, typer.Argument(help="the run's folder; a run that is in it is continued")],
    overrides: Annotated[list[str] | None, typer.Argument(help="recipe settings as key.sub=value")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with a recipe; by default the settings of nano")
    ] = None,
) -> None:
    """Train a language model alone on mosaics, from fresh weights; see docs/nano.md."""
    from train.nano.pretrain.language import LanguageRecipe, pretrain_language
    from train.nano.pretrain.trainer import read_recipe

    pretrain_language(run_dir, read_recipe(LanguageRecipe, recipe, overrides or ()))


@app.command()
def ablate(
    path: Annotated[Path, typer.Argument(help="YAML file with `base` and `runs`")] = CONFIGS / "ablation.yaml",
    out: Annotated[Path, typer.Option(help="folder of the runs; what is finished is kept")] = RUNS / "ablation",
    questions: Annotated[int, typer.Option(min=1, help="for each task and language")] = 300,
) -> None:
    """Train language models of several shapes alone with the same budget, one after another, and print their table."""
    from train.nano.pretrain.ablation import ablate as run_ablation

    typer.echo(run_ablation(path, out, questions))


@app.command()
def tower(
    run_dir: Annotated[Path, typer.Argument(help="the run's folder; a run that is in it is continued")],
    overrides: Annotated[list[str] | None, typer.Argument(help="recipe settings as key=value")] = None,
    data_dir: Annotated[Path, typer.Option("--data", help="nano's data")] = DATA,
) -> None:
    """Train a vision tower alone to name what is at given points of images, from fresh weights."""
    from train.nano.pretrain.tower import TowerRecipe, pretrain_tower
    from train.nano.pretrain.trainer import read_recipe

    pretrain_tower(run_dir, read_recipe(TowerRecipe, None, overrides or ()), data_dir)


@app.command()
def keep(
    language_dir: Annotated[Path | None, typer.Option("--language", help="`final` of a run of `language`")] = None,
    tower_dir: Annotated[Path | None, typer.Option("--tower", help="a run of `tower`, or a model")] = None,
    out: Annotated[Path, typer.Option(help="the folder that `train` starts from")] = PARTS,
) -> None:
    """Write finished parts to train/nano/parts, in bfloat16."""
    if language_dir is None and tower_dir is None:
        raise ValueError("There is nothing to keep: give --language, --tower, or both.")
    from train.nano.pretrain.join import keep_language, keep_tower

    if language_dir is not None:
        keep_language(language_dir, out)
    if tower_dir is not None:
        keep_tower(tower_dir, out)


@app.command()
def probe(
    model: Annotated[Path, typer.Argument(help="folder of a model, or of a tower alone")],
    data_dir: Annotated[Path, typer.Option("--data", help="nano's data")] = DATA,
    scale: Annotated[float, typer.Option(min=0.01, help="factor on the number of training images")] = 1.0,
    cache: Annotated[Path, typer.Option(help="folder for the features")] = RUNS / "probe",
) -> None:
    """What can be read from a vision tower: linear classifiers of its features, by skill, on held-out artwork."""
    from train.nano.measure.probe import probe_tower

    typer.echo(probe_tower(model, data_dir, cache, scale))


@app.command()
def measure_language(
    run_dirs: Annotated[list[Path], typer.Argument(help="folders of `language`, finished or not")],
    questions: Annotated[int, typer.Option(min=1, help="for each task and language")] = 300,
    examples: Annotated[int, typer.Option(min=0, help="show so many wrong answers of each run")] = 0,
) -> None:
    """Exact answers of language models alone to held-out questions about mosaics, by task: a table of all runs."""
    from train.nano.pretrain.ablation import measure_runs

    typer.echo(measure_runs(run_dirs, questions, examples))


@app.command()
def preferences(
    data_dir: Annotated[Path, typer.Option("--data", help="nano's data")] = DATA,
    model: Annotated[Path, typer.Option(help="the model whose answers they are")] = PACKAGED,
) -> None:
    """Write preferences to data/nano/preferences: a model's own answers, those without their full stop preferred."""
    from train.nano.data.preferences import build_preferences
    from yi_vl import load

    folder = build_preferences(data_dir, load(model))
    typer.echo(f"{folder}: shards of the format preference; see docs/preference.md")


@app.command()
def style(
    models: Annotated[list[str], typer.Argument(help="models as name=folder")],
    data_dir: Annotated[Path, typer.Option("--data", help="nano's data")] = DATA,
    every: Annotated[int, typer.Option(min=1, help="ask only each so many-th question of either language")] = 1,
) -> None:
    """How often models answer held-out questions without a full stop, and how many of their answers are correct."""
    from train.nano.measure.style import measure_style

    typer.echo(measure_style(_named(models), data_dir / "heldout", every))


@app.command()
def experts(
    model: Annotated[Path, typer.Argument(help="a folder of a model with experts by top-p")],
    data_dir: Annotated[Path, typer.Option("--data", help="nano's data")] = DATA,
    every: Annotated[int, typer.Option(min=1, help="take only each so many-th held-out question")] = 1,
) -> None:
    """How many experts the tokens of held-out questions get, by skill and by layer."""
    from train.nano.measure.experts import measure_experts

    typer.echo(measure_experts(model, data_dir / "heldout", every))


@app.command()
def connectors(
    config: Annotated[Path, typer.Argument(help="a YAML file")] = CONFIGS / "connectors.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key.sub=value", help="settings that replace the file's")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="only measure the time to first token of the trained models again")
    ] = False,
) -> None:
    """Train nano with different connectors, and compare accuracy by skill, tokens, and speed; killed, it resumes."""
    from train.nano.connectors.config import load_comparison

    comparison = load_comparison(config, overrides or ())
    from train.nano.connectors.compare import compare, compare_speed  # torch, after the settings are known to be right
    from train.run_series import log_to_files

    log_to_files()
    typer.echo(compare_speed(comparison) if speed else compare(comparison))


@app.command()
def tiles(
    data_dir: Annotated[Path, typer.Option("--data", help="nano's data, for its fonts")] = DATA,
    out: Annotated[Path, typer.Option(help="folder for pages, runs, results and the table")] = RUNS / "tiles",
    number: Annotated[int, typer.Option(min=2, help="most tiles of a page")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="training steps of each run")] = 150,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each kind")] = 3,
) -> None:
    """Train nano further on pages of small words, with tiles and without, and print the table; what is done is kept."""
    from train.nano.tiles.compare import compare
    from train.run_series import log_to_files

    log_to_files()
    typer.echo(compare(data_dir, out, number, steps, seeds))


@app.command()
def export(source: Path = RUNS / "chat-448" / "final", target: Path = PACKAGED) -> None:
    """Write the finished model to the package, in bfloat16, beside its card."""
    import torch

    from yi_vl import YiVLForConditionalGeneration, YiVLProcessor
    from yi_vl.generation import set_end_tokens_

    model = YiVLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    processor = YiVLProcessor.from_pretrained(source)
    set_end_tokens_(model.generation_config, processor.tokenizer)
    model.save_pretrained(target)
    processor.save_pretrained(target)


def _named(models: Sequence[str]) -> dict[str, Path]:
    if wrong := [entry for entry in models if "=" not in entry]:
        raise ValueError(f"{wrong[0]!r} is not of the form name=folder.")
    return {name: Path(folder) for name, folder in (entry.split("=", 1) for entry in models)}


if __name__ == "__main__":
    program.run(app, "error")
