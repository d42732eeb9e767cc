"""The parts of `python -m eval gpu` that train: `python -m train`, as a user starts it, on samples made on the fly.

Speed, memory and losses are what the trainer writes to metrics.jsonl, of the steps after the first two.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import runpy
import shutil
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from yi_vl.files import read_json_lines

from .guard import Measured, Part, Settings, Skipped, last_line
from .parts import MATRIX_RATE, checkpoint

_NUM_STEPS = {"6b": 10, "nano": 3}
_NUM_WARMUP = 2  # steps that are not timed: allocations, the choice of kernels, workers that start
_PACKAGES = ("webdataset", "omegaconf", "matplotlib")  # what the trainer imports besides yi_vl's own
_STAGES: dict[str, dict[str, Any]] = {
    "align-224": {"image_size": 224, "trainable": {"language": False}, "data": {"format": "caption"}},
    "upscale-448": {"image_size": 448, "trainable": {"language": False}, "data": {"format": "caption"}},
    "chat-448": {"image_size": 448, "trainable": {"language": True}, "data": {"format": "chat"}},
}
_LORA: dict[str, Any] = {
    "trainable": {"vision": False, "language": "lora"},
    "lora": {"rank": 128, "alpha": 256, "dropout": 0.05},
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointed": {"activation_checkpointing": True},
    "LoRA": _LORA,
    "QLoRA": _LORA | {"lora": _LORA["lora"] | {"base": "int4"}},
}
_BATCHES = {"6b": (16, 8), "nano": (2, 2)}  # samples of a step, and at once
_WORDS = (
    "a", "red", "blue", "small", "large", "round", "thing", "left", "right", "of",
    "the", "and", "one", "is", "it", "not", "two",
)  # fmt: skip


def train(settings: Settings, shared: dict[str, Any], stage: str, variant: str) -> Iterator[Measured]:
    """Steps of a stage from a model of 1.3 billion random weights (nano: from the bundled model).

    Raises:
        Skipped: the trainer needs a package that is not installed.
        ValueError: the trainer failed, or a loss is not finite.
    """
    packages = [*_PACKAGES, *(["peft"] if "LoRA" in variant else []), *(["bitsandbytes"] if variant == "QLoRA" else [])]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise Skipped(f"needs {', '.join(missing)}")
    name = f"{stage} {variant}".strip().replace(" ", "-")
    run_dir = settings.work / "runs" / name
    config_path = settings.work / f"{name}.yaml"
    config_path.write_text(json.dumps(_config(settings, run_dir, stage, variant), indent=1), encoding="utf-8")
    if not settings.is_cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of this process, which is the part's own
    sys.argv = ["train", str(config_path)]
    try:
        runpy.run_module("train", run_name="__main__", alter_sys=True)
        yield from _measured(settings, run_dir)
    except SystemExit as ended:
        last = last_line(settings.logs / f"train-{name}.log")  # this process's output
        raise ValueError(f"python -m train ended with code {ended.code}: {last}") from ended
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)  # gigabytes


def _measured(settings: Settings, run_dir: Path) -> Iterator[Measured]:
    rows = read_json_lines(run_dir / "metrics.jsonl")
    losses = [row["loss"] for row in rows]
    yield Measured(f"loss of step {len(rows)}", losses[-1], "", losses[0], "that of the first step")
    timed = rows[min(_NUM_WARMUP, len(rows) - 1) :]
    yield Measured("training", median(row["tokens_per_second"] for row in timed), "tokens/s")
    peak = settings.rates.get(MATRIX_RATE)
    tflops = median(row["tflops_per_device"] for row in timed)
    yield Measured("training, model FLOP/s", tflops, "TFLOP/s", peak, "bf16 matrix products: MFU" if peak else "")
    if "peak_memory_gb" in rows[-1]:
        yield Measured("peak memory", rows[-1]["peak_memory_gb"], "GB")
    if not all(map(math.isfinite, losses)) or rows[-1]["steps_skipped"]:
        raise ValueError(f"losses are {losses}, {rows[-1]['steps_skipped']} steps were skipped")


def _config(settings: Settings, run_dir: Path, stage: str, variant: str) -> dict[str, Any]:
    """The run, in JSON, which is YAML."""
    chosen = {**_STAGES[stage], **_VARIANTS[variant]}
    global_batch, micro_batch = _BATCHES[settings.size]
    num_steps = _NUM_STEPS[settings.size]
    sample_format = _STAGES[stage]["data"]["format"]
    shard = _shard(settings, sample_format, chosen["image_size"], num_steps * global_batch)
    return {
        "run_dir": str(run_dir),
        "init_from": {"checkpoint": str(checkpoint(settings, "1b"))},
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "steps": num_steps,
        "max_tokens": 2048 if settings.size == "6b" else 1024,
        "precision": "bf16",
        "log_every": 1,
        "lr": {"vision": 1e-4, "projector": 1e-4, "language": 1e-4},
        **chosen,
        "data": {
            "format": sample_format,
            "workers": 4 if settings.is_cuda else 0,
            "shuffle_buffer": 1,
            "sources": [{"name": "random", "shards": str(shard)}],
        },
    }


def _shard(settings: Settings, sample_format: str, size_px: int, num_samples: int) -> Path:
    """A shard of JPEGs in random colours with captions of about 30 words, or answers of about 150; made once."""
    import numpy as np
    from PIL import Image

    path = settings.work / f"{sample_format}-{size_px}.tar"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    num_words = (30 if sample_format == "caption" else 120) if settings.size == "6b" else 10
    with tarfile.open(path, "w") as tar:
        for index in range(num_samples):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((size_px, size_px * 3 // 4)).save(file, "JPEG")
            text = " ".join(rng.choice(_WORDS, int(rng.integers(num_words // 2, 2 * num_words))))
            turns = [{"from": "human", "value": "<image>\nWhat is it like?"}, {"from": "gpt", "value": text}]
            member = ("txt", text) if sample_format == "caption" else ("json", json.dumps({"conversations": turns}))
            for suffix, content in (("jpg", file.getvalue()), (member[0], member[1].encode())):
                info = tarfile.TarInfo(f"{index:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def _part(stage: str, variant: str = "", is_for_nano: bool = True) -> Part:
    name = f"train {stage} {variant}".strip()
    return Part(name, name, 90, partial(train, stage=stage, variant=variant), is_for_nano)


# Expected on an 80 GB card: 35 seconds each, half of them the start and the model that is saved at the end.
PARTS = (
    _part("align-224"),
    _part("chat-448"),
    _part("chat-448", "checkpointed"),
    _part("chat-448", "LoRA"),
    _part("chat-448", "QLoRA"),
    _part("upscale-448"),
    _part("align-224", "checkpointed", is_for_nano=False),
    _part("upscale-448", "checkpointed", is_for_nano=False),
)
