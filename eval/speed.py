"""`python -m eval speed WHAT`: ratios, each measured side by side in one run on this machine.

Called by __main__.py; calls yi_vl and the runner's own parts.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .question import Question

if TYPE_CHECKING:
    from yi_vl import YiVL

app = typer.Typer(help="Measure speed, side by side in one run.", no_args_is_help=True)
Preset = Literal["nano", "1b", "6b"]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def chat(
    preset: Annotated[Preset, typer.Option(help="Whose size; all but nano have random weights.")] = "1b",
    image: Annotated[Path, typer.Option(help="What the chat is about.")] = Path("docs/pictures/scene.png"),
    turns: Annotated[int, typer.Option(min=2)] = 5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of every answer.")] = 32,
    as_json: AsJson = False,
) -> None:
    """Time to the first token, turn by turn: what was read is kept, or the whole prompt is read again."""
    from .random_models import make

    model = make(preset)
    show(compare_chat(model, image, turns, new_tokens) | {"model": preset}, as_json)


def compare_chat(model: YiVL, image: Path, turns: int, new_tokens: int) -> dict[str, Any]:
    """A chat about one picture, once as it is and once with everything forgotten before each turn."""
    from yi_vl.decode import Sampling

    ways: dict[str, dict[str, float]] = {}
    for name, forgets in (("whole prompt read again", True), ("prefix kept", False)):
        model.forget()
        messages: list[dict[str, Any]] = []
        seconds = {}
        for turn in range(1, turns + 1):
            content: list[dict[str, Any]] = [{"type": "image", "image": image}] if turn == 1 else []
            messages.append(
                {"role": "user", "content": [*content, {"type": "text", "text": f"Question {turn}: what is it?"}]}
            )
            if forgets:
                model.forget()
            started = time.perf_counter()
            prompts, sampling = model.prepare([messages]), Sampling(max_new_tokens=new_tokens)
            steps = model.generate(prompts, model.begin_answers(prompts, sampling), sampling)
            pieces = [next(steps)[0]]
            seconds[f"turn_{turn}_ms"] = 1000 * (time.perf_counter() - started)
            pieces += [piece for (piece,) in steps]
            messages.append({"role": "assistant", "content": "".join(pieces) or "Yes."})
        ways[name] = seconds
    slow, fast = (way[f"turn_{turns}_ms"] for way in ways.values())
    return {
        "what": f"time to the first token, about one picture of {model.processor.patches_per_image} tokens",
        "machine": machine(),
        "ways": ways,
        "ratio": slow / fast,
    }


@app.command("runner")
def runner_(
    model: Annotated[str, typer.Option(help='"nano", or a folder or hub id of a Yi-VL.')] = "nano",
    data: Annotated[str, typer.Option(help="Questions in MMMU's schema.")] = "data/nano/heldout/mmmu",
    num_questions: Annotated[int, typer.Option(min=1, help="So many of them, spread evenly.")] = 96,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    as_json: AsJson = False,
) -> None:
    """The evaluation's questions per second against a plain loop of transformers' `generate`, one by one."""
    from . import mmmu

    if not Path(data).is_dir() and "/" in data and Path(data).parts[0] == "data":
        raise ValueError(f"{data} is not here. `python -m train.nano data` makes it, or name another with --data.")
    found = mmmu.load(data, "val")
    questions = [found[index * len(found) // num_questions] for index in range(min(num_questions, len(found)))]
    show(compare_runner(model, questions, batch_size, max_new_tokens), as_json)


def compare_runner(model: str, questions: Sequence[Question], batch_size: int, max_new_tokens: int) -> dict[str, Any]:
    """Both ways over the same questions, greedily; the first batch of each is not counted."""
    from .models import Settings, YiVLModel

    answerer = YiVLModel(model)
    ordered = sorted(questions, key=lambda question: (len(question.pictures), len(question.prompt.encode())))
    settings = Settings(max_new_tokens)

    def in_batches(some: Sequence[Question]) -> list[str]:
        return [
            reply.text
            for start in range(0, len(some), batch_size)
            for reply in answerer.answer([one.content() for one in some[start : start + batch_size]], settings)
        ]

    def one_by_one(some: Sequence[Question]) -> list[str]:
        return [_generate(answerer.yi_vl, question, max_new_tokens) for question in some]

    results, said = {}, {}
    for name, way in (
        ("transformers' generate, one by one", one_by_one),
        (f"eval's runner, batch {batch_size}", in_batches),
    ):
        way(ordered[:batch_size])
        answerer.yi_vl.forget()
        seconds, said[name] = _timed(way, ordered)
        results[name] = {"questions_per_second": len(ordered) / seconds, "seconds": seconds}
    slow, fast = (entry["questions_per_second"] for entry in results.values())
    first, second = said.values()
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return {
        "what": f"{len(ordered)} questions, at most {max_new_tokens} new tokens, {model}",
        "machine": machine(),
        "ways": results,
        "ratio": fast / slow,
        "same_answers": f"{same} of {len(ordered)}",
    }


def show(measured: dict[str, Any], as_json: bool) -> None:
    """Print a measurement as a table of its ways, or as JSON."""
    if as_json:
        typer.echo(json.dumps(measured, indent=1))
        return
    typer.echo(f"{measured['what']}; {measured['machine']}\n")
    columns = list(next(iter(measured["ways"].values())))
    typer.echo("| | " + " | ".join(name.replace("_", " ") for name in columns) + " |\n|---|" + "---:|" * len(columns))
    for name, values in measured["ways"].items():
        typer.echo(f"| {name} | " + " | ".join(f"{values[column]:.3g}" for column in columns) + " |")
    rest = {key: value for key, value in measured.items() if key not in ("what", "machine", "ways")}
    for name, value in rest.items():
        typer.echo(f"\n{name.replace('_', ' ')}: " + (f"{value:.2f}" if isinstance(value, float) else str(value)))


def machine() -> str:
    """The processor and what torch makes of it."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (named or [platform.processor()])[0]
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _timed(way: Callable[[Sequence[Question]], list[str]], questions: Sequence[Question]) -> tuple[float, list[str]]:
    started = time.perf_counter()
    said = way(questions)
    return time.perf_counter() - started, said


def _generate(yi_vl: YiVL, question: Question, max_new_tokens: int) -> str:
    """What a script for one question does: processor, `generate`, decode."""
    import torch

    from .models import read_pictures

    prompts = yi_vl.prepare([[{"role": "user", "content": read_pictures(question.content())}]])
    with torch.inference_mode():
        tokens = yi_vl.model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            pixel_values=prompts.pixel_values,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stop_strings=["###"],
            tokenizer=yi_vl.processor.tokenizer,
        )
    text: str = yi_vl.processor.tokenizer.decode(tokens[0, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    return text.split("###")[0].strip()
