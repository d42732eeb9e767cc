"""Nano's training data: WebDataset shards of composed pictures with captions and conversations.

Every shard is a pure function of its name and number, so a build can be interrupted, continued and repeated, in as many
processes as there are cores. Called by __main__.py; calls compose.py and dialogue.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from train.nano import dialogue
from train.nano.art import load_art
from train.nano.choices import choice_conversation, with_image
from train.nano.compose import Composer
from train.nano.names import FLAGS, LANGS, THINGS
from train.nano.picture import KINDS, Picture, Truth

SAMPLES_PER_SHARD = 1000
_KIND_SHARES = {"thing": 0.25, "flag": 0.25, "digit": 0.1, "word": 0.2, "scene": 0.2}
_JPEG_QUALITY = 90
_NAME_REPEATS = 500


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


def read_texts(data_dir: Path) -> Iterator[str]:
    """What the tokenizer is made from: all captions, of the conversations one shard in ten, and all names, many times.

    Names, not ways of asking, shall have tokens of their own.
    """
    from yi_vl.chat import from_llava, render, to_text

    for named in (*THINGS.values(), *FLAGS.values()):
        yield "\n".join([f" {named.en}", named.zh] * _NAME_REPEATS)
    conversations = sorted((data_dir / "text").glob("*.tar"))[::10]
    for path in (*conversations, *sorted((data_dir / "text-captions").glob("*.tar"))):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                text = file.read().decode()
                is_caption = member.name.endswith(".txt")
                yield text if is_caption else to_text(render(from_llava(json.loads(text)["conversations"])))


def write_tar(path: Path, samples: Iterator[tuple[str, dict[str, bytes]]]) -> None:
    """A reproducible tar of `KEY.member` files, in place only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for key, members in samples:
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    os.replace(partial, path)


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


def _members(picture: Picture) -> dict[str, bytes]:
    if len(picture.images) == 1:
        return {"jpg": encode_jpeg(picture.image)}
    return {f"{index}.jpg": encode_jpeg(image) for index, image in enumerate(picture.images)}


def _json(turns: list[dialogue.Turn]) -> dict[str, bytes]:
    return {"json": json.dumps({"conversations": turns}, ensure_ascii=False).encode()}


def _mixed_picture(composer: Composer, rng: np.random.Generator, size_px: int) -> Picture:
    kind = KINDS[rng.choice(len(KINDS), p=[_KIND_SHARES[kind] for kind in KINDS])]
    return composer.compose(rng, kind, size_px)


def _caption_maker(size_px: int) -> Callable[[Composer, np.random.Generator], dict[str, bytes]]:
    def make(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
        picture = _mixed_picture(composer, rng, size_px)
        text = dialogue.caption(rng, picture.truth, LANGS[rng.integers(2)])
        return _members(picture) | {"txt": text.encode()}

    return make


def _chat_maker(kind: str) -> Callable[[Composer, np.random.Generator], dict[str, bytes]]:
    def make(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
        picture = composer.pair(rng, 448) if kind == "same" else composer.compose(rng, kind, 448)  # type: ignore[arg-type]
        return _members(picture) | _json(dialogue.conversation(rng, picture.truth))

    return make


def _make_choice(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
    picture = _mixed_picture(composer, rng, 448)
    return _members(picture) | _json(with_image(rng, choice_conversation(rng, picture.truth)))


def _make_talk(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
    return _json(dialogue.talk(rng))


def _make_text(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
    """Dialogues over described pictures, multiple choice among them, and a little talk; nothing is drawn."""
    draw = rng.random()
    if draw < 0.04:
        return _json(dialogue.talk(rng))
    truth: Truth = composer.truth(rng)
    if draw < 0.15 and truth.kind != "same":
        return _json(dialogue.in_words(rng, truth, choice_conversation(rng, truth)))
    return _json(dialogue.described(rng, truth))


def _make_text_caption(composer: Composer, rng: np.random.Generator) -> dict[str, bytes]:
    """A caption after a description, in the plain form of the first stages; nothing is drawn."""
    truth = composer.truth(rng)
    while truth.kind == "same":  # two pictures have no caption
        truth = composer.truth(rng)
    return {"txt": dialogue.described_caption(rng, truth).encode()}


SOURCES = (
    Source("text", 100_000, _make_text),
    Source("text-captions", 100_000, _make_text_caption),
    Source("captions-224", 30_000, _caption_maker(224)),
    Source("captions-448", 30_000, _caption_maker(448)),
    Source("chat-448/scenes", 16_000, _chat_maker("scene")),
    Source("chat-448/words", 14_000, _chat_maker("word")),
    Source("chat-448/flags", 12_000, _chat_maker("flag")),
    Source("chat-448/things", 10_000, _chat_maker("thing")),
    Source("chat-448/digits", 4_000, _chat_maker("digit")),
    Source("chat-448/same", 4_000, _chat_maker("same")),
    Source("chat-448/choice", 8_000, _make_choice),
    Source("chat-448/talk", 2_000, _make_talk),
)
