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


@app.command()
def decode(
    preset: Annotated[Preset, typer.Option(help="Whose size; all but nano have random weights.")] = "1b",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of one answer, beside transformers' `generate` and what the memory's bandwidth allows."""
    from .random_models import make

    show(compare_decode(make(preset), prompt_tokens, new_tokens) | {"model": preset}, as_json)


def compare_decode(model: YiVL, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """The limit: every weight of the language model and its head is read once for each token."""
    conversation = _text_of(model, prompt_tokens)
    head = model.model.lm_head.weight
    layers = [p for name, p in model.model.model.language_model.named_parameters() if "embed_tokens" not in name]
    num_bytes = sum(parameter.nbytes for parameter in (*layers, head))
    bandwidth = read_bandwidth(head.device)
    limit = bandwidth / num_bytes
    _engine_rate(model, [conversation], 3)
    _generate_rate(model, conversation, 3)
    ways = {
        "memory's bandwidth": {"tokens_per_second": limit, "of_the_limit": 1.0},
        "transformers' generate": _shares(_generate_rate(model, conversation, new_tokens), limit),
        "yi_vl": _shares(_engine_rate(model, [conversation], new_tokens), limit),
    }
    return {
        "what": f"{num_bytes / 1e9:.2f} GB of weights a token, {bandwidth / 1e9:.1f} GB/s",
        "machine": machine(),
        "ways": ways,
        "ratio": ways["yi_vl"]["tokens_per_second"] / ways["transformers' generate"]["tokens_per_second"],
    }


@app.command()
def batch(
    preset: Annotated[Preset, typer.Option(help="Whose size; all but nano have random weights.")] = "1b",
    rows: Annotated[int, typer.Option(min=2)] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 32,
    as_json: AsJson = False,
) -> None:
    """Tokens per second of several answers at once, beside one."""
    from .random_models import make

    model = make(preset)
    conversations = [_text_of(model, prompt_tokens, str(row)) for row in range(rows)]
    _engine_rate(model, conversations, 3)
    ways = {
        "one": {"tokens_per_second": _engine_rate(model, conversations[:1], new_tokens)},
        f"{rows} at once": {"tokens_per_second": _engine_rate(model, conversations, new_tokens)},
    }
    one, many = (way["tokens_per_second"] for way in ways.values())
    show({"what": f"{new_tokens} new tokens each", "machine": machine(), "ways": ways, "ratio": many / one}, as_json)


@app.command()
def prefill(
    preset: Annotated[Preset, typer.Option(help="Whose size; all but nano have random weights.")] = "1b",
    tokens: Annotated[int, typer.Option(min=1)] = 1100,
    as_json: AsJson = False,
) -> None:
    """Reading a prompt, beside the machine's rate for matrix products of the same shapes."""
    from .random_models import make

    show(compare_prefill(make(preset), tokens) | {"model": preset}, as_json)


def compare_prefill(model: YiVL, num_tokens: int) -> dict[str, Any]:
    """Products of the layers' matrices and of attention count; softmax, norms and the one row of logits do not."""
    text = model.model.config.text_config
    layers = model.model.model.language_model.layers
    per_token = sum(p.numel() for p in layers.parameters() if p.ndim > 1)
    flops = 2 * per_token * num_tokens + 2 * num_tokens**2 * text.hidden_size * text.num_hidden_layers  # causal: half
    rate = matrix_rate(num_tokens, text.hidden_size, text.intermediate_size, model.model.dtype, model.model.device)
    conversation = _text_of(model, num_tokens)
    seconds = min(_first_token(model, conversation) for _ in range(3))
    ways = {
        "matrix products alone": {"tflops": rate / 1e12, "of_the_limit": 1.0},
        "yi_vl": {"tflops": flops / seconds / 1e12, "of_the_limit": flops / seconds / rate},
    }
    return {"what": f"{num_tokens} tokens in {seconds:.2f} s", "machine": machine(), "ways": ways}


def read_bandwidth(device: Any) -> float:
    """Bytes per second at which a product with one vector reads a large bf16 matrix: the best of several."""
    import torch

    weight = torch.ones(8192, 32768, dtype=torch.bfloat16, device=device)
    vector = torch.ones(1, 32768, dtype=torch.bfloat16, device=device)
    return weight.nbytes / _best_seconds(lambda: torch.nn.functional.linear(vector, weight), device)


def matrix_rate(rows: int, inner: int, columns: int, dtype: Any, device: Any) -> float:
    """Floating-point operations per second of one product: the best of several."""
    import torch

    left, right = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((rows, inner), (columns, inner)))
    return 2 * rows * inner * columns / _best_seconds(lambda: torch.nn.functional.linear(left, right), device)


def _best_seconds(work: Callable[[], Any], device: Any, times: int = 8) -> float:
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    with torch.inference_mode():
        return min(once() for _ in range(times))


def _text_of(model: YiVL, num_tokens: int, begin: str = "") -> list[dict[str, Any]]:
    """A conversation without a picture whose prompt takes about so many tokens."""

    def messages(words: int) -> list[dict[str, Any]]:
        return [{"role": "system", "content": "."}, {"role": "user", "content": f"{begin} " + "word " * words}]

    few, many = (model.prepare([messages(words)]).num_tokens[0] for words in (1, 11))
    return messages(max(1, 1 + round((num_tokens - few) * 10 / (many - few))))


def _first_token(model: YiVL, conversation: list[dict[str, Any]]) -> float:
    from yi_vl.decode import Sampling

    model.forget()
    prompts, sampling = model.prepare([conversation]), Sampling(max_new_tokens=2)
    started = time.perf_counter()
    next(model.generate(prompts, model.begin_answers(prompts, sampling), sampling))
    return time.perf_counter() - started


def _engine_rate(model: YiVL, conversations: list[list[dict[str, Any]]], new_tokens: int) -> float:
    """Tokens per second after the first, with answers that nothing ends."""
    from yi_vl.decode import Answer, Sampling

    model.forget()
    prompts, sampling = model.prepare(conversations), Sampling(max_new_tokens=new_tokens)
    answers = [Answer(model.processor.tokenizer, new_tokens, stop_ids=()) for _ in conversations]
    steps = model.generate(prompts, answers, sampling)
    next(steps)
    started = time.perf_counter()
    num_steps = sum(1 for _ in steps)
    return num_steps * len(conversations) / (time.perf_counter() - started)


def _generate_rate(model: YiVL, conversation: list[dict[str, Any]], new_tokens: int) -> float:
    import torch

    prompts = model.prepare([conversation])
    seconds = []
    with torch.inference_mode():
        for count in (1, new_tokens):
            started = time.perf_counter()
            model.model.generate(
                input_ids=prompts.input_ids,
                attention_mask=prompts.attention_mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
            seconds.append(time.perf_counter() - started)
    return (new_tokens - 1) / (seconds[1] - seconds[0])


def _shares(rate: float, limit: float) -> dict[str, float]:
    return {"tokens_per_second": rate, "of_the_limit": rate / limit}


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
