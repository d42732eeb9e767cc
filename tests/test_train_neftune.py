"""NEFTune: how large the noise is, where it is, and that nothing but training sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE_TOKEN_ID, tiny_model
from toy_runs import losses, stop_after, trainer

from train.config import TrainConfig
from train.loss import Objective
from train.neftune import noise_scale
from train.trainer import train

Configure = Callable[..., TrainConfig]
ALPHA, WIDTH = 5.0, 32


def language_inputs(objective: Objective, **inputs: Any) -> torch.Tensor:
    """What the language model gets as its embeddings in a forward pass."""
    seen: list[torch.Tensor] = []
    language_model = objective.model.model.language_model
    first = language_model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    objective(**inputs)
    hook.remove()
    return seen[0]


def batch(lengths: list[int], num_image_tokens: int = 0) -> dict[str, Any]:
    """Rows that all begin alike: images, then text."""
    width = max(lengths)
    ids = torch.arange(10, 10 + width).repeat(len(lengths), 1)
    ids[:, :num_image_tokens] = IMAGE_TOKEN_ID
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = torch.where(mask.bool(), ids, -100)
    size = 56
    images = len(lengths) * num_image_tokens // 16
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels,
        "pixel_values": torch.rand(images, 3, size, size) if images else None,
        "source_ids": torch.zeros(len(lengths), dtype=torch.long),
    }  # fmt: skip


@pytest.mark.parametrize("num_image_tokens", [0, 16])
def test_the_noise_of_a_row_has_the_papers_size_and_images_have_none(num_image_tokens: int) -> None:
    inputs = batch([400, 250, 40], num_image_tokens)
    model = tiny_model()
    clean = language_inputs(Objective(model, 1), **inputs)
    noisy = language_inputs(Objective(model, 1, ALPHA), **inputs)
    noise = noisy - clean
    for row, length in enumerate((400, 250, 40)):
        num_text = length - num_image_tokens
        limit = ALPHA / math.sqrt(num_text * WIDTH)
        text = noise[row, num_image_tokens:length]
        assert text.abs().max() <= limit * 1.01 and text.abs().max() > 0.98 * limit
        assert float(text.norm()) == pytest.approx(ALPHA / math.sqrt(3), rel=0.05)
        assert float(text.mean()) == pytest.approx(0, abs=3 * limit / math.sqrt(3 * text.numel()))
        assert not noise[row, :num_image_tokens].any() and not noise[row, length:].any()


def test_packed_rows_have_noise_of_their_own(configure: Configure) -> None:
    """Also on the tokens that all rows begin with, which are computed once without noise."""
    run = trainer(configure("data.sources.0.weight=0.001"))
    micro = next(iter(run.loader)).micro_batches[-1]
    inputs = run._inputs(micro)
    num_tokens = int(micro.attention_mask.sum())
    prefix = micro.shared_prefix_length
    assert prefix > 20
    clean = language_inputs(Objective(run.model, 2), **inputs | {"shared_prefix_length": 0})[0, :num_tokens]
    noisy = language_inputs(Objective(run.model, 2, ALPHA), **inputs)[0, :num_tokens]
    noise = (noisy - clean).split(micro.attention_mask.sum(1).tolist())
    is_text = micro.input_ids != run.model.config.image_token_id
    for row, (part, text) in enumerate(zip(noise, is_text)):
        assert torch.equal(part.any(1), text[: len(part)])
        assert float(part.norm()) == pytest.approx(ALPHA / math.sqrt(3), rel=0.1)
        assert row == 0 or not torch.allclose(part[:prefix], noise[0][:prefix])


def test_padding_is_not_counted() -> None:
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, 6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    scale = noise_scale(ids, mask, IMAGE_TOKEN_ID, 12, 3.0)
    torch.testing.assert_close(scale, torch.tensor([[0.5, 0.0, 0.5, 0.5, 0.0, 0.0]]))


def test_there_is_none_outside_of_training() -> None:
    inputs = batch([30, 20])
    model = tiny_model()
    plain, objective = Objective(model, 1), Objective(model, 1, ALPHA)
    state = torch.get_rng_state()
    assert torch.equal(objective.eval()(**inputs)[0], plain(**inputs)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(objective.train()(**inputs)[0], plain(**inputs)[0])


@pytest.mark.parametrize("checkpointed", ["false", "true"])
def test_a_stopped_run_goes_on_with_the_same_noise(configure: Configure, tmp_path: Path, checkpointed: str) -> None:
    settings = (
        "neftune=5", "checkpoint={every_steps: 2, keep_last: 1}", f"activation_checkpointing={checkpointed}",
        "trainable.language=true",
    )  # fmt: skip
    whole, stopped = configure(f"run_dir={tmp_path}/whole", *settings), configure(*settings)
    train(whole)
    stop_after(trainer(stopped), 5)
    train(stopped)
    assert losses(stopped) == losses(whole)
    plain = configure(f"run_dir={tmp_path}/plain", *settings[1:])
    train(plain)
    assert losses(plain) != losses(whole)
