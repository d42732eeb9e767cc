"""What the model says about a few held-out samples as it learns: answers.jsonl, a page to look at, and the trackers.

A sample is asked as it is learned from: everything before its first supervised token is the prompt.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import Tensor

from yi_vl.chat import STOP_STRING, Segment, TooLongError, to_text
from yi_vl.engine.engine import Engine
from yi_vl.engine.gemv import use_gemm_
from yi_vl.engine.sampling import Sampling
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

from .config import AnswersConfig, DataConfig, SourceConfig
from .data.samples import read_sample, sample_name
from .data.shard_reader import read_shard
from .data.stream import expand_shards

ANSWERS_FILE, PAGE_FILE = "answers.jsonl", "answers.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222; background: #fafafa; }
article { display: flex; gap: 1.2em; margin: 1em 0; padding: 1em; background: white; border: 1px solid #ddd; }
img { width: 224px; height: 224px; display: block; margin-bottom: .4em; border: 1px solid #ccc; }
p { white-space: pre-wrap; margin: 0 0 .6em; } small { color: #666; overflow-wrap: anywhere; }
td { padding: .1em .8em .1em 0; vertical-align: top; white-space: pre-wrap; } td:first-child { text-align: right; }
"""


@dataclass(frozen=True)
class Question:
    """A held-out sample: what the model is given, and what it should say."""

    name: str  # shard and key
    prompt: list[Segment]
    wanted: str
    pictures: list[Tensor]  # (H, W, 3) uint8 each, as the model sees them


class HeldOut:
    """The questions of a run, and what was answered to them.

    Args:
        max_prompt_tokens: tokens that a question may have; None: any number.

    Raises:
        ValueError: the shards are not there, hold too few samples, or one of these is broken or too long.
    """

    def __init__(
        self, config: AnswersConfig, data: DataConfig, processor: YiVLProcessor, run_dir: Path,
        max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.every_steps = config.every_steps
        form = config.form if config.form is not None else data.form
        source = SourceConfig(name="answers", shards=config.shards)
        samples = itertools.chain.from_iterable(read_shard(shard) for shard in expand_shards(source))
        self.questions: list[Question] = []
        for raw in itertools.islice(samples, config.count):
            try:
                segments, images = read_sample(raw, form, data.ignore)
                question = _question(sample_name(raw), segments, images, processor)
                processor.encode(question.prompt, max_prompt_tokens)
            except TooLongError as error:
                raise ValueError(
                    f"answers: {sample_name(raw)} has a question of {error.num_tokens} tokens or more, the model takes "
                    f"{max_prompt_tokens}; hold out other samples."
                ) from error
            except ValueError as error:
                raise ValueError(f"answers: {sample_name(raw)} cannot be asked about: {error}") from error
            self.questions.append(question)
        if len(self.questions) < config.count:
            raise ValueError(f"answers: {config.shards} holds {len(self.questions)} samples, count is {config.count}.")
        stop = "\n" if form == "caption" else STOP_STRING
        self._sampling = Sampling(max_new_tokens=config.max_new_tokens, stop=stop)
        self._run_dir = run_dir

    def ask(self, model: YiVLForConditionalGeneration, processor: YiVLProcessor) -> list[str]:
        """The model's answers, greedily; it must be in evaluation mode. No random state is touched."""
        engine = Engine(model, processor)
        texts = []
        for question in self.questions:
            prompts = engine.stack_prompts([processor.encode(question.prompt)], question.pictures)
            texts.append("".join(output.text for (output,) in engine.generate(prompts, self._sampling)))
        use_gemm_(model)  # what the engine makes of its linear layers is for answers only
        return texts

    def record(self, step: int, answers: list[str]) -> None:
        """Add a row to answers.jsonl, drop those of later steps that an interrupted run has left, and draw the page."""
        path = self._run_dir / ANSWERS_FILE
        rows = [row for row in read_answers(path) if row["step"] < step] + [{"step": step, "answers": answers}]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        (self._run_dir / PAGE_FILE).write_text(self._page(rows), encoding="utf-8")

    def track(self, tracker: GeneralTracker, step: int, answers: list[str]) -> None:
        """Show pictures, questions and answers in a tracker that can."""
        for index, (question, answer) in enumerate(zip(self.questions, answers, strict=True)):
            text = f"{to_text(question.prompt)}\n\nwanted: {question.wanted}\n\nsaid: {answer}"
            tracker.log({f"answers/{index}": text}, step=step)
            if tracker.name == "tensorboard" and question.pictures:
                pictures = np.stack([picture.numpy() for picture in question.pictures])
                tracker.log_images({f"answers/{index}": pictures}, step=step, dataformats="NHWC")  # type: ignore[attr-defined]
            elif tracker.name == "wandb" and question.pictures:
                pictures_of = {f"answers/{index}/pictures": [picture.numpy() for picture in question.pictures]}
                tracker.log_images(pictures_of, step=step)  # type: ignore[attr-defined]

    def _page(self, rows: list[dict[str, Any]]) -> str:
        articles = []
        for index, question in enumerate(self.questions):
            pictures = "".join(f'<img alt="" src="{_data_url(picture)}">' for picture in question.pictures)
            said = "".join(
                f"<tr><td>{row['step']}</td><td>{html.escape(row['answers'][index])}</td></tr>" for row in rows
            )
            articles.append(
                f"<article><div>{pictures}</div><div><small>{html.escape(question.name)}</small>"
                f"<p>{html.escape(to_text(question.prompt))}</p><p><b>{html.escape(question.wanted)}</b></p>"
                f"<table>{said}</table></div></article>"
            )
        title = f"{html.escape(str(self._run_dir))}: held-out answers, step by step"
        return (
            f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
            + "".join(articles)
        )


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of an answers.jsonl: step, and one answer for each question."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would break at U+2028 inside an answer
    return [json.loads(line) for line in lines if line.strip()]


def _question(name: str, segments: list[Segment], pictures: list[bytes], processor: YiVLProcessor) -> Question:
    is_told = [segment.is_supervised for segment in segments]
    first = is_told.index(True)
    end = is_told.index(False, first) if False in is_told[first:] else len(segments)
    num_shown = sum(segment.is_image for segment in segments[:first])
    squares = [processor.image_processor.to_uint8(picture) for picture in pictures[:num_shown]]
    wanted = to_text(segments[first:end]).strip().removesuffix(STOP_STRING).strip()
    return Question(name, segments[:first], wanted, squares)


def _data_url(picture: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
