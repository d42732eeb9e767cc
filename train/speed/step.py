"""Samples, tokens and model FLOP per second of training steps: this trainer beside a baseline loop.

The baseline is what transformers' Trainer does: rows in stream order, padded to the longest of their micro-batch,
`model(...).loss` under autocast, AdamW. Both train the same weights on the same samples, so their losses must agree.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig

import yi_vl
from yi_vl.chat import render, render_caption
from yi_vl.config import OpenClipVisionConfig, YiVLConfig
from yi_vl.hardware import gpu_or_cpu, matrix_rate, synchronized_seconds
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

from ..config import (
    DataConfig,
    InitConfig,
    LearningRateConfig,
    ScheduleConfig,
    SourceConfig,
    TrainableConfig,
    TrainConfig,
)
from ..data.batch import MicroBatch, Sample, StepBatch, collate, num_supervised
from ..optim import build_optimizer, set_learning_rates_, set_trainable_
from ..plan.flops import Row, step_flops
from ..trainer import Trainer

Size = Literal["nano", "300m"]
SampleFormat = Literal["caption", "chat"]
NANO = Path(yi_vl.__file__).parent / "nano"
_WORDS = (
    "a", "red", "blue", "small", "large", "round", "thing", "left", "right", "of",
    "the", "and", "one", "is", "it",
)  # fmt: skip
_MEDIAN_WORDS = {"caption": 12, "chat": 35}  # of a caption, of an answer: of a log-normal distribution
_MAX_WORDS = 200
_RATE_ROWS = 2048
# Samples of a step, and of a micro-batch. nano's step is one micro-batch: the trainer sorts by length before splitting,
# and the batch norm of nano's stem depends on the samples of a micro-batch.
BATCHES: dict[Size, tuple[int, int]] = {"nano": (16, 16), "300m": (8, 8)}

Step = Callable[[Sequence[Sample]], float]  # the mean loss of a supervised token, before the step


@dataclass(frozen=True)
class Work:
    """What both loops train on."""

    checkpoint: Path
    config: TrainConfig
    steps: list[list[Sample]]

    @property
    def rows(self) -> list[Row]:
        """Of a step, on average over steps the same: every sample has one image."""
        return [
            Row(len(sample.encoded.input_ids), sum(sample.encoded.loss_mask[1:]))
            for step in self.steps[1:]
            for sample in step
        ]


def make_checkpoint(folder: Path, size: Size) -> Path:
    """The checkpoint of a size: the bundled nano, or a model of random weights that is written to the folder."""
    if size == "nano":
        return NANO
    config = _three_hundred_million()
    processor: YiVLProcessor = YiVLProcessor.from_pretrained(NANO)  # nano's tokens, Yi's vocabulary
    processor.patch_size = config.vision_config.patch_size
    processor.image_processor.size_px = config.vision_config.image_size
    config.image_token_id = processor.image_token_id
    torch.manual_seed(0)
    as_released = YiVLForConditionalGeneration(config).to(torch.bfloat16)  # type: ignore[arg-type]  # wrapped as if no method
    as_released.save_pretrained(folder / size)
    processor.save_pretrained(folder / size)
    return folder / size


def make_work(
    folder: Path,
    checkpoint: Path,
    sample_format: SampleFormat,
    batches: tuple[int, int],
    num_steps: int,
    precision: str,
    compiles: bool,
) -> Work:
    """The settings of a run, and its samples.

    The format `caption` trains tower and projector, as the recipe's first two stages do, `chat` trains everything.

    Args:
        batches: samples of a step and of a micro-batch.
    """
    global_batch, micro_batch = batches
    (folder / "none.tar").touch()  # the trainer wants a shard, which is not read: the steps are given to it
    model_config = YiVLConfig.from_pretrained(checkpoint)
    config = TrainConfig(
        run_dir=str(folder / "run"),
        init_from=InitConfig(checkpoint=str(checkpoint)),
        image_size=model_config.vision_config.image_size,
        trainable=TrainableConfig(language=sample_format == "chat"),
        lr=LearningRateConfig(1e-4, 1e-4, 1e-4),
        global_batch=global_batch,
        micro_batch=micro_batch,
        steps=num_steps,
        schedule=ScheduleConfig(warmup=0.0),
        max_tokens=model_config.text_config.max_position_embeddings,
        precision=precision,
        compile=compiles,
        data=DataConfig(sample_format, [SourceConfig("made here", str(folder / "none.tar"))], workers=0),
    )
    processor: YiVLProcessor = YiVLProcessor.from_pretrained(checkpoint)
    rng = np.random.default_rng(0)
    samples = [_sample(processor, sample_format, rng, config.max_tokens) for _ in range(num_steps * global_batch)]
    return Work(checkpoint, config, [samples[cut : cut + global_batch] for cut in range(0, len(samples), global_batch)])


def compare(work: Work) -> dict[str, Any]:
    """Both loops, one after the other; the first step of each is not timed.

    The baseline runs first: the trainer's malloc settings would speed it up as well.
    """
    rates: dict[str, dict[str, float]] = {}
    losses: dict[str, list[float]] = {}
    model_config = YiVLConfig.from_pretrained(work.checkpoint)
    text = model_config.text_config
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[work.config.precision]
    device = gpu_or_cpu()
    limit = matrix_rate(_RATE_ROWS, text.hidden_size, text.intermediate_size, dtype, device)
    flops = sum(step_flops(model_config, work.config.trainable, row) for row in work.rows)
    num_timed = len(work.steps) - 1
    for name, prepare in LOOPS.items():
        step = prepare(work)
        losses[name], seconds = [], []
        for samples in work.steps:
            started = synchronized_seconds(device)
            losses[name].append(step(samples))
            seconds.append(synchronized_seconds(device) - started)
        typical = median(seconds[1:]) * num_timed
        rates[name] = {
            "samples_per_second": len(work.rows) / typical,
            "tokens_per_second": sum(row.tokens for row in work.rows) / typical,
            "tflops": flops / typical / 1e12,
            "mfu": flops / typical / limit,
        }
        del step
        gc.collect()
    slow, fast = (loop["samples_per_second"] for loop in rates.values())
    return {
        "matrix_tflops": limit / 1e12,
        "mean_tokens": sum(row.tokens for row in work.rows) / len(work.rows),
        "loops": rates,
        "ratio": fast / slow,
        "losses": losses,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }


def baseline(work: Work) -> Step:
    """Like transformers' Trainer: padding, all logits, the model's own loss."""
    config, device = work.config, gpu_or_cpu()
    model: Any = YiVLForConditionalGeneration.from_pretrained(work.checkpoint, dtype=torch.float32)
    model.to(device)
    processor: YiVLProcessor = YiVLProcessor.from_pretrained(work.checkpoint)
    set_trainable_(model, config)
    optimizer = build_optimizer(model, config)
    schedule = iter(range(config.steps or 0))

    def step(samples: Sequence[Sample]) -> float:
        set_learning_rates_(optimizer, next(schedule), config.steps or 0, config.schedule)
        micro_batches = _cut(samples, config.micro_batch)
        total = torch.tensor(sum(num_supervised(micro.labels) for micro in micro_batches), device=device)
        summed = 0.0
        for micro in micro_batches:
            assert micro.images is not None
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = model(
                    input_ids=micro.input_ids.to(device),
                    attention_mask=micro.attention_mask.to(device),
                    labels=micro.labels.to(device),
                    pixel_values=processor.image_processor.to_pixel_values(micro.images.to(device)),
                    num_items_in_batch=total,
                    use_cache=False,
                ).loss
            loss.backward()
            summed += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        return summed

    return step


def yi_vl_step(work: Work) -> Step:
    """The trainer's own step."""
    config = work.config
    trainer = Trainer(config, Console(quiet=True))

    def step(samples: Sequence[Sample]) -> float:
        set_learning_rates_(trainer.optimizer, trainer.done_steps, trainer.num_steps, config.schedule)
        by_length = sorted(samples, key=lambda sample: len(sample.encoded.input_ids))
        micro_batches = _cut(by_length, config.micro_batch)
        batch = StepBatch(micro_batches, [], 0, {}, [])
        per_source, _ = trainer.step(batch, batch.num_supervised)
        trainer.done_steps += 1
        loss, count = per_source.sum(0).tolist()
        return float(loss / count)

    return step


LOOPS: dict[str, Callable[[Work], Step]] = {"baseline": baseline, "train": yi_vl_step}


def _cut(samples: Sequence[Sample], micro_batch: int) -> list[MicroBatch]:
    return [collate(samples[cut : cut + micro_batch], 0) for cut in range(0, len(samples), micro_batch)]


def _sample(processor: YiVLProcessor, sample_format: SampleFormat, rng: np.random.Generator, max_tokens: int) -> Sample:
    """An image with a caption, or a conversation of several turns; lengths are log-normal."""

    def text() -> str:
        count = min(_MAX_WORDS, 1 + int(rng.lognormal(np.log(_MEDIAN_WORDS[sample_format]), 0.8)))
        return " ".join(rng.choice(_WORDS, count))

    size_px = processor.image_processor.size_px
    image = torch.from_numpy(rng.integers(0, 256, (size_px, size_px, 3), dtype=np.uint8))
    while True:
        if sample_format == "caption":
            segments = render_caption(text(), 1)
        else:
            messages: list[dict[str, Any]] = []
            for turn in range(int(rng.integers(1, 5))):
                content: list[dict[str, Any]] = [{"type": "image"}] if turn == 0 else []
                messages.append({"role": "user", "content": [*content, {"type": "text", "text": "What is it like?"}]})
                messages.append({"role": "assistant", "content": text()})
            segments = render(messages, chat_format=processor.chat_format)
        encoded = processor.encode(segments)
        if len(encoded.input_ids) <= max_tokens:
            return Sample("", 0, segments, encoded, [image])


def _three_hundred_million() -> YiVLConfig:
    """A ViT-B of 256 patches of a 448 px image, and a Llama of 200 M with Yi's vocabulary."""
    vision = OpenClipVisionConfig(
        patch_size=28, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    text = LlamaConfig(
        vocab_size=64064, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return YiVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True)
