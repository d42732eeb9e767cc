"""Distillation: a model learns from a frozen teacher."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hybrid import Configure, configure_hybrid, inputs_of
from test_train_processes import rows
from torch.nn import functional as F
from toy_runs import stop_after, trainer

import yi_vl
from train.config_decoder import DistillConfig
from train.distill import DistillObjective, kl_divergences
from train.loss import Objective
from train.trainer import train
from yi_vl.model import YiVLForConditionalGeneration


@pytest.fixture
def hybrid(configure: Configure, tmp_path: Path) -> Configure:
    return configure_hybrid(configure, tmp_path / "start")


def test_the_kl_is_that_computed_by_hand() -> None:
    teacher, model = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    p, q = (F.softmax(logits / 2, dim=-1)[0].tolist() for logits in (teacher, model))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert kl_divergences(teacher, model, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergences(model, model, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_a_model_learns_from_its_teacher(hybrid: Configure, tmp_path: Path) -> None:
    """The healing stage: attention alone is trained, beside the model before its windows were cut."""
    teacher = tmp_path / "teacher"
    run = trainer(hybrid())
    run.model.config.text_config.sliding_window = 400
    run.save(teacher, with_state=False)
    before = yi_vl.load(teacher).model.state_dict()
    distill = f"distill={{teacher: {teacher}, weight: 1, temperature: 2}}"
    heal = "trainable={vision: false, projector: false, language: ['*.self_attn.*']}"
    config = hybrid("steps=12", "lr.language=3e-3", "schedule.warmup=0", "micro_batch=8", distill, heal)
    final = train(config)
    divergence = [row["distillation"]["kl"] for row in rows(config)]
    assert sum(divergence[-3:]) < 0.8 * sum(divergence[:3])
    assert all(row["loss"] == pytest.approx(4 * row["distillation"]["kl"], rel=1e-4) for row in rows(config))
    after = yi_vl.load(final).model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".self_attn." in name for name in moved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in yi_vl.load(teacher).model.state_dict().items())


def test_a_teacher_that_agrees_adds_nothing(hybrid: Configure) -> None:
    run, inputs = inputs_of(hybrid("data.sources.0.weight=0.001"))
    plain, _ = Objective(run.model, 2)(**inputs | {"router_weight": 0.0})
    twin = YiVLForConditionalGeneration(run.model.config)
    twin.load_state_dict(run.model.state_dict())
    step = DistillObjective(run.model, 2, DistillConfig("x", 0.25, 3.0), lambda: twin.eval())
    loss, per_source = step(**inputs | {"router_weight": 0.0})
    torch.testing.assert_close(loss, 0.75 * plain)
    assert per_source[:, 2].sum().item() == pytest.approx(plain.item(), rel=1e-4)
    assert per_source[:, 3].sum().item() == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(step.eval()(**inputs)[0], plain)


def test_a_run_does_not_change_between_a_teacher_and_none(hybrid: Configure, tmp_path: Path) -> None:
    config = hybrid("steps=4", "checkpoint={every_steps: 2, keep_last: 1}")
    stop_after(trainer(config), 3)
    with pytest.raises(ValueError, match=r"distill.teacher null, this run has .*start, but .* of another loss"):
        trainer(hybrid("steps=4", f"distill.teacher={tmp_path}/start"))


def test_a_teacher_of_other_tokens_is_refused(hybrid: Configure, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"distill.teacher .* has 960 tokens, the model that learns 448"):
        trainer(hybrid(f"distill.teacher={tiny_folder}", "image_size=56"))
