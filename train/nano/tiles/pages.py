"""Pages of words: images of twice nano's size with small cards, on each of which a word is printed.

A card is an image of a word as nano was trained on (compose.py), less than half as wide as the page, so that nano's own
448 px show its letters at less than half of their pixels. A page has a card in one of its quarters, or one in each; a
quarter is a tile. The held-out pages have held-out fonts, as all of nano's questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from train.nano.data import paint
from train.nano.data.compose import Composer
from train.nano.data.labels import LANGS, Lang
from train.nano.data.packages import Split
from train.nano.data.sample import Truth
from train.nano.data.shards import encode_jpeg
from train.nano.text.dialogue import all_questions, conversation
from train.shards.files import write_tar
from yi_vl.files import write_text
from yi_vl.image.data_url import png_bytes

PAGE_PX = 896
_CARD_SIDES = (0.4, 0.48)  # in sides of the page
_SAMPLES_PER_SHARD = 1000
_FOUR_WORDS = 0.5  # of the pages
_SEED = 20261126
Skill = Literal["one word", "four words"]
_CORNERS: dict[Lang, tuple[str, ...]] = {
    "en": ("top left", "top right", "bottom left", "bottom right"),
    "zh": ("左上角", "右上角", "左下角", "右下角"),
}
_QUESTIONS: dict[Lang, tuple[str, ...]] = {
    "en": ("Which word is at the {corner}?", "What does it say at the {corner}?", "Read the word at the {corner}."),
    "zh": ("{corner}是什么单词？", "{corner}写着什么？", "请读出{corner}的单词。"),
}
Turn = dict[str, str]


def page(rng: np.random.Generator, composer: Composer, num_words: int, split: Split) -> tuple[Image.Image, list[Truth]]:
    """A page of so many cards, each in a quarter of its own, and the word on each in reading order."""
    colour = paint.pale_colour(rng) if split == "test" else paint.random_colour(rng)
    image = Image.new("RGB", (PAGE_PX, PAGE_PX), colour)
    truths = []
    quarter = PAGE_PX // 2
    for index in sorted(rng.permutation(4)[:num_words].tolist()):
        side = round(PAGE_PX * rng.uniform(*_CARD_SIDES))
        card = composer.compose(rng, "word", side, split)
        left, top = (int(rng.integers(0, quarter - side + 1)) for _ in range(2))
        image.paste(card.image, (index % 2 * quarter + left, index // 2 * quarter + top))
        truths.append(card.truth)
    return image, truths


def build_pages(composer: Composer, folder: Path, num_samples: int, num_heldout: int) -> None:
    """Write shards of pages to `folder/pages`, and held-out questions to `folder/heldout`; what is there is kept.

    Args:
        num_heldout: pages of either kind, each with a question in either language.
    """
    for number, start in enumerate(range(0, num_samples, _SAMPLES_PER_SHARD)):
        path = folder / "pages" / f"{number:05d}.tar"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            indices = range(start, min(start + _SAMPLES_PER_SHARD, num_samples))
            write_tar(path, ((f"{index:08d}", _members(composer, index)) for index in indices))
    questions = folder / "heldout" / "questions.jsonl"
    if not questions.exists():
        (questions.parent / "images").mkdir(parents=True, exist_ok=True)
        rows = [row for number in range(2 * num_heldout) for row in _heldout_rows(composer, questions.parent, number)]
        write_text(questions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _members(composer: Composer, index: int) -> dict[str, bytes]:
    """A page and a conversation about it."""
    rng = np.random.default_rng([_SEED, 0, index])
    num_words = 4 if rng.random() < _FOUR_WORDS else 1
    image, truths = page(rng, composer, num_words, "train")
    if num_words == 1:
        turns = conversation(rng, truths[0])
    else:
        lang = LANGS[rng.integers(2)]
        turns = [turn for corner in rng.permutation(4).tolist() for turn in _ask(rng, truths, corner, lang)]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"jpg": encode_jpeg(image), "json": json.dumps({"conversations": turns}, ensure_ascii=False).encode()}


def _ask(rng: np.random.Generator, truths: list[Truth], corner: int, lang: Lang) -> list[Turn]:
    """A question about a corner, and its answer in the words of nano's own about a word."""
    question = _QUESTIONS[lang][rng.integers(len(_QUESTIONS[lang]))].format(corner=_CORNERS[lang][corner])
    answer = all_questions(rng, truths[corner], lang)[0].answer
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _heldout_rows(composer: Composer, folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """A held-out page, which is written, and the rows of its questions: even numbers have one word, odd ones four."""
    rng = np.random.default_rng([_SEED, 1, number])
    num_words = 4 if number % 2 else 1
    image, truths = page(rng, composer, num_words, "test")
    name = f"images/{number:05d}.png"
    (folder / name).write_bytes(png_bytes(image))
    skill: Skill = "four words" if num_words == 4 else "one word"
    corner = int(rng.integers(num_words))
    for lang in LANGS:
        if num_words == 1:
            qa = all_questions(rng, truths[0], lang, measured=True)[0]
            question, answer = qa.question, qa.answer
        else:
            question, answer = (turn["value"] for turn in _ask(rng, truths, corner, lang))
        yield {
            "id": f"{number:05d}-{lang}", "skill": skill, "lang": lang, "images": [name], "question": question,
            "accepted": [answer],
        }  # fmt: skip
