"""Training with adapters, and what people look at while it runs: held-out answers, norms of gradients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy_runs import losses, trainer

import yi_vl
from train.config import GenerationsConfig, TrainConfig
from train.generations import HeldOut, read_generations
from train.metrics import read_metrics
from train.nano.measure.evaluate import read_questions
from train.trainer import train


def test_lora_learns_saves_little_resumes_exactly_and_loads_merged(
    configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    base = train(configure(f"run_dir={tmp_path}/base", "steps=1"))

    def lora(name: str, *overrides: str) -> TrainConfig:
        return configure(
            f"run_dir={tmp_path}/{name}", f"init_from={{checkpoint: {base}, tower: null, language_model: null}}",
            "trainable={vision: false, projector: true, language: lora}", "lora={rank: 4, alpha: 8, dropout: 0.1}",
            "lr.language=1e-2", "steps=12", "checkpoint.every_steps=6", *overrides,
        )  # fmt: skip

    final = train(lora("whole"))
    curve = losses(lora("whole"))
    assert sum(curve[-3:]) < sum(curve[:3]), curve
    weights_file = final / "adapter_model.safetensors"
    assert not (final / "model.safetensors").exists()
    assert weights_file.stat().st_size < (base / "model.safetensors").stat().st_size / 2

    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("final"))
    assert train(lora("again")) == tmp_path / "again/final"
    assert losses(lora("again")) == curve
    assert (tmp_path / "again/final/adapter_model.safetensors").read_bytes() == weights_file.read_bytes()

    before, merged = (yi_vl.load(path, dtype=torch.float32, device="cpu").model.state_dict() for path in (base, final))
    moved = {name for name in before if not torch.equal(before[name], merged[name])}
    assert all("multi_modal_projector" in name or "_proj.weight" in name for name in moved)
    assert any("down_proj" in name for name in moved) and any("multi_modal_projector" in name for name in moved)


@pytest.mark.parametrize("sample_format", ["caption", "chat"])
def test_held_out_answers_are_shown_and_change_nothing(
    configure: Callable[..., TrainConfig], tmp_path: Path, sample_format: str
) -> None:
    shards = tmp_path / ("captions/0.tar" if sample_format == "caption" else "chats/0.tar")
    answers = f"{{shards: {shards}, format: {sample_format}, every_steps: 2, count: 3, max_new_tokens: 4}}"
    plain, shown = (
        configure(f"run_dir={tmp_path}/plain"),
        configure(f"run_dir={tmp_path}/shown", f"generations={answers}"),
    )
    train(plain)
    train(shown)
    assert losses(shown) == losses(plain)
    rows = read_generations(tmp_path / "shown/generations.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6] and all(len(row["generations"]) == 3 for row in rows)
    page = (tmp_path / "shown/generations.html").read_text()
    assert page.count("<article>") == 3 and page.count("<img") >= 3
    assert ("a red image" if sample_format == "caption" else "What colour is it?") in page

    held_out = HeldOut(GenerationsConfig(str(shards), sample_format), shown.data, trainer(shown).processor, tmp_path)
    question = held_out.samples[0]
    assert question.reference == ("a red image" if sample_format == "caption" else "red")
    assert not any(segment.is_supervised for segment in question.prompt) and len(question.images) == 1


def test_held_out_answers_and_images_reach_tensorboard(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    answers = f"generations={{shards: {tmp_path}/chats/0.tar, every_steps: 2, count: 2, max_new_tokens: 4}}"
    train(configure("steps=2", "trackers=[tensorboard]", answers))
    (events,) = (tmp_path / "run/yi_vl").glob("events.out.tfevents.*")
    logged = EventAccumulator(str(events)).Reload()
    tags = logged.Tags()
    assert {"generations/0", "generations/1"} <= set(tags["images"])
    (event,) = logged.Tensors("generations/0/text_summary")
    (text,) = event.tensor_proto.string_val
    assert b"What colour is it?" in text and b"reference: red" in text
    assert {"loss", "loss_per_source/chats", "lr/vision", "grad_norm_per_component/language", "samples_broken"} <= set(
        tags["scalars"]
    )


def test_gradient_norms_of_components_make_up_the_whole(configure: Callable[..., TrainConfig]) -> None:
    train(configure("steps=2", "clip_norm=0.01"))
    for row in read_metrics(Path(configure().run_dir) / "metrics.jsonl"):
        norms = row["grad_norm_per_component"]
        assert set(norms) == {"vision", "projector", "language"}
        assert sum(norm**2 for norm in norms.values()) == pytest.approx(row["grad_norm"] ** 2, rel=1e-3)


def test_lines_of_json_end_at_line_ends_only(tmp_path: Path) -> None:
    """U+2028 and its like may stand inside a text, and Python's `splitlines` breaks there."""
    row = {"id": "1", "skill": "x", "lang": "en", "images": [], "question": "a\u2028b\x85c\x1cd", "accepted": []}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_metrics(path) == read_generations(path) == [row]
    assert [question.question for question in read_questions(tmp_path)] == [row["question"]]
