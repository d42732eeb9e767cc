"""Time to first token of the connectors' models, all in turns in one process, so that what slows one slows all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from train.checkpoint import FINAL
from train.nano.measure.evaluate import Question
from yi_vl import YiVL, load
from yi_vl.engine.sampling import Sampling
from yi_vl.files import write_text
from yi_vl.hardware import machine, synchronized_seconds

from .config import Comparison
from .runs import KEPT_SEED

_SPEED = "speed.json"
_WARM_UP_ROUNDS = 2  # the first chooses kernels


def measure_speed(comparison: Comparison, questions: Sequence[Question]) -> None:
    """Write speed.json: what `read_speed` returns, of every connector whose model is there.

    Raises:
        ValueError: there is no model yet.
    """
    last = list(comparison.config.stages)[-1]
    folders = {name: comparison.run_directory(name, KEPT_SEED) / last / FINAL for name in comparison.names}
    models = {name: load(folder) for name, folder in folders.items() if folder.is_dir()}
    if not models:
        raise ValueError(f"{comparison.directory} has no finished model yet; run the comparison without --speed first.")
    question = next(question for question in questions if len(question.images) == 1)
    num_rounds = comparison.config.speed_rounds
    milliseconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in track(range(_WARM_UP_ROUNDS + num_rounds), "time to first token"):
        for name, model in models.items():
            value = 1000 * first_token_seconds(model, question.images[0], question.question)
            if round_ >= _WARM_UP_ROUNDS:
                milliseconds[name].append(round(value, 3))
    content = {"machine": machine(), "milliseconds": milliseconds}
    write_text(comparison.directory / _SPEED, json.dumps(content, indent=1) + "\n")


def read_speed(directory: Path) -> dict[str, Any]:
    """ "machine", and under "milliseconds" by connector the time to first token in each round; {} if not measured."""
    path = directory / _SPEED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def first_token_seconds(model: YiVL, image: Path, question: str) -> float:
    """From an image file and a question about it to the first token of the answer; nothing is cached."""
    model.clear_cache()
    started = synchronized_seconds(model.model.device)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    prompt = model.engine.prepare([{"role": "user", "content": content}])
    steps = model.engine.generate([prompt], Sampling(max_new_tokens=2))
    next(steps)
    seconds = synchronized_seconds(model.model.device) - started
    steps.close()
    return seconds
