"""`python -m eval COMMAND`: benchmarks, scores and speed of a model."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from yi_vl.arguments import as_path
from yi_vl.cli import QuantizeOption
from yi_vl.program import run as run_program
from yi_vl.runtime import limit_spinning, use_huge_pages

from .chat_client import DEFAULT_TIMEOUT_SECONDS
from .evaluate import report_scores, run
from .options import JudgeModelOption, JudgeOption, Options, TimeoutOption, judge_choice, with_options
from .speed.commands import app as speed

if TYPE_CHECKING:
    from .types import Answered, Benchmark, Question

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(speed, name="speed")

Name = Literal["mmmu", "mmmu-pro", "cmmmu"]
SplitName = Literal["dev", "val", "test"]
VariantName = Literal["standard (10 options)", "standard (4 options)", "vision"]
Data = Annotated[
    str,
    typer.Option(help="Hub id, or a folder of its parquet files (for CMMMU also of its JSON lines with their images)."),
]


def _expand(path: Path | None) -> Path | None:
    return None if path is None else as_path(path, "--out")


Out = Annotated[Path, typer.Option(callback=_expand, help="Folder for predictions, results, tables, chart and page.")]
SplitOption = Annotated[SplitName, typer.Option(help="The split of the benchmark.")]


def _add_command(name: Literal["mmmu", "cmmmu"], hub_id: str, title: str) -> None:
    """A command for a benchmark whose only choice is its split."""

    @app.command(name, help=f"Run a model over {title} and score it.")
    @with_options
    def command(
        options: Options, data: Data = hub_id, split: SplitOption = "val", out: Out = Path("runs/eval") / name
    ) -> None:
        benchmark = _benchmark(name)
        run(benchmark, benchmark.load(data, split), split, out, options)


_add_command("mmmu", "MMMU/MMMU", "MMMU")
_add_command("cmmmu", "m-a-p/CMMMU", "CMMMU")


@app.command("mmmu-pro")
@with_options
def mmmu_pro(
    options: Options,
    data: Data = "MMMU/MMMU_Pro",
    variant: Annotated[
        VariantName, typer.Option(help="The dataset: 10 options, 4 options, or the question as an image.")
    ] = "standard (10 options)",
    prompt: Annotated[
        Literal["direct", "cot"], typer.Option(help="Answer directly, or with chain of thought.")
    ] = "direct",
    out: Out = Path("runs/eval/mmmu-pro"),
) -> None:
    """Run a model over MMMU-Pro and score it."""
    from .benchmarks import mmmu_pro as benchmark

    questions = benchmark.load(data, "test", variant, prompt)
    run(benchmark, questions, "test", out, options, {"variant": variant, "prompt": prompt})


@app.command("score")
def score_(
    benchmark: Annotated[Name, typer.Argument(help="The benchmark.")],
    predictions: Annotated[
        Path, typer.Option(help="A file or folder in a format of the official scripts, or a predictions.jsonl.")
    ],
    answers: Annotated[
        str | None,
        typer.Option(
            help="The official answer file, or the dataset: a folder or hub id. By default the predictions themselves, "
            "which contain the answers for MMMU-Pro."
        ),
    ] = None,
    split: Annotated[SplitName | None, typer.Option(help="The split; by default val, for MMMU-Pro test.")] = None,
    variant: Annotated[
        VariantName, typer.Option(help="The MMMU-Pro dataset, if --answers is a dataset.")
    ] = "standard (10 options)",
    is_partial: Annotated[
        bool, typer.Option("--partial", help="Score MMMU-Pro's predictions even if they are not all 1,730.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(callback=_expand, help="Also write results.json, table, chart and verdicts here.")
    ] = None,
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_SECONDS,
) -> None:
    """Score predictions by the official rules, with and without random guesses, and by an LLM judge if given."""
    module, judge_model_choice = _benchmark(benchmark), judge_choice(judge, judge_model, timeout)
    if judge_model_choice is not None and out is None:
        raise ValueError("--judge needs --out, the folder where the judge's replies are kept for later runs.")
    split = split or ("test" if benchmark == "mmmu-pro" else "val")
    _check_score_options(module, answers, split, is_partial)
    known = module.read_answers(predictions) if answers is None else _answers(benchmark, answers, split, variant)
    questions = {question.id: question for question in known}
    answered = module.read_predictions(predictions, questions)
    _check_scorable(module, answered, predictions, is_partial)
    if len(answered) < len(questions):
        typer.echo(
            f"Only {len(answered)} of {len(questions)} questions are answered; the scores are of these.", err=True
        )
    config = {
        "model": predictions.name.removesuffix(".jsonl").removesuffix(".json"),
        "predictions": str(predictions),
        "answers": answers or str(predictions),
    }
    report_scores(module, answered, out, config, split, judge_model_choice)


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(help="Two or more folders that hold a verdicts.jsonl.")],
) -> None:
    """Compare models pair by pair on the questions that both answered."""
    from .report import compare_results

    if len(results) < 2:
        raise ValueError("Give two folders or more to compare.")
    typer.echo(compare_results(results))


@app.command()
def submit(
    benchmark: Annotated[Name, typer.Argument(help="The benchmark.")],
    predictions: Annotated[Path, typer.Option(help="The predictions.jsonl of a run over the test split.")],
    data: Annotated[str, typer.Option(help="The dataset, to check that no question is missing: a folder or hub id.")],
    out: Out = Path("."),
    split: SplitOption = "test",
) -> None:
    """Write the file to submit to the benchmark's test server; an error if a question is missing."""
    module = _benchmark(benchmark)
    module.submission(())  # refuses before the data is loaded where there is no test server
    questions = {question.id: question for question in _answers(benchmark, data, split)}
    answered = module.read_predictions(predictions, questions)
    _check_unique(answered, predictions)
    missing = sorted(set(questions) - {item.question.id for item in answered})
    if missing:
        raise ValueError(
            f"{predictions} lacks {len(missing)} of {len(questions)} questions, so there is nothing to submit: "
            f"{', '.join(missing[:5])} ..."
        )
    name, text = module.submission(answered)
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text, encoding="utf-8")
    typer.echo(f"{out / name}: {len(answered)} answers")


@app.command("gpu")
def gpu_(
    out: Annotated[Path, typer.Option(callback=_expand, help="Folder for gpu.json, gpu.md and logs.")] = Path(
        "runs/eval/gpu"
    ),
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="The device to measure.")] = "cuda",
    size: Annotated[Literal["6b", "nano"], typer.Option(help="6b needs an 80 GB GPU; nano runs on a CPU.")] = "6b",
    parts: Annotated[str, typer.Option(help="Parts to run, comma-separated: environment,logits,train.")] = "",
    minutes: Annotated[float, typer.Option(help="Time limit: no part starts or runs after it.")] = 10,
) -> None:
    """Measure loading, inference, quantization and training on a GPU; failed parts are recorded."""
    from .gpu.measure import TABLE_FILE, measure

    outcomes = measure(out, device, size, [name.strip() for name in parts.split(",") if name.strip()], minutes)
    typer.echo((out / TABLE_FILE).read_text(encoding="utf-8"))
    if any(outcome.status == "failed" for outcome in outcomes.values()):
        raise typer.Exit(1)


@app.command("full-size")
def full_size(
    folder: Annotated[Path, typer.Argument(help="The checkpoint; created with random weights if it does not exist.")],
    size: Annotated[Literal["6b", "34b"], typer.Option(help="The model whose shapes are used.")] = "6b",
    tokenizer: Annotated[
        Path, typer.Option(help="A folder with tokenizer.model and tokenizer_config.json, for a new checkpoint.")
    ] = Path("tests/official_tiny/checkpoint"),
    image: Annotated[Path, typer.Option(help="The image of the question.")] = Path("docs/images/dog.png"),
    new_tokens: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 16,
    quantize: QuantizeOption = None,
) -> None:
    """Load a checkpoint in the released shapes and layout and generate: load time, peak memory, tokens/s."""
    from .speed.full_size import make, measure

    if not folder.exists():
        typer.echo(f"Writing {folder}: random weights in the shapes and layout of Yi-VL-{size.upper()} ...", err=True)
        make(folder, size, tokenizer)
    for name, value in measure(folder, image, new_tokens, quantize).items():
        typer.echo(f"{name:<34}{value}")


def _benchmark(name: Name) -> Benchmark:
    from .benchmarks import cmmmu, mmmu, mmmu_pro

    benchmarks: dict[str, Benchmark] = {module.NAME: module for module in (mmmu, mmmu_pro, cmmmu)}
    return benchmarks[name]


def _answers(
    name: Name, source: str, split: SplitName, variant: VariantName = "standard (10 options)"
) -> list[Question]:
    from .benchmarks import mmmu_pro

    if Path(source).is_file():
        return _benchmark(name).read_answers(Path(source))
    return mmmu_pro.load(source, split, variant) if name == "mmmu-pro" else _benchmark(name).load(source, split)


def _check_score_options(benchmark: Benchmark, answers: str | None, split: SplitName, is_partial: bool) -> None:
    if answers is None and not benchmark.HAS_ANSWERS_IN_PREDICTIONS:
        raise ValueError(f"Give --answers: predictions for {benchmark.NAME} do not come with them.")
    if benchmark.NAME == "mmmu-pro" and split != "test":
        raise ValueError(f"MMMU-Pro has no split {split}; its only one is test.")
    if is_partial and benchmark.NUM_REQUIRED is None:
        raise ValueError(f"--partial is for mmmu-pro; {benchmark.NAME} has its own rule for unanswered questions.")


def _check_scorable(benchmark: Benchmark, answered: list[Answered], source: Path, is_partial: bool) -> None:
    if not answered:
        raise ValueError(f"{source} holds no predictions.")
    _check_unique(answered, source)
    num_required = benchmark.NUM_REQUIRED
    if num_required is not None and len(answered) != num_required and not is_partial:
        raise ValueError(
            f"{source} has {len(answered)} responses, and the official script scores exactly {num_required}. "
            "Give --partial to score these all the same."
        )
    hidden = [item.question.id for item in answered if not item.question.gold]
    if hidden:
        raise ValueError(
            f"{len(hidden)} of {len(answered)} answered questions have no public answer, {hidden[0]} first, so they "
            "cannot be scored here; `submit` writes the test server's file."
        )


def _check_unique(answered: list[Answered], source: Path) -> None:
    seen: set[str] = set()
    for item in answered:
        if item.question.id in seen:
            raise ValueError(f"{source} answers {item.question.id} more than once.")
        seen.add(item.question.id)


def main() -> None:
    """The entry point of `python -m eval`."""
    use_huge_pages()
    limit_spinning()
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    run_program(partial(app, prog_name="python -m eval"), "eval")


if __name__ == "__main__":
    main()
