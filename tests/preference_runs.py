"""Preferences for the trainer's tests, and the settings of a toy run on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import COLOURS, Members, png
from toy_runs import trainer

from train.config import TrainConfig
from yi_vl.chat import Segment

Configure = Callable[..., TrainConfig]


def pair_sample(index: int) -> tuple[str, Members]:
    """A question about an image with a good and a bad answer; every fifth has two images, every seventh none.

    Lengths differ much, so that sorting by length mixes the samples; some have an earlier turn.
    """
    colours = [list(COLOURS)[index % 4], list(COLOURS)[index // 3 % 4]]
    num_images = 0 if index % 7 == 6 else 2 if index % 5 == 4 else 1
    colour, other = colours[0], list(COLOURS)[(index + 1) % 4]
    turns: list[dict[str, Any]] = []
    if index % 3 == 0:
        turns = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hello there."}]
    turns.append({"from": "human", "value": "What colour is it?" + " Tell me." * (index % 4)})
    turns[0]["value"] = "<image>" * num_images + "\n" + turns[0]["value"]
    record = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": colour},
        "rejected": {"from": "gpt", "value": f"It is {other}" + ", I think" * (index % 5) + "."},
    }
    suffixes = ["png"] if num_images == 1 else [f"{i}.png" for i in range(num_images)]
    members = {suffix: png(each) for suffix, each in zip(suffixes, colours)}
    return f"p{index:05d}", members | {"json": json.dumps(record).encode()}


def configure_preferences(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    """A function (overrides) -> the settings of a DPO run from a saved toy model, over two shards of pairs."""
    start = tmp_path / "start"
    if not start.exists():
        run = trainer(configure())
        run.model.to(torch.bfloat16).float()  # as released
        run.save(start, with_state=False)
        for number in range(2):
            write_shard(tmp_path / f"pairs/{number}.tar", [pair_sample(30 * number + i) for i in range(30)])
    settings = (
        f"init_from={{checkpoint: {start}, tower: null, language_model: null}}",
        "objective=dpo",
        "data.format=preference",
        f"data.sources=[{{name: pairs, shards: '{tmp_path}/pairs/*.tar'}}]",
        "trainable.vision=false",
        "lr={projector: 1e-3, language: 1e-3}",
    )
    return lambda *overrides: configure(*settings, *overrides)


def supervised(segments: list[Segment]) -> str:
    """The text that the loss is of."""
    return "".join(segment.text for segment in segments if segment.is_supervised)
