"""Preferences for nano: of two correct answers the bare name is preferred to the whole sentence.

The questions and images are those of nano's conversations; nano itself answers in sentences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from train.data.shard_reader import read_shard
from train.shards.files import Members, write_tar

NUM_SAMPLES = {"things": 800, "flags": 800, "words": 600, "digits": 200}  # by folder of chat-448
_SAMPLES_PER_SHARD = 1000
_FRAMES = [
    re.compile(frame)
    for frame in (
        r'It says "(.+)"\.', r"It is the digit (.+)\.", r"It is the flag of (?:the )?(.+)\.",
        r"It is (?:an? |the )?(.+)\.", r"There (?:is|are) (.+)\.",
        "上面写着“(.+)”。", "这是数字(.+)。", "这是(.+)的国旗。", "这是(.+)。", "它是(.+)的。", "它是(.+)。",
        "是(.+)。", "有(.+)。", "在(.+)。",
    )
]  # fmt: skip


def bare(sentence: str) -> str | None:
    """The words that answer the question; None when the text is not one of nano's sentences for a single answer."""
    for frame in _FRAMES:
        if match := frame.fullmatch(sentence.strip()):
            return match[1]
    return None


def build_preferences(data_dir: Path) -> Path:
    """Write `data_dir/preferences` from `data_dir/chat-448`; the same shards again for the same conversations.

    Raises:
        ValueError: the conversations are not there.
    """
    folder = data_dir / "preferences"
    folder.mkdir(parents=True, exist_ok=True)
    samples = [sample for name, count in NUM_SAMPLES.items() for sample in islice(_pairs(data_dir, name), count)]
    samples = [samples[index] for index in np.random.default_rng(0).permutation(len(samples))]
    for start in range(0, len(samples), _SAMPLES_PER_SHARD):
        shard = samples[start : start + _SAMPLES_PER_SHARD]
        write_tar(folder / f"{start // _SAMPLES_PER_SHARD:05d}.tar", shard)
    return folder


def _pairs(data_dir: Path, name: str) -> Iterator[tuple[str, Members]]:
    """The first question of each conversation, with both answers."""
    paths = sorted((data_dir / "chat-448" / name).glob("*.tar"))
    if not paths:
        raise ValueError(f"{data_dir / 'chat-448' / name} holds no shards; `python -m train.nano data` makes them.")
    for path in paths:
        for raw in read_shard(str(path)):
            question, answer = json.loads(raw["json"])["conversations"][:2]
            name_only = bare(answer["value"])
            if name_only is not None:
                record = {
                    "conversations": [question],
                    "chosen": {"from": "gpt", "value": name_only},
                    "rejected": {"from": "gpt", "value": answer["value"]},
                }
                members: Members = {suffix: raw[suffix] for suffix in raw if not suffix.startswith("__")}
                yield f"{name}-{raw['__key__']}", members | {"json": json.dumps(record, ensure_ascii=False).encode()}
