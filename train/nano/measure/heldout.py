"""Nano's held-out questions, as JSON lines and in MMMU's and CMMMU's schemas.

Drawings of twemoji and circle-flags, a third of the fonts, the digits' test split, scenes of shapes and such drawings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from train.nano.data.art import load_art
from train.nano.data.compose import Composer
from train.nano.data.labels import LANGS
from train.nano.data.sample import Sample
from train.nano.data.unknown import UNKNOWN_STYLES
from train.nano.data.vocabulary import VOCABULARY
from train.nano.text.choices import judgement
from train.nano.text.dialogue import SKILLS, QAPair, all_questions, multiple_choice
from yi_vl.image.data_url import png_bytes

SIZE_PX = 448
NUM_WORDS, NUM_SCENES, NUM_PAIRS, NUM_UNKNOWN = 200, 300, 100, 120
_SEED = 20240122
_SCENE_TOPICS = (
    ("count", "count_of"), ("colour",), ("shape",), ("left", "right", "above", "below"), ("sideways", "upright")
)  # fmt: skip
_MMMU_SUBJECTS = {"things": "Things", "flags": "Flags", "digits": "Digits", "words": "Words", "scenes": "Scenes"}
_NUM_PER_SUBJECT, _NUM_DEV = 60, 5


def build_heldout(data_dir: Path) -> None:
    """Write `data_dir/heldout`: questions.jsonl with its images, mmmu/ and cmmmu/ parquet folders."""
    folder = data_dir / "heldout"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, samples = [], list(heldout_samples(Composer(load_art(data_dir))))
    for index, (sample, topics) in enumerate(samples):
        files = _save_images(folder, index, sample)
        for lang in LANGS:
            qa = _pick(np.random.default_rng([_SEED, index]), sample, lang, topics)
            rows.append(_row(f"{index:05d}-{lang}", SKILLS[sample.truth.category], files, qa))
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_mmmu(folder / "mmmu", samples)
    write_cmmmu(folder / "cmmmu", samples)


def heldout_samples(composer: Composer) -> Iterator[tuple[Sample, tuple[str, ...]]]:
    """Every held-out sample, with the topics that may be asked about it (all, where none are named)."""
    for sample in composer.all_test_samples(SIZE_PX):
        yield sample, ()
    for sample in composer.all_test_digits(SIZE_PX):
        yield sample, ()
    words = [VOCABULARY[i] for i in np.random.default_rng(_SEED).choice(len(VOCABULARY), NUM_WORDS, replace=False)]
    for index, word in enumerate(words):
        yield composer.compose(_rng("word", index), "word", SIZE_PX, "test", word), ()
    for index in range(NUM_SCENES):
        topics = _SCENE_TOPICS[index % len(_SCENE_TOPICS)]
        rng = _rng("scene", index)
        while True:  # until a scene allows a question of the topic
            sample = composer.compose(rng, "scene", SIZE_PX, "test")
            if any(qa.topic in topics for qa in all_questions(rng, sample.truth, "en")):
                break
        yield sample, topics
    for index in range(NUM_PAIRS):
        yield composer.pair(_rng("same", index), SIZE_PX, "test"), ()
    for index in range(NUM_UNKNOWN):
        style = UNKNOWN_STYLES[index % len(UNKNOWN_STYLES)]
        yield composer.unknown(_rng("unknown", index), SIZE_PX, "test", style), ()


def write_mmmu(folder: Path, samples: list[tuple[Sample, tuple[str, ...]]]) -> None:
    """English multiple choice in MMMU's columns: `folder/<Subject>/{dev,validation}-00000-of-00001.parquet`."""
    for skill, subject in _MMMU_SUBJECTS.items():
        rows: dict[str, list[dict[str, Any]]] = {"dev": [], "validation": []}
        for index, sample, topics in _select(samples, skill):
            rng = np.random.default_rng([_SEED, index, 1])
            qa, options = _choice(rng, sample, "en", topics)
            split = "dev" if len(rows["dev"]) < _NUM_DEV else "validation"
            number = len(rows[split]) + 1
            rows[split].append(
                {
                    "id": f"{split}_{subject}_{number}",
                    "question": f"<image 1>\n{qa.question}",
                    "options": repr(options),
                    "explanation": "",
                    "image_1": {"bytes": png_bytes(sample.image), "path": f"{split}_{subject}_{number}_1.png"},
                    **{f"image_{i}": None for i in range(2, 8)},
                    "img_type": "['Icons and Symbols']",
                    "answer": qa.answer,
                    "topic_difficulty": "Easy",
                    "question_type": "multiple-choice",
                    "subfield": qa.topic,
                }
            )
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        names = list(rows["dev"][0])
        schema = pa.schema([(name, image if name.startswith("image_") else pa.string()) for name in names])
        for split, entries in rows.items():
            _write(folder / subject / f"{split}-00000-of-00001.parquet", entries, schema)


def write_cmmmu(folder: Path, samples: list[tuple[Sample, tuple[str, ...]]]) -> None:
    """Chinese questions in CMMMU's columns and three types: `folder/<category>/{dev,val}-00000-of-00001.parquet`."""
    number = 0
    for skill in _MMMU_SUBJECTS:
        rows: dict[str, list[dict[str, Any]]] = {"dev": [], "val": []}
        for index, sample, topics in _select(samples, skill):
            rng = np.random.default_rng([_SEED, index, 2])
            number += 1
            question_type = ("选择", "选择", "判断", "填空")[number % 4]
            question, answer, options, topic = _cmmmu_question(rng, question_type, sample, topics)
            file = f"{number}_01.png"
            image = {"bytes": png_bytes(sample.image), "path": file}
            split = "dev" if len(rows["dev"]) < _NUM_DEV else "val"
            rows[split].append(
                {
                    "id": str(number),
                    "type": question_type,
                    "source_type": "website",
                    "source": "yi_vl nano",
                    "question": f'<img="{file}">{question}',
                    **{f"option{i + 1}": options[i] if i < len(options) else "" for i in range(4)},
                    "image_1": image,
                    **{f"image_{i}": None for i in range(2, 6)},
                    "answer": answer,
                    "analysis": "",
                    "distribution": "",
                    "difficulty_level": "easy",
                    "subcategory": skill,
                    "category": skill,
                    "subfield": topic,
                    "img_type": "['图标']",
                    **{f"image_{i}_filename": file if i == 1 else "" for i in range(1, 6)},
                }
            )
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        images = {f"image_{i}" for i in range(1, 6)}
        schema = pa.schema([(name, struct if name in images else pa.string()) for name in rows["dev"][0]])
        for split, entries in rows.items():
            _write(folder / skill / f"{split}-00000-of-00001.parquet", entries, schema)


def _cmmmu_question(
    rng: np.random.Generator, question_type: str, sample: Sample, topics: tuple[str, ...]
) -> tuple[str, str, list[str], str]:
    """(question, gold answer, options, topic)"""
    if question_type == "判断":
        statement, is_true = judgement(rng, sample.truth, measured=True)
        return statement, "对" if is_true else "错", [], "judge"
    if question_type == "填空":
        qa = _pick(rng, sample, "zh", topics)
        return qa.question, qa.core, [], qa.topic
    qa, options = _choice(rng, sample, "zh", topics)
    return qa.question, qa.answer, options, qa.topic


def _choice(rng: np.random.Generator, sample: Sample, lang: Any, topics: tuple[str, ...]) -> tuple[QAPair, list[str]]:
    while True:
        qa, options = multiple_choice(rng, sample.truth, lang, measured=True)
        if not topics or qa.topic in topics:
            return qa, options


def _pick(rng: np.random.Generator, sample: Sample, lang: Any, topics: tuple[str, ...]) -> QAPair:
    questions = all_questions(rng, sample.truth, lang, measured=True)
    return next(qa for qa in questions if not topics or qa.topic in topics)


def _select(samples: list[tuple[Sample, tuple[str, ...]]], skill: str) -> list[tuple[int, Sample, tuple[str, ...]]]:
    """Some samples of a skill, spread evenly over all there are."""
    of_skill = [
        (i, sample, topics) for i, (sample, topics) in enumerate(samples) if SKILLS[sample.truth.category] == skill
    ]
    count = min(len(of_skill), _NUM_PER_SUBJECT + _NUM_DEV)
    return [of_skill[i] for i in np.linspace(0, len(of_skill) - 1, count).astype(int)]


def _row(key: str, skill: str, files: list[str], qa: QAPair) -> dict[str, Any]:
    return {
        "id": key, "skill": skill, "topic": qa.topic, "lang": qa.lang, "images": files,
        "question": qa.question, "answer": qa.answer, "accepted": [qa.answer, *qa.accepted],
    }  # fmt: skip


def _save_images(folder: Path, index: int, sample: Sample) -> list[str]:
    names = []
    for position, image in enumerate(sample.images):
        name = f"images/{index:05d}.{position}.png"
        image.save(folder / name)
        names.append(name)
    return names


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _rng(category: str, index: int) -> np.random.Generator:
    return np.random.default_rng([_SEED, sum(map(ord, category)), index])
