"""Nano's training data: WebDataset shards of composed images with captions and conversations.

Every shard is a pure function of its name and number, so a build can be interrupted, continued and repeated, in as many
processes as there are cores.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from train.nano.data.art import load_art
from train.nano.data.compose import Composer
from train.nano.data.labels import LANGS
from train.nano.data.sample import CATEGORIES, Category, Sample
from train.nano.text import dialogue
from train.nano.text.choices import choice_conversation, with_image
from train.shards.files import write_tar

SAMPLES_PER_SHARD = 1000
_SHARES_224: dict[Category, float] = {"thing": 0.36, "flag": 0.34, "digit": 0.1, "scene": 0.2}  # too coarse for letters
_SHARES_448: dict[Category, float] = {"thing": 0.2, "flag": 0.2, "digit": 0.05, "word": 0.35, "scene": 0.2}
_IN_LATER_TURNS: tuple[Category, ...] = (*CATEGORIES, "unknown")
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Source:
    """A folder of shards: `make` writes one sample's members from a random generator."""

    folder: str
    num_samples: int
    make: Callable[[Composer, np.random.Generator], dict[str, bytes]]


def build_shards(data_dir: Path, processes: int = 2) -> None:
    """Write all shards to `data_dir`; complete ones are kept."""
    jobs = [
        (data_dir, index, number)
        for index, source in enumerate(SOURCES)
        for number in range(-(-source.num_samples // SAMPLES_PER_SHARD))
        if not shard_path(data_dir, source, number).exists()
    ]
    load_art(data_dir)  # fetched and rendered once, before the processes start
    with ProcessPoolExecutor(processes) as pool:
        for _ in track(pool.map(_write_shard, *zip(*jobs)) if jobs else [], "shards", total=len(jobs)):
            pass


def shard_path(data_dir: Path, source: Source, number: int) -> Path:
    return data_dir / source.folder / f"{number:05d}.tar"


def encode_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


@cache
def _composer(data_dir: Path) -> Composer:
    return Composer(load_art(data_dir))


def _write_shard(data_dir: Path, source_index: int, number: int) -> None:
    source = SOURCES[source_index]
    composer = _composer(data_dir)
    first = number * SAMPLES_PER_SHARD
    indices = range(first, min(first + SAMPLES_PER_SHARD, source.num_samples))
    seed = int.from_bytes(hashlib.sha256(source.folder.encode()).digest()[:4], "big")

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in indices:
            yield f"{index:08d}", source.make(composer, np.random.default_rng([seed, index]))

    write_tar(shard_path(data_dir, source, number), samples())


def _members(sample: Sample) -> dict[str, bytes]:
    if len(sample.images) == 1:
        return {"jpg": encode_jpeg(sample.image)}
    return {f"{index}.jpg": encode_jpeg(image) for index, image in enumerate(sample.images)}


def _json(turns: list[dialogue.Turn]) -> dict[str, bytes]:
    return {"json": json.dumps({"conversations": turns}, ensure_ascii=False).encode()}


def _mixed_sample(composer: Composer, rng: np.random.Generator, size_px: int) -> Sample:
    shares = _SHARES_224 if size_px == 224 else _SHARES_448
    return composer.compose(rng, list(shares)[rng.choice(len(shares), p=list(shares.values()))], size_px)


def _caption_maker(size_px: int) -> Callable[[Composer, np.random.Generator], dict[str, bytes]]:
    def make(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
        sample = _mixed_sample(composer, rng, size_px)
        text = dialogue.caption(rng, sample.truth, LANGS[rng.integers(2)])
        return _members(sample) | {"txt": text.encode()}

    return make


def _chat_maker(category: str) -> Callable[[Composer, np.random.Generator], dict[str, bytes]]:
    def make(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
        sample = composer.pair(rng, 448) if category == "same" else composer.compose(rng, category, 448)  # type: ignore[arg-type]
        # A scene has much to ask about: more questions an image cost little.
        return _members(sample) | _json(dialogue.conversation(rng, sample.truth, max_turns=10))

    return make


def _make_choice(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
    sample = _mixed_sample(composer, rng, 448)
    return _members(sample) | _json(with_image(rng, choice_conversation(rng, sample.truth)))


def _make_later_image(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
    """A conversation that comes to another image: what is asked then is about that one."""
    samples = [composer.compose(rng, _IN_LATER_TURNS[rng.integers(len(_IN_LATER_TURNS))], 448) for _ in range(2)]
    images = {f"{index}.jpg": encode_jpeg(sample.image) for index, sample in enumerate(samples)}
    conversations = [dialogue.conversation(rng, sample.truth, max_turns=2) for sample in samples]
    return images | _json([turn for turns in conversations for turn in turns])


def _make_talk(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
    return _json(dialogue.talk(rng))


SOURCES = (
    Source("captions-224", 40_000, _caption_maker(224)),
    Source("captions-448", 24_000, _caption_maker(448)),
    Source("chat-448/scenes", 12_000, _chat_maker("scene")),
    Source("chat-448/words", 10_000, _chat_maker("word")),
    Source("chat-448/flags", 9_000, _chat_maker("flag")),
    Source("chat-448/things", 9_000, _chat_maker("thing")),
    Source("chat-448/digits", 3_000, _chat_maker("digit")),
    Source("chat-448/same", 3_000, _chat_maker("same")),
    Source("chat-448/unknown", 4_000, _chat_maker("unknown")),
    Source("chat-448/choice", 6_000, _make_choice),
    Source("chat-448/later", 4_000, _make_later_image),
    Source("chat-448/talk", 1_000, _make_talk),
)
