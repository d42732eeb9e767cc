"""Plans and FLOPs of a decoder of experts are those of its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import RunApp
from hybrid import TRAINED, Configure, configure_hybrid
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import trainer

from train.config import TrainableConfig, TrainConfig
from train.loss import Objective
from train.optim import set_trainable_
from train.plan import __main__ as plan
from train.plan.count import count_flops, count_saved_bytes
from train.plan.estimate import count_parameters
from train.plan.flops import Row, batch_flops
from yi_vl.model import YiVLForConditionalGeneration


@pytest.fixture
def hybrid(configure: Configure, tmp_path: Path) -> Configure:
    return configure_hybrid(configure, tmp_path / "start")


ROW = Row(tokens=30, supervised=9)


def counted_step(model: YiVLForConditionalGeneration, trains: TrainableConfig) -> Callable[[], Tensor]:
    set_trainable_(model, TrainConfig(trainable=trains))
    patches = model.config.vision_config.num_patches
    ids = torch.ones(2, ROW.tokens, dtype=torch.long)
    ids[:, :patches] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -ROW.supervised :] = 5
    size_px = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size_px, size_px)
    step = partial(Objective(model, 1), ids, torch.ones_like(ids), labels, pixels, torch.zeros(2, dtype=torch.long))
    return lambda: step()[0]


@pytest.mark.parametrize(
    "trains",
    [
        *TRAINED,
        TrainableConfig(False, False, ["*.layers.1.self_attn.v_proj.*"]),
        TrainableConfig(False, False, ["*.gate.*"]),
        TrainableConfig(False, True, ["*.layers.2.mlp.experts.down_proj", "*.layers.0.*norm*"]),
    ],
    ids=str,
)
def test_operations_are_exact(hybrid: Configure, trains: TrainableConfig) -> None:
    """But for the window of attention, whose products the reference computes whole."""
    model = trainer(hybrid()).model
    model.model.language_model.set_attn_implementation("sdpa")
    model.model.language_model.set_experts_implementation("batched_mm")
    text, config = model.config.text_config, TrainConfig(trainable=trains)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        counted_step(model, trains)().backward()
    text.sliding_window = ROW.tokens
    mask = torch.ones(2, ROW.tokens, dtype=torch.bool)
    supervised = torch.arange(ROW.tokens).expand(2, -1) < ROW.supervised
    assert batch_flops(model.config, trains, mask, supervised, 2) == counter.get_total_flops()
    for window in (ROW.tokens, 7):
        text.sliding_window = window
        assert 2 * count_flops(model.config, config, ROW) == batch_flops(model.config, trains, mask, supervised, 2)
    more = batch_flops(model.config, trains, mask, supervised, 2, experts_per_token=3.0)
    assert more > batch_flops(model.config, trains, mask, supervised, 2, experts_per_token=2.0)


def test_a_plan_counts_the_experts(
    hybrid: Configure, tmp_path: Path, run_app: RunApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hybrid("experts.top_p=0.4")
    model = trainer(config).model
    counted = count_parameters(model.config, config)
    assert counted.total["language"] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "language" in name or "lm_head" in name
    )
    assert counted.largest_unit == sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    saved = [count_saved_bytes(model.config, replace(config, precision="bf16"), ROW, 2, False, "cpu")]
    more = replace(config, precision="bf16")
    model.config.text_config.max_experts_per_tok = 6
    saved.append(count_saved_bytes(model.config, more, ROW, 2, False, "cpu"))
    assert saved[1].activations > 1.2 * saved[0].activations and saved[0].weight_copies == saved[1].weight_copies
    settings = tmp_path / "toy.yaml"
    start = f"init_from={{checkpoint: {tmp_path}/start, tower: null, language_model: null}}"
    code, out, err = run_app("plan", plan.app, settings, start, "experts.top_p=0.4", "distill.teacher=x", "--gpus", 2)
    assert code == 0, err
    assert "experts: 6 in each layer, 0.1 M parameters; counted for each token are 4 at most" in " ".join(out.split())
    assert "the teacher, whole on each GPU, and its forward passes are not counted" in out
