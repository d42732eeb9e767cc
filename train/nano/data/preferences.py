"""Preferences for nano: its own answers without their full stop are preferred to the same with it, or cut short.

The questions and images are those of nano's conversations, the answers a model's own: nano ends its sentences with a
full stop. What they say is in both answers of a pair, so that training changes the style alone; only correct answers
are taken, or training would strengthen the wrong ones. From pairs without cut answers nano learns to end where it
hesitates: "It is the flag of Sierra".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from train.data.shard_reader import RawSample, read_shard
from train.shards.files import Members, write_tar
from yi_vl import YiVL

# Of chat-448.
NUM_SAMPLES = {"things": 300, "flags": 400, "words": 400, "digits": 200, "scenes": 400, "same": 300, "unknown": 300}
_SAMPLES_PER_SHARD = 1000
_CUT_EVERY = 3  # of so many pairs, one has a cut answer
_BATCH = 64
_MAX_NEW_TOKENS = 48
FULL_STOPS = (".", "。")


@dataclass(frozen=True)
class _Answered:
    """A conversation's first question with the model's own answer."""

    name: str
    images: Members
    question: dict[str, Any]
    answer: str


def without_full_stop(sentence: str) -> str | None:
    """The sentence without its full stop; None when it has none."""
    sentence = sentence.strip()
    return sentence[:-1] if sentence.endswith(FULL_STOPS) else None


def cut_short(sentence: str, rng: np.random.Generator) -> str:
    """A beginning of a sentence, at least one character shorter and one long."""
    return sentence[: rng.integers(1, len(sentence))].rstrip()


def build_preferences(data_dir: Path, model: YiVL) -> Path:
    """Write `data_dir/preferences` from `data_dir/chat-448`; the same shards again for the same model.

    Raises:
        ValueError: the conversations are not there.
    """
    folder = data_dir / "preferences"
    folder.mkdir(parents=True, exist_ok=True)
    raws = [
        (f"{name}-{raw['__key__']}", raw)
        for name, count in NUM_SAMPLES.items()
        for raw in islice(_conversations(data_dir, name), count)
    ]
    answered: list[_Answered] = []
    for start in track(range(0, len(raws), _BATCH), "answer"):
        answered += _answer(raws[start : start + _BATCH], model)
    answered = _balanced(answered)
    order, cuts = np.random.default_rng(0).permutation(len(answered)), np.random.default_rng(1)
    samples = [_pair(answered[index], cuts if number % _CUT_EVERY == 0 else None) for number, index in enumerate(order)]
    for start in range(0, len(samples), _SAMPLES_PER_SHARD):
        shard = samples[start : start + _SAMPLES_PER_SHARD]
        write_tar(folder / f"{start // _SAMPLES_PER_SHARD:05d}.tar", shard)
    return folder


def _conversations(data_dir: Path, name: str) -> Iterator[RawSample]:
    paths = sorted((data_dir / "chat-448" / name).glob("*.tar"))
    if not paths:
        raise ValueError(f"{data_dir / 'chat-448' / name} holds no shards; `python -m train.nano data` makes them.")
    for path in paths:
        yield from read_shard(str(path))


def _answer(named: list[tuple[str, RawSample]], model: YiVL) -> Iterator[_Answered]:
    """The first question of each conversation with the model's answer, if that is the conversation's and has a full
    stop."""
    conversations = [json.loads(raw["json"])["conversations"] for _, raw in named]
    questions: list[dict[str, Any]] = [turns[0] for turns in conversations]
    golds: list[str] = [turns[1]["value"] for turns in conversations]
    images = [{suffix: raw[suffix] for suffix in raw if suffix.endswith("jpg")} for _, raw in named]
    texts = [question["value"].replace("<image>", "").lstrip("\n") for question in questions]
    requests = [(list(members.values()), text) for members, text in zip(images, texts, strict=True)]
    answers = model.predict_batch(requests, max_new_tokens=_MAX_NEW_TOKENS, batch_size=_BATCH)
    for (name, _), members, question, gold, answer in zip(named, images, questions, golds, answers, strict=True):
        if without_full_stop(answer) and _essence(answer, name) == _essence(gold, name):
            yield _Answered(name, members, question, answer)


def _essence(answer: str, name: str) -> str:
    """What of an answer has to be right: of one about two images its yes or no, which stands before a comma."""
    text = answer.strip().casefold()
    return re.split("[,，]", text)[0] if name.startswith("same") else text


def _balanced(answered: list[_Answered]) -> list[_Answered]:
    """As many yes as no about two images, or training would make nano say yes more often: it does so when unsure."""
    verdicts: dict[bool, list[_Answered]] = {True: [], False: []}
    for each in answered:
        if each.name.startswith("same"):
            verdicts[each.answer.strip().casefold().startswith(("yes", "是"))].append(each)
    count = min(map(len, verdicts.values()))
    left_out = {each.name for some in verdicts.values() for each in some[count:]}
    return [each for each in answered if each.name not in left_out]


def _pair(answered: _Answered, cuts: np.random.Generator | None) -> tuple[str, Members]:
    chosen = without_full_stop(answered.answer) or ""
    rejected = answered.answer if cuts is None or len(chosen) < 2 else cut_short(chosen, cuts)
    record = {
        "conversations": [answered.question],
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
    }
    return answered.name, answered.images | {"json": json.dumps(record, ensure_ascii=False).encode()}
