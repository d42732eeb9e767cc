"""Weights that change between two answers: what was cached with the earlier weights is not used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import OFFICIAL, prefill, tiny_yi_vl
from torch import nn

from yi_vl.engine.fingerprint import fingerprint
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL

pytestmark = pytest.mark.core

WIDE = OFFICIAL / "wide.png"
Model = YiVLForConditionalGeneration


def _attach(model: Model) -> Any:
    """Two adapters whose B is not 0."""
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    adapted.add_adapter("second", config)
    return adapted.eval()


def _in_place(model: Model) -> None:
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(-1)


def _one_element(model: Model) -> None:
    with torch.no_grad():
        model.model.language_model.norm.weight[7] = 50.0


def _through_data(model: Model) -> None:
    model.model.language_model.layers[1].mlp.up_proj.weight.data.mul_(-1)


def _replaced_twice(model: Model) -> None:
    """The second time the memory may be that of the first weights again."""
    weight = model.model.language_model.layers[1].mlp.up_proj.weight
    for factor in (3, -1):
        weight.data = weight.data * factor


def _loaded(model: Model) -> None:
    model.load_state_dict(tiny_yi_vl(seed=1).model.state_dict())


def _projector(model: Model) -> None:
    with torch.no_grad():
        model.model.multi_modal_projector.norm_2.weight.mul_(-2)


def _new_module(model: Model) -> None:
    model.lm_head = copy.deepcopy(model.lm_head)
    nn.init.normal_(model.lm_head.weight)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "in place": _in_place,
    "one element": _one_element,
    "through data": _through_data,
    "data replaced twice": _replaced_twice,
    "load_state_dict": _loaded,
    "projector": _projector,
    "module replaced": _new_module,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float64": lambda model: model.double(),
    "adapter attached": _attach,
}


def _logits(yi_vl: YiVL) -> torch.Tensor:
    """Of the first token that answers; what is known of the question is taken from what is kept."""
    return prefill(yi_vl, [yi_vl.engine.prepare(_conversation())]).logits.float()


def _conversation() -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "What is this?"}]}]


def _ask(yi_vl: YiVL) -> str:
    return yi_vl.answer(_conversation(), max_new_tokens=6)


def _is_as_new(yi_vl: YiVL, before: torch.Tensor) -> None:
    """The next answer is that of a model that has seen nothing, and not the last one."""
    warm = _logits(yi_vl)
    torch.testing.assert_close(warm, _logits(YiVL(yi_vl.model, yi_vl.processor)))
    assert not torch.equal(warm, before)
    _ask(yi_vl)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_answer_for_themselves(change: str) -> None:
    yi_vl = tiny_yi_vl()
    _ask(yi_vl)
    before = _logits(yi_vl)
    CHANGES[change](yi_vl.model)
    _is_as_new(yi_vl, before)


@pytest.mark.filterwarnings("ignore:::peft")
def test_adapters_that_are_switched_scaled_or_merged_answer_for_themselves() -> None:
    yi_vl = tiny_yi_vl()
    adapted = _attach(yi_vl.model)
    layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]

    def scale() -> None:
        for layer in layers:
            layer.scaling["second"] *= 2

    switches: list[Callable[[], Any]] = [
        lambda: adapted.set_adapter("second"),
        scale,
        adapted.base_model.disable_adapter_layers,
        adapted.base_model.enable_adapter_layers,
        lambda: adapted.delete_adapter("second"),
        adapted.base_model.unload,
    ]
    for switch in switches:
        _ask(yi_vl)
        before = _logits(yi_vl)
        switch()
        _is_as_new(yi_vl, before)


def test_weights_made_in_inference_mode_have_no_versions_and_are_noticed_too() -> None:
    with torch.inference_mode():
        yi_vl = YiVL(copy.deepcopy(tiny_yi_vl().model), tiny_yi_vl().processor)
        _ask(yi_vl)
        before = _logits(yi_vl)
        yi_vl.model.model.language_model.layers[0].mlp.up_proj.weight.mul_(-1)
        assert yi_vl.model.lm_head.weight.is_inference()
        _is_as_new(yi_vl, before)


def test_what_does_not_change_the_weights_keeps_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    yi_vl = tiny_yi_vl()
    _ask(yi_vl)
    mark = fingerprint(yi_vl.model)
    encoded: list[int] = []
    monkeypatch.setattr(yi_vl.model.model, "encode_images", lambda pixels: encoded.append(1))
    _ask(yi_vl)
    yi_vl.model.eval()
    yi_vl.model.state_dict()
    _ask(yi_vl)
    assert not encoded and fingerprint(yi_vl.model) == mark


def test_an_answer_that_weights_overtake_is_not_kept_for_the_new_ones() -> None:
    yi_vl = tiny_yi_vl()
    pieces = yi_vl.stream_messages(_conversation(), max_new_tokens=8)
    next(pieces)
    _in_place(yi_vl.model)
    before = _logits(yi_vl)
    pieces.close()
    torch.testing.assert_close(_logits(yi_vl), before)
    torch.testing.assert_close(_logits(yi_vl), _logits(YiVL(yi_vl.model, yi_vl.processor)))
