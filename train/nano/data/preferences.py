"""Preferences for nano: of two correct answers the one without a full stop is preferred.

The questions and images are those of nano's conversations; nano itself ends its sentences with one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from train.data.shard_reader import read_shard
from train.shards.files import Members, write_tar

NUM_SAMPLES = {"things": 800, "flags": 800, "words": 600, "digits": 200}  # by folder of chat-448
_SAMPLES_PER_SHARD = 1000
FULL_STOPS = (".", "。")


def without_full_stop(sentence: str) -> str | None:
    """The sentence without its full stop; None when it has none."""
    sentence = sentence.strip()
    return sentence[:-1] if sentence.endswith(FULL_STOPS) else None


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
            chosen = without_full_stop(answer["value"])
            if chosen:
                record = {
                    "conversations": [question],
                    "chosen": {"from": "gpt", "value": chosen},
                    "rejected": {"from": "gpt", "value": answer["value"]},
                }
                members: Members = {suffix: raw[suffix] for suffix in raw if not suffix.startswith("__")}
                yield f"{name}-{raw['__key__']}", members | {"json": json.dumps(record, ensure_ascii=False).encode()}
