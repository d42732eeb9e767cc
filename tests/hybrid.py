"""A toy Yi-VL with a hybrid language model of experts, saved, and the settings of a run that starts from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from toy_runs import trainer

from train.config import TrainableConfig, TrainConfig
from train.trainer import Trainer
from yi_vl.decoder.config import FULL, SLIDING, YiHybridConfig
from yi_vl.decoder.experts import router_sums
from yi_vl.decoder.losses import router_loss
from yi_vl.model import YiVLForConditionalGeneration

Configure = Callable[..., TrainConfig]
TRAINED = (TrainableConfig(), TrainableConfig(False, False, ["*.self_attn.*"]), TrainableConfig(True, True, False))


def hybrid_config(**settings: Any) -> YiHybridConfig:
    """Four layers: two with a window of 7 tokens, smaller than any row, and two that share keys and values."""
    defaults: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "sliding_window": 7,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "max_experts_per_tok": 4,
        "router_balance_weights": [0.2, 0.3, 0.5],
        "router_balance_parts": 2,
        "router_entropy_weight": 0.1,
    }
    return YiHybridConfig(**defaults | settings)


def configure_hybrid(configure: Configure, folder: Path, **settings: Any) -> Configure:
    """A function (overrides) -> the settings of a toy run from a hybrid of random weights, spread wide, in `folder`."""
    if not folder.exists():
        torch.set_num_threads(1)
        dense = trainer(configure())
        config = dense.model.config
        config.text_config = hybrid_config(vocab_size=config.text_config.vocab_size, **settings)
        torch.manual_seed(0)
        model = YiVLForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(20 if "gate.weight" in name else 3)  # decided routers, unlike new ones
        model.to(torch.bfloat16).float().save_pretrained(folder)  # type: ignore[arg-type]  # as released
        dense.processor.save_pretrained(folder)
    start_from = f"init_from={{checkpoint: {folder}, tower: null, language_model: null}}"
    return lambda *overrides: configure(start_from, *overrides)


def level_one(rank: int | None = None, port: int = 0, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """The balance loss over ranks of nine tokens, of which rank 0 has three, and its gradient in a weight of all.

    Args:
        rank: of two, which saves both to `folder`, the gradient averaged as data parallelism does, by tokens; None:
            one process with all tokens.
    """
    if rank is not None:
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(store)
        distributed.init_process_group("gloo", rank=rank, world_size=2)
    tokens = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.linspace(-1, 1, 32).view(4, 8).sin().requires_grad_()
    local = tokens if rank is None else tokens.split([3, 6])[rank]
    probabilities = (local @ weight.T).softmax(-1)
    sums = router_sums(probabilities, probabilities.topk(2).indices, None, 2)
    config = hybrid_config(router_balance_weights=[1.0, 0.0, 0.0], router_entropy_weight=0.0)
    loss = router_loss([sums, sums], config)
    (gradient,) = torch.autograd.grad(loss, weight)
    if rank is not None and folder is not None:
        gradient = gradient * len(local) / 9
        distributed.all_reduce(gradient)
        torch.save((loss.detach(), gradient), folder / f"{rank}.pt")
        distributed.destroy_process_group()
    return loss.detach(), gradient


def inputs_of(config: TrainConfig, **overrides: Any) -> tuple[Trainer, dict[str, Any]]:
    run = trainer(config)
    micro = next(iter(run.loader)).micro_batches[-1]
    assert micro.shared_prefix_length > 20 and micro.images is not None and not micro.attention_mask.all()
    return run, run._inputs(micro) | {"router_weight": 50.0} | overrides


def gradients_of(model: YiVLForConditionalGeneration, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def assert_close(gradients: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-3) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=1e-5, msg=name)


def text_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["text_config"]  # type: ignore[no-any-return]
