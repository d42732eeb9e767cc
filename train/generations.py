"""Answers generated for held-out samples during training: generations.jsonl, an HTML page, and trackers.

The prompt of a sample is everything before its first supervised token.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from torch import Tensor

from yi_vl.chat import Segment, end_of_message, to_text
from yi_vl.encode import TooLongError
from yi_vl.engine.engine import Engine
from yi_vl.engine.sampling import Sampling
from yi_vl.files import read_json_lines
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

from .config import DataConfig, GenerationsConfig, SourceConfig
from .data.samples import read_sample, sample_name
from .data.shard_reader import read_shard
from .data.stream import expand_shards
from .html_page import html_page, image_tag

GENERATIONS_FILE, PAGE_FILE = "generations.jsonl", "generations.html"
_STYLE = """
td { padding: .1em .8em .1em 0; vertical-align: top; white-space: pre-wrap; } td:first-child { text-align: right; }
"""


@dataclass(frozen=True)
class HeldOutSample:
    """A prompt and its reference answer."""

    name: str  # shard and key
    prompt: list[Segment]
    reference: str
    images: list[list[Tensor]]  # (H, W, 3) uint8 each, after the transform: of an image its thumbnail, then its tiles

    @property
    def images_uint8(self) -> list[Tensor]:
        """All that the tower sees."""
        return [each for image in self.images for each in image]


class HeldOut:
    """The held-out samples of a run, and the answers generated for them.

    Args:
        max_prompt_tokens: longest prompt allowed; None: no limit.

    Raises:
        ValueError: the shards are missing or hold too few samples, or one of these is broken or too long.
    """

    def __init__(
        self, config: GenerationsConfig, data: DataConfig, processor: YiVLProcessor, run_dir: Path,
        max_prompt_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.every_steps = config.every_steps
        sample_format = config.format if config.format is not None else data.format
        source = SourceConfig(name="generations", shards=config.shards)
        shards = expand_shards(source, "generations.shards")
        raw_samples = itertools.chain.from_iterable(read_shard(shard) for shard in shards)
        self.samples: list[HeldOutSample] = []
        for raw in itertools.islice(raw_samples, config.count):
            try:
                segments, images = read_sample(raw, sample_format, data.ignore, processor.chat_format)
                sample = _held_out_sample(sample_name(raw), segments, images, processor)
                encoded = processor.encode(sample.prompt, max_prompt_tokens)
                processor.expand(encoded, [len(image) for image in sample.images], max_prompt_tokens)
            except TooLongError as error:
                raise ValueError(
                    f"generations: {sample_name(raw)} has a prompt of {error.num_tokens} tokens or more, the model "
                    f"takes {max_prompt_tokens}; hold out other samples."
                ) from error
            except ValueError as error:
                raise ValueError(f"generations: {sample_name(raw)} cannot be used: {error}") from error
            self.samples.append(sample)
        if len(self.samples) < config.count:
            raise ValueError(
                f"generations: {config.shards} holds {len(self.samples)} samples, count is {config.count}."
            )
        stop = "\n" if sample_format == "caption" else ()  # the engine knows what ends an answer in a chat
        self._sampling = Sampling(max_new_tokens=config.max_new_tokens, stop=stop)
        self._run_dir = run_dir

    def generate(self, model: YiVLForConditionalGeneration, processor: YiVLProcessor) -> list[str]:
        """Greedy answers of a model in eval mode. No random state is used."""
        language_model = model.model.language_model
        attention = language_model.config._attn_implementation
        language_model.set_attn_implementation("sdpa")  # packed attention only takes whole micro-batches
        engine = Engine(model, processor, max_draft_tokens=0)
        texts = []
        for sample in self.samples:
            prompt = engine.inputs.to_prompt(processor.encode(sample.prompt), sample.images)
            texts.append("".join(output.text for (output,) in engine.generate([prompt], self._sampling)))
        language_model.set_attn_implementation(attention)
        return texts

    def record(self, step: int, texts: list[str]) -> None:
        """Add a row to generations.jsonl, drop rows of later steps from an interrupted run, and rewrite the page."""
        path = self._run_dir / GENERATIONS_FILE
        rows = [row for row in read_generations(path) if row["step"] < step] + [{"step": step, "generations": texts}]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        (self._run_dir / PAGE_FILE).write_text(self._page(rows), encoding="utf-8")

    def track(self, tracker: GeneralTracker, step: int, texts: list[str]) -> None:
        """Log images, prompts and answers to a tracker."""
        for index, (sample, answer) in enumerate(zip(self.samples, texts, strict=True)):
            text = f"{to_text(sample.prompt)}\n\nreference: {sample.reference}\n\nresponse: {answer}"
            tracker.log({f"generations/{index}": text}, step=step)
            if tracker.name == "tensorboard" and sample.images:
                images = np.stack([image.numpy() for image in sample.images_uint8])
                tracker.log_images({f"generations/{index}": images}, step=step, dataformats="NHWC")  # type: ignore[attr-defined]
            elif tracker.name == "wandb" and sample.images:
                values = {f"generations/{index}/images": [image.numpy() for image in sample.images_uint8]}
                tracker.log_images(values, step=step)  # type: ignore[attr-defined]

    def _page(self, rows: list[dict[str, Any]]) -> str:
        articles = []
        for index, sample in enumerate(self.samples):
            images = "".join(map(image_tag, sample.images_uint8))
            responses = "".join(
                f"<tr><td>{row['step']}</td><td>{escape(row['generations'][index])}</td></tr>" for row in rows
            )
            articles.append(
                f"<article><div>{images}</div><div><small>{escape(sample.name)}</small>"
                f"<p>{escape(to_text(sample.prompt))}</p><p><b>{escape(sample.reference)}</b></p>"
                f"<table>{responses}</table></div></article>"
            )
        title = f"{self._run_dir}: generations for held-out samples, by step"
        return html_page(title, f"<h1>{escape(title)}</h1>" + "".join(articles), _STYLE)


def read_generations(path: Path) -> list[dict[str, Any]]:
    """The rows of a generations.jsonl: step, and one text per held-out sample."""
    if not path.exists():
        return []
    return read_json_lines(path)


def _held_out_sample(
    name: str, segments: list[Segment], images: list[bytes], processor: YiVLProcessor
) -> HeldOutSample:
    is_supervised = [segment.is_supervised for segment in segments]
    first = is_supervised.index(True)
    end = is_supervised.index(False, first) if False in is_supervised[first:] else len(segments)
    num_images = sum(segment.is_image for segment in segments[:first])
    inputs = [processor.image_processor.to_inputs(image) for image in images[:num_images]]
    end_text = to_text(end_of_message(processor.chat_format)).strip()
    reference = to_text(segments[first:end]).strip().removesuffix(end_text).strip()
    return HeldOutSample(name, segments[:first], reference, inputs)
