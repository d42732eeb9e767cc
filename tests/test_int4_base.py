"""Adapters on a language model in four bits: what learns, what is saved, where it goes on, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bitsandbytes.functional import dequantize_4bit
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from toy_runs import losses, trainer

import yi_vl
from train.config import TrainConfig
from train.data.batch import num_supervised
from train.metrics import component_table
from train.qlora import num_weights
from train.trainer import Trainer, train

Lora = Callable[..., TrainConfig]


@pytest.fixture
def lora(configure: Callable[..., TrainConfig], tmp_path: Path) -> Iterator[Lora]:
    """A function (name, overrides) -> the settings of a run that adapts a saved model in four bits."""
    torch.set_num_threads(1)
    Trainer(configure(), Console(quiet=True)).save(tmp_path / "base", with_state=False)

    def settings(name: str, *overrides: str) -> TrainConfig:
        AcceleratorState._reset_state(True)  # else it keeps the precision of the run before
        return configure(
            f"run_dir={tmp_path}/{name}",
            f"init_from={{checkpoint: {tmp_path}/base, tower: null, language_model: null}}",
            "trainable={vision: false, projector: true, language: lora}",
            "lora={rank: 4, alpha: 8, dropout: 0.1, base: int4}", "lr.language=1e-2", "steps=12",
            "checkpoint.every_steps=6", *overrides,
        )  # fmt: skip

    yield settings
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_saves_little_resumes_exactly_and_is_merged_into_the_original(
    lora: Lora, tmp_path: Path, precision: str
) -> None:
    """The first run is also asked for answers, which must not change what it learns."""
    answers = f"generations={{shards: {tmp_path}/chats/0.tar, every_steps: 2, count: 2, max_new_tokens: 4}}"
    final = train(lora("whole", f"precision={precision}", answers))
    curve = losses(lora("whole"))
    assert sum(curve[-3:]) < sum(curve[:3]), curve
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("final"))
    train(lora("again", f"precision={precision}"))
    assert losses(lora("again")) == curve
    saved = (final / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "again/final/adapter_model.safetensors").read_bytes() == saved

    stored = load_file(final / "adapter_model.safetensors")
    assert all(".lora_" in name or "multi_modal_projector" in name for name in stored)
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "base")
    base, merged = (
        yi_vl.load(path, dtype=torch.float32, device="cpu").model.state_dict() for path in (tmp_path / "base", final)
    )
    for name, tensor in base.items():
        key = f"base_model.model.{name}"
        a, b = (stored.get(f"{key.removesuffix('.weight')}.lora_{half}.weight") for half in "AB")
        expected = tensor + 2 * b @ a if a is not None and b is not None else stored.get(key, tensor)
        assert (a is not None) == ("language_model" in name and "_proj" in name)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_only_the_frozen_layers_are_in_four_bits(lora: Lora, tmp_path: Path) -> None:
    run = trainer(lora("run", "precision=bf16"))
    original = yi_vl.load(tmp_path / "base", dtype=torch.float32, device="cpu").model
    params, base = dict(run.model.named_parameters()), dict(original.named_parameters())
    in_four = {name for name, parameter in params.items() if hasattr(parameter, "quant_state")}
    assert in_four == {name for name in params if name.endswith("base_layer.weight")} and len(in_four) == 2 * 7
    for name, parameter in params.items():
        is_trainable = ".lora_" in name or "modules_to_save" in name
        assert parameter.requires_grad == is_trainable, name
        if name.startswith("model.vision_tower"):
            assert torch.equal(parameter, base[name]), "no bit of the tower is lost"
        elif is_trainable:
            assert parameter.dtype == torch.float32
    assert params["lm_head.weight"].dtype == params["model.language_model.embed_tokens.weight"].dtype == torch.bfloat16
    for name in in_four:
        assert num_weights(params[name]) == base[name.replace(".base_layer", "")].numel()
    console = Console(width=120)
    with console.capture() as shown:
        console.print(component_table(run.model, run.config))
    language = sum(p.numel() for name, p in base.items() if "language_model" in name or "lm_head" in name)
    adapters = sum(parameter.numel() for name, parameter in params.items() if ".lora_" in name)
    assert f"{language + adapters:,} " in shown.get() and f"{adapters:,} " in shown.get()


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_gradients_reach_the_projector_as_through_the_same_weights_in_full(lora: Lora, checkpointing: str) -> None:
    """Layers in four bits, beside plain ones that hold what those stand for."""
    run = trainer(lora("run", "lora.dropout=0", f"activation_checkpointing={checkpointing}"))
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)  # else A would have no gradient
    whole = copy.deepcopy(run.objective)
    for module in whole.modules():
        layer = getattr(module, "base_layer", None)
        if layer is not None:
            module.base_layer = nn.Linear(layer.in_features, layer.out_features, bias=False)
            module.base_layer.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    (micro, *_) = next(iter(run.loader)).micro_batches
    assert num_supervised(micro.labels) and micro.images is not None
    for objective in (run.objective, whole):
        objective(**run._inputs(micro))[0].backward()
    gradients = [{n: p.grad for n, p in objective.named_parameters() if p.requires_grad and "base_layer" not in n}
                 for objective in (run.objective, whole)]  # fmt: skip
    assert any("multi_modal_projector" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_what_cannot_be_is_refused(lora: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"lora\.base is 'int8'; expected null or int4"):
        lora("run", "lora.base=int8")
    for other in ("true", "false"):
        with pytest.raises(ValueError, match=rf"language is {other.title()}: 4-bit weights cannot be trained"):
            lora("run", f"trainable.language={other}")

    config = lora("run")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ValueError, match=r'bitsandbytes is missing.* pip install -e "\.\[train\]"$'):
            trainer(config)
    with monkeypatch.context() as patch:
        patch.setattr("train.distributed.is_sharded", lambda _: True)
        patch.setattr(Accelerator, "is_fsdp2", True)
        with pytest.raises(ValueError, match="does not go with FSDP"):
            trainer(config)

    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "yi_vl"}}))
    with pytest.raises(ValueError, match="is quantised and cannot be trained"):
        trainer(config)
